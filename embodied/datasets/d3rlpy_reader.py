"""Reader of what d3rlpy's `ReplayBuffer.dump` writes: one HDF5 file, a data set for every column of every episode.

    columns: names; num_episodes; version ("2.1")
    observations_I [T, ...] (or observations_I_J, parts of a tuple)
    actions_I [T, A]; rewards_I [T, 1]; terminated_I

https://d3rlpy.readthedocs.io/en/latest/references/dataset.html and the files of d3rlpy 2.8. An episode that is not
terminated was stopped. d3rlpy does not keep what was seen after the last action, and does not train on a stopped
episode's last step; Tandem's writer keeps it in `final_observation_I`, which d3rlpy does not look at, and whether
the task was done in `success_I`. How many discrete actions there are is the file's attribute `choices`; other files
do not say, and one more than the largest action is taken (attribute `choices_inferred`).
"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from embodied.datasets.hdf5 import array, finite, opened
from embodied.datasets.recorded import PROPRIO, RecordedEpisode
from embodied.datasets.source import Source, column, recorded
from experiment.errors import UserError

VERSION = "2.1"


class D3rlpySource(Source):
    """One file. UserError when it is missing, damaged, or not d3rlpy's version 2.1."""

    kind = "d3rlpy"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with opened(self.path) as file:
            if missing := [name for name in ("columns", "num_episodes", "version") if name not in file]:
                raise UserError(f"{self.path}: has no {missing[0]}: not d3rlpy's layout, or cut off")
            version = file["version"].asstr()[()]
            if version != VERSION:
                raise UserError(f"{self.path}: d3rlpy's version {version}, Tandem reads {VERSION}: dump it again")
            episodes = int(file["num_episodes"][()])
            names = [f"actions_{index}" for index in range(episodes)]
            if missing := [name for name in names if name not in file]:
                raise UserError(f"{self.path}: has no {missing[0]}, though it counts {episodes} episodes")
            self.lengths = tuple(file[name].shape[0] for name in names)
            if names and file[names[0]].dtype.kind in "iu" and file[names[0]].shape[1:] == (1,):
                self.choices, self.choices_inferred = _choices(file, names)

    def _read(self, index: int, images: bool) -> RecordedEpisode:
        where = f"{self.path}: episode {index}"
        with opened(self.path) as file:
            actions = array(file, f"actions_{index}", where, columns=True)
            rewards = array(file, f"rewards_{index}", where, columns=False)
            if f"terminated_{index}" not in file:
                raise UserError(f"{where}: has no terminated_{index}; was it cut off?")
            seen = self._observations(file, index, where, images)
            for name, values in {"rewards": rewards, **seen}.items():
                if len(values) != len(actions):
                    raise UserError(f"{where}: {len(actions)} actions but {len(values)} rows of {name}")
            if not len(actions):
                raise UserError(f"{where}: has no steps")
            terminated = bool(file[f"terminated_{index}"][()])
            kept, done = file.get(f"final_observation_{index}"), file.get(f"success_{index}")
            return recorded(
                images={name: values for name, values in seen.items() if values.ndim == 4},
                vectors={name: column(values) for name, values in seen.items() if values.ndim < 4},
                final={} if kept is None else {PROPRIO: kept[()].astype(np.float32)},
                actions=actions,
                rewards=rewards,
                terminated=terminated,
                truncated=not terminated,
                success=None if done is None else bool(done[()]),
                name=where,
            )

    def _observations(self, file: h5py.File, index: int, where: str, images: bool) -> dict[str, np.ndarray]:
        """Name -> [T, ...]: `state`, or `0`, `1`, ... of a tuple; pictures [T, H, W, 3]."""
        key = f"observations_{index}"
        present = {"state": file[key]} if key in file else {}
        while key not in file and f"{key}_{len(present)}" in file:
            present[str(len(present))] = file[f"{key}_{len(present)}"]
        if not present:
            raise UserError(f"{where}: has no {key}; was it cut off?")
        found = {}
        for name, values in present.items():
            picture = values.dtype == np.uint8 and values.ndim == 4
            if picture and values.shape[1] != 3:
                raise UserError(f"{where}: pictures are {list(values.shape[1:])}, expected [3, H, W]")
            if picture and images:
                found["pixels" if name == "state" else name] = values[()].transpose(0, 2, 3, 1)
            elif not picture:
                found[name] = finite(values[()], f"{where}: observations")
        return found


def _choices(file: h5py.File, names: list[str]) -> tuple[int, bool]:
    """How many discrete actions there are, and whether that is inferred."""
    if "choices" in file.attrs:
        return int(file.attrs["choices"]), bool(file.attrs.get("choices_inferred", False))
    return 1 + max(int(file[name][()].max(initial=0)) for name in names), True
