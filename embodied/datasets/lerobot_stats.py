"""Statistics of features, as LeRobot keeps them: of every episode, and of the whole data set.

min, max, mean, std, count and the quantiles q01 to q99, over frames (and over pixels, a value a channel, scaled to
0..1, of pictures). The data set's are folded from the episodes': exact for min, max, mean, std and count; its
quantiles are the mean of the episodes' quantiles weighted by count, because that is what LeRobot writes there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiment.errors import UserError

Stats = dict[str, dict[str, NDArray[Any]]]
"""Feature -> statistic -> array: [d] of a vector, [3, 1, 1] of pictures; count is [1]."""

QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
NAMES = ("min", "max", "mean", "std", "count", *QUANTILES)
_LEVELS = np.arange(256)


def vector_stats(values: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Statistics of [T, d] or [T] numbers, T > 0: arrays [d] (or [1]) float64."""
    rows = np.asarray(values, np.float64).reshape(len(values), -1)
    quantiles = np.quantile(rows, list(QUANTILES.values()), axis=0)
    return {
        "min": rows.min(axis=0),
        "max": rows.max(axis=0),
        "mean": rows.mean(axis=0),
        "std": rows.std(axis=0),
        "count": np.array([len(rows)]),
        **dict(zip(QUANTILES, quantiles, strict=True)),
    }


class PictureStats:
    """Counts the levels of uint8 pictures, from which everything else follows exactly."""

    def __init__(self) -> None:
        self.frames = 0
        self.counts = np.zeros((3, 256), np.int64)

    def add(self, picture: NDArray[np.uint8]) -> None:
        """One more picture [H, W, 3]."""
        levels = picture.reshape(-1, 3) + np.array([0, 256, 512])
        self.counts += np.bincount(levels.ravel(), minlength=768).reshape(3, 256)
        self.frames += 1

    def stats(self) -> dict[str, NDArray[Any]]:
        """Arrays [3, 1, 1] float64 in 0..1; count is the number of pictures."""
        total = self.counts.sum(axis=1)
        mean = self.counts @ _LEVELS / total
        # sum of squares minus square of the sum: integers, so nothing cancels
        variance = (self.counts @ _LEVELS**2) / total - mean**2
        below = np.cumsum(self.counts, axis=1) / total[:, None]
        found: dict[str, NDArray[Any]] = {
            "min": (self.counts > 0).argmax(axis=1),
            "max": 255 - (self.counts[:, ::-1] > 0).argmax(axis=1),
            "mean": mean,
            "std": np.sqrt(np.maximum(variance, 0.0)),
            **{name: (below >= q).argmax(axis=1) for name, q in QUANTILES.items()},
        }
        scaled = {name: (value / 255.0).reshape(3, 1, 1) for name, value in found.items()}
        return {**scaled, "count": np.array([self.frames])}


def fold(first: Stats | None, second: Stats) -> Stats:
    """Statistics of two sets of frames together; `first` may be None (no frames)."""
    if first is None:
        return second
    return {
        name: merged({key: np.stack([first[name][key], value]) for key, value in one.items()})
        for name, one in second.items()
    }


def merged(stacked: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Statistics of N sets of frames together, from the statistics of each, stacked: [N, ...]."""
    mean = stacked["mean"]
    counts = stacked["count"].reshape(-1, *[1] * (mean.ndim - 1))
    shares = counts / counts.sum()
    together = (shares * mean).sum(axis=0)
    variance = (shares * (stacked["std"] ** 2 + (mean - together) ** 2)).sum(axis=0)
    found = {
        "min": stacked["min"].min(axis=0),
        "max": stacked["max"].max(axis=0),
        "mean": together,
        "std": np.sqrt(variance),
        "count": stacked["count"].sum(axis=0),
    }
    return found | {name: (shares * stacked[name]).sum(axis=0) for name in QUANTILES if name in stacked}


def as_text(stats: Stats) -> str:
    """The text of `meta/stats.json`."""
    plain = {name: {key: value.tolist() for key, value in one.items()} for name, one in stats.items()}
    return json.dumps(plain, indent=4)


def read_stats(path: Path) -> Stats:
    """Read `meta/stats.json`; {} where there is none. Raises UserError when it is damaged."""
    if not path.is_file():
        return {}
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return {name: {key: np.atleast_1d(value) for key, value in one.items()} for name, one in told.items()}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error}); fetch the data set again") from error
