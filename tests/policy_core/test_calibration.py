"""Reliability, calibration error and temperature, by hand and at their limits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from policy_core.calibration import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    ReliabilityRow,
    both_ways,
    expected_calibration_error,
    fit_temperature,
    reliability_table,
)
from tests.policy_core.helpers import NAN, close

PROBABILITIES = torch.tensor([0.0, 0.125, 0.25, 0.5, 0.625, 1.0])
OUTCOMES = torch.tensor([0.0, 1.0, 0.0, 0.5, 1.0, 1.0])


def test_table_by_hand() -> None:
    """Four bins; an edge belongs to the bin above it, 1 to the last."""
    assert reliability_table(PROBABILITIES, OUTCOMES, bins=4) == [
        ReliabilityRow(low=0.0, high=0.25, count=2, confidence=0.0625, frequency=0.5),
        ReliabilityRow(low=0.25, high=0.5, count=1, confidence=0.25, frequency=0.0),
        ReliabilityRow(low=0.5, high=0.75, count=2, confidence=0.5625, frequency=0.75),
        ReliabilityRow(low=0.75, high=1.0, count=1, confidence=1.0, frequency=1.0),
    ]


def test_error_by_hand() -> None:
    expected = (2 * 0.4375 + 1 * 0.25 + 2 * 0.1875 + 0) / 6
    assert expected_calibration_error(PROBABILITIES, OUTCOMES, bins=4) == pytest.approx(expected, abs=1e-15)
    assert math.isnan(expected_calibration_error(torch.zeros(0), torch.zeros(0)))


def test_float32_and_booleans_are_accepted() -> None:
    rows = reliability_table(torch.tensor([0.75], dtype=torch.float32), torch.tensor([True]), bins=2)
    assert rows == [ReliabilityRow(low=0.5, high=1.0, count=1, confidence=0.75, frequency=1.0)]


def test_pairs_are_judged_in_either_order() -> None:
    logits, outcomes = both_ways(torch.tensor([2.0, -1.0]))
    close(logits, [2.0, -1.0, -2.0, 1.0])
    close(outcomes, [1.0, 1.0, 0.0, 0.0])
    # "chosen first" alone, all outcomes are 1; the temperature is the same, since a pair's two terms are equal
    differences = torch.randn(50, generator=torch.Generator().manual_seed(3)) + 0.4
    alone = fit_temperature(differences, torch.ones(50))
    assert fit_temperature(*both_ways(differences)) == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_temperature_by_hand(temperature: float) -> None:
    """One logit, right in three of four cases: the best probability is 3 / 4, so T = logit / log 3."""
    logits = torch.full((4,), temperature * math.log(3.0))
    outcomes = torch.tensor([1.0, 1.0, 0.0, 1.0])
    assert fit_temperature(logits, outcomes) == pytest.approx(temperature, rel=1e-12)


def test_temperature_is_the_minimum_and_scales_with_the_logits() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(200, generator=generator)
    outcomes = (torch.rand(200, generator=generator) < torch.sigmoid(logits / 2.5)).double()
    best = fit_temperature(logits, outcomes)

    def loss(value: float) -> float:
        return float(F.binary_cross_entropy_with_logits(logits / value, outcomes))

    assert loss(best) < min(loss(best * 0.99), loss(best * 1.01))
    assert best == pytest.approx(2.5, rel=0.3)  # 200 draws
    assert fit_temperature(7 * logits, outcomes) == pytest.approx(7 * best, rel=1e-9)


def test_temperature_at_its_bounds() -> None:
    assert fit_temperature(torch.tensor([5.0, -5.0]), torch.tensor([1.0, 0.0])) == MIN_TEMPERATURE
    assert fit_temperature(torch.tensor([5.0, -5.0]), torch.tensor([0.0, 1.0])) == MAX_TEMPERATURE
    assert fit_temperature(torch.zeros(3), torch.ones(3)) == MAX_TEMPERATURE


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"^wanted two vectors of one length, got \(2,\) and \(3,\)$"):
        reliability_table(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"^probabilities must be in \[0, 1\]$"):
        reliability_table(torch.tensor([NAN]), torch.zeros(1))
    with pytest.raises(ValueError, match=r"^outcomes must be in \[0, 1\]$"):
        expected_calibration_error(torch.zeros(1), torch.tensor([2.0]))
    with pytest.raises(ValueError, match=r"^bins must be at least 1, got 0$"):
        reliability_table(torch.zeros(1), torch.zeros(1), bins=0)
    with pytest.raises(ValueError, match=r"^a temperature needs logits, all of them finite$"):
        fit_temperature(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match=r"^a temperature needs logits, all of them finite$"):
        fit_temperature(torch.tensor([math.inf]), torch.ones(1))
