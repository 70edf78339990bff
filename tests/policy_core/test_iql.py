"""IQL's functions by hand, its limits, and a chain on which the answer is known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from policy_core import iql
from policy_core.critics import ActorCritic, EnsembleCritic
from policy_core.distributions import DiagonalGaussian
from policy_core.iql import IQLConfig, advantage_weights, expectile_loss, weighted_likelihood_loss
from policy_core.rollout import Transitions


def test_expectile_loss_by_hand() -> None:
    values = torch.tensor([0.0, 3.0, 5.0], requires_grad=True)
    targets = torch.tensor([2.0, 1.0, torch.nan], requires_grad=True)
    mask = torch.tensor([True, True, False])
    loss = expectile_loss(values=values, targets=targets, mask=mask, expectile=0.8)
    assert float(loss) == pytest.approx((0.8 * 4 + 0.2 * 4) / 2)
    loss.backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, torch.tensor([-0.8 * 2, 0.2 * 2, 0.0]))
    assert targets.grad is None


def test_the_middle_expectile_is_half_the_squared_error() -> None:
    values, targets, mask = torch.randn(50), torch.randn(50), torch.rand(50) < 0.7
    loss = expectile_loss(values=values, targets=targets, mask=mask, expectile=0.5)
    torch.testing.assert_close(loss, 0.5 * (targets - values)[mask].square().mean())


@pytest.mark.parametrize(("expectile", "expected"), [(0.5, 2.0), (0.9, 3.6), (0.99, 3.96)])
def test_the_minimiser_is_the_expectile(expectile: float, expected: float) -> None:
    """Of 0 and 4 in equal parts it is 4 tau, where the two slopes balance."""
    targets, value = torch.tensor([0.0, 4.0]), torch.tensor(1.0, requires_grad=True)
    optimizer = torch.optim.LBFGS([value], max_iter=100, tolerance_grad=1e-12)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = expectile_loss(
            values=value.expand(2), targets=targets, mask=torch.ones(2).bool(), expectile=expectile
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(value) == pytest.approx(expected, abs=1e-6)


def test_advantage_weights_by_hand() -> None:
    advantages = torch.tensor([-1.0, 0.0, 1.0, 100.0], requires_grad=True)
    weights = advantage_weights(advantages=advantages, inverse_temperature=2.0, max_weight=50.0)
    torch.testing.assert_close(
        weights, torch.tensor([torch.tensor(-2.0).exp(), 1.0, torch.tensor(2.0).exp(), 50.0])
    )
    assert not weights.requires_grad
    ones = advantage_weights(advantages=advantages, inverse_temperature=0.0, max_weight=50.0)
    assert ones.tolist() == [1.0] * 4  # beta 0 is cloning


def test_weighted_likelihood_by_hand() -> None:
    log_probs = torch.tensor([-1.0, -2.0, -torch.inf], requires_grad=True)
    weights, mask = torch.tensor([2.0, 0.5, 1.0]), torch.tensor([True, True, False])
    loss = weighted_likelihood_loss(log_probs=log_probs, weights=weights, mask=mask)
    assert float(loss) == pytest.approx((2.0 + 1.0) / 2)
    loss.backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [-1.0, -0.25, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expectile": 1.0}, "expectile must be in"),
        ({"inverse_temperature": -1.0}, "inverse_temperature must not be negative"),
        ({"max_weight": 0.0}, "max_weight must be positive"),
        ({"target_rate": 0.0}, "target_rate must be in"),
    ],
)
def test_impossible_settings(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IQLConfig(**options)


class Table(nn.Module):
    """A value and a normal a state, for observations that are one-hot."""

    def __init__(self, states: int) -> None:
        super().__init__()
        self.mean, self.value = nn.Parameter(torch.zeros(states, 1)), nn.Parameter(torch.zeros(states))

    def distribution_of(self, observations: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(observations @ self.mean, torch.full((1,), -1.0))

    def values_of(self, observations: Tensor) -> Tensor:
        return observations @ self.value

    def both_of(self, observations: Tensor) -> tuple[Any, Tensor]:
        return self.distribution_of(observations), self.values_of(observations)

    def actor_parameters(self) -> Iterator[nn.Parameter]:
        yield self.mean


def crossroads() -> Transitions:
    """Three states in a row; at each, -1 ends with 0 and +1 goes on; the last +1 ends with 1. The data do both."""
    states = torch.eye(3).repeat_interleave(2, 0)
    actions = torch.tensor([-1.0, 1.0]).repeat(3).unsqueeze(1)
    following = torch.stack([states[0], states[2], states[2], states[4], states[4], states[4]])
    terminated = torch.tensor([True, False, True, False, True, True])
    rewards = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    mask = torch.ones(6, dtype=torch.bool)
    return Transitions(states, actions, rewards, following, terminated, torch.full((6,), 0.9), mask)


def test_values_on_a_chain_are_those_of_the_best_that_was_done() -> None:
    batch, policy = crossroads(), Table(3)
    networks = ActorCritic.of(policy, EnsembleCritic(2, 3, 1, (64,)))
    optimizer = torch.optim.Adam([*policy.parameters(), *networks.critic.parameters()], lr=1e-2)
    config = IQLConfig(expectile=0.98, inverse_temperature=10.0, target_rate=0.1)
    for _ in range(3000):
        iql.update(networks, optimizer, batch, config)
    last = 0.98 * 1.0  # of 1 and 0 the expectile; then of what goes on, discounted, and 0
    assert policy.value.tolist() == pytest.approx([last * 0.882**2, last * 0.882, last], abs=5e-3)
    assert bool((policy.mean.flatten() > 0.9).all())  # and the policy takes it


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_replayed_update_is_autograds(autocast: bool, layer_norm: bool) -> None:
    torch.set_default_dtype(torch.float32 if autocast else torch.float64)  # float64 is left alone by autocast
    batch = crossroads()
    batch.mask[2] = False
    outcomes = []
    for replay in (False, True):
        torch.manual_seed(1)
        policy = Table(3)
        networks = ActorCritic.of(policy, EnsembleCritic(2, 3, 1, (16,), layer_norm=layer_norm))
        optimizer = torch.optim.Adam([*policy.parameters(), *networks.critic.parameters()], lr=1e-2)
        traced = iql.traced_gradient(networks) if replay else None
        for _ in range(5):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
                metrics = iql.update(networks, optimizer, batch, IQLConfig(), traced=traced)
        modules = (policy, networks.critic, networks.target)
        outcomes.append((metrics, [p.detach() for module in modules for p in module.parameters()]))
    (metrics, weights), (replayed, same_weights) = outcomes
    assert replayed.keys() == metrics.keys()
    tolerance = 1e-5 if autocast else 1e-12
    torch.testing.assert_close(replayed, metrics, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(same_weights, weights, rtol=tolerance, atol=tolerance)


def test_a_graph_of_one_precision_is_not_replayed_in_another() -> None:
    torch.set_default_dtype(torch.float32)
    policy = Table(3)
    networks = ActorCritic.of(policy, EnsembleCritic(2, 3, 1, (64,)))
    still = torch.optim.SGD([*policy.parameters(), *networks.critic.parameters()], lr=0.0)
    traced = iql.traced_gradient(networks)
    found: dict[bool, torch.Tensor] = {}
    for autocast in (False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
            q_values = iql.update(networks, still, crossroads(), IQLConfig(), traced=traced)["q_values"]
            assert found.setdefault(autocast, q_values) == q_values
    assert found[True] != found[False]
