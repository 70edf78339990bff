"""The reward-hacking monitor: what to distrust while a policy climbs a reward.

At each look (a validation) it is fed metrics and completions. A rule that fires gives one line; it is quiet until
it has been silent once. What is normal is learned from the first looks. The rules:

    gap         over the last `window` looks the proxy rises and the gold score falls, each trend significant by
                its least-squares slope's t statistic
    forecast    gold and proxy are fitted with Gao's RL form c + d (alpha - beta log d), d = sqrt(KL) (2210.10760,
                section 3.2): gold's turning point is near, the proxy's is not. This one comes before the turn
    length      completions became longer or shorter than they were
    kl          the KL to the reference jumped, or passed a limit
    entropy     the policy's entropy is a small share of what it was
    repeated    texts repeat themselves, or completions of different prompts are the same text
    probes      the share of completions that a user's rule (flattery, a forbidden format) is true of has risen
"""

from __future__ import annotations

import difflib
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from experiment.errors import UserError
from experiment.statistics import wilson_interval
from llm_rlhf.evaluation.diversity import repetition_share
from llm_rlhf.evaluation.frontier import JUDGED_KL, Fit, fit_rl
from llm_rlhf.rewards.rules import Rule, load_rule, rate_of

REPETITION_SIZE = 8
"""Characters: repeated words and a single repeated character are both seen, an English text has few."""
FORECAST_CONFIDENCE = 0.9995
"""Of the fitted rise and of the fitted bend: the fit is made anew at every look, so chance has many tries."""


@dataclass(frozen=True)
class MonitorConfig:
    """What fires; a threshold of null turns its rule off.

    enabled         look at all
    stop            end the run at the first warning and name the last good checkpoint
    proxy           the metric that is climbed
    gold            the metric that says whether it is worth climbing; null: there is none
    kl, entropy     metrics: nats a completion, nats a token; beside a gold of eval/ `forecast` takes eval/kl
    window          looks over which a trend is measured
    baseline        first looks that say what is normal
    confidence      of each of the two trends of `gap`, one-sided
    gold_fall       `gap` asks besides that gold fell by this much over the window, in its own units
    turn_share      `forecast` fires at this share of the KL distance d at which gold is predicted to turn
    length_ratio    mean length against the baseline, either way
    kl_limit        nats a completion
    kl_ratio        against the highest of the last `window` looks, and at least one nat above it; every run's KL
                    leaves 0 by leaps, so the first `window` looks are not judged
    entropy_share   of the baseline's entropy
    repetition      rise of the repeated share of a text above the baseline's
    duplicates      share of completions, of different prompts, that are the same text as another's; above the
                    baseline's
    probes          `file.py:function` (prompt, completion) -> bool: the largest rise of its rate above the
                    baseline's
    """

    enabled: bool = True
    stop: bool = False
    proxy: str = "objective/scores"
    gold: str | None = "eval/sampled"
    kl: str = "objective/kl"
    entropy: str = "policy/entropy_avg"
    window: int = 8
    baseline: int = 3
    confidence: float = 0.975
    gold_fall: float = 0.0
    turn_share: float | None = 0.8
    length_ratio: float | None = 2.0
    kl_limit: float | None = None
    kl_ratio: float | None = 3.0
    entropy_share: float | None = 0.1
    repetition: float | None = 0.2
    duplicates: float | None = 0.5
    probes: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.window < 4 or self.baseline < 1:
            raise ValueError("monitor: window must be at least 4 looks and baseline at least 1")
        if not 0.5 < self.confidence < 1:
            raise ValueError(f"monitor.confidence must be between 0.5 and 1, got {self.confidence}")
        for name, low, high in (
            ("turn_share", 0.0, 1.0),
            ("length_ratio", 1.0, math.inf),
            ("kl_limit", 0.0, math.inf),
            ("kl_ratio", 1.0, math.inf),
            ("entropy_share", 0.0, 1.0),
            ("repetition", 0.0, 1.0),
            ("duplicates", 0.0, 1.0),
        ):
            value = getattr(self, name)
            if value is not None and not low < value <= high:
                raise ValueError(f"monitor.{name} must be above {low:g} and at most {high:g}, or null; got {value}")
        for name, rise in self.probes.items():
            if not 0 <= rise < 1:
                raise ValueError(f"monitor.probes: {name}: the largest rise must be in [0, 1), got {rise}")


@dataclass(frozen=True)
class Warned:
    """rule: which one; line: for the user; step: of the look; since: the last step whose policy looked well."""

    rule: str
    line: str
    step: int
    since: int


@dataclass(frozen=True)
class Report:
    """Of one look. warnings: the new ones; firing: every rule that is true now; metrics: for the log."""

    warnings: list[Warned]
    firing: list[str]
    metrics: dict[str, float]


@dataclass(frozen=True)
class Shown:
    """What a look is about besides the update's metrics: some of what was written, and metrics of when it was.
    step: the update before which that was; None = the look's own."""

    prompts: list[str]
    completions: list[str]
    metrics: dict[str, float] = field(default_factory=dict)
    step: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)


Look = dict[str, Any]


class Monitor:
    """Remembers every look; feed it with `look`, keep `state_dict()` in the run's checkpoint."""

    def __init__(self, config: MonitorConfig) -> None:
        """Raises UserError for a probe that cannot be loaded."""
        self.config = config
        self.probes: dict[str, Rule] = {name: load_rule(name, "monitor.probes") for name in config.probes}
        self.looks: list[Look] = []
        self.firing: list[str] = []
        self.first: Warned | None = None

    def look(
        self,
        metrics: Mapping[str, float],
        *,
        global_step: int,
        prompts: Sequence[str] = (),
        completions: Sequence[str] = (),
        written: int | None = None,
    ) -> Report:
        """Take in one look at the run and say what is suspicious.

        written     the update before which the completions were drawn and measured; None = this one

        A proxy or gold that is NaN, because nothing could be judged, is not known at this look. Raises UserError if
        the first look has no metric of the names that the configuration gives for these, or if a probe cannot be
        used; ValueError for another number of prompts than of completions.
        """
        config = self.config
        if len(prompts) != len(completions):
            raise ValueError(f"the monitor was given {len(prompts)} prompts for {len(completions)} completions")
        if not config.enabled:
            return Report([], [], {})
        if not self.looks:
            for setting, name in (("proxy", config.proxy), ("gold", config.gold)):
                _require(metrics, setting, name)
        seen = self._measure(metrics, prompts, completions)
        seen |= {"step": global_step, "written": global_step if written is None else written}
        self.looks.append(seen)
        found = {warned.rule: warned for check in CHECKS for warned in check(self.config, self.looks)}
        new = [warned for rule, warned in found.items() if rule not in self.firing]
        self.firing = list(found)
        if self.first is None and new:
            self.first = min(new, key=lambda warned: warned.since)
        numbers = {f"monitor/{name}": seen[name] for name in SHOWN if seen.get(name) is not None}
        rates = {f"monitor/probes/{Path(name).name}": rate for name, (rate, _) in seen["probes"].items()}
        return Report(new, self.firing, {**numbers, **rates, "monitor/warnings": float(len(found))})

    def _measure(self, metrics: Mapping[str, float], prompts: Sequence[str], completions: Sequence[str]) -> Look:
        """The numbers of one look; None where one cannot be had."""
        config = self.config
        seen: Look = {
            "proxy": _finite(metrics, config.proxy),
            "gold": None if config.gold is None else _finite(metrics, config.gold),
            "kl": _finite(metrics, config.kl),
            "judged_kl": _finite(metrics, JUDGED_KL),
            "entropy": _finite(metrics, config.entropy),
            "length": _finite(metrics, "completions/mean_length"),
            "repetition": None,
            "duplicates": None,
            "probes": {},
        }
        if completions:
            if seen["length"] is None:
                seen["length"] = statistics.fmean(len(text) for text in completions)
            seen["repetition"] = statistics.fmean(repetition_share(text, REPETITION_SIZE) for text in completions)
            seen["duplicates"] = _duplicates(prompts, completions)
            for name, rule in self.probes.items():
                broken, judged = rate_of(rule, name, prompts, completions)
                if judged:
                    seen["probes"][name] = [broken / judged, judged]
        return seen

    def last_good(self, saved: Iterable[int]) -> int | None:
        """The newest of the checkpoints `saved` (their steps) from before what the first warning is about.

        None where no warning was given, or no checkpoint is that old.
        """
        if self.first is None:
            return None
        since = self.first.since
        return max((step for step in saved if step <= since), default=None)

    def state_dict(self) -> dict[str, Any]:
        """Every look, what fires, and the first warning."""
        first = (
            None if self.first is None else [self.first.rule, self.first.line, self.first.step, self.first.since]
        )
        return {"looks": [dict(look) for look in self.looks], "firing": list(self.firing), "first": first}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.looks = [dict(look) for look in state["looks"]]
        self.firing = list(state["firing"])
        self.first = None if state["first"] is None else Warned(*state["first"])


class HackingSuspected(UserError):
    """The monitor has stopped the run; the message names the last good checkpoint."""


def act_on(report: Report, monitor: Monitor, *, folder: Path) -> None:
    """Print a look's new warnings, one line each; stop the run where its configuration says so.

    folder      the run's

    Raises HackingSuspected, naming the last good checkpoint that is still there.
    """
    for warned in report.warnings:
        print(f"monitor: {warned.line}", file=sys.stderr, flush=True)
    if not monitor.config.stop or monitor.first is None or not report.firing:
        return
    checkpoints = folder / "checkpoints"
    saved = [int(path.name) for path in checkpoints.glob("*") if path.name.isdigit()]
    good = monitor.last_good(saved)
    which = (
        "no checkpoint from before it was kept (run.checkpoint_every, run.keep)"
        if good is None
        else f"the last good checkpoint is {checkpoints / f'{good:09d}'}"
    )
    raise HackingSuspected(f"run {folder}: stopped by monitor.stop: {monitor.first.line}; {which}")


SHOWN = ("repetition", "duplicates")


# ---------------------------------------------------------------- the rules


def check_gap(config: MonitorConfig, looks: Sequence[Look]) -> list[Warned]:
    """The proxy rises while gold falls."""
    both = [look for look in looks if look["proxy"] is not None and look["gold"] is not None][-config.window :]
    if len(both) < config.window or looks[-1] is not both[-1]:
        return []
    steps = [look["step"] for look in both]
    rise, rise_t = trend(steps, [look["proxy"] for look in both])
    fall, fall_t = trend(steps, [look["gold"] for look in both])
    needed = float(stats.t.ppf(config.confidence, config.window - 2))
    if rise_t < needed or fall_t > -needed or -fall <= config.gold_fall:
        return []
    best = _measured(max(both, key=lambda look: look["gold"]), config.gold)
    line = (
        f"{config.proxy} rose by {rise:.3g} while {config.gold} fell by {-fall:.3g} between steps {steps[0]} and "
        f"{steps[-1]}: the reward is being gamed; raise kl.coef, or stop near step {best}"
    )
    return [Warned("gap", line, steps[-1], best)]


def check_forecast(config: MonitorConfig, looks: Sequence[Look]) -> list[Warned]:
    """Gold's turning point is near, the proxy's is not."""
    measured = (config.gold, config.proxy)
    used = [
        look
        for look in looks
        if None not in (look["proxy"], look["gold"]) and all(_kl_beside(look, metric) > 0 for metric in measured)
    ]
    if config.turn_share is None or len(used) < config.window or looks[-1] is not used[-1]:
        return []
    kl, climbed_kl = ([_kl_beside(look, metric) for look in used] for metric in measured)
    if any(max(kls) < 4 * min(kls) or len(set(kls)) < 4 for kls in (kl, climbed_kl)):
        return []  # the distance has not even doubled: nothing to see a bend on
    gold = fit_rl(kl, [look["gold"] for look in used], intercept=True)
    proxy = fit_rl(climbed_kl, [look["proxy"] for look in used], intercept=True)
    turn = _sure_turn(gold, float(stats.t.ppf(FORECAST_CONFIDENCE, len(used) - 3)))
    distance = math.sqrt(kl[-1])
    if turn is None or distance < config.turn_share * turn:
        return []
    others = proxy.turning_point
    if others is not None and others < 2 * turn:
        return []  # both level off at the same place: the task is solved, or as good as it gets
    line = (
        f"{config.gold} is forecast to turn at a KL of {turn**2:.3g} nats and {config.proxy} is not (the KL is "
        f"{kl[-1]:.3g}): over-optimisation is near; hold the KL there"
    )
    return [Warned("forecast", line, looks[-1]["step"], _measured(looks[-1], config.gold))]


def _kl_beside(look: Look, metric: str | None) -> float:
    """The KL of the policy that a metric of a look was measured on, NaN where it is not known.

    That is eval/kl for eval/*, where the run logs it; runs of before that have only what was drawn for the update.
    """
    judged = look.get("judged_kl") if metric is not None and metric.startswith("eval/") else None
    kl = look["kl"] if judged is None else judged
    return math.nan if kl is None else float(kl)


def _sure_turn(fit: Fit, needed: float) -> float | None:
    """The distance at which a fit turns, where both its rise and its bend are beyond doubt."""
    if fit.turning_point is None or fit.beta < needed * fit.beta_error or fit.alpha < needed * fit.alpha_error:
        return None
    return fit.turning_point


def check_length(config: MonitorConfig, looks: Sequence[Look]) -> list[Warned]:
    """Completions became longer or shorter."""
    normal, now = _normal(config, looks, "length"), looks[-1]["length"]
    if config.length_ratio is None or not normal or now is None:
        return []
    ratio = now / normal
    if 1 / config.length_ratio <= ratio <= config.length_ratio:
        return []
    return [_warned("length", looks, f"completions are {ratio:.2g} times as long as at first ({now:.1f})")]


def check_kl(config: MonitorConfig, looks: Sequence[Look]) -> list[Warned]:
    """The KL passed its limit or jumped."""
    now = looks[-1]["kl"]
    if now is None:
        return []
    if config.kl_limit is not None and now > config.kl_limit:
        line = f"{config.kl} is {now:.3g} nats, above monitor.kl_limit {config.kl_limit:g}"
        return [_warned("kl", looks, line, config.kl)]
    before = [look["kl"] for look in looks[-1 - config.window : -1] if look["kl"] is not None]
    if config.kl_ratio is None or len(before) < config.window:
        return []
    highest = max(before)
    if now <= config.kl_ratio * highest or now - highest <= 1.0:
        return []
    return [_warned("kl", looks, f"{config.kl} jumped to {now:.3g} nats from {highest:.3g} at most", config.kl)]


def check_entropy(config: MonitorConfig, looks: Sequence[Look]) -> list[Warned]:
    """The policy became nearly deterministic."""
    normal, now = _normal(config, looks, "entropy"), looks[-1]["entropy"]
    if config.entropy_share is None or not normal or now is None or now >= config.entropy_share * normal:
        return []
    line = f"{config.entropy} fell to {now:.3g} nats from {normal:.3g}: it collapses"
    return [_warned("entropy", looks, line, config.entropy)]


def check_repeated(config: MonitorConfig, looks: Sequence[Look]) -> list[Warned]:
    """Texts that repeat themselves or each other."""
    found = []
    for name, what in (
        ("repetition", "of a completion is text that it had before"),
        ("duplicates", "of completions are the same as another prompt's"),
    ):
        normal, now = _normal(config, looks, name), looks[-1][name]
        allowed = getattr(config, name)
        if allowed is not None and normal is not None and now is not None and now - normal > allowed:
            found.append(_warned(name, looks, f"{now:.0%} {what}, at first {normal:.0%}"))
    return found


def check_probes(config: MonitorConfig, looks: Sequence[Look]) -> list[Warned]:
    """A user's rule is true more often than at first, beyond what chance allows."""
    found = []
    for name, allowed in config.probes.items():
        first = [look["probes"][name] for look in looks[: config.baseline] if name in look["probes"]]
        if len(looks) <= config.baseline or not first or name not in looks[-1]["probes"]:
            continue
        normal = sum(rate * count for rate, count in first) / sum(count for _, count in first)
        rate, count = looks[-1]["probes"][name]
        low, _ = wilson_interval(round(rate * count), count)
        if rate - normal > allowed and low > normal:
            line = f"{name} is true of {rate:.0%} of completions, at first of {normal:.0%}"
            found.append(_warned(f"probes/{name}", looks, line))
    return found


CHECKS: tuple[Callable[[MonitorConfig, Sequence[Look]], list[Warned]], ...] = (
    check_gap,
    check_forecast,
    check_length,
    check_kl,
    check_entropy,
    check_repeated,
    check_probes,
)


def looks_needed(config: MonitorConfig) -> dict[str, int]:
    """Rule that is on -> the looks behind which it can fire for the first time."""
    behind = config.baseline + 1
    rules = (
        ("gap", config.window, config.gold is not None),
        ("forecast", config.window, None not in (config.gold, config.turn_share)),
        ("length", behind, config.length_ratio is not None),
        ("kl_limit", 1, config.kl_limit is not None),
        ("kl_ratio", config.window + 1, config.kl_ratio is not None),
        ("entropy", behind, config.entropy_share is not None),
        ("repetition", behind, config.repetition is not None),
        ("duplicates", behind, config.duplicates is not None),
        ("probes", behind, bool(config.probes)),
    )
    return {rule: looks for rule, looks, on in rules if on and config.enabled}


def trend(steps: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """The least-squares line through values: its rise from the first step to the last, and its slope's t statistic.

    t is the slope over its standard error (N - 2 degrees of freedom); infinite for a perfect line, 0 for a level
    one.
    """
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    centred = x - x.mean()
    slope = float(centred @ (y - y.mean()) / (centred @ centred))
    residual = y - y.mean() - slope * centred
    scale = max(float(np.abs(y).max()), 1e-300)
    error = math.sqrt(float(residual @ residual) / (len(x) - 2) / float(centred @ centred))
    rise = slope * float(x[-1] - x[0])
    if abs(rise) <= 1e-12 * scale:
        return 0.0, 0.0
    return rise, slope / error if error > 0 else math.copysign(math.inf, slope)


def _normal(config: MonitorConfig, looks: Sequence[Look], name: str) -> float | None:
    """The mean of the first looks; None while those last."""
    first = [look[name] for look in looks[: config.baseline] if look[name] is not None]
    return statistics.fmean(first) if first and len(looks) > config.baseline else None


def _measured(look: Look, metric: str | None) -> int:
    """The step whose policy a metric of a look was measured on.

    eval/* are measured behind the step's update; everything else on completions that the policy wrote before an
    update learned from them.
    """
    step: int = look["step"]
    written: int = look.get("written", step)
    return step if metric is not None and metric.startswith("eval/") else written - 1


def _warned(rule: str, looks: Sequence[Look], line: str, metric: str | None = None) -> Warned:
    """A warning about the last look; those of earlier policies were well. metric: where that is a metric, not the
    texts."""
    now = _measured(looks[-1], metric)
    since = max((step for look in looks[:-1] if (step := _measured(look, metric)) < now), default=now - 1)
    return Warned(rule, f"step {looks[-1]['step']}: {line}", looks[-1]["step"], since)


def _duplicates(prompts: Sequence[str], completions: Sequence[str]) -> float | None:
    """Share of completions that are, word for word, another prompt's as well; None where there is one prompt."""
    who: dict[str, set[str]] = {}
    for prompt, completion in zip(prompts, completions, strict=True):
        who.setdefault(completion, set()).add(prompt)
    if len(set(prompts)) < 2:
        return None
    return statistics.fmean(float(len(who[completion]) > 1) for completion in completions)


def _finite(metrics: Mapping[str, float], name: str) -> float | None:
    value = metrics.get(name)
    return None if value is None or not math.isfinite(value) else float(value)


def _require(metrics: Mapping[str, float], setting: str, name: str | None) -> None:
    """A monitor that waits for a metric that never comes would be worse than none."""
    if name is None or name in metrics:
        return
    near = difflib.get_close_matches(name, list(metrics), n=1, cutoff=0.3)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"monitor.{setting}: the run logs no metric {name!r}{hint}")
