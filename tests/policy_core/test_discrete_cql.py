"""Conservative values of choices: by hand, against d3rlpy for a hundred updates, and what they prefer."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from d3rlpy.algos import DiscreteCQLConfig as TheirConfig
from torch import Tensor, nn

from policy_core.discrete_cql import ActionValues, DiscreteCQLConfig, double_targets, loss, update
from policy_core.rollout import Transitions
from tests.policy_core import d3rlpy_twins as peers


def transitions(observations: Tensor, actions: Tensor, rewards: Tensor, *, terminated: Tensor) -> Transitions:
    return Transitions(
        observations=observations,
        actions=actions,
        rewards=rewards,
        next_observations=observations.flip(0),
        terminated=terminated,
        discount=torch.full_like(rewards, 0.5),
        mask=torch.ones_like(terminated),
    )


def test_targets_by_hand() -> None:
    """The present values choose, the slow ones judge; where an episode terminated nothing follows."""
    batch = transitions(
        torch.zeros(2, 1), torch.tensor([0, 1]), torch.tensor([1.0, 2.0]), terminated=torch.tensor([False, True])
    )
    found = double_targets(
        batch,
        next_values=torch.tensor([[0.0, 3.0], [1.0, 0.0]]),
        slow_next_values=torch.tensor([[9.0, 4.0], [7.0, 8.0]]),
    )
    assert found.tolist() == [1 + 0.5 * 4, 2.0]


def test_the_loss_by_hand() -> None:
    """Errors of 0.5 (squared, halved) and 3 (linear: 3 - 1/2), and the gap of two equal values, ln 2."""
    values = torch.tensor([[1.0, 1.0], [0.0, 0.0], [5.0, -5.0]])
    total, metrics = loss(
        values=values,
        actions=torch.tensor([0, 1, 1]),
        targets=torch.tensor([1.5, 3.0, 100.0]),
        mask=torch.tensor([True, True, False]),
        config=DiscreteCQLConfig(weight=2.0),
    )
    assert metrics["td_loss"].item() == pytest.approx((0.125 + 2.5) / 2)
    assert metrics["conservative_gap"].item() == pytest.approx(math.log(2))
    assert total.item() == pytest.approx((0.125 + 2.5) / 2 + 2 * math.log(2))
    assert metrics["q_values"].item() == pytest.approx(0.5)


class Twin(nn.Module):
    """d3rlpy's Q function with our signature."""

    def __init__(self, q_function: nn.Module) -> None:
        super().__init__()
        self.inner = copy.deepcopy(q_function)

    def values(self, observations: Tensor) -> Tensor:
        found: Any = self.inner(observations)
        return found.q_value


def values_of(module: nn.Module) -> ActionValues:
    assert isinstance(module, Twin)
    return module.values


def test_a_hundred_updates() -> None:
    impl = peers.build(
        TheirConfig(
            encoder_factory=peers.encoder(),
            batch_size=peers.BATCH,
            gamma=peers.GAMMA,
            alpha=1.5,
            learning_rate=3e-3,
            target_update_interval=1,
        )
    )
    model = Twin(impl._modules.q_funcs[0])
    target = Twin(impl._modules.targ_q_funcs[0])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, eps=1e-8)
    config = DiscreteCQLConfig(weight=1.5, target_rate=1.0)
    for step in range(100):
        theirs, ours = peers.batches(step)
        chosen = torch.randint(peers.ACTIONS, (peers.BATCH,), generator=torch.Generator().manual_seed(step))
        theirs = type(theirs)(**{**vars(theirs), "actions": chosen[:, None].double()})
        ours = Transitions(**{**vars(ours), "actions": chosen})
        expected = impl.inner_update(theirs, step)
        found = update(model, target, values_of, optimizer, ours, config)
        assert found["td_loss"].item() == pytest.approx(expected["td_loss"], rel=1e-7)
        assert found["conservative_gap"].item() == pytest.approx(expected["conservative_loss"], rel=1e-7)
    peers.assert_same_module(model.inner, impl._modules.q_funcs[0], "weight", 1e-8)
    peers.assert_same_module(target.inner, impl._modules.targ_q_funcs[0], "weight", 1e-8)


def test_what_was_never_chosen_looks_worse() -> None:
    """Both choices earn the same where they lead; one of them is not in the data."""
    torch.manual_seed(0)
    model = Twin(Linear())
    target = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    observations, ended = torch.randn(32, 1), torch.ones(32, dtype=torch.bool)
    batch = transitions(observations, torch.zeros(32).long(), torch.ones(32), terminated=ended)
    for _ in range(100):
        update(model, target, values_of, optimizer, batch, DiscreteCQLConfig(weight=0.1))
    done, other = model.values(observations).mean(0).tolist()
    assert done > other + 1
    assert done == pytest.approx(1.0, abs=0.3)


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 2)

    def forward(self, observations: Tensor) -> Any:
        class Output:
            q_value = self.layer(observations)

        return Output


@pytest.mark.parametrize("options", [{"weight": -1.0}, {"target_rate": 0.0}, {"target_rate": 1.5}])
def test_impossible_settings(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="weight must not be negative and target_rate"):
        DiscreteCQLConfig(**options)
