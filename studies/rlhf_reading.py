"""Reading a run of the study of RLHF: gold along the KL, whether and where it turned, and what the monitor said."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment.checkpoint import load_checkpoint
from experiment.metrics import read_metrics
from llm_rlhf.evaluation.frontier import Fit, fit_rl
from llm_rlhf.online.monitor import CHECKS, MonitorConfig

SMOOTH = 5
"""Looks that are averaged before a highest one is searched for: a single look is noise."""
SURE = 3.0
"""Standard errors by which gold must have fallen from its highest mean to its last one to have turned."""
NEEDS_GOLD = frozenset({"gap", "forecast"})
"""The monitor's rules that read the gold score; the others can be had without one."""


@dataclass(frozen=True)
class Point:
    """A look at a run: update, KL in nats a reply, gold and proxy mean."""

    step: int
    kl: float
    gold: float
    proxy: float


def points_of(run: Path, *, proxy: str) -> list[Point]:
    """Every look of a PPO run. proxy: the reward model's run, whose own mean is wanted, not what was made of it."""
    return [
        Point(
            int(row["global_step"]),
            max(row["objective/kl"], 0.0),
            row["eval/sampled"],
            row[f"rewards/{proxy}/mean"],
        )
        for row in read_metrics(run / "metrics.jsonl")
        if "eval/sampled" in row
    ]


def smoothed(values: Sequence[float]) -> list[float]:
    """Means of SMOOTH neighbours, fewer at the ends; as many as there are values."""
    half = SMOOTH // 2
    windows = [values[max(0, at - half) : at + half + 1] for at in range(len(values))]
    return [math.fsum(window) / len(window) for window in windows]


def read_curve(points: Sequence[Point], *, start: float) -> dict[str, Any]:
    """What a run's gold did, in JSON's types.

    start       gold before the run, at a KL of 0

    turned      it ended SURE standard errors below its highest mean; the error is from neighbours' differences
    peak, step, kl      the highest mean of SMOOTH looks, and where it was
    fallen      the first update after it at which gold is known to have fallen; None if it did not
    gao         the fitted d (alpha - beta log d) (2210.10760), the start among its points; None where it cannot be
    """
    gold = [point.gold for point in points]
    means, kl = smoothed(gold), smoothed([point.kl for point in points])
    noise = math.sqrt(math.fsum((b - a) ** 2 for a, b in itertools.pairwise(gold)) / (2 * (len(gold) - 1)))
    needed = SURE * noise * math.sqrt(2 / SMOOTH)
    at = max(range(len(means)), key=means.__getitem__)
    last = math.fsum(gold[-SMOOTH:]) / len(gold[-SMOOTH:])
    turned = means[at] - last > needed
    fallen = next((i for i in range(at, len(means)) if means[at] - means[i] > needed), None) if turned else None
    return {
        "start": start,
        "peak": means[at],
        "step": points[at].step,
        "kl": kl[at],
        "last": last,
        "last_kl": kl[-1],
        "proxy": [points[0].proxy, points[at].proxy, math.fsum(p.proxy for p in points[-SMOOTH:]) / SMOOTH],
        "turned": turned,
        "fallen": None if fallen is None else points[fallen].step,
        "gao": _fit(points, start=start),
        "points": [[p.step, round(p.kl, 3), round(p.gold, 4), round(p.proxy, 4)] for p in points],
    }


def _fit(points: Sequence[Point], *, start: float) -> dict[str, float | None] | None:
    """Gao's RL form of the gold above the start."""
    try:
        fitted: Fit = fit_rl([p.kl for p in points], [p.gold - start for p in points])
    except ValueError:
        return None
    return {
        "alpha": fitted.alpha,
        "beta": fitted.beta,
        "beta_error": fitted.beta_error,
        "turning_point": fitted.turning_point,
        "turning_point_error": fitted.turning_point_error,
        "residual_std": fitted.residual_std,
    }


def alarms(run: Path, config: MonitorConfig) -> dict[str, int]:
    """The update at which each of the monitor's rules first fired in a finished run, replayed with `config`.

    The looks are those that the run's last checkpoint keeps.
    """
    looks = load_checkpoint(run / "checkpoints" / "last").state["monitor"]["looks"]
    first: dict[str, int] = {}
    for end in range(1, len(looks) + 1):
        for check in CHECKS:
            for warned in check(config, looks[:end]):
                first.setdefault(Path(warned.rule).name.rpartition(":")[2], warned.step)
    return first


def verdict(curve: dict[str, Any], fired: dict[str, int], *, with_gold: bool) -> str:
    """How the monitor did on a run: of one that turned "before" the turn, "after" it but before the fall was known,
    "late" or "missed"; of another "quiet" or "false"."""
    steps = [step for rule, step in fired.items() if with_gold or rule not in NEEDS_GOLD]
    if not curve["turned"]:
        return "false" if steps else "quiet"
    if not steps:
        return "missed"
    if min(steps) <= curve["step"]:
        return "before"
    return "after" if curve["fallen"] is not None and min(steps) <= curve["fallen"] else "late"


def kl_of_last_third(run: Path) -> float:
    """Mean KL over the last third of a run's updates, in nats a reply."""
    rows = [row["objective/kl"] for row in read_metrics(run / "metrics.jsonl") if "objective/kl" in row]
    last = rows[-(len(rows) // 3) :]
    return math.fsum(last) / len(last)
