"""Reader of robomimic's HDF5 layout: data/demo_i/{actions, rewards, dones, obs/KEY, next_obs/KEY}.

https://robomimic.github.io/docs/datasets/overview.html. Beyond it, an optional group `initial_state` of a
demonstration holds what the simulator needs to begin there, and an optional `success` (data set or
attribute) says whether the task was done.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import h5py
import numpy as np

from embodied.datasets.episode import Episode
from experiment.errors import UserError

DoneMeaning = Literal["truncated", "terminated"]


def read_episodes(
    path: str | Path,
    *,
    observation_keys: Sequence[str] = ("state",),
    subset: str | None = None,
    done_means: DoneMeaning = "truncated",
) -> list[Episode]:
    """All episodes of a file, in the order of their numbers.

    observation_keys: data sets under `obs`, [T, d] each, that are concatenated in this order.
    subset: only the demonstrations that `mask/SUBSET` lists (robomimic's filter keys, such as 'train').
    done_means: how an episode ended. robomimic writes `dones` = 1 at the end of a recording whether it
        succeeded or was stopped, so the file cannot say; 'truncated' (bootstrap there) is right for tasks that go
        on, 'terminated' for tasks that end with success.

    Observations may have T rows or T + 1 (the last one is the final observation), or `next_obs` gives it.
    Raises UserError, one line with the path, when the file is missing, not HDF5 or cut off, has no
    demonstrations, or when a demonstration lacks something, disagrees with itself or with the others in its
    shapes, is empty, or holds NaN or infinity.
    """
    path = Path(path)
    if not observation_keys:
        raise UserError("observation_keys is empty: name at least one data set under obs")
    with _opened(path) as file:
        episodes = [
            _read_episode(demo, f"{path}: data/{name}", observation_keys, done_means)
            for name, demo in _demonstrations(file, path, subset)
        ]
    first = episodes[0]
    for episode in episodes[1:]:
        for what in ("observations", "actions"):
            expected, found = getattr(first, what).shape[1], getattr(episode, what).shape[1]
            if found != expected:
                raise UserError(f"{episode.name}: {what} have {found} dimensions, those of {first.name} {expected}")
    return episodes


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError) as error:  # h5py raises either, also while reading
        reason = " ".join(str(error).split())
        if "signature" in reason:
            raise UserError(f"{path}: not an HDF5 file") from error
        raise UserError(f"{path}: damaged or cut off, fetch it again ({reason})") from error


def _demonstrations(file: h5py.File, path: Path, subset: str | None) -> list[tuple[str, h5py.Group]]:
    data = file.get("data")
    names = [name for name in data if re.fullmatch(r"demo_\d+", name)] if isinstance(data, h5py.Group) else []
    if not names:
        raise UserError(f"{path}: has no groups data/demo_0, data/demo_1, ...: not robomimic's layout")
    if subset is not None:
        masks = file.get("mask", {})
        if subset not in masks:
            raise UserError(f"{path}: has no subset mask/{subset}; it has {sorted(masks) or 'none'}")
        listed = {entry.decode() for entry in masks[subset][()]}
        if unknown := sorted(listed - set(names)):
            raise UserError(f"{path}: mask/{subset} lists {unknown[0]}, which is not in data")
        names = [name for name in names if name in listed]
        if not names:
            raise UserError(f"{path}: the subset mask/{subset} is empty")
    return [(name, data[name]) for name in sorted(names, key=lambda name: int(name[5:]))]


def _read_episode(
    demo: h5py.Group, where: str, observation_keys: Sequence[str], done_means: DoneMeaning
) -> Episode:
    actions = _array(demo, "actions", where, columns=True)
    length = len(actions)
    if length == 0:
        raise UserError(f"{where}: has no steps")
    rewards = _array(demo, "rewards", where, columns=False)
    if len(rewards) != length:
        raise UserError(f"{where}: {length} actions but {len(rewards)} rewards")
    parts = [_array(demo, f"obs/{key}", where, columns=True) for key in observation_keys]
    for key, part in zip(observation_keys, parts, strict=True):
        if len(part) not in (length, length + 1) or len(part) != len(parts[0]):
            raise UserError(f"{where}: {length} actions but {len(part)} rows of obs/{key}")
    observations = np.concatenate(parts, axis=1)
    final = observations[length] if len(observations) > length else None
    if final is None and "next_obs" in demo:
        ahead = [_array(demo, f"next_obs/{key}", where, columns=True) for key in observation_keys]
        for key, part in zip(observation_keys, ahead, strict=True):
            if len(part) != length:
                raise UserError(f"{where}: {length} actions but {len(part)} rows of next_obs/{key}")
        final = np.concatenate([part[-1] for part in ahead])
        if len(final) != observations.shape[1]:
            raise UserError(f"{where}: obs have {observations.shape[1]} dimensions, next_obs {len(final)}")
    return Episode(
        observations=observations[:length],
        actions=actions,
        rewards=rewards,
        terminated=done_means == "terminated",
        truncated=done_means == "truncated",
        final_observation=final,
        success=_success(demo),
        initial_state=_initial_state(demo),
        name=where,
    )


def _array(demo: h5py.Group, key: str, where: str, *, columns: bool) -> np.ndarray:
    """A data set as finite float32, [T, d] or, without columns, [T] (also where it was written as [T, 1])."""
    dataset = demo.get(key)
    if not isinstance(dataset, h5py.Dataset):
        parent = key.rpartition("/")[0]
        group = demo.get(parent) if parent else demo
        present = sorted(group) if isinstance(group, h5py.Group) else "nothing"
        raise UserError(f"{where}: has no {key}; {parent or 'the demonstration'} has {present}")
    shape = dataset.shape
    if not columns and len(shape) == 2 and shape[1] == 1:
        shape = shape[:1]
    if len(shape) != (2 if columns else 1) or dataset.dtype.kind not in "fiub":
        expected = "[T, d] numbers" if columns else "[T] numbers"
        raise UserError(f"{where}: {key} is {dataset.dtype} {list(dataset.shape)}, expected {expected}")
    values = dataset[()].astype(np.float32).reshape(shape)
    finite = np.isfinite(values)
    bad = np.flatnonzero(~(finite.all(axis=1) if columns else finite))
    if len(bad):
        raise UserError(f"{where}: {key} row {bad[0]} is not finite: {values[bad[0]].tolist()}")
    return values


def _success(demo: h5py.Group) -> bool | None:
    if isinstance(demo.get("success"), h5py.Dataset):
        return bool(np.any(demo["success"][()]))
    return bool(np.any(demo.attrs["success"])) if "success" in demo.attrs else None


def _initial_state(demo: h5py.Group) -> dict[str, np.ndarray] | None:
    group = demo.get("initial_state")
    if not isinstance(group, h5py.Group):
        return None
    return {name: dataset[()] for name, dataset in group.items() if isinstance(dataset, h5py.Dataset)}
