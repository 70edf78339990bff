"""What a back end must do, and the units that it learns in: the same as our own recipes'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from embodied.datasets.episode import Episode, dataset_statistics
from embodied.policies.numpy_actor import OBSERVATION_LIMIT
from envs.make import EnvironmentSpec
from envs.stepper import EpisodeRecord, Stepper
from experiment.errors import UserError

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Units:
    """Observations are shifted and scaled to the data's moments, actions so that +-1 are the environment's bounds,
    rewards as the data's are.

    mean, std [D]; low, high [A].
    """

    mean: Array
    std: Array
    low: Array
    high: Array
    reward_scale: float = 1.0
    reward_shift: float = 0.0

    @classmethod
    def of(
        cls,
        episodes: Sequence[Episode],
        environment: EnvironmentSpec,
        *,
        reward_scale: float = 1.0,
        reward_shift: float = 0.0,
    ) -> Units:
        """The units of a data set. Raises UserError where actions have no bounds."""
        assert environment.action_low is not None
        assert environment.action_high is not None
        if not (np.isfinite(environment.action_low).all() and np.isfinite(environment.action_high).all()):
            raise UserError(f"{environment.env_id}: back ends need actions with bounds")
        moments = dataset_statistics(episodes)
        std = np.where(moments.observation_std > 0, moments.observation_std, 1.0)
        return cls(
            moments.observation_mean.astype(np.float32),
            std.astype(np.float32),
            environment.action_low,
            environment.action_high,
            reward_scale,
            reward_shift,
        )

    def observations(self, raw: Array) -> Array:
        """[..., D] -> [..., D]."""
        return np.clip((raw - self.mean) / self.std, -OBSERVATION_LIMIT, OBSERVATION_LIMIT).astype(np.float32)

    def actions(self, raw: Array) -> Array:
        """The environment's actions [..., A] -> the same within +-1."""
        clipped = np.clip(raw, self.low, self.high)
        return ((clipped - self.low) / (self.high - self.low) * 2.0 - 1.0).astype(np.float32)

    def to_environment(self, actions: Array) -> Array:
        """Actions [..., A] within +-1 -> the environment's."""
        return (self.low + (actions + 1.0) / 2.0 * (self.high - self.low)).astype(np.float32)

    def rewards(self, raw: Array) -> Array:
        """The environment's rewards [...] -> the learner's."""
        return np.asarray(raw * self.reward_scale + self.reward_shift, np.float32)

    def as_json(self) -> dict[str, Any]:
        """The units as plain numbers and lists, for a file."""
        arrays = {name: getattr(self, name).tolist() for name in ("mean", "std", "low", "high")}
        return {**arrays, "reward_scale": self.reward_scale, "reward_shift": self.reward_shift}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Units:
        """Read what `as_json` gave. Raises KeyError for what is missing."""
        mean, std, low, high = (np.asarray(told[name], np.float32) for name in ("mean", "std", "low", "high"))
        return cls(mean, std, low, high, told.get("reward_scale", 1.0), told.get("reward_shift", 0.0))


class Backend(Protocol):
    """An algorithm of another library under way; everything in learner's units."""

    def learn(self, count: int) -> dict[str, float]:
        """Make `count` updates (offline) or environment steps (online); the latest metrics."""
        ...

    def act(self, observations: Array) -> Array:
        """[N, D] -> the policy's best actions [N, A]."""
        ...

    def save(self, folder: Path) -> None:
        """Write everything that `load` of its module needs, no pickle."""
        ...


def play(
    backend: Backend, units: Units, environment: Any, seeds: Sequence[int], *, width: int = 8
) -> list[EpisodeRecord]:
    """One episode from each seed with the policy's best actions, in the order of the seeds.

    environment: an `EnvironmentConfig`.
    """
    width = min(width, len(seeds))
    limits, options = environment.max_episode_steps, environment.options
    stepper = Stepper(environment.id, list(range(width)), limits, options=options)
    records: list[EpisodeRecord] = []
    for start in range(0, len(seeds), width):
        block = list(seeds[start : start + width])
        stepper.reset(block + block[:1] * (width - len(block)))
        ended: dict[int, EpisodeRecord] = {}
        while len(ended) < width:
            actions = backend.act(units.observations(stepper.observations))
            result = stepper.step(units.to_environment(actions))
            for index, record in result.episodes.items():
                ended.setdefault(index, record)
        records += [ended[index] for index in range(len(block))]
    stepper.close()
    return records
