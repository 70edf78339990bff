"""Do probabilities mean what they say? Reliability table, expected calibration error, temperature.

Probabilities are those that an outcome is 1. A preference model only ever sees pairs ordered "chosen first", whose
outcome is always 1: give its logits through `both_ways`, or every table will look over-confident or worse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-2, 1e2
"""Of `fit_temperature`: it meets the lower where logits are never wrong, the upper where they say nothing."""


@dataclass(frozen=True)
class ReliabilityRow:
    """One bin: probabilities in [low, high) (the last one closed), how many, their mean, the mean outcome."""

    low: float
    high: float
    count: int
    confidence: float
    frequency: float


def both_ways(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Score differences chosen - rejected [N] -> logits and outcomes [2N]: each pair once in either order."""
    ones = torch.ones_like(logits)
    return torch.cat([logits, -logits]), torch.cat([ones, torch.zeros_like(ones)])


def reliability_table(probabilities: Tensor, outcomes: Tensor, bins: int = 10) -> list[ReliabilityRow]:
    """Equally wide bins over [0, 1], empty ones left out.

    probabilities, outcomes     [N] in [0, 1]; an outcome is 0 or 1 (0.5 where it is half of either, a tie)

    Raises ValueError for shapes that differ, a probability or an outcome outside [0, 1] (NaN is), or bins < 1.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    probabilities, outcomes = _checked(probabilities, outcomes)
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError("probabilities must be in [0, 1]")
    index = (probabilities * bins).long().clamp(max=bins - 1)
    rows = []
    for number in index.unique().tolist():
        here = index == number
        rows.append(
            ReliabilityRow(
                low=number / bins,
                high=(number + 1) / bins,
                count=int(here.sum()),
                confidence=float(probabilities[here].mean()),
                frequency=float(outcomes[here].mean()),
            )
        )
    return rows


def expected_calibration_error(probabilities: Tensor, outcomes: Tensor, bins: int = 10) -> float:
    """Mean over samples of |confidence - frequency| of their bin (Guo 2017, 1706.04599 eq. 3); [N] each.

    NaN without samples.
    """
    rows = reliability_table(probabilities, outcomes, bins)
    total = sum(row.count for row in rows)
    if total == 0:
        return math.nan
    return sum(row.count * abs(row.confidence - row.frequency) for row in rows) / total


def fit_temperature(logits: Tensor, outcomes: Tensor) -> float:
    """The T that minimises the cross-entropy of sigmoid(logits / T) (Guo 2017, 1706.04599 section 4.2); [N] each.

    Convex in 1 / T, so bisection on the derivative finds it, in float64. Returns a number within MIN_TEMPERATURE
    and MAX_TEMPERATURE. Raises ValueError for shapes that differ, no samples, logits that are not finite, or
    outcomes outside [0, 1].
    """
    logits, outcomes = _checked(logits, outcomes)
    if logits.numel() == 0 or not torch.isfinite(logits).all():
        raise ValueError("a temperature needs logits, all of them finite")

    def slope(inverse: float) -> float:
        return float(((torch.sigmoid(inverse * logits) - outcomes) * logits).sum())

    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    if slope(low) >= 0:
        return MAX_TEMPERATURE
    if slope(high) <= 0:
        return MIN_TEMPERATURE
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 2 / (low + high)


def _checked(values: Tensor, outcomes: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64 without gradients; raises ValueError as the callers say."""
    if values.shape != outcomes.shape or values.dim() != 1:
        raise ValueError(f"wanted two vectors of one length, got {tuple(values.shape)} and {tuple(outcomes.shape)}")
    outcomes = outcomes.detach().double()
    if not ((outcomes >= 0) & (outcomes <= 1)).all():
        raise ValueError("outcomes must be in [0, 1]")
    return values.detach().double(), outcomes
