"""Columns of a LeRobot data set to arrays: numbers, PNG pictures, frames of videos."""

from __future__ import annotations

import io

import av
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from embodied.datasets.finite import first_not_finite, shown
from embodied.datasets.lerobot_layout import INFO, Feature
from embodied.datasets.lerobot_tables import VideoSpan
from experiment.errors import UserError


def number_column(column: pa.ChunkedArray, feature: Feature, where: str) -> NDArray:
    """[T] or [T, ...] of a column of numbers. Raises UserError when its shape is not the feature's."""
    values: NDArray
    if (
        pa.types.is_list(column.type)
        or pa.types.is_fixed_size_list(column.type)
        or pa.types.is_large_list(column.type)
    ):
        rows = column.to_pylist()
        try:
            values = np.array(rows, feature.dtype)
        except (TypeError, ValueError) as error:
            raise UserError(f"{where} has rows of different lengths, or holes: {error}") from error
    else:
        if column.null_count:
            raise UserError(f"{where} has holes in {column.null_count} rows")
        values = column.to_numpy().astype(feature.dtype)
    expected = () if feature.shape == (1,) else feature.shape
    if values.shape[1:] == (1,) and expected == ():
        values = values[:, 0]
    if values.shape[1:] != expected:
        raise UserError(f"{where} has shape {list(values.shape[1:])}, {INFO} says {list(feature.shape)}")
    return values


def check_finite(values: NDArray, where: str) -> None:
    """Raise UserError naming the first frame that is NaN or infinite."""
    bad = first_not_finite(values)
    if bad is not None:
        raise UserError(f"{where} is not finite in frame {bad}: {shown(values[bad])}")


def decode_pictures(column: pa.ChunkedArray, feature: Feature, where: str) -> NDArray[np.uint8]:
    """[T, H, W, 3] of a column of picture files. Raises UserError when one is damaged or of another size."""
    frames = np.empty((len(column), *feature.size, 3), np.uint8)
    for number, cell in enumerate(column.to_pylist()):
        content = (cell or {}).get("bytes")
        if content is None:
            raise UserError(
                f"{where}: frame {number} is not in the data file (it names {(cell or {}).get('path')})"
            )
        try:
            with Image.open(io.BytesIO(content)) as picture:
                decoded = np.asarray(picture.convert("RGB"))
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
            raise UserError(f"{where}: frame {number} cannot be decoded ({error})") from error
        if decoded.shape != frames.shape[1:]:
            raise UserError(
                f"{where}: frame {number} has {decoded.shape[0]} x {decoded.shape[1]} pixels, {INFO} says "
                f"{feature.size[0]} x {feature.size[1]}"
            )
        frames[number] = decoded
    return frames


def decode_video(
    span: VideoSpan, timestamps: NDArray[np.floating], fps: float, feature: Feature, where: str
) -> NDArray[np.uint8]:
    """[T, H, W, 3] at the given times after the span's beginning.

    Raises UserError when the file is missing or damaged, has no frame within half a frame of one of the times, or
    frames of another size.
    """
    frames = np.empty((len(timestamps), *feature.size, 3), np.uint8)
    wanted = span.from_seconds + np.asarray(timestamps, np.float64)
    best = np.full(len(wanted), 0.5 / fps)
    found = np.zeros(len(wanted), bool)
    try:
        with av.open(str(span.path)) as container:
            stream = container.streams.video[0]
            scale = float(stream.time_base or 0)
            container.seek(int(max(0.0, wanted[0] - 1 / fps) / scale), stream=stream)
            for frame in container.decode(stream):
                seconds = (frame.pts or 0) * scale
                near = int(np.abs(wanted - seconds).argmin())
                if abs(wanted[near] - seconds) < best[near]:
                    best[near], found[near] = abs(wanted[near] - seconds), True
                    frames[near] = frame.to_ndarray(format="rgb24")
                if seconds > wanted[-1] + 0.5 / fps:
                    break
    except FileNotFoundError as error:
        raise UserError(f"{span.path}: no such file; `tandem data validate` lists what is missing") from error
    except (av.FFmpegError, IndexError) as error:
        raise UserError(f"{span.path}: damaged or not a video ({error})") from error
    except ValueError as error:
        raise UserError(
            f"{span.path}: its frames are not {feature.size[0]} x {feature.size[1]} ({error})"
        ) from error
    if not found.all():
        missing = int(np.flatnonzero(~found)[0])
        raise UserError(f"{where}: frame {missing} is not in {span.path} (at {wanted[missing]:.3f} s)")
    return frames
