"""Likelihoods of comparisons: by hand, with ties, at their limits, and in micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from policy_core.comparisons import (
    bradley_terry_loss,
    centring_loss,
    davidson_log_probs,
    davidson_loss,
    rao_kupper_log_probs,
    rao_kupper_loss,
)
from tests.policy_core.helpers import NAN, close

CHOSEN = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
REJECTED = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)  # differences 1, -1, 0
TIED = torch.tensor([False, False, True])
WEIGHTS = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)


def softplus(value: float) -> float:
    """-log sigmoid(-value)."""
    return math.log1p(math.exp(value))


# ---------------------------------------------------------------- Bradley-Terry


def test_bradley_terry_by_hand() -> None:
    loss, metrics = bradley_terry_loss(chosen=CHOSEN, rejected=REJECTED, weights=WEIGHTS)
    close(loss, 0.2 * softplus(-1.0) + 0.3 * softplus(1.0) + 0.5 * math.log(2))
    close(metrics["accuracy"], 0.2)  # equal scores are no right answer
    close(metrics["margin"], 0.2 - 0.3)
    close(metrics["mean_reward"], 0.2 * 0.5 + 0.5 * 2.0)


def test_margin_by_hand_and_where_there_is_none() -> None:
    margin = torch.tensor([0.5, NAN, 2.0])
    loss, _ = bradley_terry_loss(chosen=CHOSEN, rejected=REJECTED, weights=WEIGHTS, margin=margin)
    close(loss, 0.2 * softplus(-0.5) + 0.3 * softplus(1.0) + 0.5 * softplus(2.0))


def test_label_smoothing_by_hand() -> None:
    loss, _ = bradley_terry_loss(chosen=CHOSEN, rejected=REJECTED, weights=WEIGHTS, label_smoothing=0.1)
    first, second = 0.9 * softplus(-1.0) + 0.1 * softplus(1.0), 0.9 * softplus(1.0) + 0.1 * softplus(-1.0)
    close(loss, 0.2 * first + 0.3 * second + 0.5 * math.log(2))


def test_heads_are_learned_side_by_side() -> None:
    """Scores [N, K]: the loss is the sum over heads, each with the pairs' weights."""
    chosen = torch.stack([CHOSEN, REJECTED], dim=1)
    rejected = torch.stack([REJECTED, CHOSEN], dim=1)
    together, _ = bradley_terry_loss(chosen=chosen, rejected=rejected, weights=WEIGHTS.unsqueeze(1))
    one, _ = bradley_terry_loss(chosen=CHOSEN, rejected=REJECTED, weights=WEIGHTS)
    other, _ = bradley_terry_loss(chosen=REJECTED, rejected=CHOSEN, weights=WEIGHTS)
    close(together, one + other)


# ---------------------------------------------------------------- ties


@pytest.mark.parametrize(
    "log_probs",
    [
        lambda difference: rao_kupper_log_probs(difference, threshold=0.7),
        lambda difference: davidson_log_probs(difference, nu=0.7),
    ],
)
def test_outcomes_have_probability_one_in_all_and_mirror(log_probs: Callable[[Tensor], Tensor]) -> None:
    difference = torch.tensor([-30.0, -2.0, -0.1, 0.0, 0.4, 3.0, 30.0])
    probabilities = log_probs(difference).exp()
    close(probabilities.sum(-1), torch.ones(7))
    close(log_probs(-difference), log_probs(difference).flip(-1))  # who is called first does not matter
    assert (probabilities[:, 0].diff() > 0).all()  # a better one wins more often
    assert probabilities[:, 1].argmax() == 3  # equals tie most
    assert torch.isfinite(log_probs(torch.tensor([500.0, -500.0]))).all()


def test_rao_kupper_by_hand() -> None:
    """Strengths 3 and 1, theta 2: win 3 / (3 + 2), lose 1 / (1 + 6), tie (4 - 1) * 3 / (5 * 7)."""
    probabilities = rao_kupper_log_probs(torch.tensor([math.log(3.0)]), threshold=math.log(2.0)).exp()
    close(probabilities, [[3 / 5, 9 / 35, 1 / 7]])


def test_davidson_by_hand() -> None:
    """Strengths 4 and 1, nu 1: 4 : sqrt(4) : 1."""
    close(davidson_log_probs(torch.tensor([math.log(4.0)]), nu=1.0).exp(), [[4 / 7, 2 / 7, 1 / 7]])


TIE_LOSSES: list[tuple[Callable[..., tuple[Tensor, dict[str, Tensor]]], str, Callable[..., Tensor]]] = [
    (rao_kupper_loss, "threshold", rao_kupper_log_probs),
    (davidson_loss, "nu", davidson_log_probs),
]


@pytest.mark.parametrize("loss, key, log_probs", TIE_LOSSES)
def test_tie_losses_are_the_likelihood_of_what_happened(
    loss: Callable[..., tuple[Tensor, dict[str, Tensor]]], key: str, log_probs: Callable[..., Tensor]
) -> None:
    value, metrics = loss(chosen=CHOSEN, rejected=REJECTED, tied=TIED, weights=WEIGHTS, **{key: 1.5})
    table = log_probs(CHOSEN - REJECTED, **{key: 1.5})
    close(value, -(0.2 * table[0, 0] + 0.3 * table[1, 0] + 0.5 * table[2, 1]))
    close(metrics["tied"], 0.5)
    close(metrics["tie_probability"], (WEIGHTS * table[:, 1].exp()).sum())
    close(metrics["accuracy"], 0.2)


def test_outcome_accuracy_counts_ties_that_were_foreseen() -> None:
    """nu 1.5: differences 4 and 0 make a win and a tie likeliest; the second pair is tied, the third is not."""
    scores = torch.tensor([4.0, 0.0, 0.0])
    tied = torch.tensor([False, True, False])
    _, metrics = davidson_loss(chosen=scores, rejected=torch.zeros(3), tied=tied, weights=WEIGHTS, nu=1.5)
    close(metrics["outcome_accuracy"], 0.2 + 0.3)


@pytest.mark.parametrize("loss, key", [(rao_kupper_loss, "threshold"), (davidson_loss, "nu")])
def test_which_of_a_tied_pair_comes_first_does_not_matter(
    loss: Callable[..., tuple[Tensor, dict[str, Tensor]]], key: str
) -> None:
    arguments: dict[str, Any] = {"tied": torch.ones(3, dtype=torch.bool), "weights": WEIGHTS, key: 0.8}
    there, _ = loss(chosen=CHOSEN, rejected=REJECTED, **arguments)
    back, _ = loss(chosen=REJECTED, rejected=CHOSEN, **arguments)
    close(there, back)
    # and its gradient draws the two scores together
    chosen = torch.tensor([1.0], requires_grad=True)
    arguments = {"tied": torch.ones(1, dtype=torch.bool), "weights": torch.ones(1), key: 0.8}
    loss(chosen=chosen, rejected=torch.zeros(1), **arguments)[0].backward()
    assert chosen.grad is not None
    assert chosen.grad > 0


@pytest.mark.parametrize("loss, key", [(rao_kupper_loss, "threshold"), (davidson_loss, "nu")])
def test_without_ties_it_is_bradley_terry(loss: Callable[..., tuple[Tensor, dict[str, Tensor]]], key: str) -> None:
    """The threshold (nu) -> 0, on pairs of which none is tied."""
    expected, _ = bradley_terry_loss(chosen=CHOSEN, rejected=REJECTED, weights=WEIGHTS)
    none = torch.zeros(3, dtype=torch.bool)
    value, _ = loss(chosen=CHOSEN, rejected=REJECTED, tied=none, weights=WEIGHTS, **{key: 1e-10})
    close(value, expected, atol=1e-9)


def test_the_threshold_learns_the_share_of_ties() -> None:
    """Equal strengths: P(tie) = (theta - 1) / (theta + 1), so at a share of 1 / 3 the best theta is 2."""
    threshold = torch.tensor(math.log(2.0), requires_grad=True)
    level = torch.zeros(3)
    rao_kupper_loss(chosen=level, rejected=level, tied=TIED, weights=torch.ones(3), threshold=threshold)[
        0
    ].backward()
    assert threshold.grad is not None
    close(threshold.grad, 0.0)
    nu = torch.tensor(1.0, requires_grad=True)  # nu / (nu + 2) = 1 / 3
    davidson_loss(chosen=level, rejected=level, tied=TIED, weights=torch.ones(3), nu=nu)[0].backward()
    assert nu.grad is not None
    close(nu.grad, 0.0)


def test_the_loss_of_equal_scores_is_the_entropy_of_the_outcomes() -> None:
    """Of nu = 1 all three are equally likely."""
    level = torch.zeros(3)
    loss, _ = davidson_loss(chosen=level, rejected=level, tied=TIED, weights=torch.full((3,), 1 / 3), nu=1.0)
    close(loss, math.log(3))


# ---------------------------------------------------------------- centring, and all of them


def test_centring_by_hand() -> None:
    loss, metrics = centring_loss(chosen=CHOSEN, rejected=REJECTED, weights=WEIGHTS, coef=0.1)
    close(loss, 0.1 * (0.2 * 1.0 + 0.3 * 0.0 + 0.5 * 16.0))
    close(metrics["centring_loss"], loss)


ALL: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]] = {
    "bradley_terry": lambda chosen, rejected, tied, weights: bradley_terry_loss(
        chosen=chosen, rejected=rejected, weights=weights, margin=tied * 0.7, label_smoothing=0.2
    ),
    "rao_kupper": lambda chosen, rejected, tied, weights: rao_kupper_loss(
        chosen=chosen, rejected=rejected, tied=tied, weights=weights, threshold=0.4
    ),
    "davidson": lambda chosen, rejected, tied, weights: davidson_loss(
        chosen=chosen, rejected=rejected, tied=tied, weights=weights, nu=0.4
    ),
    "centring": lambda chosen, rejected, tied, weights: centring_loss(
        chosen=chosen, rejected=rejected, weights=weights, coef=0.3
    ),
}


@pytest.mark.parametrize("name", list(ALL))
def test_gradient_by_finite_differences(name: str) -> None:
    inputs = (CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda chosen, rejected: ALL[name](chosen, rejected, TIED, WEIGHTS)[0], inputs)


@pytest.mark.parametrize("name", list(ALL))
def test_micro_batches_add_up(name: str) -> None:
    whole, metrics = ALL[name](CHOSEN, REJECTED, TIED, WEIGHTS)
    parts = [ALL[name](CHOSEN[p], REJECTED[p], TIED[p], WEIGHTS[p]) for p in ([0], [1, 2])]
    close(parts[0][0] + parts[1][0], whole)
    for key, value in metrics.items():
        close(parts[0][1][key] + parts[1][1][key], value)


@pytest.mark.parametrize("name", ["bradley_terry", "rao_kupper", "davidson"])
def test_only_differences_matter(name: str) -> None:
    close(ALL[name](CHOSEN + 5.0, REJECTED + 5.0, TIED, WEIGHTS)[0], ALL[name](CHOSEN, REJECTED, TIED, WEIGHTS)[0])


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"^label_smoothing must be in \[0, 0\.5\), got 0\.5$"):
        bradley_terry_loss(chosen=CHOSEN, rejected=REJECTED, weights=WEIGHTS, label_smoothing=0.5)
    with pytest.raises(ValueError, match=r"^threshold must be above 0, got 0\.0: without it there are no ties$"):
        rao_kupper_log_probs(CHOSEN, threshold=0.0)
    with pytest.raises(ValueError, match=r"^nu must be above 0, got -1\.0: without it there are no ties$"):
        davidson_log_probs(CHOSEN, nu=-1.0)
