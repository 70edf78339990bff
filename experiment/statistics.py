"""Intervals for what was measured a finite number of times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a success rate (Wilson 1927).

    Args:
        successes: how many of the trials succeeded.
        n: how many trials there were.
        confidence: coverage, between 0 and 1.

    Returns:
        (low, high), within [0, 1]; (0, 1) when there were no trials.

    Raises:
        ValueError: not 0 <= successes <= n, or not 0 < confidence < 1.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n, got {successes} of {n}")
    z = NormalDist().inv_cdf(0.5 + _check(confidence) / 2)
    if n == 0:
        return 0.0, 1.0
    rate, scale = successes / n, 1 + z**2 / n
    centre = (rate + z**2 / (2 * n)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    # At 0 and n the exact bounds are 0 and 1; rounding would leave 1e-17 beside them.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, confidence: float = 0.95, seed: int = 0, resamples: int = 10_000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron 1979).

    Args:
        values: [N] independent measurements, one per seed or episode.
        confidence: coverage, between 0 and 1.
        seed: of the resampling; the same seed gives the same interval.
        resamples: how many bootstrap means are drawn.

    Returns:
        (low, high).

    Raises:
        ValueError: there are no values, or one of them is not finite, or not 0 < confidence < 1.
    """
    sample = np.asarray(values, dtype=np.float64).ravel()
    if sample.size == 0 or not np.isfinite(sample).all():
        raise ValueError("a bootstrap interval needs at least one value, and finite ones only")
    tail = (1 - _check(confidence)) / 2
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    for begin in range(0, resamples, 500):  # in parts, so that many values do not need much memory
        count = min(500, resamples - begin)
        means[begin : begin + count] = sample[generator.integers(sample.size, size=(count, sample.size))].mean(1)
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _check(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    return confidence
