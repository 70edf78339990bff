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
    auxiliary: Tensor | None = None,
    auxiliary_coef: float = 0.0,
    denominator: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative mean log-likelihood of the demonstrated decisions, to be minimised.

    log_probs       [B, T] or [B, T, F] nats (factors are summed) of the demonstrated actions
    mask            [B, T] True where a demonstrated decision counts (completion tokens, good steps)
    auxiliary       [B, T] a supervised loss per decision (`Evaluation.auxiliary`), added auxiliary_coef times
    denominator     counted decisions of the whole optimizer step, when this is one of several micro-batches

    Metrics: nll (nats per decision), auxiliary_loss (mean per decision, before its coefficient).
    """
    decision = per_decision(log_probs, factor_mask)
    total = mask.sum().clamp(min=1) if denominator is None else denominator
    loss = -torch.where(mask, decision, 0.0).sum() / total
    metrics = {"nll": loss.detach()}
    if auxiliary is not None:
        extra = torch.where(mask, auxiliary, 0.0).sum() / total
        metrics["auxiliary_loss"] = extra.detach()
        loss = loss + auxiliary_coef * extra
    return loss, metrics
