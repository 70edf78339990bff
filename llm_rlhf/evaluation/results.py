"""What a measurement of a model is: figures with intervals, item by item, so that two models can be compared."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiment.checkpoint import write_atomically
from experiment.errors import UserError
from experiment.statistics import wilson_interval

RESAMPLES = 10_000
Interval = tuple[float, float]


@dataclass(frozen=True)
class Measure:
    """A mean over items, or a ratio of their sums, with what it is made of.

    top, bottom     of each item; bottom None = 1 each, so the value is the mean of top
    exponential     the value is exp of that, as perplexity is
    share           items that are all 0 or 1 are successes of trials; False where they may be negative
    """

    top: Sequence[float]
    bottom: Sequence[float] | None = None
    exponential: bool = False
    share: bool = True

    def __post_init__(self) -> None:
        if not self.top or (self.bottom is not None and len(self.bottom) != len(self.top)):
            raise ValueError("a measure needs at least one item, and a bottom for every top")

    @property
    def value(self) -> float:
        """Over all items."""
        whole = float(np.sum(self.top)) / (len(self.top) if self.bottom is None else float(np.sum(self.bottom)))
        return math.exp(whole) if self.exponential else whole

    def interval(self, confidence: float = 0.95) -> Interval:
        """Wilson's where every item is 0 or 1, else the percentile bootstrap over items."""
        if self.share and self.bottom is None and not self.exponential and set(self.top) <= {0.0, 1.0}:
            return wilson_interval(int(sum(self.top)), len(self.top), confidence)
        return _percentiles(self._resampled(_draws(len(self.top), seed=0)), confidence)

    def _resampled(self, rows: np.ndarray) -> np.ndarray:
        """[R, N] row numbers -> [R] values."""
        top = np.asarray(self.top, dtype=np.float64)[rows].sum(1)
        if self.bottom is None:
            whole = top / rows.shape[1]
        else:
            whole = top / np.asarray(self.bottom, dtype=np.float64)[rows].sum(1)
        return np.exp(whole) if self.exponential else whole


def difference(before: Measure, after: Measure, confidence: float = 0.95) -> tuple[float, Interval]:
    """after - before, and its bootstrap interval: paired by item where both have the same number of items.

    Pairing takes out what is hard about the items themselves, which is most of the noise.
    """
    if len(before.top) == len(after.top):
        rows = _draws(len(before.top), seed=0)
        gap = after._resampled(rows) - before._resampled(rows)
    else:
        gap = after._resampled(_draws(len(after.top), seed=0)) - before._resampled(_draws(len(before.top), seed=1))
    return after.value - before.value, _percentiles(gap, confidence)


def _draws(items: int, *, seed: int) -> np.ndarray:
    resamples = max(200, min(RESAMPLES, 20_000_000 // items))  # at most 160 MB of row numbers
    return np.random.default_rng(seed).integers(items, size=(resamples, items))


def _percentiles(values: np.ndarray, confidence: float) -> Interval:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Result:
    """What a suite found.

    measures    by name, the most important one first
    counts      further numbers without an interval (items, truncated prompts, ...), or groups of such numbers
    notes       what the reader must know, one line each
    rows        one object an item: what was asked, what came, what it scored
    """

    measures: Mapping[str, Measure]
    counts: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    rows: Sequence[Mapping[str, Any]] = ()

    def figures(self) -> dict[str, Any]:
        """Flat: NAME, NAME_interval of every measure, then the counts."""
        found: dict[str, Any] = {}
        for name, measure in self.measures.items():
            found[name] = measure.value
            found[f"{name}_interval"] = list(measure.interval())
        return {**found, **self.counts}


def before_after(before: Result, after: Result) -> dict[str, Any]:
    """What training changed: NAME/before, NAME/after, NAME/change, each with its interval.

    The alignment tax (Ouyang 2022, 2203.02155, section 4.2) is this table of perplexity and of task accuracy.
    """
    table: dict[str, Any] = {}
    for name, later in after.measures.items():
        if name not in before.measures:
            continue
        earlier = before.measures[name]
        change, interval = difference(earlier, later)
        for label, value, bounds in (
            ("before", earlier.value, earlier.interval()),
            ("after", later.value, later.interval()),
            ("change", change, interval),
        ):
            table[f"{name}/{label}"] = value
            table[f"{name}/{label}_interval"] = list(bounds)
    return table


def write_result(path: str | Path, report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Path:
    """The report as JSON and, beside it, one line an item (NAME.items.jsonl), whose path is returned.

    Raises UserError if they cannot be written.
    """
    file = Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{file.parent}: cannot be written: {error.strerror or error}") from error
    items = file.with_suffix(".items.jsonl")
    write_atomically(items, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_atomically(file, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return items
