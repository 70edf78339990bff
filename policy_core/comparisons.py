"""Reward models from comparisons: Bradley-Terry, two models of ties, and a centring term.

A score is any real number; only differences matter but for `centring_loss`. The likelihoods are those of one
comparison's outcome. Weights carry the whole optimizer step's denominators (1 / pairs of the step for a mean), so
the losses and metrics of micro-batches add up. Where shapes are [N], any that broadcast do (heads, objectives).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from policy_core.metrics import Metrics


def bradley_terry_loss(
    *,
    chosen: Tensor,
    rejected: Tensor,
    weights: Tensor,
    margin: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """-log sigmoid(chosen - rejected - margin) (Ouyang 2022, 2203.02155 eq. 1; Touvron 2023, 2307.09288 eq. 2).

    chosen, rejected, weights   [N] scores
    margin                      [N] in units of the score, NaN = none; None = none anywhere
    label_smoothing             share of labels taken to be wrong, in [0, 0.5)

    Metrics: accuracy (chosen above rejected), margin (mean difference), mean_reward.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    logits = chosen - rejected
    if margin is not None:
        logits = logits - torch.where(torch.isnan(margin), 0.0, margin)
    losses = -(1 - label_smoothing) * F.logsigmoid(logits)
    if label_smoothing > 0:
        losses = losses - label_smoothing * F.logsigmoid(-logits)
    return (weights * losses).sum(), _score_metrics(chosen, rejected, weights)


def _score_metrics(chosen: Tensor, rejected: Tensor, weights: Tensor) -> Metrics:
    chosen, rejected = chosen.detach(), rejected.detach()
    return {
        "accuracy": (weights * (chosen > rejected)).sum(),
        "margin": (weights * (chosen - rejected)).sum(),
        "mean_reward": (weights * (chosen + rejected) / 2).sum(),
    }


def rao_kupper_log_probs(difference: Tensor, *, threshold: float | Tensor) -> Tensor:
    """Log-probabilities of winning, tying and losing [N, 3] from score differences [N].

    Rao and Kupper 1967 (JASA 62:194), with threshold t = log theta > 0: P(win) = sigmoid(d - t), P(lose) =
    sigmoid(-d - t), the rest ties. Raises ValueError for a number t that is not above 0.
    """
    if not isinstance(threshold, Tensor) and not threshold > 0:
        raise ValueError(f"threshold must be above 0, got {threshold}: without it there are no ties")
    level = torch.as_tensor(threshold, dtype=difference.dtype, device=difference.device)
    win, lose = F.logsigmoid(difference - level), F.logsigmoid(-difference - level)
    return torch.stack([win, torch.log(torch.expm1(2 * level)) + win + lose, lose], dim=-1)


def davidson_log_probs(difference: Tensor, *, nu: float | Tensor) -> Tensor:
    """Log-probabilities of winning, tying and losing [N, 3] from score differences [N].

    Davidson 1970 (JASA 65:317): P(win) : P(tie) : P(lose) = exp(d / 2) : nu : exp(-d / 2). Raises ValueError for a
    number nu that is not above 0.
    """
    if not isinstance(nu, Tensor) and not nu > 0:
        raise ValueError(f"nu must be above 0, got {nu}: without it there are no ties")
    weight = torch.as_tensor(nu, dtype=difference.dtype, device=difference.device)
    logits = torch.stack([difference / 2, weight.log().expand_as(difference), -difference / 2], dim=-1)
    return logits.log_softmax(-1)


def _tie_loss(log_probs: Tensor, *, tied: Tensor, weights: Tensor) -> tuple[Tensor, Metrics]:
    """Negative log-likelihood of what happened, of log-probabilities [N, 3] of winning, tying and losing."""
    happened = tied.long()
    losses = -log_probs.gather(-1, happened.unsqueeze(-1)).squeeze(-1)
    guessed = log_probs.detach()
    return (weights * losses).sum(), {
        "outcome_accuracy": (weights * (guessed.argmax(-1) == happened)).sum(),
        "tied": (weights * tied).sum(),
        "tie_probability": (weights * guessed[..., 1].exp()).sum(),
    }


def rao_kupper_loss(
    *, chosen: Tensor, rejected: Tensor, tied: Tensor, weights: Tensor, threshold: float | Tensor
) -> tuple[Tensor, Metrics]:
    """Negative log-likelihood under Rao and Kupper's model of ties (see `rao_kupper_log_probs`).

    chosen, rejected, weights   [N] scores; which of a tied pair is called chosen does not matter
    tied                        [N] bool
    threshold                   log theta, a number or a parameter that learns

    Metrics: accuracy, margin, mean_reward as in `bradley_terry_loss`; outcome_accuracy (the likeliest of the three
    outcomes happened), tied (share), tie_probability (mean).
    """
    log_probs = rao_kupper_log_probs(chosen - rejected, threshold=threshold)
    loss, metrics = _tie_loss(log_probs, tied=tied, weights=weights)
    return loss, {**_score_metrics(chosen, rejected, weights), **metrics}


def davidson_loss(
    *, chosen: Tensor, rejected: Tensor, tied: Tensor, weights: Tensor, nu: float | Tensor
) -> tuple[Tensor, Metrics]:
    """Negative log-likelihood under Davidson's model of ties (see `davidson_log_probs`).

    As `rao_kupper_loss`, with nu (a number or a parameter that learns) for the threshold.
    """
    log_probs = davidson_log_probs(chosen - rejected, nu=nu)
    loss, metrics = _tie_loss(log_probs, tied=tied, weights=weights)
    return loss, {**_score_metrics(chosen, rejected, weights), **metrics}


def centring_loss(*, chosen: Tensor, rejected: Tensor, weights: Tensor, coef: float) -> tuple[Tensor, Metrics]:
    """coef * (chosen + rejected)^2: pulls scores to mean 0 (Eisenstein 2023, 2312.09244 eq. 2). [N] each.

    Metrics: centring_loss.
    """
    loss = coef * (weights * (chosen + rejected).square()).sum()
    return loss, {"centring_loss": loss.detach()}
