"""Episodes of any source as one HDF5 file that d3rlpy's `ReplayBuffer.load` reads (see `d3rlpy_reader`).

The vectors lie side by side in one observation, in the order of `source.flat`; pictures and words have no place.
"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from embodied.datasets.d3rlpy_reader import VERSION
from embodied.datasets.recorded import RecordedEpisode
from embodied.datasets.source import Source, flat
from embodied.datasets.staging import StagedEpisodes

COLUMNS = ["observations", "actions", "rewards", "terminated"]


class D3rlpyTarget:
    """A file that is assembled from staged episodes."""

    def __init__(self, staged: StagedEpisodes, path: Path, source: Source, example: RecordedEpisode) -> None:
        """example: of the source; the order of its vectors is that of every episode's observations."""
        self._staged, self._path, self._keys = staged, path, list(example.vectors)
        self._choices, self._inferred = source.choices, source.choices_inferred

    def __len__(self) -> int:
        return len(self._staged)

    def append(self, episode: RecordedEpisode) -> None:
        """Add an episode, on the disk when this returns. Raises UserError when it has no vectors or no rewards."""
        one, number = flat(episode, self._keys), len(self._staged)

        def write(file: h5py.File) -> None:
            file[f"observations_{number}"] = one.observations
            file[f"actions_{number}"] = one.actions if self._choices is None else one.actions.astype(np.int64)
            file[f"rewards_{number}"] = one.rewards[:, None]
            file[f"terminated_{number}"] = one.terminated
            if one.final_observation is not None:
                file[f"final_observation_{number}"] = one.final_observation
            if one.success is not None:
                file[f"success_{number}"] = one.success

        self._staged.append(write)

    def finish(self) -> None:
        """Assemble the file. Raises UserError when the disk is full."""

        def head(file: h5py.File) -> None:
            file["columns"], file["num_episodes"], file["version"] = COLUMNS, len(self._staged), VERSION
            if self._choices is not None:
                file.attrs["choices"], file.attrs["choices_inferred"] = self._choices, self._inferred

        self._staged.assemble(self._path, head)

    def close(self) -> None:
        """Nothing is open between episodes."""
