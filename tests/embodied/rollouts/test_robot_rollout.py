"""From experience to the core's rollout: bootstraps, episodes and log-probs, by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from embodied.policies.numpy_actor import Spaces
from embodied.policies.state_mlp import StatePolicy
from embodied.rollouts.rollout import Collector, Experience, judge, spaces_of
from embodied.rollouts.workers import EnvironmentConfig, environment_spec
from policy_core import ppo
from policy_core.optimizer import FlatAdam
from policy_core.ppo import PPOConfig
from policy_core.returns import gae

Make = Callable[..., StatePolicy]


@pytest.fixture
def policy(make_policy: Make) -> StatePolicy:
    return make_policy(Spaces(3, 2))


@pytest.fixture
def experience() -> Experience:
    """Row 0: cut by time at column 1, ended at column 3. Row 1: nothing ends. Row 2: both flags at column 0."""
    torch.manual_seed(4)
    terminated, truncated = torch.zeros(3, 5, dtype=torch.bool), torch.zeros(3, 5, dtype=torch.bool)
    truncated[0, 1] = terminated[0, 3] = True
    terminated[2, 0] = truncated[2, 0] = True
    finals = [
        (0, 1, np.full(3, 0.5, np.float32)),
        (0, 3, np.full(3, -0.5, np.float32)),
        (2, 0, np.ones(3, np.float32)),
    ]
    return Experience(
        observations=torch.randn(3, 5, 3),
        actions=torch.randn(3, 5, 2),
        rewards=torch.randn(3, 5),
        terminated=terminated,
        truncated=truncated,
        next_observations=torch.randn(3, 3),
        final_observations=finals,
        episodes=[],
    )


def test_bootstraps_by_hand(policy: StatePolicy, experience: Experience) -> None:
    rollout = judge(experience, policy, gamma=0.9, rewards=experience.rewards)
    rollout.validate()
    values = policy.values(experience.observations)
    torch.testing.assert_close(rollout.values, values)
    after = policy.values(experience.next_observations)
    cut = policy.values(torch.full((3,), 0.5)[None])[0]
    expected: list[list[Any]] = [
        [values[0, 1], cut, values[0, 3], None, after[0]],
        [values[1, 1], values[1, 2], values[1, 3], values[1, 4], after[1]],
        [None, values[2, 2], values[2, 3], values[2, 4], after[2]],
    ]
    assert rollout.next_values is not None
    for row in range(3):
        for column in range(5):
            wanted = expected[row][column]
            if wanted is not None:  # what stands where an episode terminated is ignored
                assert float(rollout.next_values[row, column]) == pytest.approx(float(wanted), rel=1e-5)
    assert rollout.episode.tolist() == [[0, 0, 1, 1, 2], [0] * 5, [0, 1, 1, 1, 1]]
    assert bool(rollout.mask.all())
    assert torch.equal(rollout.discount, torch.full((3, 5), 0.9))


def test_advantages_by_hand(policy: StatePolicy, experience: Experience) -> None:
    """Independent of the core's scan: one episode after the other, as the textbook has it."""
    rollout = judge(experience, policy, gamma=0.9, rewards=experience.rewards)
    advantages, returns = gae(rollout, gae_lambda=0.8)
    values = policy.values(experience.observations).double()
    after = policy.values(experience.next_observations).double()
    cut = float(policy.values(torch.full((1, 3), 0.5)))
    for row, first, last, bootstrap in (
        (0, 0, 1, cut),
        (0, 2, 3, 0.0),
        (0, 4, 4, float(after[0])),
        (1, 0, 4, float(after[1])),
        (2, 0, 0, 0.0),
        (2, 1, 4, float(after[2])),
    ):
        carry, following = 0.0, bootstrap
        for column in range(last, first - 1, -1):
            value = float(values[row, column])
            delta = float(experience.rewards[row, column]) + 0.9 * following - value
            carry = delta + 0.9 * 0.8 * carry
            assert float(advantages[row, column]) == pytest.approx(carry, abs=1e-5)
            assert float(returns[row, column]) == pytest.approx(carry + value, abs=1e-5)
            following = value


def test_the_given_rewards_replace_the_raw_ones(policy: StatePolicy, experience: Experience) -> None:
    scaled = torch.randn(3, 5)
    assert judge(experience, policy, gamma=0.9, rewards=scaled).rewards is scaled


def test_a_reference_gives_its_log_probs(policy: StatePolicy, experience: Experience, make_policy: Make) -> None:
    reference = make_policy(Spaces(3, 2), seed=9)
    rollout = judge(experience, policy, gamma=0.9, rewards=experience.rewards, reference=reference)
    rollout.validate()
    assert rollout.ref_log_probs is not None
    expected = reference.evaluate(experience.observations, experience.actions).log_probs
    torch.testing.assert_close(rollout.ref_log_probs, expected)
    assert judge(experience, policy, gamma=0.9, rewards=experience.rewards).ref_log_probs is None


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
def test_the_first_ratio_is_one(env_id: str, make_policy: Make) -> None:
    """The log-probs of a real rollout are those that the update sees on its first pass, minibatches and all."""
    environment = EnvironmentConfig(env_id, max_episode_steps=20, count=3, workers=0)
    policy = make_policy(spaces_of(environment_spec(environment)))
    with Collector(environment, policy, steps=32, seed=0) as collector:
        experience = collector.collect(policy)
    rollout = judge(experience, policy, gamma=0.99, rewards=experience.rewards)
    rollout.validate()
    advantages, returns = gae(rollout, gae_lambda=0.95)
    metrics = ppo.update(
        policy=policy,
        optimizer=FlatAdam([policy.parameters()], learning_rate=0.0),
        rollout=rollout.decisions(),
        advantages=advantages.flatten().unsqueeze(1),
        returns=returns.flatten().unsqueeze(1),
        config=PPOConfig(epochs=2, minibatch_size=16, learning_rate=0.0),
        generator=torch.Generator().manual_seed(0),
    )
    assert metrics["approx_kl"] == pytest.approx(0.0, abs=1e-9)
    assert metrics["clip_fraction"] == 0.0


def test_the_sampled_actions_fit_the_policys_deviation(make_policy: Make) -> None:
    """numpy acts, torch judges: standardised actions must be standard normal."""
    environment = EnvironmentConfig("Pendulum-v1", count=4, workers=0)
    policy = make_policy(Spaces(3, 1))
    with Collector(environment, policy, steps=1000, seed=0) as collector:
        experience = collector.collect(policy)
    distribution, _ = policy(experience.observations)
    standardised = ((experience.actions - distribution.mean) / policy.log_std.exp()).detach()
    assert abs(float(standardised.mean())) < 0.06
    assert abs(float(standardised.std()) - 1.0) < 0.05


def test_sizes_of_environments() -> None:
    assert spaces_of(environment_spec(EnvironmentConfig("Pendulum-v1", count=1, workers=0))) == Spaces(3, 1)
    assert spaces_of(environment_spec(EnvironmentConfig("CartPole-v1", count=1, workers=0))) == Spaces(4, 2, True)
