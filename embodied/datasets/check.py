"""Looks at everything in a data set of any format and lists what is wrong with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from embodied.datasets import lerobot_check
from embodied.datasets.formats import open_dataset
from embodied.datasets.lerobot_layout import INFO, read_told
from embodied.datasets.recorded import RecordedEpisode
from embodied.datasets.staging import interrupted
from embodied.datasets.writing import check_alike
from experiment.errors import UserError


def problems(path: str | Path, on_episode: Callable[[int], None] = lambda index: None) -> Iterator[str]:
    """A line for everything that is wrong; none when all is well.

    Every episode is read and every picture decoded: what is missing, cut off, not finite, of another length or
    shape. Of LeRobot v3, `lerobot_check` looks at counts, times and statistics too. A conversion that was
    interrupted is told.

    on_episode: called with its index when an episode has been looked at.
    """
    path = Path(path)
    if unfinished := interrupted(path):
        yield unfinished
        if not path.exists():
            return
    if (path / INFO).is_file() and not _older(path):
        yield from lerobot_check.problems(path, on_episode)
        return
    first: RecordedEpisode | None = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            source = open_dataset(path)
        except UserError as error:
            yield str(error)
            return
    yield from (str(one.message) for one in caught)
    if not len(source):
        yield f"{path}: has no episodes"
    for index in range(len(source)):
        try:
            episode = source.read(index)
            first = first or episode
            check_alike(first, episode)
        except UserError as error:
            yield str(error)
        on_episode(index)


def _older(folder: Path) -> bool:
    try:
        return read_told(folder)[0].lstrip("v").startswith("2.")
    except UserError:
        return False  # `lerobot_check` says what is wrong with it
