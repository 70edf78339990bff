"""Reader of D4RL's HDF5 files: all steps of all episodes in flat arrays of the same length.

    observations [N, D]; actions [N, A]; rewards, terminals, timeouts [N]; next_observations [N, D] in some;
    infos/* and metadata/*, which are not read

https://github.com/Farama-Foundation/D4RL/wiki/Tasks. `terminals` marks steps after which the environment had ended,
`timeouts` those after which it was stopped; a step with both has ended. Only a file with `next_observations` says
what was seen after an episode's last action: without them the next row is the beginning of another episode, so that
a stopped episode's last step cannot be bootstrapped. Steps after the last end are an episode that was stopped.

A file without `timeouts` cannot say where episodes were stopped. With `next_observations`, an episode is taken to
be stopped where the next row does not go on from them; without, only `terminals` separate episodes (a warning says
so).
"""

from __future__ import annotations

import warnings
from pathlib import Path

import h5py
import numpy as np

from embodied.datasets.hdf5 import array, opened
from embodied.datasets.recorded import PROPRIO, RecordedEpisode
from embodied.datasets.source import Source, recorded
from experiment.errors import UserError

_ROWS_AT_ONCE = 100_000


class D4RLSource(Source):
    """One file. UserError when it is missing, damaged, or not D4RL's."""

    kind = "d4rl"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with opened(self.path) as file:
            self._check(file)
            ends, self._terminated = self._ends(file)
        begins = np.concatenate([[0], ends[:-1]]).astype(int) if len(ends) else ends
        self._spans = list(zip(begins.tolist(), ends.tolist(), strict=True))
        self.lengths = tuple(end - begin for begin, end in self._spans)

    def _check(self, file: h5py.File) -> None:
        for name in ("observations", "actions", "rewards", "terminals"):
            if not isinstance(file.get(name), h5py.Dataset):
                raise UserError(f"{self.path}: has no {name}: not D4RL's layout; it has {sorted(file)}")
        steps = file["actions"].shape[0]
        for name in ("observations", "rewards", "terminals", "timeouts", "next_observations"):
            if name in file and file[name].shape[:1] != (steps,):
                raise UserError(f"{self.path}: {steps} actions but {list(file[name].shape)} {name}")

    def _ends(self, file: h5py.File) -> tuple[np.ndarray, list[bool]]:
        """After which rows episodes end, and whether each was terminated."""
        steps = file["actions"].shape[0]
        terminals = _flags(file, "terminals")
        if "timeouts" in file:
            stops = _flags(file, "timeouts")
        elif "next_observations" in file:
            stops = _jumps(file)
        else:
            stops = np.zeros(steps, bool)
            warnings.warn(
                f"{self.path}: has neither timeouts nor next_observations: only terminals separate its episodes",
                stacklevel=4,
            )
        ends = np.flatnonzero(terminals | stops) + 1
        if steps and (not len(ends) or ends[-1] != steps):
            ends = np.append(ends, steps)
        return ends, [bool(terminals[end - 1]) for end in ends]

    def _read(self, index: int, images: bool) -> RecordedEpisode:
        (begin, end), where = self._spans[index], f"{self.path}: episode {index}"
        rows = slice(begin, end)
        with opened(self.path) as file:
            ahead = "next_observations" in file
            last = slice(end - 1, end)
            final = {PROPRIO: array(file, "next_observations", where, columns=True, rows=last)[0]} if ahead else {}
            return recorded(
                images={},
                vectors={"state": array(file, "observations", where, columns=True, rows=rows)},
                final=final,
                actions=array(file, "actions", where, columns=True, rows=rows),
                rewards=array(file, "rewards", where, columns=False, rows=rows),
                terminated=self._terminated[index],
                truncated=not self._terminated[index],
                name=where,
            )


def _flags(file: h5py.File, name: str) -> np.ndarray:
    """[N] bool, also of [N, 1] and of numbers."""
    return np.asarray(file[name][()]).reshape(-1).astype(bool)


def _jumps(file: h5py.File) -> np.ndarray:
    """[N] bool: after which rows the next one begins elsewhere than `next_observations` says."""
    steps = file["actions"].shape[0]
    found = np.zeros(steps, bool)
    for begin in range(0, steps - 1, _ROWS_AT_ONCE):
        end = min(begin + _ROWS_AT_ONCE, steps - 1)
        apart = file["next_observations"][begin:end] != file["observations"][begin + 1 : end + 1]
        found[begin:end] = apart.reshape(end - begin, -1).any(axis=1)
    return found
