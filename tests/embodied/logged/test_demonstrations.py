"""Demonstrations as training data, and the likelihood term beside PPO."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from embodied.datasets.episode import Episode
from embodied.logged.demonstrations import (
    DemonstrationBatches,
    DemonstrationTerm,
    EpisodesConfig,
    best_episodes,
    read_demonstrations,
    stack_steps,
)
from embodied.policies.numpy_actor import Spaces
from embodied.policies.state_mlp import StatePolicy
from embodied.rollouts.workers import EnvironmentConfig, environment_spec
from envs.make import EnvironmentSpec
from experiment.errors import UserError

Make = Callable[..., StatePolicy]


@pytest.fixture(scope="module")
def pendulum() -> EnvironmentSpec:
    return environment_spec(EnvironmentConfig("Pendulum-v1", count=1, workers=0))


def test_steps_are_stacked_and_actions_clipped_as_the_environment_clips_them(pendulum: EnvironmentSpec) -> None:
    def episode(values: list[float]) -> Episode:
        column = np.array(values, np.float32)[:, None]
        return Episode(np.repeat(column, 3, 1), column, column[:, 0], terminated=False, truncated=True)

    observations, actions = stack_steps([episode([0.5, -9.0]), episode([3.0])], pendulum)
    assert observations.tolist() == [[0.5] * 3, [-9.0] * 3, [3.0] * 3]
    assert actions.tolist() == [[0.5], [-2.0], [2.0]]  # torques within +-2


def test_a_file_is_read_whole(pendulum: EnvironmentSpec, pendulum_demonstrations: Path) -> None:
    observations, actions = stack_steps(
        read_demonstrations(EpisodesConfig(path=str(pendulum_demonstrations)), pendulum), pendulum
    )
    assert (observations.shape, actions.shape) == ((600, 3), (600, 1))
    assert observations.dtype == actions.dtype == torch.float32
    expected = torch.tanh(observations @ torch.tensor([[0.5], [-1.0], [-0.2]]))
    torch.testing.assert_close(actions, expected, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_named(
    pendulum: EnvironmentSpec, pendulum_demonstrations: Path, tmp_path: Path
) -> None:
    cheetah = environment_spec(EnvironmentConfig("HalfCheetah-v5", count=1, workers=0))
    with pytest.raises(UserError, match="observations have 3 dimensions and actions 1, but HalfCheetah-v5 has 17"):
        read_demonstrations(EpisodesConfig(path=str(pendulum_demonstrations)), cheetah)
    with pytest.raises(UserError, match=r"none\.hdf5: no such file"):
        read_demonstrations(EpisodesConfig(path=str(tmp_path / "none.hdf5")), pendulum)


@pytest.fixture
def batches(pendulum: EnvironmentSpec, pendulum_demonstrations: Path) -> DemonstrationBatches:
    term = DemonstrationTerm(path=str(pendulum_demonstrations), coef=0.5, decay=0.9, batch_size=7)
    loaded = DemonstrationBatches.load(term, pendulum, seed=3)
    assert loaded is not None
    return loaded


def test_no_file_is_no_term(pendulum: EnvironmentSpec) -> None:
    assert DemonstrationBatches.load(DemonstrationTerm(), pendulum, seed=0) is None


@pytest.mark.parametrize(("update", "weight"), [(-4, 0.5), (0, 0.5), (1, 0.5), (2, 0.5 * 0.9), (11, 0.5 * 0.9**10)])
def test_the_term_by_hand(batches: DemonstrationBatches, make_policy: Make, update: int, weight: float) -> None:
    """coef * decay**(update - 1) * mean negative log-likelihood; constant until the critic is warm."""
    policy = make_policy(Spaces(3, 1))
    rows = torch.randint(600, (7,), generator=torch.Generator().manual_seed(3 + 1))
    distribution, _ = policy(batches.observations[rows])
    reference = torch.distributions.Normal(distribution.mean, policy.log_std.exp())
    nll = -reference.log_prob(batches.actions[rows]).sum(-1).mean()
    value, metrics = batches.auxiliary_loss(policy, update)()
    torch.testing.assert_close(value, weight * nll, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics["demonstration_nll"], nll.detach(), rtol=1e-5, atol=1e-6)
    value.backward()
    assert policy.actor.weight.grad is not None
    assert bool((policy.actor.weight.grad != 0).any())
    assert policy.critic.weight.grad is None or bool((policy.critic.weight.grad == 0).all())


def test_batches_differ_and_continue_from_their_state(batches: DemonstrationBatches, make_policy: Make) -> None:
    policy = make_policy(Spaces(3, 1))
    loss = batches.auxiliary_loss(policy, 1)
    first = loss()[0]
    state = batches.state_dict()
    expected = [float(loss()[0].detach()) for _ in range(3)]
    assert len({float(first.detach()), *expected}) == 4
    batches.generator.manual_seed(77)
    batches.load_state_dict(state)
    assert [float(loss()[0].detach()) for _ in range(3)] == expected


def test_the_best_episodes_keep_their_order() -> None:
    def earning(reward: float) -> Episode:
        return Episode(np.zeros((2, 1), np.float32), np.zeros((2, 1), np.float32), np.full(2, reward), True, False)

    episodes = [earning(reward) for reward in (3.0, 1.0, 4.0, 2.0)]
    kept = best_episodes(episodes, 0.5)
    assert [episode.rewards[0] for episode in kept] == [3.0, 4.0]
    assert len(best_episodes(episodes, 0.01)) == 1
    assert best_episodes(episodes, 1.0) == episodes
