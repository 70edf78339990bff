"""Frames to mp4, with PyAV: h264 in yuv420p, which every browser plays."""

from __future__ import annotations

import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np

from experiment.errors import storage_errors


def write_mp4(frames: Iterable[np.ndarray], path: Path, fps: float) -> Path:
    """Write a video; the file appears, whole, when the last frame is in.

    Args:
        frames: uint8 arrays [H, W, 3], all of one size. yuv420p needs even sizes, so an odd one gains a row or a
            column that repeats the edge.
        path: where; missing folders are made.
        fps: frames per second.

    Returns:
        The path.

    Raises:
        ValueError: there is no frame, or a frame has another shape or type.
        UserError: the disk is full.
    """
    import av

    path = Path(path)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    rate = Fraction(fps).limit_denominator(1000)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            size: tuple[int, ...] | None = None
            with av.open(str(temporary), "w", format="mp4") as container:
                stream = container.add_stream("libx264", rate=rate, options={"crf": "20"})
                stream.pix_fmt = "yuv420p"
                # libx264 counts the cores otherwise, and many cores write a slightly different file.
                stream.codec_context.thread_count = 1
                for index, frame in enumerate(frames):
                    size = _check(frame, size, index)
                    even = np.pad(frame, ((0, size[0] % 2), (0, size[1] % 2), (0, 0)), mode="edge")
                    if index == 0:
                        stream.height, stream.width = even.shape[:2]
                    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
                    container.mux(stream.encode(picture))
                if size is None:
                    raise ValueError(f"{path}: a video needs at least one frame")
                container.mux(stream.encode())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return path


def _check(frame: np.ndarray, size: tuple[int, ...] | None, index: int) -> tuple[int, ...]:
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise ValueError(f"frame {index}: expected uint8 [H, W, 3], got {frame.dtype} {list(frame.shape)}")
    if size is not None and frame.shape != size:
        raise ValueError(f"frame {index}: its shape is {list(frame.shape)}, that of the first is {list(size)}")
    return frame.shape
