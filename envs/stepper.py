"""N environments of one kind, stepped one after the other in one process, with exact capture of their state.

The inner loop of online learning. Gymnasium's outermost bookkeeping wrappers (time limit, order enforcing)
are taken off and done here, which saves two Python calls a step; wrappers that an environment registers for
itself stay. Episode k of an environment is reset with `episode_seed(seed, k)`, so what happens in it does not
depend on how environments are spread over processes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit

from envs import capture
from envs.make import EnvironmentSpec, describe, make_environment


class EpisodeRecord(NamedTuple):
    """A finished episode. The success fields are None where the environment reports none.

    success_once: some step succeeded; success_at_end: the last step did. `number` counts the environment's
    episodes from 0; `seed` is what it was reset with.
    """

    episode_return: float
    length: int
    success_once: bool | None
    success_at_end: bool | None
    terminated: bool
    truncated: bool
    number: int
    seed: int


class StepResult(NamedTuple):
    """One step of N environments; the arrays belong to the caller.

    observations: [N, D] float32; where an episode ended, already the first one of the next episode.
    rewards: [N] float32. terminated, truncated: [N] bool; both may be True, as Gymnasium has it.
    final_observations: index -> [D] float32, the true last observation of each episode that ended now.
    episodes: index -> record of each episode that ended now.
    """

    observations: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    final_observations: dict[int, np.ndarray]
    episodes: dict[int, EpisodeRecord]

    def next_observations(self) -> np.ndarray:
        """[N, D]: where each step truly led, also at the end of an episode."""
        result = self.observations.copy()
        for index, final in self.final_observations.items():
            result[index] = final
        return result


def episode_seed(seed: int, number: int) -> int:
    """The reset seed, below 2**31, of episode `number` of an environment whose seed is `seed`."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0] >> 1)


class Stepper:
    """Steps len(seeds) copies of `env_id`; a finished episode is followed by the next one in the same step.

    spec: EnvironmentSpec. observations: [N, D] float32, the latest ones.
    Raises ValueError as `make_environment` does, and when `seeds` is empty or negative.
    """

    def __init__(
        self,
        env_id: str,
        seeds: Sequence[int],
        max_episode_steps: int | None = None,
        *,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if not seeds or min(seeds) < 0:
            raise ValueError(f"seeds must be non-negative, one for each environment, got {list(seeds)}")
        made = [make_environment(env_id, max_episode_steps=max_episode_steps, options=options) for _ in seeds]
        self.spec: EnvironmentSpec = describe(made[0])
        self._environments, limits = zip(*map(_without_bookkeeping, made), strict=True)
        self._limit: int | None = limits[0]
        self._nominal = capture.nominal_fields(self._environments[0])
        self._step_functions = [env.step for env in self._environments]
        self._action_start = 0
        if self.spec.discrete:
            self._action_start = int(self._environments[0].action_space.start)
        n = len(made)
        self._seeds = [int(seed) for seed in seeds]
        self._numbers = [-1] * n
        self._returns = [0.0] * n
        self._lengths = [0] * n
        self._success_once: list[bool | None] = [None] * n
        self._capture_obstacle: str | None = None
        self._capture_checked = False
        self.observations = np.zeros((n, self.spec.observation_dim), np.float32)

    @property
    def num_environments(self) -> int:
        """N."""
        return len(self._seeds)

    def reset(self, seeds: Sequence[int] | None = None) -> np.ndarray:
        """Begin the next episode everywhere, or episode 0 of new seeds; gives observations [N, D] float32."""
        if seeds is not None:
            if len(seeds) != self.num_environments or min(seeds) < 0:
                raise ValueError(f"reset needs {self.num_environments} non-negative seeds, got {list(seeds)}")
            self._seeds = [int(seed) for seed in seeds]
            self._numbers = [-1] * self.num_environments
        for index in range(self.num_environments):
            self.observations[index] = self._begin_episode(index)
        return self.observations.copy()

    def step(self, actions: np.ndarray) -> StepResult:
        """One step everywhere.

        actions: [N, A], clipped to the bounds; or [N] integers counted from 0 when discrete.
        Raises ValueError for a wrong shape, a non-finite action, a choice out of range, or before `reset`.
        """
        chosen = self._check_actions(actions)
        n = len(chosen)
        observations = np.empty_like(self.observations)
        rewards = np.empty(n, np.float32)
        terminations, truncations = np.zeros(n, bool), np.zeros(n, bool)
        final_observations: dict[int, np.ndarray] = {}
        episodes: dict[int, EpisodeRecord] = {}
        limit, lengths, returns, once = self._limit, self._lengths, self._returns, self._success_once

        # local names and an inlined success: this loop costs 1.5 microseconds beside the environment's step
        for index, step in enumerate(self._step_functions):
            observation, reward, terminated, truncated, info = step(chosen[index])
            observations[index] = observation
            rewards[index] = reward
            returns[index] += float(reward)
            lengths[index] += 1
            success = None
            if "success" in info or "is_success" in info:
                success = bool(info["success"] if "success" in info else info["is_success"])
                once[index] = success or bool(once[index])
            if lengths[index] == limit:
                truncated = True
            if terminated or truncated:
                terminations[index], truncations[index] = terminated, truncated
                final_observations[index] = observations[index].copy()
                episodes[index] = self._record(index, success, bool(terminated), bool(truncated))
                observations[index] = self._begin_episode(index)

        self.observations = observations
        return StepResult(observations.copy(), rewards, terminations, truncations, final_observations, episodes)

    @property
    def can_capture(self) -> bool:
        """Whether `state` holds the environments themselves; if not, resuming begins new episodes."""
        return self.capture_obstacle is None

    @property
    def capture_obstacle(self) -> str | None:
        """One line that says why the environments cannot be captured, None if they can."""
        if not self._capture_checked:
            if self._numbers[0] < 0:
                raise ValueError("call reset before state: many environments have their attributes only then")
            found = (capture.obstacle(env, self._nominal) for env in self._environments)
            self._capture_obstacle = next((one for one in found if one is not None), None)
            self._capture_checked = True
        return self._capture_obstacle

    def state(self) -> dict[str, Any]:
        """All that the next steps depend on: dicts, lists, numpy arrays, numbers, strings, None.

        Where `can_capture` is False, only the episode counters. Raises ValueError before the first reset.
        """
        environments = None
        if self.can_capture:
            environments = [capture.capture(env, self._nominal) for env in self._environments]
        return {
            "env_id": self.spec.env_id,
            "seeds": list(self._seeds),
            "numbers": list(self._numbers),
            "returns": list(self._returns),
            "lengths": list(self._lengths),
            "success_once": list(self._success_once),
            "observations": self.observations.copy(),
            "environments": environments,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue where `state()` was taken; without captured environments, begin the next episodes.

        The latest observations are in `observations` afterwards. Raises ValueError when the state is of
        another environment or of another number of them.
        """
        if state["env_id"] != self.spec.env_id or len(state["seeds"]) != self.num_environments:
            raise ValueError(
                f"the state is of {len(state['seeds'])} x {state['env_id']}, "
                f"not of {self.num_environments} x {self.spec.env_id}"
            )
        self._seeds, self._numbers = list(state["seeds"]), list(state["numbers"])
        if state["environments"] is None:
            self.reset()
            return
        self._returns, self._lengths = list(state["returns"]), list(state["lengths"])
        self._success_once = list(state["success_once"])
        self.observations = np.array(state["observations"])
        for env, captured in zip(self._environments, state["environments"], strict=True):
            env.reset(seed=0)  # so that whatever is made at the first reset exists
            capture.restore(env, captured, self._nominal)

    def close(self) -> None:
        """Close the environments."""
        for env in self._environments:
            env.close()

    def _begin_episode(self, index: int) -> np.ndarray:
        self._numbers[index] += 1
        self._returns[index], self._lengths[index], self._success_once[index] = 0.0, 0, None
        seed = episode_seed(self._seeds[index], self._numbers[index])
        return self._environments[index].reset(seed=seed)[0]

    def _record(self, index: int, success: bool | None, terminated: bool, truncated: bool) -> EpisodeRecord:
        return EpisodeRecord(
            episode_return=self._returns[index],
            length=self._lengths[index],
            success_once=self._success_once[index],
            success_at_end=success,
            terminated=terminated,
            truncated=truncated,
            number=self._numbers[index],
            seed=episode_seed(self._seeds[index], self._numbers[index]),
        )

    def _check_actions(self, actions: np.ndarray) -> np.ndarray:
        """The actions as the environments take them: float32 within bounds, or integers from `start`."""
        if self._numbers[0] < 0:
            raise ValueError("call reset before step")
        spec, n = self.spec, self.num_environments
        low, high = spec.action_low, spec.action_high
        if low is None or high is None:
            chosen = np.asarray(actions)
            if chosen.shape != (n,) or chosen.dtype.kind not in "iu":
                raise ValueError(f"actions must be [{n}] integers, got {chosen.dtype} {list(chosen.shape)}")
            if chosen.min() < 0 or chosen.max() >= spec.action_dim:
                raise ValueError(f"actions must be 0 .. {spec.action_dim - 1}, got {chosen.tolist()}")
            return chosen + self._action_start
        chosen = np.asarray(actions, np.float32)
        if chosen.shape != (n, spec.action_dim):
            raise ValueError(f"actions must be [{n}, {spec.action_dim}], got {list(chosen.shape)}")
        if not math.isfinite(chosen.sum()):
            bad = np.flatnonzero(~np.isfinite(chosen).all(axis=1))
            if len(bad):
                raise ValueError(f"the action of environment {bad[0]} is not finite: {chosen[bad[0]].tolist()}")
        return np.minimum(np.maximum(chosen, low), high)


def _without_bookkeeping(env: gymnasium.Env[Any, Any]) -> tuple[gymnasium.Env[Any, Any], int | None]:
    """The environment without its outermost wrappers that only keep books, and its time limit."""
    limit = None
    while isinstance(env, (TimeLimit, OrderEnforcing, PassiveEnvChecker)):
        if isinstance(env, TimeLimit):
            limit = env._max_episode_steps if limit is None else min(limit, env._max_episode_steps)
        env = env.env
    return env, limit
