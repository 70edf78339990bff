"""A recorded episode to look at: frames with the instruction written under them, as a film or as one sheet."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from embodied.datasets.recorded import RecordedEpisode
from experiment.errors import UserError

_SMALLEST = 320
"""Pixels to which small pictures are enlarged, a whole number of times."""
_TEXT, _LINE, _MARGIN = 16, 20, 8
_INK, _PAPER, _GOOD, _BAD = (235, 235, 235), (24, 24, 28), (110, 220, 130), (240, 120, 110)


def film(episode: RecordedEpisode, cameras: tuple[str, ...] = ()) -> Iterator[NDArray[np.uint8]]:
    """Frames [H, W, 3]: the cameras side by side, and what was said and earned.

    cameras: which, in which order; all of them by default. Raises UserError when one is not there.
    """
    names = _known(episode, cameras)
    earned = 0.0
    for step in range(len(episode)):
        shown = _pictures(episode, names, step, _SMALLEST)
        status = f"step {step + 1} of {len(episode)}"
        if episode.rewards is not None:
            earned += float(episode.rewards[step])
            status += f"   return {earned:.2f}"
        ended, colour = _ending(episode) if step == len(episode) - 1 else ("", _INK)
        yield _with_text(shown, [*_wrapped(episode.instruction, shown.shape[1]), status], ended, colour)


def sheet(episode: RecordedEpisode, cameras: tuple[str, ...] = (), pictures: int = 12) -> NDArray[np.uint8]:
    """One picture [H, W, 3]: at most `pictures` moments, evenly spaced from first to last. UserError as `film`."""
    names = _known(episode, cameras)
    steps = np.unique(np.linspace(0, len(episode) - 1, min(pictures, len(episode))).round().astype(int))
    tiles = []
    for step in steps:
        shown = _pictures(episode, names, int(step), _SMALLEST // 2)
        tiles.append(_with_text(shown, [f"step {step + 1}"], "", _INK))
    across = min(4, len(tiles))
    blank = np.full_like(tiles[0], _PAPER)
    tiles += [blank] * (-len(tiles) % across)
    rows = [np.concatenate(tiles[first : first + across], axis=1) for first in range(0, len(tiles), across)]
    grid = np.concatenate(rows)
    return _with_text(grid, _wrapped(episode.instruction, grid.shape[1]), *_ending(episode))


def _known(episode: RecordedEpisode, cameras: tuple[str, ...]) -> tuple[str, ...]:
    if not episode.images:
        raise UserError(f"{episode.name}: has no pictures to show")
    for name in cameras:
        if name not in episode.images:
            raise UserError(f"{episode.name}: has no camera {name!r}; it has {', '.join(episode.images)}")
    return cameras or tuple(episode.images)


def _pictures(episode: RecordedEpisode, names: tuple[str, ...], step: int, smallest: int) -> NDArray[np.uint8]:
    """The cameras of one step beside each other, all as high as the highest."""
    enlarged = []
    for name in names:
        picture = episode.images[name][step]
        times = max(1, -(-smallest // max(picture.shape[:2])))
        enlarged.append(picture.repeat(times, axis=0).repeat(times, axis=1))
    height = max(len(picture) for picture in enlarged)
    padded = [np.pad(picture, ((0, height - len(picture)), (0, 0), (0, 0))) for picture in enlarged]
    return np.concatenate(padded, axis=1)


def _ending(episode: RecordedEpisode) -> tuple[str, tuple[int, int, int]]:
    how = "cut off" if episode.truncated else "ended"
    if episode.success is None:
        return how, _INK
    return (f"success, {how}", _GOOD) if episode.success else (f"failure, {how}", _BAD)


def _wrapped(text: str, width: int) -> list[str]:
    """Lines that fit; the built-in font is about half as wide as high."""
    return textwrap.wrap(f"“{text}”" if text else "(no instruction)", max(12, 2 * (width - 2 * _MARGIN) // _TEXT))


def _with_text(
    picture: NDArray[np.uint8], lines: list[str], ended: str, colour: tuple[int, int, int]
) -> NDArray[np.uint8]:
    """The picture above lines of text, the last of which ends with a coloured word; height and width are even."""
    height, width, _ = picture.shape
    total = height + 2 * _MARGIN + _LINE * len(lines)
    paper = Image.new("RGB", (width + width % 2, total + total % 2), _PAPER)
    paper.paste(Image.fromarray(picture), (0, 0))
    draw, font = ImageDraw.Draw(paper), ImageFont.load_default(_TEXT)
    for number, line in enumerate(lines):
        at = (_MARGIN, height + _MARGIN + number * _LINE)
        draw.text(at, line, fill=_INK, font=font)
        if ended and number == len(lines) - 1:
            draw.text((at[0] + draw.textlength(line, font=font) + _TEXT, at[1]), ended, fill=colour, font=font)
    return np.asarray(paper)
