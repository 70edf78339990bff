"""Stepper: same-step reset, seeds, records, errors; capture that continues bit for bit."""

import threading
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import pytest

from envs.make import make_environment
from envs.stepper import Stepper, StepResult, episode_seed


class Counter(gymnasium.Env):
    """Observes (reset seed, step); reward = step; `goal` steps succeed; ends itself at step `end`."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Discrete(3, start=5)

    def __init__(self, end: int = 4, success: Sequence[int] = (2,), key: str = "success") -> None:
        self.end, self.success, self.key = end, tuple(success), key
        self.seen: list[int] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        self.seed_given, self.count = seed or 0, 0
        return np.array([self.seed_given % 1000, 0.0]), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.seen.append(int(action))
        self.count += 1
        observation = np.array([self.seed_given % 1000, float(self.count)])
        info = {} if not self.key else {self.key: np.float32(self.count in self.success)}
        return observation, float(self.count), self.count >= self.end, False, info


class Queue(Counter):
    """Holds something that has no readable state."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = (threading.Lock(),)


@pytest.fixture(autouse=True)
def _registered() -> Any:
    gymnasium.register("Counter-v0", lambda **options: Counter(**options), max_episode_steps=10)
    gymnasium.register("Queue-v0", lambda **options: Queue(**options), max_episode_steps=10)
    yield
    gymnasium.registry.pop("Counter-v0")
    gymnasium.registry.pop("Queue-v0")


def _actions(stepper: Stepper, steps: int, seed: int = 0) -> list[np.ndarray]:
    n, spec, rng = stepper.num_environments, stepper.spec, np.random.default_rng(seed)
    if spec.discrete:
        return [rng.integers(0, spec.action_dim, n) for _ in range(steps)]
    return [rng.uniform(-1.5, 1.5, (n, spec.action_dim)).astype(np.float32) for _ in range(steps)]


def _assert_identical(left: Sequence[StepResult], right: Sequence[StepResult]) -> None:
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a.observations, b.observations)
        np.testing.assert_array_equal(a.rewards, b.rewards)
        assert a.episodes == b.episodes
        assert a.final_observations.keys() == b.final_observations.keys()
        np.testing.assert_array_equal(a.next_observations(), b.next_observations())


def test_a_terminated_episode_is_followed_by_the_next_in_the_same_step() -> None:
    stepper = Stepper("Counter-v0", [7])
    first = stepper.reset()
    assert first.dtype == np.float32
    assert first.tolist() == [[episode_seed(7, 0) % 1000, 0.0]]
    results = [stepper.step(np.array([0])) for _ in range(4)]
    assert [r.terminated.tolist() for r in results] == [[False], [False], [False], [True]]
    assert not any(r.truncated.any() for r in results)
    last = results[-1]
    assert last.rewards.tolist() == [4.0]
    assert last.observations.tolist() == [[episode_seed(7, 1) % 1000, 0.0]]
    assert last.final_observations[0].tolist() == [episode_seed(7, 0) % 1000, 4.0]
    assert last.next_observations().tolist() == [[episode_seed(7, 0) % 1000, 4.0]]
    record = last.episodes[0]
    assert (record.episode_return, record.length) == (1 + 2 + 3 + 4, 4)
    assert (record.success_once, record.success_at_end) == (True, False)
    assert (record.terminated, record.truncated, record.number) == (True, False, 0)
    assert record.seed == episode_seed(7, 0)
    np.testing.assert_array_equal(stepper.observations, last.observations)


def test_the_time_limit_truncates() -> None:
    stepper = Stepper("Counter-v0", [1, 2], max_episode_steps=3)
    stepper.reset()
    results = [stepper.step(np.array([0, 0])) for _ in range(6)]
    assert [r.truncated.all() for r in results] == [False, False, True, False, False, True]
    assert not any(r.terminated.any() for r in results)
    assert [r.episodes[1].number for r in (results[2], results[5])] == [0, 1]
    assert results[5].episodes[1].length == 3


@pytest.mark.parametrize(
    "options, once, at_end",
    [
        ({"success": (4,)}, True, True),
        ({"success": ()}, False, False),
        ({"key": "is_success"}, True, False),
        ({"key": ""}, None, None),
    ],
)
def test_success_is_read_from_the_info(options: dict[str, Any], once: bool | None, at_end: bool | None) -> None:
    stepper = Stepper("Counter-v0", [0], options=options)
    stepper.reset()
    record = [stepper.step(np.array([0])) for _ in range(4)][-1].episodes[0]
    assert (record.success_once, record.success_at_end) == (once, at_end)


def test_discrete_actions_are_counted_from_zero() -> None:
    stepper = Stepper("Counter-v0", [0])
    stepper.reset()
    for action in (0, 1, 2):
        stepper.step(np.array([action]))
    assert stepper._environments[0].unwrapped.seen == [5, 6, 7]


def test_continuous_actions_are_clipped() -> None:
    stepper, expected = Stepper("Pendulum-v1", [3]), make_environment("Pendulum-v1")
    stepper.reset()
    expected.reset(seed=episode_seed(3, 0))
    observation, reward, *_ = expected.step(np.array([2.0], np.float32))
    result = stepper.step(np.array([[9.0]]))
    np.testing.assert_array_equal(result.observations[0], observation.astype(np.float32))
    assert result.rewards[0] == np.float32(reward)


def test_it_gives_what_gymnasium_gives() -> None:
    stepper = Stepper("Hopper-v5", [11], max_episode_steps=30)
    env = make_environment("Hopper-v5", max_episode_steps=30)
    stepper.reset()
    env.reset(seed=episode_seed(11, 0))
    number = 0
    for action in _actions(stepper, 80):
        result = stepper.step(action)
        observation, reward, terminated, truncated, _ = env.step(np.clip(action[0], -1, 1))
        np.testing.assert_array_equal(result.next_observations()[0], observation.astype(np.float32))
        assert result.rewards[0] == np.float32(reward)
        assert (result.terminated[0], result.truncated[0]) == (terminated, truncated)
        if terminated or truncated:
            number += 1
            observation, _ = env.reset(seed=episode_seed(11, number))
            np.testing.assert_array_equal(result.observations[0], observation.astype(np.float32))
    assert number >= 2


def test_results_do_not_depend_on_how_environments_are_spread() -> None:
    together = Stepper("CartPole-v1", [5, 6])
    apart = [Stepper("CartPole-v1", [5]), Stepper("CartPole-v1", [6])]
    actions = _actions(together, 60)
    np.testing.assert_array_equal(together.reset(), np.concatenate([s.reset() for s in apart]))
    ended = 0
    for action in actions:
        result = together.step(action)
        ended += len(result.episodes)
        parts = [stepper.step(action[i : i + 1]) for i, stepper in enumerate(apart)]
        np.testing.assert_array_equal(result.observations, np.concatenate([p.observations for p in parts]))
    assert ended >= 3


def test_reset_with_new_seeds_begins_at_episode_zero() -> None:
    stepper = Stepper("CartPole-v1", [5])
    first = stepper.reset()
    second = stepper.reset()
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(stepper.reset(seeds=[5]), first)


def test_seeds_are_distinct_and_small() -> None:
    seeds = {episode_seed(s, k) for s in range(50) for k in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_results_belong_to_the_caller() -> None:
    stepper = Stepper("CartPole-v1", [5])
    stepper.reset()[:] = 99.0
    kept = stepper.step(np.array([0]))
    before = kept.observations.copy()
    stepper.step(np.array([1]))
    np.testing.assert_array_equal(kept.observations, before)
    kept.observations[:] = 99.0
    assert abs(stepper.observations).max() < 5.0


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="seeds"):
        Stepper("CartPole-v1", [])
    stepper = Stepper("Pendulum-v1", [1, 2])
    with pytest.raises(ValueError, match="reset before step"):
        stepper.step(np.zeros((2, 1)))
    with pytest.raises(ValueError, match="reset before state"):
        stepper.state()
    stepper.reset()
    with pytest.raises(ValueError, match=r"must be \[2, 1\], got \[2\]"):
        stepper.step(np.zeros(2))
    with pytest.raises(ValueError, match="environment 1 is not finite"):
        stepper.step(np.array([[0.0], [np.nan]]))
    with pytest.raises(ValueError, match="environment 0 is not finite"):
        stepper.step(np.array([[np.inf], [0.0]]))
    discrete = Stepper("CartPole-v1", [1])
    discrete.reset()
    with pytest.raises(ValueError, match=r"0 \.\. 1"):
        discrete.step(np.array([2]))
    with pytest.raises(ValueError, match="integers"):
        discrete.step(np.array([0.0]))
    with pytest.raises(ValueError, match="2 x Pendulum-v1, not of 1 x CartPole-v1"):
        discrete.set_state(stepper.state())


@pytest.mark.parametrize(
    "env_id",
    [
        "HalfCheetah-v5",
        "tandem/AdroitDoor-v0",
        "Ant-v5",  # reads body positions of before the step, which are not those of qpos
        "Humanoid-v5",
        "Reacher-v5",
        "CartPole-v1",
        "Pendulum-v1",
        "Acrobot-v1",
        "Counter-v0",
    ],
)
def test_a_captured_state_continues_bit_for_bit(env_id: str) -> None:
    original = Stepper(env_id, [3, 4], max_episode_steps=70)
    original.reset()
    for action in _actions(original, 150):
        original.step(action)
    assert original.can_capture
    state = original.state()
    actions = _actions(original, 100, seed=1)
    expected = [original.step(action) for action in actions]
    assert sum(len(result.episodes) for result in expected) >= 2

    fresh = Stepper(env_id, [3, 4], max_episode_steps=70)
    fresh.set_state(state)
    np.testing.assert_array_equal(fresh.observations, state["observations"])
    _assert_identical(expected, [fresh.step(action) for action in actions])

    original.set_state(state)  # a stepper that has gone on goes back as well
    _assert_identical(expected, [original.step(action) for action in actions])


def test_without_a_readable_state_it_says_so_and_begins_anew() -> None:
    stepper = Stepper("Queue-v0", [3])
    stepper.reset()
    stepper.step(np.array([0]))
    assert not stepper.can_capture
    assert stepper.capture_obstacle == "Queue.lock[0]: _thread.lock has no readable state"
    state = stepper.state()
    assert state["environments"] is None
    fresh = Stepper("Queue-v0", [3])
    fresh.set_state(state)
    assert fresh.observations.tolist() == [[episode_seed(3, 1) % 1000, 0.0]]
    result = [fresh.step(np.array([0])) for _ in range(4)][-1]
    assert result.episodes[0].number == 1
    assert result.episodes[0].length == 4
