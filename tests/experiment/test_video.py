"""Videos that decode to what went in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiment.video import write_mp4


def decode(path: Path) -> tuple[np.ndarray, float, str, str | None]:
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return np.stack(frames), float(stream.average_rate or 0), stream.codec_context.name, stream.pix_fmt


def frame(index: int, height: int = 48, width: int = 64) -> np.ndarray:
    picture = np.full((height, width, 3), 30, np.uint8)
    picture[:, : 8 * (index + 1), 0] = 200
    return picture


def test_frames_rate_and_format(tmp_path: Path) -> None:
    path = write_mp4((frame(i) for i in range(6)), tmp_path / "new" / "a.mp4", fps=12.5)
    frames, rate, codec, pixels = decode(path)
    assert frames.shape == (6, 48, 64, 3)
    assert rate == pytest.approx(12.5)
    assert (codec, pixels) == ("h264", "yuv420p")
    for index, picture in enumerate(frames):
        error = np.abs(picture.astype(int) - frame(index).astype(int))
        assert error.mean() < 4
    assert [p.name for p in path.parent.iterdir()] == ["a.mp4"]


def test_odd_sizes_repeat_the_edge(tmp_path: Path) -> None:
    frames, *_ = decode(write_mp4([frame(0, 47, 63)], tmp_path / "a.mp4", fps=10))
    assert frames.shape == (1, 48, 64, 3)
    assert abs(int(frames[0, 47, 30, 1]) - 30) < 6


def test_views_from_a_renderer_flipped_upside_down(tmp_path: Path) -> None:
    frames, *_ = decode(write_mp4([frame(1)[::-1, ::-1]], tmp_path / "a.mp4", fps=10))
    assert frames[0, 10, 60, 0] > 150
    assert frames[0, 10, 4, 0] < 80


@pytest.mark.parametrize(
    "frames, message",
    [
        ([], "at least one frame"),
        ([frame(0), frame(0, 50, 64)], "frame 1: its shape is"),
        ([frame(0).astype(np.float32)], "frame 0: expected uint8"),
        ([frame(0)[..., 0]], "frame 0: expected uint8"),
    ],
)
def test_a_refused_video_leaves_the_old_one(tmp_path: Path, frames: list[np.ndarray], message: str) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=message):
        write_mp4(frames, path, fps=10)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
