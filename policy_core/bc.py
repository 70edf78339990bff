"""Behaviour cloning and supervised fine-tuning: the same masked log-likelihood."""

from __future__ import annotations

import torch
from torch import Tensor

from policy_core.kl import per_decision


def bc_loss(
    *,
    log_probs: Tensor,
    mask: Tensor,
    factor_mask: Tensor | None = None,
    denominator: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative mean log-likelihood of the demonstrated decisions, to be minimised.

    log_probs       [B, T] or [B, T, F] nats (factors are summed) of the demonstrated actions
    mask            [B, T] True where a demonstrated decision counts (completion tokens, good steps)
    denominator     counted decisions of the whole optimizer step, when this is one of several micro-batches

    Metrics: nll (nats per decision).
    """
    decision = per_decision(log_probs, factor_mask)
    total = mask.sum().clamp(min=1) if denominator is None else denominator
    loss = -torch.where(mask, decision, 0.0).sum() / total
    return loss, {"nll": loss.detach()}
