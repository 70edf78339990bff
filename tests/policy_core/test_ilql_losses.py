"""ILQL's terms by hand on a vocabulary of three, what must not change them, and the shift of the logits."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from policy_core import ilql
from policy_core.ilql import MASKED_OUT, ILQLConfig, advantage_shift
from policy_core.iql import IQLConfig
from policy_core.returns import next_values_of

SOFT_MAXIMUM = math.log(1 + math.e + math.e**2)  # of (0, 1, 2) in any order


@dataclass(frozen=True)
class Batch:
    rewards: Tensor
    terminated: Tensor
    discount: Tensor
    mask: Tensor


def config(*, conservative: float = 0.0, likelihood: float = 0.0, inverse_temperature: float = 0.0) -> ILQLConfig:
    terms = IQLConfig(expectile=0.9, inverse_temperature=inverse_temperature)
    return ILQLConfig(conservative_weight=conservative, likelihood_weight=likelihood, iql=terms)


def two_decisions() -> dict[str, Any]:
    """Tokens 1 and 2 of three, the second ends the text and earns 1; discount 0.5."""
    return {
        "log_probs": torch.tensor([[-1.0, -2.0]]),
        "values": torch.tensor([[0.2, 0.4]]),
        "next_values": torch.tensor([[0.4, 9.0]]),  # nothing comes after an end
        "q_values": torch.tensor([[[[0.0, 1.0, 2.0], [1.0, 1.0, 1.0]]], [[[0.0, 0.0, 0.0], [2.0, 0.0, 1.0]]]]),
        "slow_q_values": torch.tensor([[[0.5, 0.1]], [[0.7, 0.9]]]),
        "actions": torch.tensor([[1, 2]]),
        "batch": Batch(
            rewards=torch.tensor([[0.0, 1.0]]),
            terminated=torch.tensor([[False, True]]),
            discount=torch.full((1, 2), 0.5),
            mask=torch.ones(1, 2, dtype=torch.bool),
        ),
    }


def test_every_term_by_hand() -> None:
    loss, metrics = ilql.loss(**two_decisions(), config=config())
    # targets 0.2 and 1; critics say 1 and 1, 0 and 1
    assert float(metrics["critic_loss"]) == pytest.approx((0.8**2 + 0.2**2) / 2)
    # the lower slow critic is 0.5 and 0.1: 0.3 above the value, weight 0.9, and 0.3 below it, weight 0.1
    assert float(metrics["value_loss"]) == pytest.approx((0.9 * 0.09 + 0.1 * 0.09) / 2)
    assert float(metrics["conservative_gap"]) == pytest.approx(
        (SOFT_MAXIMUM - 1 + math.log(3)) / 2 + (math.log(3) + SOFT_MAXIMUM - 1) / 2
    )
    assert float(metrics["policy_loss"]) == pytest.approx(1.5)
    assert float(loss) == pytest.approx(0.34 + 0.045)
    whole, _ = ilql.loss(**two_decisions(), config=config(conservative=0.1, likelihood=2.0))
    assert float(whole) == pytest.approx(0.385 + 0.1 * (SOFT_MAXIMUM - 1 + math.log(3)) + 3.0)


def test_the_likelihood_may_be_weighed_by_advantage() -> None:
    _, metrics = ilql.loss(**two_decisions(), config=config(inverse_temperature=2.0))
    assert float(metrics["policy_loss"]) == pytest.approx((math.exp(0.6) + 2 * math.exp(-0.6)) / 2)


def gradients(parts: dict[str, Any], **more: Any) -> tuple[float, dict[str, Tensor]]:
    """The loss, and its gradient in everything that learns."""
    learned = {name: parts[name].clone().requires_grad_() for name in ("log_probs", "values", "q_values")}
    loss, _ = ilql.loss(**{**parts, **learned}, config=config(conservative=0.3, likelihood=0.7), **more)
    loss.backward()
    return loss.item(), {name: tensor.grad for name, tensor in learned.items() if tensor.grad is not None}


def with_column(parts: dict[str, Any], at: int) -> dict[str, Any]:
    """A masked column of large numbers before column `at`."""

    def insert(tensor: Tensor, dim: int, filling: float) -> Tensor:
        left, right = tensor.split([at, tensor.shape[dim] - at], dim)
        shape = list(tensor.shape)
        shape[dim] = 1
        return torch.cat([left, torch.full(shape, filling, dtype=tensor.dtype), right], dim)

    batch = parts["batch"]
    return {
        **{name: insert(parts[name], 1, 50.0) for name in ("log_probs", "values", "next_values")},
        **{name: insert(parts[name], 2, 50.0) for name in ("q_values", "slow_q_values")},
        "actions": insert(parts["actions"], 1, 0),
        "batch": Batch(
            rewards=insert(batch.rewards, 1, 50.0),
            terminated=insert(batch.terminated, 1, 0),
            discount=insert(batch.discount, 1, 0.1),
            mask=insert(batch.mask, 1, 0),
        ),
    }


@pytest.mark.parametrize("at", [0, 1, 2])
def test_padding_and_inserted_observations_change_nothing(at: int) -> None:
    """Padding on either side and a token that nobody chose in between, the next value found past it."""
    parts = two_decisions()
    wider = with_column(parts, at)
    batch = wider["batch"]
    wider["next_values"] = next_values_of(
        values=wider["values"],
        mask=batch.mask,
        episode=torch.zeros_like(wider["actions"]),
        terminated=batch.terminated,
        final_values=None,
    )
    expected, of_expected = gradients(parts)
    found, of_found = gradients(wider)
    assert found == pytest.approx(expected)
    kept = [column for column in range(3) if column != at]
    for name, gradient in of_expected.items():
        dim = 2 if name == "q_values" else 1
        torch.testing.assert_close(of_found[name].index_select(dim, torch.tensor(kept)), gradient)
        assert of_found[name].select(dim, at).eq(0).all(), name


def test_decisions_may_be_split_into_micro_batches() -> None:
    parts = two_decisions()
    expected, whole = gradients(parts)
    batch = parts["batch"]
    total = 0.0
    for column in range(2):
        mask = torch.zeros_like(batch.mask)
        mask[:, column] = True
        loss, part = gradients({**parts, "batch": replace(batch, mask=mask)}, denominator=2.0)
        total += loss
        for name, gradient in part.items():
            whole[name] = whole[name] - gradient
    assert total == pytest.approx(expected)
    for name, rest in whole.items():
        torch.testing.assert_close(rest, torch.zeros_like(rest), msg=name)


def test_no_gradient_reaches_targets() -> None:
    parts = two_decisions()
    for name in ("next_values", "slow_q_values"):
        parts[name].requires_grad_()
    parts["values"].requires_grad_()
    loss, _ = ilql.loss(**parts, config=config())
    loss.backward()
    assert parts["next_values"].grad is None
    assert parts["slow_q_values"].grad is None
    assert parts["values"].grad.abs().sum() > 0


def test_shift_by_hand() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0])
    slow = torch.tensor([[0.5, 0.1, 3.0], [0.7, -0.2, 2.0]])
    value = torch.tensor(0.3)
    shifted = advantage_shift(logits=logits, slow_q_values=slow, values=value, beta=2.0)
    torch.testing.assert_close(shifted, torch.tensor([0.0 + 0.4, 1.0 - 1.0, -1.0 + 3.4]))
    best = advantage_shift(logits=logits, slow_q_values=slow, values=value, beta=2.0, top_k=2)
    torch.testing.assert_close(best, torch.tensor([0.4, MASKED_OUT, 2.4]))
    assert advantage_shift(logits=logits, slow_q_values=slow, values=value, beta=0.0) is logits
    assert advantage_shift(logits=logits, slow_q_values=slow, values=value, beta=0.0, top_k=3) is logits


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        ILQLConfig(conservative_weight=-0.1)
    with pytest.raises(ValueError, match="expectile"):
        IQLConfig(expectile=1.0)
