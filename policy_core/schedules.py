"""Learning-rate schedules as pure functions of progress."""

from __future__ import annotations

import math
from typing import Literal

import torch

Schedule = Literal["constant", "linear", "cosine"]


def scheduled(initial: float, *, schedule: Schedule, progress: float, warmup: float = 0.0) -> float:
    """The learning rate at `progress` in 0..1 of a run.

    Rises linearly over the first `warmup` share of the run, then stays, falls linearly to 0, or falls along half
    a cosine to 0. Raises ValueError for progress below 0 or a warm-up outside [0, 1).
    """
    if progress < 0 or not 0 <= warmup < 1:
        raise ValueError(f"progress {progress} must be >= 0 and warmup {warmup} in [0, 1)")
    if progress < warmup:
        return initial * progress / warmup
    if schedule == "constant":
        return initial
    remaining = max(0.0, 1.0 - (progress - warmup) / (1.0 - warmup))
    if schedule == "linear":
        return initial * remaining
    return initial * 0.5 * (1.0 - math.cos(math.pi * remaining))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
