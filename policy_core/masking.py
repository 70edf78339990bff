"""Masked statistics and the weights that turn per-decision losses into one number.

A loss is `(per_decision * weights).sum()`. The weights carry the whole aggregation rule, so splitting a batch
into micro-batches, padding it or inserting observation columns cannot change the gradient: the denominators
are those of the whole optimizer step.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["decision", "episode", "constant"]
FLAT = 1e-6
"""Share of the largest number within which numbers are one and the same: what is left is rounding."""


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over counted entries; what is masked may be NaN. Any equal shapes -> scalar."""
    return torch.where(mask, values, 0.0).sum()


def masked_mean(values: Tensor, mask: Tensor, *, denominator: float | None = None) -> Tensor:
    """Mean over counted entries, 0 where nothing counts. Any equal shapes -> scalar.

    denominator     counted entries of the whole optimizer step, when this is one of several micro-batches
    """
    total = mask.sum().clamp(min=1) if denominator is None else denominator
    return masked_sum(values, mask) / total


def masked_std(values: Tensor, mask: Tensor) -> Tensor:
    """Standard deviation over counted entries (n - 1 in the denominator), 0 below two entries."""
    count = mask.sum()
    squares = masked_sum((values - masked_mean(values, mask)) ** 2, mask)
    return (squares / (count - 1).clamp(min=1)).sqrt()


def normalize(values: Tensor, mask: Tensor, *, epsilon: float = 1e-8) -> Tensor:
    """Counted entries shifted to mean 0 and scaled to standard deviation 1; the rest is 0. [B, T] -> [B, T].

    All are 0 where the entries are one and the same up to rounding, which would be scaled up to 1 otherwise.
    """
    high = torch.where(mask, values, -torch.inf).amax()
    low = torch.where(mask, values, torch.inf).amin()
    flat = high - low <= FLAT * torch.maximum(high.abs(), low.abs())
    centred = values - masked_mean(values, mask)
    return torch.where(mask & ~flat, centred / (masked_std(values, mask) + epsilon), 0.0)


def episode_index(mask: Tensor, episode: Tensor) -> tuple[Tensor, int]:
    """Number the episodes that have at least one decision.

    mask, episode [B, T] -> index [B, T] int in 0..E-1 on decisions and -1 elsewhere, and E. The same id in two
    rows means two episodes.
    """
    rows = torch.arange(mask.shape[0], device=mask.device).unsqueeze(1).expand_as(mask)
    keys = rows * (episode.max().clamp(min=0) + 1) + episode
    unique, inverse = torch.unique(keys[mask], return_inverse=True)
    index = torch.full_like(episode, -1)
    index[mask] = inverse.to(index.dtype)
    return index, int(unique.numel())


def aggregation_weights(
    *,
    mask: Tensor,
    episode: Tensor,
    aggregation: Aggregation,
    constant: float | None = None,
    factor_mask: Tensor | None = None,
) -> Tensor:
    """Weights with which per-decision (or per-factor) losses are summed.

    mask, episode   [B, T]
    factor_mask     [B, T, F] when losses are per factor; the weights then are [B, T, F], else [B, T]
    aggregation     "decision": every counted decision (factor) weighs the same (token-mean, DAPO 2503.14476);
                    "episode": mean within each episode, then over episodes (GRPO 2402.03300);
                    "constant": sum within an episode over `constant`, then mean over episodes (Dr.GRPO
                    2503.20783 eq. 2 with its maximum length), so that long episodes are not made weak

    Raises ValueError if "constant" comes without its number.
    """
    counted = mask if factor_mask is None else mask.unsqueeze(-1) & factor_mask
    weights = counted.to(torch.get_default_dtype())
    if aggregation == "decision":
        return weights / weights.sum().clamp(min=1)
    index, episodes = episode_index(mask, episode)
    if aggregation == "constant":
        if constant is None:
            raise ValueError("aggregation 'constant' needs aggregation_constant, the longest episode's decisions")
        return weights / (constant * max(episodes, 1))
    per_decision = weights if factor_mask is None else weights.sum(-1)
    lengths = per_decision.new_zeros(max(episodes, 1)).index_add_(0, index[mask], per_decision[mask])
    share = torch.zeros_like(per_decision)
    share[mask] = 1.0 / (lengths.clamp(min=1)[index[mask]] * max(episodes, 1))
    return weights * (share if factor_mask is None else share.unsqueeze(-1))
