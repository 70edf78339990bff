"""Data sets of any format as lazy sources of episodes, and the flat view that training from states needs."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from embodied.datasets.episode import Episode
from embodied.datasets.recorded import OBSERVATION, PROPRIO, STATE, RecordedEpisode
from experiment.errors import UserError


class Source(ABC):
    """Episodes on the disk. Opening reads counts and lengths; episodes are read when asked for, and not kept.

    kind: the format's name, such as "minari".
    path: what was opened.
    lengths: steps of every episode.
    fps: steps a second, None where the format does not say.
    choices: how many discrete actions there are, None for continuous ones.
    choices_inferred: whether `choices` is only one more than the largest action that occurs.
    robot_type: what LeRobot calls the robot, None elsewhere.
    names: feature -> what its dimensions are called, where the format says.
    details: what else the format says of the whole, such as Minari's metadata.
    """

    kind: str
    path: Path
    lengths: tuple[int, ...]
    fps: int | None = None
    choices: int | None = None
    choices_inferred: bool = False
    robot_type: str | None = None
    names: Mapping[str, Any] = MappingProxyType({})
    details: Mapping[str, Any] = MappingProxyType({})

    def __len__(self) -> int:
        """Episodes."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[RecordedEpisode]:
        return map(self.read, range(len(self)))

    @property
    def parts(self) -> tuple[Source, ...]:
        """The data sets that this one is made of."""
        return (self,)

    @property
    def places(self) -> tuple[Path, ...]:
        """The files and folders that are read."""
        return (self.path,)

    def identity(self) -> Any:
        """What tells this source from others, and from itself before its files were changed, as JSON."""
        where = [str(place.resolve()) for place in self.places]
        return [self.kind, where, len(self), sum(self.lengths), _stamp(self.places)]

    def read(self, index: int, *, images: bool = True) -> RecordedEpisode:
        """One episode, by its number from 0.

        images: whether to decode pictures; without, `RecordedEpisode.images` is empty.
        Raises UserError, one line with the path, when there is no such episode or something of it is missing,
        damaged, of a wrong shape or not finite.
        """
        if not 0 <= index < len(self):
            known = f"0 to {len(self) - 1}" if len(self) else "none"
            raise UserError(f"{self.path}: has no episode {index}; there are {known}")
        return self._read(index, images)

    @abstractmethod
    def _read(self, index: int, images: bool) -> RecordedEpisode:
        """`read`, of an episode that exists."""

    def episode(
        self, index: int, observation_keys: Sequence[str] | None = None, *, need_rewards: bool = True
    ) -> Episode:
        """The flat view of one episode, without decoding pictures. Raises UserError as `read` and `flat` do."""
        return flat(self.read(index, images=False), observation_keys, need_rewards=need_rewards)


def flat(
    episode: RecordedEpisode, observation_keys: Sequence[str] | None = None, *, need_rewards: bool = True
) -> Episode:
    """The same episode with its vectors side by side in one observation [T, D] float32.

    observation_keys: which vectors, in which order, with or without `observation.` before their names. None: all of
        them, `state` and `environment_state` first, then in the recording's order.
    need_rewards: refuse an episode without rewards; otherwise they are 0.

    The final observation is known where it is of all of these vectors. Raises UserError when a vector is not there,
    there is none, or rewards are needed and were not recorded.
    """
    vectors = episode.vectors
    keys = (
        list(vectors) if observation_keys is None else [_known(key, vectors, episode) for key in observation_keys]
    )
    if not keys:
        what = "has no observations that are vectors" if observation_keys is None else "observation_keys is empty"
        raise UserError(f"{episode.name}: {what}; it has {_listed(vectors, episode)}")
    if episode.rewards is None and need_rewards:
        raise UserError(f"{episode.name}: has no rewards, which learning from values needs")
    rewards = np.zeros(len(episode), np.float32) if episode.rewards is None else episode.rewards
    whole = all(key in episode.final for key in keys)
    return Episode(
        observations=np.concatenate([vectors[key].astype(np.float32) for key in keys], axis=1),
        actions=episode.actions,
        rewards=rewards,
        terminated=episode.terminated,
        truncated=episode.truncated,
        final_observation=np.concatenate([final_row(episode, key) for key in keys]) if whole else None,
        success=episode.success,
        initial_state=episode.initial_state,
        name=episode.name,
    )


def final_row(episode: RecordedEpisode, name: str) -> np.ndarray:
    """[d] float32: what a vector was after the last action. KeyError where it was not recorded."""
    return episode.final[name].astype(np.float32).reshape(-1)


def recorded(
    *, vectors: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray] | None = None, **told: Any
) -> RecordedEpisode:
    """An episode of which the vectors are given by name, without `observation.`, [T, d] each.

    others, told: what else `RecordedEpisode` takes.
    """
    named = {OBSERVATION + name: values for name, values in vectors.items()}
    proprio = named.pop(PROPRIO, np.zeros((len(told["actions"]), 0), np.float32))
    return RecordedEpisode(
        proprio=proprio, state=named.pop(STATE, None), others={**named, **(others or {})}, **told
    )


def column(values: np.ndarray) -> np.ndarray:
    """[T] or [T, ...] numbers as rows of float32: [T, d]."""
    return values.reshape(len(values), -1).astype(np.float32)


def _stamp(places: Iterable[Path]) -> str:
    """A digest of the names, sizes and times of change of files, and of all files in folders; nothing is read."""
    digest = hashlib.sha256()
    for place in places:
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.is_file():
                told = path.stat()
                digest.update(f"{path.relative_to(place)} {told.st_size} {told.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _known(key: str, vectors: Mapping[str, np.ndarray], episode: RecordedEpisode) -> str:
    for name in (key, OBSERVATION + key):
        if name in vectors:
            return name
    raise UserError(f"{episode.name}: has no observation {key!r}; it has {_listed(vectors, episode)}")


def _listed(vectors: Mapping[str, np.ndarray], episode: RecordedEpisode) -> str:
    words = [name.removeprefix(OBSERVATION) for name in vectors] + [
        f"pictures of {name}" for name in episode.images
    ]
    return ", ".join(words) or "none"
