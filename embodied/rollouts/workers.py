"""What a worker process does with environments that give flat states: roll them out with its copy of the actor.

One exchange a rollout, none a step: the parent writes the actor's weights into shared memory, every worker steps
its environments for the whole horizon and writes what it saw into its rows of shared arrays. Noise and resets are
drawn per environment, so the number of workers does not change which episodes are played.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embodied.policies.numpy_actor import NumpyActor, Spaces, StatePolicyConfig
from embodied.rollouts.processes import Layout, SharedArrays
from envs.make import EnvironmentSpec, describe, make_environment
from envs.stepper import EpisodeRecord, Stepper
from experiment.errors import UserError, user_errors


@dataclass(frozen=True)
class EnvironmentConfig:
    """id, options: what `gymnasium.make` takes; max_episode_steps: another time limit than the environment's own.

    count: environments stepped together; workers: processes to share them (0 = this process; at most `count`).
    """

    id: str = "HalfCheetah-v5"
    max_episode_steps: int | None = None
    options: dict[str, str | bool | int | float] = field(default_factory=dict)
    count: int = 8
    workers: int = 2

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.workers <= self.count:
            raise ValueError(f"environment.workers must be 0..count, got {self.workers} for {self.count}")


def environment_spec(config: EnvironmentConfig) -> EnvironmentSpec:
    """The specification of the environment that `config` names; UserError if it cannot be made."""
    with user_errors("environment.id"):
        environment = make_environment(
            config.id, max_episode_steps=config.max_episode_steps, options=config.options
        )
    spec = describe(environment)
    environment.close()
    return spec


@dataclass(frozen=True)
class Collected:
    """What one worker reports beside the shared arrays.

    final_observations  (row, column, observation [D]) where an episode was cut or ended
    next_observations   [n, D] after the last column
    episodes            those that ended, in order of time
    """

    final_observations: list[tuple[int, int, NDArray[np.float32]]]
    next_observations: NDArray[np.float32]
    episodes: list[EpisodeRecord]


def layout_of(count: int, steps: int, spaces: Spaces, weights: int) -> Layout:
    """The shared arrays [count, steps, ...] of a rollout, and the actor's flat weights."""
    action: tuple[tuple[int, ...], str] = ((), "int64") if spaces.discrete else ((spaces.action_size,), "float32")
    return {
        "observations": ((count, steps, spaces.observation_size), "float32"),
        "actions": ((count, steps, *action[0]), action[1]),
        "rewards": ((count, steps), "float32"),
        "terminated": ((count, steps), "bool"),
        "truncated": ((count, steps), "bool"),
        "weights": ((weights,), "float32"),
    }


def environment_seed(seed: int, row: int) -> int:
    """The seed of a training environment, 1000 to a run's seed; always below those that evaluation plays."""
    return (seed * 1000 + row) % 9_999_991  # the largest prime below 10 million


class RolloutWorker:
    """Steps the environments of rows `rows` of the shared arrays."""

    def __init__(
        self,
        rows: range,
        environment: EnvironmentConfig,
        spaces: Spaces,
        policy: StatePolicyConfig,
        arrays: SharedArrays,
        seed: int,
    ) -> None:
        self.environment, self.rows = environment, rows
        seeds = [environment_seed(seed, row) for row in rows]
        self.stepper = Stepper(environment.id, seeds, environment.max_episode_steps, options=environment.options)
        self.actor = NumpyActor(spaces, policy)
        self.generators = [np.random.default_rng([row_seed, 1]) for row_seed in seeds]
        self.arrays = {
            name: arrays.view(name)[rows.start : rows.stop]
            for name in ("observations", "actions", "rewards", "terminated", "truncated")
        }
        self.weights = arrays.view("weights")
        self.stepper.reset()
        self._evaluation: Stepper | None = None

    def collect(self, deterministic: bool = False) -> Collected:
        """Fill this worker's rows with the present weights. deterministic: with the policy's modes, not samples."""
        arrays, stepper = self.arrays, self.stepper
        self.actor.load(self.weights)
        steps = arrays["rewards"].shape[1]
        noise = np.stack([self.actor.noise(generator, steps) for generator in self.generators], axis=1)
        finals: list[tuple[int, int, NDArray[np.float32]]] = []
        episodes: list[EpisodeRecord] = []
        observations, actions_out = arrays["observations"], arrays["actions"]
        for step in range(steps):
            observations[:, step] = stepper.observations
            actions = self.actor.act(stepper.observations, None if deterministic else noise[step])
            actions_out[:, step] = actions
            try:
                result = stepper.step(actions)
            except ValueError as error:
                if np.isfinite(stepper.observations).all():
                    raise
                raise UserError(
                    f"environment {self.environment.id} gave an observation that is not finite (NaN or infinity);"
                    " mend it, or go on from the last checkpoint"
                ) from error
            arrays["rewards"][:, step] = result.rewards
            arrays["terminated"][:, step] = result.terminated
            arrays["truncated"][:, step] = result.truncated
            if result.episodes:
                first = self.rows.start
                finals += [(first + i, step, seen) for i, seen in result.final_observations.items()]
                episodes += result.episodes.values()
        return Collected(finals, stepper.observations, episodes)

    def evaluate(self, seeds: Sequence[int], deterministic: bool) -> list[EpisodeRecord]:
        """One episode from each seed in environments of their own; training's are not touched."""
        if not seeds:  # fewer episodes than workers
            return []
        self.actor.load(self.weights)
        width = min(len(seeds), max(1, len(self.rows)))
        if self._evaluation is None or self._evaluation.num_environments != width:
            if self._evaluation is not None:
                self._evaluation.close()
            config = self.environment
            self._evaluation = Stepper(
                config.id, list(range(width)), config.max_episode_steps, options=config.options
            )
        stepper = self._evaluation
        records: list[EpisodeRecord] = []
        for start in range(0, len(seeds), width):
            block = list(seeds[start : start + width])
            filled = block + block[:1] * (width - len(block))
            stepper.reset(filled)
            generators = [np.random.default_rng([seed, 2]) for seed in filled]
            ended: dict[int, EpisodeRecord] = {}
            while len(ended) < width:
                noise = None
                if not deterministic:
                    noise = np.concatenate([self.actor.noise(generator, 1) for generator in generators])
                result = stepper.step(self.actor.act(stepper.observations, noise))
                for index, record in result.episodes.items():
                    ended.setdefault(index, record)
            records += [ended[index] for index in range(len(block))]
        return records

    def state(self) -> dict[str, Any]:
        """Environments and noise, for a checkpoint."""
        return {
            "stepper": self.stepper.state(),
            "generators": [generator.bit_generator.state for generator in self.generators],
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`."""
        self.stepper.set_state(state["stepper"])
        for generator, saved in zip(self.generators, state["generators"], strict=True):
            generator.bit_generator.state = saved

    def capture_obstacle(self) -> str | None:
        """Why the environments cannot be captured, None if they can."""
        return self.stepper.capture_obstacle

    def close(self) -> None:
        """Close the environments."""
        self.stepper.close()
        if self._evaluation is not None:
            self._evaluation.close()
