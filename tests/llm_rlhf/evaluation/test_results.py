"""Measures, their intervals, and what changed between two models."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from experiment.statistics import bootstrap_interval, wilson_interval
from llm_rlhf.evaluation.results import Measure, Result, before_after, difference, write_result


def test_values_by_hand() -> None:
    assert Measure([0.0, 1.0, 1.0, 1.0]).value == 0.75
    assert Measure([3.0, 1.0], [1.0, 3.0]).value == 1.0  # of the sums, not the mean of 3 and 1/3
    assert Measure([math.log(8), math.log(2)], [1, 1], exponential=True).value == pytest.approx(4.0)


def test_intervals() -> None:
    assert Measure([1.0] * 30 + [0.0] * 10).interval() == wilson_interval(30, 40)
    values = np.random.default_rng(0).normal(2.0, 1.0, 100).tolist()
    assert Measure(values).interval() == pytest.approx(bootstrap_interval(values), abs=0.02)
    low, high = Measure(values, [2.0] * 100).interval()
    assert (2 * low, 2 * high) == pytest.approx(Measure(values).interval())
    nats = [value + 3 for value in values]
    logs = [math.log(bound) for bound in Measure(nats, [1.0] * 100, exponential=True).interval()]
    assert logs == pytest.approx(Measure(nats).interval(), abs=1e-9)


def test_pairing_takes_the_items_out() -> None:
    """Items differ by far more than the models do: paired, a change of 0.1 is certain, unpaired it is lost."""
    items = np.random.default_rng(1).normal(0, 10, 200)
    before, after = Measure(items.tolist()), Measure((items + 0.1).tolist())
    change, (low, high) = difference(before, after)
    assert change == pytest.approx(0.1)
    assert (low, high) == pytest.approx((0.1, 0.1))
    _, (low, high) = difference(Measure(items[:-1].tolist()), after)
    assert low < -1 < 1 < high


def test_before_and_after() -> None:
    before = Result({"accuracy": Measure([1.0, 1.0, 0.0, 1.0]), "gone": Measure([1.0])})
    after = Result({"accuracy": Measure([1.0, 0.0, 0.0, 1.0]), "new": Measure([1.0])})
    table = before_after(before, after)
    assert table["accuracy/before"], table["accuracy/after"] == (0.75, 0.5)
    assert table["accuracy/change"] == -0.25
    assert table["accuracy/change_interval"] == [-0.75, 0.0]
    assert len(table) == 6


def test_writing(tmp_path: Path) -> None:
    result = Result({"a": Measure([0.0, 1.0])}, {"items": 2}, rows=[{"x": "ü"}, {"x": 2}])
    figures = result.figures()
    assert figures == {"a": 0.5, "a_interval": list(wilson_interval(1, 2)), "items": 2}
    items = write_result(tmp_path / "deep" / "report.json", {"figures": figures}, result.rows)
    assert json.loads((tmp_path / "deep" / "report.json").read_text())["figures"]["a"] == 0.5
    assert [json.loads(line)["x"] for line in items.read_text().splitlines()] == ["ü", 2]
    assert items.name == "report.items.jsonl"


def test_nothing_is_no_measure() -> None:
    with pytest.raises(ValueError, match="at least one item"):
        Measure([])
    with pytest.raises(ValueError, match="a bottom for every top"):
        Measure([1.0], [])
