"""Reading a run of the study of RLHF: gold along the KL, whether and where it turned, and what the monitor said."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment.checkpoint import load_checkpoint
from experiment.metrics import read_metrics
from llm_rlhf.evaluation.frontier import JUDGED_KL, Fit, fit_rl
from llm_rlhf.online.monitor import CHECKS, MonitorConfig

SMOOTH = 5
"""Looks that are averaged before a highest one is searched for: a single look is noise."""
SURE = 3.0
"""Standard errors by which gold must have fallen from its highest mean to its last one to have turned."""
BLOCK = 10
"""Updates whose mean KL is held against a target: one mean of a third of a run would hide a swing about it."""
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
    """Every look of a PPO run. proxy: the reward model's run, whose own mean is wanted, not what was made of it.

    The KL is that of the policy that gold judged; runs that logged none have that of the update's own completions.
    """
    return [
        Point(
            int(row["global_step"]),
            max(row.get(JUDGED_KL, row["objective/kl"]), 0.0),
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

    start       gold before the run, at a KL of 0, on other prompts than the run's looks

    turned      it ended SURE standard errors below its highest mean; the error is from neighbours' differences
    peak, step, kl      the highest mean of SMOOTH looks, and where it was
    fallen      the first update after it at which gold is known to have fallen; None if it did not
    gao         the fitted offset + d (alpha - beta log d) (2210.10760); None where it cannot be
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
        "gao": _fit(points),
        "points": [[p.step, round(p.kl, 3), round(p.gold, 4), round(p.proxy, 4)] for p in points],
    }


def _fit(points: Sequence[Point]) -> dict[str, float | None] | None:
    """Gao's RL form of the gold; its value at a KL of 0 is fitted too, as other prompts measured the start's."""
    try:
        fitted: Fit = fit_rl([p.kl for p in points], [p.gold for p in points], intercept=True)
    except ValueError:
        return None
    return {
        "offset": fitted.offset,
        "alpha": fitted.alpha,
        "beta": fitted.beta,
        "beta_error": fitted.beta_error,
        "turning_point": fitted.turning_point,
        "turning_point_error": fitted.turning_point_error,
        "residual_std": fitted.residual_std,
    }


def turn_within(curve: Mapping[str, Any]) -> float | None:
    """The KL at which Gao's fit turns, in nats; None where it does not, or beyond the largest KL that was seen."""
    gao = curve["gao"]
    if gao is None or gao["turning_point"] is None:
        return None
    turn = float(gao["turning_point"]) ** 2
    return turn if turn <= max(point[1] for point in curve["points"]) else None


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
    first = first_alarm(fired, with_gold=with_gold)
    if not curve["turned"]:
        return "quiet" if first is None else "false"
    if first is None:
        return "missed"
    if first <= curve["step"]:
        return "before"
    return "after" if curve["fallen"] is not None and first <= curve["fallen"] else "late"


def first_alarm(fired: Mapping[str, int], *, with_gold: bool) -> int | None:
    """The first update at which any rule fired, or any that needs no gold; None where none did."""
    return min((step for rule, step in fired.items() if with_gold or rule not in NEEDS_GOLD), default=None)


def lead(curve: Mapping[str, Any], fired: Mapping[str, int], *, with_gold: bool) -> tuple[int, float] | None:
    """Updates and nats from the first alarm to the turn, below 0 where it came afterwards; None of a run that did
    not turn or in which nothing fired. Both KLs are means of SMOOTH looks."""
    first = first_alarm(fired, with_gold=with_gold)
    if not curve["turned"] or first is None:
        return None
    means = smoothed([point[1] for point in curve["points"]])
    seen = [kl for (step, *_), kl in zip(curve["points"], means, strict=True) if step <= first]
    return curve["step"] - first, curve["kl"] - (seen[-1] if seen else 0.0)


def last_third(run: Path) -> dict[str, Any]:
    """KL in nats a reply over the last third of a run's updates, in JSON's types.

    kl_of_last_third    the mean
    kl_of_blocks        means of BLOCK updates each, the last block at the run's end; the first updates of the third
                        that fill none are left out
    kl_updates          the third's first update and its last
    """
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "objective/kl" in row]
    rows = rows[-(len(rows) // 3) :]
    kls = [float(row["objective/kl"]) for row in rows]
    ends = range(len(kls) % BLOCK + BLOCK, len(kls) + 1, BLOCK)
    return {
        "kl_of_last_third": math.fsum(kls) / len(kls),
        "kl_of_blocks": [math.fsum(kls[end - BLOCK : end]) / BLOCK for end in ends],
        "kl_updates": [int(rows[0]["global_step"]), int(rows[-1]["global_step"])],
    }
