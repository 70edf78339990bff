"""What an update says of itself: numbers by name, averaged over its steps, or the terms that went wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Metrics = dict[str, Tensor]


def average(history: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Mean of each metric over the optimizer steps that report it."""
    names = {name: None for metrics in history for name in metrics}
    return {
        name: float(torch.stack([metrics[name] for metrics in history if name in metrics]).mean()) for name in names
    }


def describe(metrics: Mapping[str, float | Tensor], grad_norm: float) -> str:
    """Name the terms of a step that went wrong."""
    bad = [name for name, value in metrics.items() if not math.isfinite(float(value))]
    culprit = f"{', '.join(bad)} not finite" if bad else "the losses are finite, their gradient is not"
    return f"NaN or infinity in the update: {culprit} (gradient norm {grad_norm:g})"
