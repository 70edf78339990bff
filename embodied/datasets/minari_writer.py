"""Episodes of any source as a Minari data set (HDF5), in the layout that `minari_reader` describes.

A single vector becomes a `Box` observation, several or pictures a `Dict` of boxes; pictures are kept exactly (no
JPEG). Where what was seen after the last action is not known, the last row is repeated, because Minari's
observations have a row more than actions, and the episode's attribute `final_observation_recorded` is False;
pictures are always repeated.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np

from embodied.datasets.minari_reader import METADATA
from embodied.datasets.recorded import OBSERVATION, PROPRIO, RecordedEpisode
from embodied.datasets.source import Source, final_row
from embodied.datasets.staging import StagedEpisodes
from experiment.errors import UserError, storage_errors

if TYPE_CHECKING:
    from gymnasium import Space

_KEPT = (
    "env_spec",
    "eval_env_spec",
    "algorithm_name",
    "author",
    "author_email",
    "code_permalink",
    "description",
    "requirements",
    "ref_max_score",
    "ref_min_score",
)
"""What remains true of the metadata of a Minari source once its episodes are elsewhere."""

_TELLING = ("minari", "played")
"""Kinds of sources whose details are Minari's metadata."""


class MinariTarget:
    """A folder that is assembled from staged episodes."""

    def __init__(
        self, staged: StagedEpisodes, folder: Path, name: str, source: Source, example: RecordedEpisode
    ) -> None:
        """folder: what is made. name: the data set's. Raises UserError when there is nothing to observe."""
        if not example.vectors and not example.images:
            raise UserError(f"{example.name}: has no observations, which Minari needs")
        self._staged, self._folder, self._source = staged, folder, source
        self._choices = source.choices
        self._plain = list(example.vectors) == [PROPRIO] and not example.images
        self._id = re.sub(r"[^-\w]", "-", re.sub(r"-v\d+$", "", name)).strip("-") or "data"
        version = re.search(r"-v\d+$", name)
        self._id += version[0] if version else "-v0"
        self._spaces = {
            "observation_space": _observation_space(example, self._plain),
            "action_space": _action_space(example, source),
        }

    def __len__(self) -> int:
        return len(self._staged)

    def append(self, episode: RecordedEpisode) -> None:
        """Add an episode, on the disk when this returns. Raises UserError when it has no rewards."""
        if episode.rewards is None:
            raise UserError(f"{episode.name}: has no rewards, which Minari needs")
        number, whole = len(self._staged), all(name in episode.final for name in episode.vectors)

        def write(file: h5py.File) -> None:
            group = file.create_group(f"episode_{number}")
            group.attrs.update({"id": number, "total_steps": len(episode)})
            if not whole:
                group.attrs["final_observation_recorded"] = False
            if episode.success is not None:
                group.attrs["success"] = episode.success
            if episode.instruction:
                group.attrs["instruction"] = episode.instruction
            for name, values in _observed(episode, self._plain).items():
                packed = {"compression": "gzip", "compression_opts": 1} if values.ndim > 2 else {}
                group.create_dataset(f"observations{name}", data=values, **packed)
            actions = episode.actions
            group["actions"] = actions if self._choices is None else actions[:, 0].astype(np.int64)
            group["rewards"] = episode.rewards
            last = np.arange(len(episode)) == len(episode) - 1
            group["terminations"] = last & episode.terminated
            group["truncations"] = last & episode.truncated

        self._staged.append(write)

    def finish(self) -> None:
        """Assemble the folder. Raises UserError when the disk is full."""
        import minari
        from minari.serialization import serialize_space

        data = self._folder / "data"
        self._staged.assemble(data / "main_data.hdf5", lambda file: None)
        kept = self._source.details if self._source.kind in _TELLING else {}
        metadata = {name: kept[name] for name in _KEPT if name in kept} | {
            "dataset_id": self._id,
            "minari_version": minari.__version__,
            "data_format": "hdf5",
            "jpeg_encoding": False,
            "total_episodes": len(self._staged),
            "total_steps": sum(self._source.lengths),
            "dataset_size": round((data / "main_data.hdf5").stat().st_size / 1e6, 1),
            **{name: serialize_space(space) for name, space in self._spaces.items()},
        }
        if self._source.choices_inferred:
            metadata["choices_inferred"] = True
        with storage_errors(data):
            (data / METADATA).write_text(json.dumps(metadata), encoding="utf-8")

    def close(self) -> None:
        """Nothing is open between episodes."""


def _observed(episode: RecordedEpisode, plain: bool) -> dict[str, np.ndarray]:
    """ "" or "/NAME" -> [T + 1, ...]."""
    found = {}
    for name, values in episode.vectors.items():
        after = final_row(episode, name) if name in episode.final else values[-1]
        key = "" if plain else f"/{name.removeprefix(OBSERVATION)}"
        found[key] = np.concatenate([values, after[None]]).astype(np.float32)
    return found | {f"/{name}": np.concatenate([one, one[-1:]]) for name, one in episode.images.items()}


def _observation_space(example: RecordedEpisode, plain: bool) -> Space:
    from gymnasium.spaces import Box, Dict

    boxes: OrderedDict[str, Space] = OrderedDict()
    for name, values in example.vectors.items():
        boxes[name.removeprefix(OBSERVATION)] = Box(-np.inf, np.inf, values.shape[1:], np.float32)
    for name, pictures in example.images.items():
        boxes[name] = Box(0, 255, pictures.shape[1:], np.uint8)
    return next(iter(boxes.values())) if plain else Dict(boxes)


def _action_space(example: RecordedEpisode, source: Source) -> Space:
    """The source's, where it tells and the actions are as they were; bounds are not known otherwise."""
    from gymnasium.spaces import Box, Discrete
    from minari.serialization import deserialize_space

    if source.choices is not None:
        return Discrete(source.choices)
    shape = example.actions.shape[1:]
    told = source.details.get("action_space") if source.kind in _TELLING else None
    known = None if told is None else deserialize_space(told)
    return known if isinstance(known, Box) and known.shape == shape else Box(-np.inf, np.inf, shape, np.float32)
