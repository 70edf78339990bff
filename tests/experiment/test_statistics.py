"""Intervals against hand-computed and published numbers."""

from __future__ import annotations

import numpy as np
import pytest

from experiment.statistics import bootstrap_interval, wilson_interval


def test_wilson_by_hand() -> None:
    # z = 1.959964, n = 10, p = 0.8: centre (0.8 + 0.1920729) / 1.3841459, half width 0.2265838
    low, high = wilson_interval(8, 10)
    assert low == pytest.approx(0.4901625, abs=1e-7)
    assert high == pytest.approx(0.9433178, abs=1e-7)
    # with no success the upper end is z^2 / (n + z^2) = 3.8414588 / 13.8414588
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-7)
    assert wilson_interval(10, 10) == pytest.approx((1 - 0.2775328, 1.0), abs=1e-7)
    assert (wilson_interval(0, 10)[0], wilson_interval(10, 10)[1]) == (0.0, 1.0)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_wilson_agrees_with_scipy() -> None:
    from scipy.stats import binomtest

    for successes, n, confidence in [(1, 7, 0.9), (123, 200, 0.95), (199, 200, 0.99)]:
        expected = binomtest(successes, n).proportion_ci(confidence, method="wilson")
        assert wilson_interval(successes, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_bootstrap() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    low, high = bootstrap_interval(values)
    # For a mean of many values the percentile interval is the normal one: +- 1.96 s / sqrt(n)
    half = 1.959964 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.01)
    assert high == pytest.approx(values.mean() + half, abs=0.01)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(values, seed=1) != (low, high)
    narrow = bootstrap_interval(values, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert bootstrap_interval([2.5]) == (2.5, 2.5)


def test_refusals() -> None:
    for successes, n in [(-1, 3), (4, 3)]:
        with pytest.raises(ValueError, match="0 <= successes <= n"):
            wilson_interval(successes, n)
    for confidence in (0.0, 1.0, 95.0):
        with pytest.raises(ValueError, match="between 0 and 1"):
            wilson_interval(1, 2, confidence)
        with pytest.raises(ValueError, match="between 0 and 1"):
            bootstrap_interval([1.0], confidence)
    for values in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="at least one value"):
            bootstrap_interval(values)
