"""Reader of Minari's data sets, through the minari library: HDF5 or Arrow, a folder or the id of a local one.

    FOLDER/data/metadata.json, main_data.hdf5            the folder, or its `data`, is what is named
    $MINARI_DATASETS_PATH/ID, ~/.minari/datasets/ID      where an id such as D4RL/door/human-v2 lies

https://minari.farama.org/content/dataset_standards/. Observations have a row more than actions: the last one is the
final observation. `terminations` and `truncations` are per step; an episode whose last step has both was
terminated, one with neither was cut off when collecting stopped. What is observed follows the observation space: a
dictionary's leaves in the order of the space (Gymnasium sorts the keys), depth first, called `outer.inner`; a leaf
of numbers is flattened row by row, a discrete one is a single column; uint8 [H, W, 3] are pictures; text is left
out. A space that is not a dictionary is called `state`, a picture `pixels`. `infos/success`, or the episode's
attribute `success`, says whether the task was done, and its attribute `instruction` what the robot was told.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embodied.datasets.hdf5 import finite
from embodied.datasets.recorded import OBSERVATION, RecordedEpisode
from embodied.datasets.source import Source, column, recorded
from experiment.errors import UserError

if TYPE_CHECKING:
    from gymnasium import Space
    from minari.dataset.minari_storage import MinariStorage

METADATA = "metadata.json"


def minari_folder(name: str | Path) -> Path | None:
    """Where the `metadata.json` of a data set lies that is named by its path or its id; None without one."""
    kept = Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")
    for folder in (Path(name), Path(name) / "data", kept / name / "data"):
        if (folder / METADATA).is_file():
            return folder
    return None


class MinariSource(Source):
    """A data set. `details` is what `metadata.json` says."""

    kind = "minari"

    def __init__(self, path: str | Path) -> None:
        """Raises UserError when there is no such data set, or it is damaged."""
        self.path = Path(path)
        folder = minari_folder(path)
        if folder is None:
            raise UserError(f"{path}: not a Minari data set (it has no {METADATA})")
        self.details, self._storage = _opened(folder, self.path)
        episodes = int(self.details.get("total_episodes", 0))
        try:
            told = list(self._storage.get_episode_metadata(range(episodes)))
            self.lengths = tuple(int(one["total_steps"]) for one in told)
        except Exception as error:  # h5py, pyarrow, JSON: each has exceptions of its own
            raise UserError(f"{self.path}: damaged or cut off ({_brief(error)})") from error
        self._told = told
        self.choices = _choices(self._storage.action_space)

    def _read(self, index: int, images: bool) -> RecordedEpisode:
        where = f"{self.path}: episode {index}"
        try:
            (data,) = self._storage.get_episodes([index])
        except Exception as error:  # as above; what was read may be of any kind
            raise UserError(f"{where}: damaged or cut off ({_brief(error)})") from error
        actions, rewards = column(np.asarray(data["actions"])), np.asarray(data["rewards"], np.float32)
        if not len(actions):
            raise UserError(f"{where}: has no steps")
        ends = {name: np.asarray(data[name]).reshape(-1).astype(bool) for name in ("terminations", "truncations")}
        for name, values in {"rewards": rewards, **ends}.items():
            if values.shape != (len(actions),):
                raise UserError(f"{where}: {len(actions)} actions but {list(values.shape)} {name}")
        for name, values in ends.items():
            if early := np.flatnonzero(values[:-1]).tolist():
                raise UserError(f"{where}: {name} is true at step {early[0]}, before the end")
        pictures, vectors, final = self._observations(data["observations"], where, len(actions), images)
        terminated = bool(ends["terminations"][-1])
        told = self._told[index]
        return recorded(
            images=pictures,
            vectors=vectors,
            final=final if told.get("final_observation_recorded", True) else {},
            actions=finite(actions, f"{where}: actions"),
            rewards=finite(rewards, f"{where}: rewards"),
            terminated=terminated,
            truncated=not terminated,
            success=_success(data.get("infos"), told),
            instruction=str(told.get("instruction", "")),
            name=where,
        )

    def _observations(
        self, observations: Any, where: str, length: int, images: bool
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Camera -> [T, H, W, 3], vector -> [T, d], feature -> [d] after the last action."""
        pictures, vectors, final = {}, {}, {}
        for name, values in _leaves(observations, self._storage.observation_space):
            if len(values) not in (length, length + 1):
                raise UserError(f"{where}: {length} actions but {len(values)} observations of {name or 'state'}")
            if values.dtype == np.uint8 and values.ndim == 4 and values.shape[3] == 3:
                if images:
                    pictures[name or "pixels"] = values[:length]
                continue
            rows = finite(column(values), f"{where}: observations of {name or 'state'}")
            vectors[name or "state"] = rows[:length]
            if len(rows) > length:
                final[OBSERVATION + (name or "state")] = rows[length]
        return pictures, vectors, final


def _opened(folder: Path, path: Path) -> tuple[dict[str, Any], MinariStorage]:
    from minari.dataset.minari_storage import MinariStorage

    try:
        metadata = json.loads((folder / METADATA).read_text(encoding="utf-8"))
        return metadata, MinariStorage.read(folder)
    except Exception as error:  # gymnasium raises any kind where a space or an environment is unknown to it
        raise UserError(f"{path}: not a Minari data set, or damaged ({_brief(error)})") from error


def _brief(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _choices(space: Space) -> int | None:
    from gymnasium.spaces import Discrete

    return int(space.n) if isinstance(space, Discrete) and space.start == 0 else None


def _leaves(values: Any, space: Space, name: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Every leaf of numbers with its name, in the order of the space."""
    from gymnasium.spaces import Dict, Text, Tuple

    if isinstance(space, Dict):
        inner = [(str(key), values[key], one) for key, one in space.spaces.items()]
    elif isinstance(space, Tuple):
        inner = [(str(place), values[place], one) for place, one in enumerate(space.spaces)]
    elif isinstance(space, Text):
        return
    else:
        yield name, np.asarray(values)
        return
    for key, value, one in inner:
        yield from _leaves(value, one, f"{name}.{key}" if name else key)


def _success(infos: Mapping[str, Any] | None, told: Mapping[str, Any]) -> bool | None:
    if infos and "success" in infos:
        return bool(np.any(infos["success"]))
    return bool(told["success"]) if "success" in told else None
