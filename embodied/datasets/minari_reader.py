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

import io
import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
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
        self._told, self._folder = told, folder
        self._numbers = _without_pictures(self._storage.observation_space)
        self.choices = _choices(self._storage.action_space)
        self.choices_inferred = self.choices is not None and bool(self.details.get("choices_inferred"))

    @property
    def places(self) -> tuple[Path, ...]:
        """The folder, which may have been named by an id."""
        return (self._folder,)

    def _read(self, index: int, images: bool) -> RecordedEpisode:
        where = f"{self.path}: episode {index}"
        try:
            data = self._stored(index, images)
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
        space = self._storage.observation_space if images else self._numbers
        pictures, vectors, final = self._observations(data["observations"], space, where, len(actions))
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

    def _stored(self, index: int, images: bool) -> Mapping[str, Any]:
        """What is kept of an episode. Without images no picture is read, which costs more than all else."""
        stored, numbers = self._storage, self._numbers
        if images or numbers == stored.observation_space:
            (data,) = stored.get_episodes([index])
        elif stored.FORMAT == "hdf5":
            data = _hdf5_numbers(self._folder / "main_data.hdf5", index, numbers, stored.jpeg_encoding)
        else:
            fewer = type(stored)(self._folder, numbers, stored.action_space, stored.jpeg_encoding)
            (data,) = fewer.get_episodes([index])
        return data

    def _observations(
        self, observations: Any, space: Space, where: str, length: int
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Camera -> [T, H, W, 3], vector -> [T, d], feature -> [d] after the last action."""
        pictures, vectors, final = {}, {}, {}
        for name, values in _leaves(observations, space):
            if len(values) not in (length, length + 1):
                raise UserError(f"{where}: {length} actions but {len(values)} observations of {name or 'state'}")
            if values.dtype == np.uint8 and values.ndim == 4 and values.shape[3] == 3:
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


def _is_picture(space: Space) -> bool:
    from gymnasium.spaces import Box

    return isinstance(space, Box) and space.dtype == np.uint8 and len(space.shape) == 3 and space.shape[2] == 3


def _without_pictures(space: Space) -> Space:
    """The same space, with an empty dictionary, of which nothing is read, for every picture."""
    from gymnasium.spaces import Dict, Tuple

    if isinstance(space, Dict):
        return Dict(OrderedDict((key, _without_pictures(one)) for key, one in space.spaces.items()))
    if isinstance(space, Tuple):
        return Tuple([_without_pictures(one) for one in space.spaces])
    return Dict() if _is_picture(space) else space


def _hdf5_numbers(path: Path, index: int, space: Space, jpeg: bool) -> dict[str, Any]:
    """An episode as the library gives it, of its observations only what the space has."""
    with h5py.File(path, "r") as file:
        group = file[f"episode_{index}"]
        names = ("actions", "rewards", "terminations", "truncations")
        found: dict[str, Any] = {name: group[name][()] for name in names}
        found["observations"] = _hdf5_leaves(group["observations"], space, jpeg)
        if "infos/success" in group:
            found["infos"] = {"success": group["infos/success"][()]}
    return found


def _hdf5_leaves(stored: h5py.Group | h5py.Dataset, space: Space, jpeg: bool) -> Any:
    from gymnasium.spaces import Dict, Text, Tuple
    from minari.dataset.minari_storage import is_image_space
    from PIL import Image

    if isinstance(space, Dict):
        return {key: _hdf5_leaves(stored[key], one, jpeg) for key, one in space.spaces.items()}
    if isinstance(space, Tuple):
        return tuple(_hdf5_leaves(stored[f"_index_{i}"], one, jpeg) for i, one in enumerate(space.spaces))
    if isinstance(space, Text):
        return None
    if jpeg and is_image_space(space):  # not of three channels: a vector here, though kept as a picture
        return np.stack([np.asarray(Image.open(io.BytesIO(one))) for one in stored[()]])
    return stored[()]


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
        yield name, np.asarray(values, np.uint8 if _is_picture(space) else None)
        return
    for key, value, one in inner:
        yield from _leaves(value, one, f"{name}.{key}" if name else key)


def _success(infos: Mapping[str, Any] | None, told: Mapping[str, Any]) -> bool | None:
    if infos and "success" in infos:
        return bool(np.any(infos["success"]))
    return bool(told["success"]) if "success" in told else None
