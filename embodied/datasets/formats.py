"""One front for every format: find out what a path is, and open it.

    source = open_dataset("data/door")              # lazy: len(source), source.lengths, source.read(3)
    episodes = read_dataset("data/door")            # the flat view, all episodes, in memory

A source gives `RecordedEpisode`s, with pictures, words and observations by name; `source.flat` makes an `Episode`
of one. docs/data.md says how each format's ends, final observations and rewards are understood.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import h5py

from embodied.datasets.d3rlpy_reader import D3rlpySource
from embodied.datasets.d4rl import D4RLSource
from embodied.datasets.episode import Episode
from embodied.datasets.hdf5 import is_hdf5, opened
from embodied.datasets.lerobot_layout import INFO
from embodied.datasets.lerobot_source import LeRobotSource
from embodied.datasets.libero import LiberoSource
from embodied.datasets.minari_reader import MinariSource, minari_folder
from embodied.datasets.robomimic import DoneMeaning, RobomimicSource
from embodied.datasets.source import Source
from experiment.errors import UserError

READ = "LeRobot v2.1 and v3, Minari, robomimic, LIBERO, D4RL, d3rlpy"
"""The formats that are read, as messages name them."""


def detect(path: str | Path) -> str:
    """A path's format: "lerobot", "minari", "robomimic", "libero", "d4rl" or "d3rlpy".

    Raises UserError, one line, when there is no such path (nor a local Minari data set of that id), its file is
    damaged, or the format is none of these.
    """
    place = Path(path)
    if (place / INFO).is_file():
        return "lerobot"
    if minari_folder(path) is not None:
        return "minari"
    if not place.exists():
        raise UserError(f"{path}: no such file or folder, and no local Minari data set of that name")
    if is_hdf5(place):
        with opened(place) as file:
            if found := _hdf5_layout(file):
                return found
    what = "folder" if place.is_dir() else "file"
    raise UserError(f"{path}: this {what} is no data set that Tandem reads ({READ})")


def _hdf5_layout(file: h5py.File) -> str | None:
    data = file.get("data")
    if isinstance(data, h5py.Group):
        demo = next(iter(data.values()), None)
        pictures = isinstance(demo, h5py.Group) and "agentview_rgb" in demo.get("obs", ())
        return "libero" if "problem_info" in data.attrs or pictures else "robomimic"
    if "columns" in file and "num_episodes" in file:
        return "d3rlpy"
    if "episode_terminals" in file:
        raise UserError(f"{file.filename}: d3rlpy's version 1; load it with its load_v1 and dump it again")
    return "d4rl" if {"observations", "actions"} <= file.keys() else None


def open_dataset(path: str | Path, *, subset: str | None = None, done_means: DoneMeaning | None = None) -> Source:
    """Open a data set of any format; only counts and lengths are read.

    subset: a filter key of robomimic's (`mask/NAME`), or a split that LeRobot's `meta/info.json` names.
    done_means: how robomimic's episodes ended, which its files cannot say: all "truncated" (the default) or all
        "terminated". The other formats say so themselves.
    Raises UserError as `detect`, or when the data set is damaged, has no such subset or says itself how it ends.
    """
    kind = detect(path)
    if done_means is not None and kind != "robomimic":
        raise UserError(
            f"{path}: says itself how its episodes ended; done_means is for robomimic's files, which do not"
        )
    match kind:
        case "lerobot":
            return LeRobotSource(path, subset)
        case "robomimic":
            return RobomimicSource(path, subset, done_means or "truncated")
        case "libero":
            return LiberoSource(path, subset)
    if subset is not None:
        raise UserError(f"{path}: has no subsets; only robomimic's and LeRobot's data sets do")
    match kind:
        case "minari":
            return MinariSource(path)
        case "d4rl":
            return D4RLSource(path)
        case _:
            return D3rlpySource(path)


def read_dataset(
    path: str | Path,
    *,
    observation_keys: Sequence[str] | None = None,
    subset: str | None = None,
    done_means: DoneMeaning | None = None,
    need_rewards: bool = True,
) -> list[Episode]:
    """All episodes of a data set of any format, in the flat view; pictures are not decoded.

    observation_keys: which vectors make the observation, in which order; all of them by default (`source.flat`).
    subset, done_means: as in `open_dataset`.
    need_rewards: whether an episode without rewards is refused; otherwise they are 0.

    Raises UserError, one line with the path, when something is missing, damaged or not finite, there is no episode,
    or the episodes' dimensions differ.
    """
    source = open_dataset(path, subset=subset, done_means=done_means)
    if not len(source):
        raise UserError(f"{path}: has no episodes")
    episodes: list[Episode] = []
    for index in range(len(source)):
        episodes.append(source.episode(index, observation_keys, need_rewards=need_rewards))
        check_shapes(episodes[0], episodes[-1])
    return episodes


def check_shapes(first: Episode, other: Episode) -> None:
    """Raise UserError when observations or actions of two episodes have different dimensions."""
    for what in ("observations", "actions"):
        expected, found = getattr(first, what).shape[1], getattr(other, what).shape[1]
        if found != expected:
            raise UserError(f"{other.name}: {what} have {found} dimensions, those of {first.name} {expected}")
