"""Soft actor-critic: losses by hand, who gets which gradient, and a bandit with a known answer."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from policy_core import cql, sac
from policy_core.cql import CQLConfig
from policy_core.critics import ActorCritic, EnsembleCritic
from policy_core.distributions import TanhGaussian
from policy_core.sac import Coefficient, Optimizers, SACConfig, lowest, policy_loss, temperature_loss
from tests.policy_core.test_critics import transitions


class Squashed(nn.Module):
    """A linear tanh-Gaussian."""

    def __init__(self, observations: int, actions: int) -> None:
        super().__init__()
        self.layer = nn.Linear(observations, 2 * actions)

    def distribution_of(self, observations: Tensor) -> TanhGaussian:
        mean, log_std = self.layer(observations).chunk(2, -1)
        return TanhGaussian(mean, log_std.clamp(-5, 2))

    def values_of(self, observations: Tensor) -> Tensor:
        raise NotImplementedError("SAC has no state value")

    def both_of(self, observations: Tensor) -> tuple[Any, Tensor]:
        raise NotImplementedError("SAC has no state value")

    def actor_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.parameters()


def learner(members: int = 2) -> tuple[ActorCritic, Coefficient, Optimizers]:
    torch.manual_seed(0)
    policy = Squashed(2, 1)
    networks = ActorCritic.of(policy, EnsembleCritic(members, 2, 1, (64,)))
    temperature = Coefficient(0.5).double()
    movers = [torch.optim.Adam(m.parameters(), 2e-2) for m in (policy, networks.critic, temperature)]
    return networks, temperature, Optimizers(*movers)


def test_losses_by_hand() -> None:
    log_probs, mask = torch.tensor([-1.0, 2.0, torch.nan]), torch.tensor([True, True, False])
    alpha = torch.tensor(0.5, requires_grad=True)
    assert float(
        policy_loss(log_probs=log_probs, q_values=torch.tensor([1.0, 3.0, 0.0]), temperature=alpha, mask=mask)
    ) == pytest.approx((-0.5 - 1.0 + 1.0 - 3.0) / 2)
    loss = temperature_loss(temperature=alpha, log_probs=log_probs, mask=mask, target_entropy=-1.5)
    assert float(loss) == pytest.approx(-0.5 * (0.5 - 1.5))
    loss.backward()
    assert alpha.grad is not None
    assert float(alpha.grad) == pytest.approx(1.0)  # entropy -0.5 is above the target -1.5: it falls


def test_a_coefficient_is_positive_and_starts_where_asked() -> None:
    coefficient = Coefficient(0.3)
    assert float(coefficient()) == pytest.approx(0.3)
    with torch.no_grad():
        coefficient.log_value.sub_(50.0)
    assert float(coefficient()) > 0


def test_the_minimum_is_over_the_drawn_critics() -> None:
    q_values = torch.arange(12.0).view(4, 3)
    assert lowest(q_values, SACConfig(), None).tolist() == [0.0, 1.0, 2.0]
    seen = {
        tuple(lowest(q_values, SACConfig(target_critics=2), torch.Generator().manual_seed(seed)).tolist())
        for seed in range(60)
    }
    assert seen == {(0.0, 1.0, 2.0), (3.0, 4.0, 5.0), (6.0, 7.0, 8.0)}  # the fourth is never the lower of two


def test_the_policys_step_leaves_the_critics_alone() -> None:
    networks, temperature, optimizers = learner()
    before = [parameter.clone() for parameter in networks.critic.parameters()]
    start = [parameter.clone() for parameter in networks.policy.actor_parameters()]
    sac.improve_policy(networks, temperature, optimizers, transitions(8), SACConfig())
    for parameter, old in zip(networks.critic.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
        assert parameter.grad is None
    moved = zip(networks.policy.actor_parameters(), start, strict=True)
    assert all(not torch.equal(parameter, old) for parameter, old in moved)


def test_critics_may_learn_more_often_than_the_policy() -> None:
    networks, temperature, optimizers = learner()
    kept = [*networks.policy.actor_parameters(), *temperature.parameters()]
    start, critics = ([one.detach().clone() for one in many] for many in (kept, networks.critic.parameters()))
    batch = transitions(8)
    for update in (partial(sac.update, config=SACConfig()), partial(cql.update, config=CQLConfig(samples=2))):
        metrics = update(networks, temperature, optimizers, batch, improve=False)
        assert "policy_loss" not in metrics
        assert all(torch.equal(one, old) for one, old in zip(kept, start, strict=True))
        now = list(networks.critic.parameters())
        assert all(not torch.equal(one, old) for one, old in zip(now, critics, strict=True))


def test_a_fixed_temperature_stays() -> None:
    networks, temperature, optimizers = learner()
    fixed = Optimizers(optimizers.policy, optimizers.critic)
    metrics = sac.update(networks, temperature, fixed, transitions(8), SACConfig())
    assert float(metrics["temperature"]) == pytest.approx(0.5)


@pytest.mark.parametrize("members", [2, 5])
def test_a_bandit_is_solved(members: int) -> None:
    """Reward -(a - 0.6)^2: the mode goes there, and the entropy to its target."""
    networks, temperature, optimizers = learner(members)
    batch = transitions(256)
    batch.rewards.copy_(-4 * (batch.actions.squeeze(-1) - 0.6).square())
    batch.terminated.fill_(True)
    drawn = torch.Generator().manual_seed(0)
    config = SACConfig(target_critics=2 if members > 2 else None)
    for _ in range(800):
        metrics = sac.update(networks, temperature, optimizers, batch, config, generator=drawn)
    mode = networks.policy.distribution_of(batch.observations).mode()
    assert float((mode - 0.6).abs().mean()) < 0.12
    assert float(metrics["entropy"]) == pytest.approx(-1.0, abs=0.35)


@pytest.mark.parametrize(
    "options", [{"initial_temperature": 0.0}, {"target_critics": 0}, {"target_rate": 0.0}, {"target_rate": 1.5}]
)
def test_impossible_settings(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        SACConfig(**options)  # type: ignore[arg-type]
