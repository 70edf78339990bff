"""Behaviour cloning's loss by hand."""

from __future__ import annotations

import torch

from policy_core.bc import bc_loss
from tests.policy_core.helpers import NAN, close, flags


def test_masked_mean_of_the_negative_log_likelihood() -> None:
    log_probs = torch.tensor([[-1.0, NAN, -2.0], [-6.0, NAN, NAN]], requires_grad=True)
    loss, metrics = bc_loss(log_probs=log_probs, mask=flags("101", "100"))
    close(loss.detach(), 3.0)
    close(metrics["nll"], 3.0)
    assert not metrics["nll"].requires_grad
    # raising a demonstrated action's log-probability lowers the loss; nothing else matters
    close(torch.autograd.grad(loss, log_probs)[0], [[-1 / 3, 0, -1 / 3], [-1 / 3, 0, 0]])


def test_factors_are_summed_where_they_were_executed() -> None:
    log_probs = torch.tensor([[[-1.0, -2.0], [-4.0, NAN]]])
    factor_mask = torch.tensor([[[True, True], [True, False]]])
    close(bc_loss(log_probs=log_probs, mask=flags("11"), factor_mask=factor_mask)[0], (3.0 + 4.0) / 2)
    close(bc_loss(log_probs=log_probs, mask=flags("10"))[0], 3.0)


def test_micro_batches_with_the_whole_steps_denominator_add_up() -> None:
    log_probs = torch.randn(4, 3)
    mask = flags("111", "100", "110", "000")
    whole, _ = bc_loss(log_probs=log_probs, mask=mask)
    parts = [
        bc_loss(log_probs=log_probs[rows], mask=mask[rows], denominator=6.0)[0]
        for rows in (slice(0, 1), slice(1, 4))
    ]
    close(parts[0] + parts[1], whole)


def test_nothing_demonstrated_is_no_loss() -> None:
    close(bc_loss(log_probs=torch.full((1, 2), NAN), mask=flags("00"))[0], 0.0)
