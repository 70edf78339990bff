"""Reader of robomimic's HDF5 layout: data/demo_i/{actions, rewards, dones, obs/KEY, next_obs/KEY}.

https://robomimic.github.io/docs/datasets/overview.html. Beyond it, an optional group `initial_state` of a
demonstration holds what the simulator needs to begin there, and an optional `success` (data set or
attribute) says whether the task was done. Filter keys (`mask/NAME`) are subsets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from embodied.datasets.hdf5 import array, opened
from embodied.datasets.recorded import OBSERVATION, RecordedEpisode
from embodied.datasets.source import Source, recorded
from experiment.errors import UserError

DoneMeaning = Literal["truncated", "terminated"]


class RobomimicSource(Source):
    """A file: everything under `obs`, pictures (uint8 [T, H, W, 3]) as cameras, and [T, d] or [T] as vectors.

    What is neither (depth maps) is left out, and so are the simulator's `states`. The order of the vectors is that
    of their names. A vector has T rows, or T + 1, the last of which was seen after the last action; of one that has
    T, `next_obs` may say what was seen then.
    """

    kind = "robomimic"

    def __init__(self, path: str | Path, subset: str | None = None, done_means: DoneMeaning = "truncated") -> None:
        """subset: only the demonstrations that `mask/SUBSET` lists (robomimic's filter keys, such as 'train').

        done_means: how an episode ended. robomimic writes `dones` = 1 at the end of a recording whether it
            succeeded or was stopped, so the file cannot say; 'truncated' (bootstrap there) is right for tasks that
            go on, 'terminated' for tasks that end with success.

        Raises UserError, one line with the path, when the file is missing, not HDF5 or cut off, or has no
        demonstrations, no such subset or a demonstration without actions.
        """
        self.path, self._subset, self._done_means = Path(path), subset, done_means
        with opened(self.path) as file:
            found = demonstrations(file, self.path, subset)
            self._demos = [name for name, _ in found]
            self.lengths = tuple(_length(demo, f"{self.path}: data/{name}") for name, demo in found)
            self.fps = _control_rate(file["data"])

    def identity(self) -> Any:
        """The identity of any source, with the subset and the reading of ends."""
        return [*super().identity(), self._subset, self._done_means]

    def _read(self, index: int, images: bool) -> RecordedEpisode:
        where = f"{self.path}: data/{self._demos[index]}"
        with opened(self.path) as file:
            return self._recorded(file["data"][self._demos[index]], where, images)

    def _recorded(self, demo: h5py.Group, where: str, images: bool) -> RecordedEpisode:
        actions = array(demo, "actions", where, columns=True)
        if not len(actions):
            raise UserError(f"{where}: has no steps")
        rewards = array(demo, "rewards", where, columns=False) if "rewards" in demo else None
        if rewards is not None and len(rewards) != len(actions):
            raise UserError(f"{where}: {len(actions)} actions but {len(rewards)} rewards")
        pictures, vectors, final = _observations(demo, where, len(actions), images)
        return recorded(
            images=pictures,
            vectors=vectors,
            final={OBSERVATION + key: row for key, row in final.items()},
            actions=actions,
            rewards=rewards,
            terminated=self._done_means == "terminated",
            truncated=self._done_means == "truncated",
            success=_success(demo),
            initial_state=_initial_state(demo),
            name=where,
        )


def _length(demo: h5py.Group, where: str) -> int:
    if not isinstance(demo.get("actions"), h5py.Dataset):
        raise UserError(f"{where}: has no actions; the demonstration has {sorted(demo)}")
    return int(demo["actions"].shape[0])


def _control_rate(data: h5py.Group) -> int | None:
    """Steps a second, which robosuite's environments say."""
    try:
        rate = json.loads(data.attrs["env_args"])["env_kwargs"]["control_freq"]
    except (KeyError, TypeError, ValueError):
        return None
    return int(rate) if isinstance(rate, int | float) and rate >= 1 else None


def _observations(
    demo: h5py.Group, where: str, length: int, images: bool
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Camera -> [T, H, W, 3], vector -> [T, d], vector -> [d] after the last action."""
    pictures, vectors, final = {}, {}, {}
    seen, ahead = demo.get("obs"), demo.get("next_obs", {})
    for key in sorted(seen) if isinstance(seen, h5py.Group) else []:
        dataset = seen[key]
        if not isinstance(dataset, h5py.Dataset) or dataset.ndim not in (1, 2, 4):
            continue
        if len(dataset) not in (length, length + 1):
            raise UserError(f"{where}: {length} actions but {len(dataset)} rows of obs/{key}")
        if dataset.ndim == 4:
            if images and dataset.dtype == np.uint8 and dataset.shape[3] == 3:
                pictures[key] = dataset[:length]
            continue
        rows = array(demo, f"obs/{key}", where, columns=dataset.ndim == 2).reshape(len(dataset), -1)
        vectors[key] = rows[:length]
        if len(rows) > length:
            final[key] = rows[length]
        elif key in ahead:
            last = array(demo, f"next_obs/{key}", where, columns=dataset.ndim == 2)
            if last.shape[0] != length or last.reshape(length, -1).shape != vectors[key].shape:
                raise UserError(f"{where}: next_obs/{key} is {list(last.shape)}, obs/{key} {list(dataset.shape)}")
            final[key] = last[-1].reshape(-1)
    return pictures, vectors, final


def demonstrations(file: h5py.File, path: Path, subset: str | None) -> list[tuple[str, h5py.Group]]:
    """Name and group of every demonstration, in the order of their numbers. UserError as `RobomimicSource`."""
    data = file.get("data")
    names = [name for name in data if re.fullmatch(r"demo_\d+", name)] if isinstance(data, h5py.Group) else []
    if not names:
        raise UserError(f"{path}: has no groups data/demo_0, data/demo_1, ...: not robomimic's layout")
    if subset is not None:
        masks = file.get("mask", {})
        if not isinstance(masks, Mapping) or subset not in masks:  # h5py's groups are mappings
            has = sorted(masks) if isinstance(masks, Mapping) else []
            raise UserError(f"{path}: has no subset mask/{subset}; it has {has or 'none'}")
        listed = set(_texts(masks[subset], f"{path}: mask/{subset}"))
        if unknown := sorted(listed - set(names)):
            raise UserError(f"{path}: mask/{subset} lists {unknown[0]}, which is not in data")
        names = [name for name in names if name in listed]
        if not names:
            raise UserError(f"{path}: the subset mask/{subset} is empty")
    found = [(name, data[name]) for name in sorted(names, key=lambda name: int(name[5:]))]
    for name, demo in found:
        if not isinstance(demo, h5py.Group):
            raise UserError(f"{path}: data/{name} is no group: not robomimic's layout")
    return found


def _texts(names: Any, where: str) -> list[str]:
    """A data set of texts. Raises UserError if it is something else."""
    if not isinstance(names, h5py.Dataset) or names.ndim != 1:
        raise UserError(f"{where}: is no list of names")
    entries = names[()]
    if not all(isinstance(entry, bytes) for entry in entries):
        raise UserError(f"{where}: is no list of names")
    return [entry.decode(errors="replace") for entry in entries]


def _success(demo: h5py.Group) -> bool | None:
    if isinstance(demo.get("success"), h5py.Dataset):
        return bool(np.any(demo["success"][()]))
    return bool(np.any(demo.attrs["success"])) if "success" in demo.attrs else None


def _initial_state(demo: h5py.Group) -> dict[str, np.ndarray] | None:
    group = demo.get("initial_state")
    if not isinstance(group, h5py.Group):
        return None
    return {name: dataset[()] for name, dataset in group.items() if isinstance(dataset, h5py.Dataset)}
