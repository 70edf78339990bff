"""The ensemble of critics against networks built one by one, both ways of multiplying, and the slow copy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from policy_core.critics import ActorCritic, EnsembleCritic, bootstrap, of_decisions, polyak_, td_loss
from policy_core.networks import MANY
from policy_core.rollout import Transitions


def transitions(count: int = 3, observations: int = 2, actions: int = 1) -> Any:
    """Plain `Transitions`; Any, for the checker knows their tensors as nested ones."""
    return Transitions(
        observations=torch.randn(count, observations),
        actions=torch.rand(count, actions) * 2 - 1,
        rewards=torch.randn(count),
        next_observations=torch.randn(count, observations),
        terminated=torch.zeros(count, dtype=torch.bool),
        discount=torch.full((count,), 0.9),
        mask=torch.ones(count, dtype=torch.bool),
    )


def alone(critic: EnsembleCritic, member: int, rows: Tensor) -> Tensor:
    """One member, written out with torch's own functions."""
    last = len(critic.weights) - 1
    for layer in range(last + 1):
        rows = F.linear(rows, critic.weights[layer][member].t(), critic.biases[layer][member, 0])
        if layer < last:
            if critic.layer_norm:
                gain, shift = critic.gains[layer][member, 0], critic.shifts[layer][member, 0]
                rows = F.layer_norm(rows, rows.shape[-1:], gain, shift)
            rows = F.relu(rows)
    return rows.squeeze(-1)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """One thread multiplies many rows member by member."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("rows", [5, MANY + 3])
def test_values_are_not_rounded_to_the_precision_of_products(layer_norm: bool, rows: int) -> None:
    torch.set_default_dtype(torch.float32)  # float64 is left alone by autocast
    torch.manual_seed(0)
    critic = EnsembleCritic(2, 4, 2, (64, 64), layer_norm=layer_norm)
    critic.weights[-1].data *= 1000.0
    observations, actions = torch.randn(rows, 4), torch.randn(rows, 2)
    hidden: list[Tensor] = []
    relu = torch.relu_

    def watched(layer: Tensor) -> Tensor:
        hidden.append(relu(layer))
        return hidden[-1]

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "relu_", watched)
        values = critic(observations, actions)
    assert values.dtype == torch.float32
    last = torch.stack(hidden[-2:]) if hidden[-1].dim() == 2 else hidden[-1]  # of two members, or of both at once
    exact = last.bfloat16().double() @ critic.weights[-1].data.bfloat16().double()
    exact = exact.squeeze(-1) + critic.biases[-1].data[:, 0].double()
    assert values.abs().max() > 100
    # layer_norm leaves a float32 layer, which a batch of members multiplies as it is
    tolerance = 5e-3 if layer_norm else 2e-5
    assert torch.allclose(values.double(), exact, rtol=0, atol=tolerance * float(exact.abs().max()))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rows", [5, MANY + 3])
def test_the_gradient_of_rounded_products_is_theirs(rows: int) -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    critic = EnsembleCritic(2, 4, 2, (64, 64))
    observations, actions, weights = torch.randn(rows, 4), torch.randn(rows, 2), torch.rand(2, rows)
    parameters = list(critic.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad((critic(observations, actions) * weights).sum(), parameters)
    exact = torch.autograd.grad((critic(observations, actions) * weights).sum(), parameters)
    for mine, right in zip(found, exact, strict=True):
        assert torch.linalg.vector_norm(mine - right) < 0.05 * torch.linalg.vector_norm(right)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("rows", [5, MANY + 3])
def test_every_member_is_a_network_of_its_own(layer_norm: bool, rows: int) -> None:
    critic = EnsembleCritic(3, 4, 2, (7, 6), layer_norm=layer_norm)
    if layer_norm:
        for parameter in (*critic.gains, *critic.shifts):
            parameter.data += 0.3 * torch.randn_like(parameter)
    observations, actions = torch.randn(rows, 4), torch.randn(rows, 2, requires_grad=True)
    values = critic(observations, actions)
    assert values.shape == (3, rows)
    joined = torch.cat([observations, actions], -1)
    expected = torch.stack([alone(critic, member, joined) for member in range(3)])
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    inputs = [actions, *critic.parameters()]
    found = torch.autograd.grad(values.square().sum(), inputs)
    for gradient, reference in zip(found, torch.autograd.grad(expected.square().sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("states", [3, MANY])
def test_many_actions_of_every_state(states: int) -> None:
    critic = EnsembleCritic(2, 4, 2, (8,))
    observations, actions = torch.randn(states, 4), torch.randn(5, states, 2)
    values = critic(observations, actions)
    one_by_one = torch.stack([critic(observations, chosen) for chosen in actions], dim=1)
    torch.testing.assert_close(values, one_by_one, rtol=1e-12, atol=1e-12)


def test_weights_start_within_torchs_bounds() -> None:
    critic = EnsembleCritic(2, 60, 4, (100, 50))
    for weight, bias, fan_in in zip(critic.weights, critic.biases, (64, 100, 50), strict=True):
        assert weight.abs().max().item() <= fan_in**-0.5
        assert bias.abs().max().item() <= fan_in**-0.5
        assert weight.std().item() == pytest.approx(fan_in**-0.5 / 3**0.5, rel=0.1)
    assert not torch.equal(critic.weights[0][0], critic.weights[0][1])


def test_the_slow_copy_starts_equal_and_moves_by_its_rate() -> None:
    class Nobody:
        pass

    critic = EnsembleCritic(2, 3, 1, (4,))
    networks = ActorCritic.of(Nobody(), critic)  # type: ignore[arg-type]
    before = [parameter.clone() for parameter in networks.target.parameters()]
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(1.0)
    polyak_(networks.target, critic, rate=0.25)
    for moved, start in zip(networks.target.parameters(), before, strict=True):
        torch.testing.assert_close(moved, start + 0.25)
        assert not moved.requires_grad
    polyak_(networks.target, critic, rate=1.0)
    for moved, online in zip(networks.target.parameters(), critic.parameters(), strict=True):
        torch.testing.assert_close(moved, online.detach())


def test_td_loss_by_hand() -> None:
    q_values = torch.tensor([[1.0, 2.0, 9.0], [0.0, 4.0, 9.0]], requires_grad=True)
    targets = torch.tensor([3.0, 2.0, torch.nan], requires_grad=True)
    mask = torch.tensor([True, True, False])
    loss = td_loss(q_values=q_values, targets=targets, mask=mask)
    assert float(loss) == pytest.approx((4 + 0) / 2 + (9 + 4) / 2)
    loss.backward()
    assert q_values.grad is not None
    assert q_values.grad.tolist() == [[-2.0, 0.0, 0.0], [-3.0, 2.0, 0.0]]
    assert targets.grad is None


def test_parts_of_a_batch_add_up() -> None:
    q_values, targets, mask = torch.randn(2, 6), torch.randn(6), torch.tensor([1, 1, 0, 1, 1, 1]).bool()
    whole = td_loss(q_values=q_values, targets=targets, mask=mask)
    parts = [
        td_loss(q_values=q_values[:, rows], targets=targets[rows], mask=mask[rows], denominator=float(mask.sum()))
        for rows in (slice(0, 4), slice(4, 6))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_nothing_is_bootstrapped_after_a_termination() -> None:
    batch = transitions()
    batch.terminated[1] = True
    following = torch.tensor([2.0, torch.inf, -1.0])
    expected = batch.rewards + torch.tensor([1.8, 0.0, -0.9])
    torch.testing.assert_close(bootstrap(batch, following), expected)


def test_log_probs_of_a_decision_are_summed_over_its_factors() -> None:
    batch = transitions(2)
    assert of_decisions(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), batch).tolist() == [3.0, 7.0]
    assert of_decisions(torch.tensor([1.0, 2.0]), batch).tolist() == [1.0, 2.0]


def test_a_critic_without_hidden_layers_is_linear() -> None:
    critic = EnsembleCritic(1, 2, 1, ())
    observations, actions = torch.randn(4, 2), torch.randn(4, 1)
    expected = torch.cat([observations, actions], -1) @ critic.weights[0][0] + critic.biases[0][0]
    torch.testing.assert_close(critic(observations, actions)[0], expected.squeeze(-1))
