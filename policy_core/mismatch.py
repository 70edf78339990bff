"""Where what sampled was not quite the policy that learns: truncated importance weights.

A decoder in bfloat16, or another engine, draws from probabilities that round otherwise than the training
forward's. `old_log_probs` are then the training forward's, so that PPO's first ratio is 1, and the surrogate is
weighted by how much likelier the decision was to the policy than to what drew it, min(pi_old / behaviour, cap): the
estimate is right where nothing is cut, and its variance stays bounded (truncated importance sampling, Ionides 2008;
Espeholt 2018, 1802.01561 section 4.1). PPO's ratio begins at pi_old, so the two count nothing twice.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from policy_core.kl import per_decision
from policy_core.rollout import Rollout


def importance_weights(rollout: Rollout, *, level: Literal["decision", "factor"], cap: float) -> Tensor | None:
    """min(exp(old_log_probs - behaviour_log_probs), cap), 1 where nothing was decided; None where what sampled was
    the policy itself.

    Returns [B, T], or [B, T, F] of log-probs of factors at that level.
    """
    behaviour, factors = rollout.behaviour_log_probs, rollout.factor_mask
    if behaviour is None:
        return None
    gap = rollout.old_log_probs - behaviour
    counts = rollout.mask
    if level == "decision":
        gap = per_decision(gap, factors)
    elif gap.dim() == 3:
        counts = counts.unsqueeze(-1) if factors is None else counts.unsqueeze(-1) & factors
    return torch.where(counts, gap, 0.0).exp().clamp(max=cap)


def weighted(advantages: Tensor, weights: Tensor) -> Tensor:
    """Advantages times weights: PPO's surrogate is proportional to the advantage, clipped or not. Of factors where
    either is."""
    if advantages.dim() < weights.dim():
        advantages = advantages.unsqueeze(-1)
    elif weights.dim() < advantages.dim():
        weights = weights.unsqueeze(-1)
    return advantages * weights
