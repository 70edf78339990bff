"""The flat Adam takes torch's steps; frozen groups stand still; a checkpoint continues bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from policy_core.optimizer import FlatAdam, NonFiniteLoss, clipped_step, flatten_
from tests.policy_core.helpers import close, weights_of


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def loss_of(model: nn.Module, step: int) -> Tensor:
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    result: Tensor = (model(inputs) - inputs[:, :2].square()).square().mean()
    return result


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad(set_to_none=True)
        loss_of(model, step).backward()
        optimizer.step()


def groups_of(model: nn.Sequential) -> list[list[nn.Parameter]]:
    return [list(model[0].parameters()), list(model[2].parameters())]


def test_flatten_keeps_the_weights_and_makes_them_views() -> None:
    model = network()
    before = weights_of(model)
    flat = flatten_(model.parameters())
    close(flat.detach(), before, atol=0.0)
    assert flat.grad is not None
    with torch.no_grad():
        flat.add_(1.0)
    close(weights_of(model), before + 1.0)
    loss_of(model, 0).backward()
    close(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), flat.grad, atol=0.0)
    assert flat.grad.any()


@pytest.mark.parametrize(
    "group", [[], [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, dtype=torch.float16))]]
)
def test_flatten_refuses_empty_and_mixed_groups(group: list[nn.Parameter]) -> None:
    message = f"^a flat group needs parameters of one dtype and device, got {len(group)} kinds$"
    with pytest.raises(ValueError, match=message):
        flatten_(group)


def test_equals_torchs_adam_step_for_step() -> None:
    ours, theirs = network(), network()
    flat = FlatAdam(groups_of(ours), learning_rate=0.01)
    plain = torch.optim.Adam(theirs.parameters(), lr=0.01, eps=1e-5)
    for step in range(20):
        train(ours, flat, range(step, step + 1))
        train(theirs, plain, range(step, step + 1))
        close(weights_of(ours), weights_of(theirs))


def test_epsilon_and_learning_rate_are_used() -> None:
    # the first step of Adam moves by lr * g / (|g| + eps)
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = FlatAdam([[weight]], learning_rate=0.5, epsilon=0.25)
    optimizer.zero_grad()
    (weight * torch.tensor([0.75, -0.25])).sum().backward()
    optimizer.step()
    close(weight.detach(), [1.0 - 0.5 * 0.75, -2.0 + 0.5 * 0.5])


def test_zero_grad_forgets_the_last_gradient() -> None:
    model = network()
    optimizer = FlatAdam(groups_of(model), learning_rate=0.01)
    loss_of(model, 0).backward()
    optimizer.zero_grad(set_to_none=True)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_a_frozen_group_is_left_alone_with_its_moments_and_step_count() -> None:
    model = network()
    optimizer = FlatAdam(groups_of(model), learning_rate=0.01)
    train(model, optimizer, range(3))
    first, second = optimizer.param_groups[0]["params"]
    frozen = {name: value.clone() for name, value in optimizer.state[first].items()}
    before, others = first.detach().clone(), second.detach().clone()

    model[0].requires_grad_(False)
    train(model, optimizer, range(3, 6))
    assert torch.equal(first.detach(), before)
    assert not torch.equal(second.detach(), others)
    for name, value in frozen.items():
        assert torch.equal(optimizer.state[first][name], value)

    model[0].requires_grad_(True)
    reference = copy.deepcopy(weights_of(model))
    train(model, optimizer, range(6, 7))
    assert optimizer.state[first]["step"] == 4
    assert not torch.equal(first.detach(), reference[: first.numel()])


def test_state_dict_round_trip_continues_bit_for_bit() -> None:
    straight, broken = network(), network()
    one = FlatAdam(groups_of(straight), learning_rate=0.01)
    two = FlatAdam(groups_of(broken), learning_rate=0.01)
    train(straight, one, range(10))
    train(broken, two, range(4))

    resumed = network()
    saved = copy.deepcopy((broken.state_dict(), two.state_dict()))
    three = FlatAdam(groups_of(resumed), learning_rate=0.5)
    resumed.load_state_dict(saved[0])
    three.load_state_dict(saved[1])
    train(resumed, three, range(4, 10))
    assert torch.equal(weights_of(resumed), weights_of(straight))


def test_a_step_is_clipped_as_torch_clips_it() -> None:
    for largest in (1e-3, 1e3):
        ours, theirs = network(), network()
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in (ours, theirs)]
        for model in (ours, theirs):
            loss_of(model, 0).backward()
        norm = clipped_step(optimizers[0], max_grad_norm=largest, losses={})
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), largest)
        optimizers[1].step()
        close(norm, expected)
        close(weights_of(ours), weights_of(theirs))


def test_a_gradient_that_is_not_finite_spoils_no_weights() -> None:
    model = network()
    before = weights_of(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    (loss_of(model, 0) * torch.inf).backward()
    with pytest.raises(NonFiniteLoss, match=r"^NaN or infinity in the update: value_loss not finite \("):
        clipped_step(optimizer, max_grad_norm=1.0, losses={"loss": 1.0, "value_loss": torch.tensor(torch.inf)})
    assert torch.equal(weights_of(model), before)
    assert not optimizer.state
