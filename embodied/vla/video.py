"""Videos of a policy at the table, with what it was told and whether it did it, and one sheet of them all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from embodied.policies.vla import VLAPolicy
from embodied.rollouts.processes import SharedArrays
from embodied.vla.chunk_workers import Player, export_weights, layout_of
from embodied.vla.seats import Play, Seats, TableConfig, TableEpisode, make_table
from envs.table.env import TableEnv
from experiment.errors import storage_errors
from experiment.video import write_mp4

Picture = NDArray[np.uint8]

SIZE = 256
"""Pixels of a side of the pictures."""
FPS = 10
HOLD = FPS
"""Frames for which the last picture stays, so that the outcome can be read."""
LETTERS = 14
"""Height of the letters in pixels."""
_MARGIN, _GAP = 5, 6
_DONE, _OPEN, _FAILED = (120, 240, 140), (235, 235, 235), (255, 140, 120)


class FilmedTable(TableEnv):
    """Keeps a picture of every control step of the episode, and whether the goal had been met by then."""

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As TableEnv."""
        answer = super().reset(seed=seed, options=options)
        self.frames, self.met = [self.picture("front", SIZE)], [False]
        return answer

    def step(self, action: NDArray[np.floating]) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """As TableEnv."""
        answer = super().step(action)
        self.frames.append(self.picture("front", SIZE))
        self.met.append(bool(answer[-1]["success"]) or self.met[-1])
        return answer


@dataclass(frozen=True)
class Film:
    """An episode and a picture [256, 256, 3] of every control step, the first before the first action.

    met: whether the goal had been met by then.
    """

    episode: TableEpisode
    frames: Sequence[Picture]
    met: Sequence[bool]

    def captioned(self) -> list[Picture]:
        """The pictures with instruction, task and success written into them."""
        judged = self.episode.record.success_once is not None
        last = len(self.frames) - 1
        pictures = []
        for index, (frame, met) in enumerate(zip(self.frames, self.met, strict=True)):
            status, colour = ("success", _DONE) if met else ("", _OPEN)
            if not judged:
                status, colour = "not judged", _OPEN
            elif index == last and not met:
                status, colour = "failure", _FAILED
            pictures.append(
                caption(frame, self.episode.instruction, self.episode.task if judged else "", status, colour)
            )
        return pictures


class FilmWorker(Player):
    """Films what it plays."""

    def film(self, play: Play, table: TableConfig, deterministic: bool) -> Film:
        """Play and film an episode."""
        (episode,) = self.evaluate([play], table, deterministic)
        env = self._evaluation_seats(table, 1).seats[0].env
        assert isinstance(env, FilmedTable)
        return Film(episode, env.frames, env.met)

    def _evaluation_seats(self, environment: TableConfig, plays: int) -> Seats:
        table = super()._evaluation_seats(environment, plays)
        for seat in table.seats:
            if not isinstance(seat.env, FilmedTable):
                seat.env.close()
                seat.env = make_table(environment, self.policy.spaces.image_size, FilmedTable)
        return table


class Studio:
    """Films a policy, one episode at a time, in this process."""

    def __init__(self, policy: VLAPolicy) -> None:
        arrays = SharedArrays(layout_of(policy, 1, 1))
        with tempfile.TemporaryDirectory() as folder:
            policy.save_pretrained(folder)
            self._worker = FilmWorker(range(1), TableConfig(count=1, workers=0), Path(folder), arrays)
        export_weights(policy, arrays.view("weights"))

    def film(self, play: Play, *, table: TableConfig | None = None, deterministic: bool = True) -> Film:
        """Play and film an episode. UserError where nothing can be drawn."""
        return self._worker.film(play, table or self._worker.environment, deterministic)

    def __enter__(self) -> Studio:
        return self

    def __exit__(self, *exception: object) -> None:
        self._worker.close()


def write_film(film: Film, path: Path) -> Path:
    """As mp4, 10 frames a second, the last picture held for a second. UserError if the disk is full."""
    pictures = film.captioned()
    return write_mp4(pictures + [pictures[-1]] * HOLD, path, FPS)


def caption(frame: Picture, instruction: str, task: str, status: str, colour: tuple[int, int, int]) -> Picture:
    """The picture with the instruction above, in two lines if it is long, and task and status below."""
    image = Image.fromarray(frame).convert("RGB")
    pen = ImageDraw.Draw(image, "RGBA")
    font = ImageFont.load_default(LETTERS)
    width, height = image.size
    lines = wrap(instruction, lambda text: pen.textlength(text, font), width - 2 * _MARGIN)
    line = LETTERS + 3
    pen.rectangle((0, 0, width, _MARGIN + line * len(lines)), fill=(0, 0, 0, 150))
    for index, text in enumerate(lines):
        pen.text((_MARGIN, 2 + line * index), text, font=font, fill=(255, 255, 255))
    below = ": ".join(filter(None, (task, status)))
    if below:
        pen.rectangle(
            (0, height - line - 3, 2 * _MARGIN + pen.textlength(below, font), height), fill=(0, 0, 0, 150)
        )
        pen.text((_MARGIN, height - line - 1), below, font=font, fill=colour)
    return np.asarray(image)


def wrap(text: str, measure: Callable[[str], float], width: float) -> list[str]:
    """One or two lines no wider than `width`; what does not fit in the second ends in "..."."""
    words, lines = text.split(), [""]
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if measure(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > 2:
        lines = [lines[0], " ".join(lines[1:])]
    while measure(lines[-1]) > width and len(lines[-1]) > 3:
        lines[-1] = lines[-1].removesuffix("...")[:-1].rstrip() + "..."
    return lines


def contact_sheet(films: Sequence[Film], path: Path) -> Path:
    """A PNG with the first, the middle and the last picture of each film. UserError if the disk is full."""
    if not films:
        raise ValueError("a contact sheet needs at least one film")
    columns = max(1, round((len(films) * 4 / 9) ** 0.5))  # triplets are three times as wide as high: about 4 to 3
    rows = -(-len(films) // columns)
    wide, high = 3 * SIZE + 2 * _GAP // 2, SIZE
    sheet = Image.new("RGB", (columns * (wide + _GAP) + _GAP, rows * (high + _GAP) + _GAP), (60, 60, 60))
    for index, film in enumerate(films):
        left, top = _GAP + (index % columns) * (wide + _GAP), _GAP + (index // columns) * (high + _GAP)
        pictures = film.captioned()
        for place, picture in enumerate((pictures[0], pictures[len(pictures) // 2], pictures[-1])):
            sheet.paste(Image.fromarray(picture), (left + place * (SIZE + _GAP // 2), top))
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            sheet.save(temporary, "PNG")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return path
