"""Reward against KL: what a policy gained for how far it went, best-of-n's frontier beside, and where gold turns.

Gao, Schulman and Hilton (2210.10760) measure distance as d = sqrt(KL(policy || start)), KL in nats a completion,
and find for the gold reward, in units above the start's,

    best-of-n   R(d) = d (alpha - beta d)           (section 3.1)     turns at d* = alpha / (2 beta)
    RL          R(d) = d (alpha - beta log d)       (section 3.1)     turns at d* = exp(alpha / beta - 1)

Both are linear in alpha and beta, so their least-squares fits are unique; turning points follow from R'(d) = 0 and
carry the standard error of the delta method.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import least_squares
from torch import Tensor

from experiment.errors import UserError
from experiment.figures import save_figure
from experiment.metrics import read_metrics
from experiment.statistics import bootstrap_interval
from policy_core.selection import best_of_n_kl, expected_best_of_k

Form = Literal["bon", "rl"]
Array = np.ndarray
BEST_OF_N = "best of n"
MOST_LOG_DISTANCE = 50.0
"""A turning point beyond exp(50) is none."""
JUDGED_KL = "eval/kl"
"""Logged beside the other eval/ metrics: the KL of the policy that they judge, behind the update."""


@dataclass(frozen=True)
class Row:
    """A point: label (of a run), step, KL in nats a completion, gold and proxy reward (None: not known)."""

    label: str
    step: int
    kl: float
    gold: float | None
    proxy: float | None = None
    gold_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Fit:
    """One of Gao's forms with an offset (0 where none was fitted).

    turning_point is the d at which the fitted reward is highest, None where it has no highest point. NAME_error are
    standard errors; NaN where the points are as many as the numbers.
    """

    form: Form
    alpha: float
    beta: float
    offset: float
    alpha_error: float
    beta_error: float
    turning_point: float | None
    turning_point_error: float | None
    residual_std: float

    def __call__(self, distance: Array) -> Array:
        """The fitted reward at d [N]."""
        return self.offset + _columns(self.form, np.asarray(distance, dtype=np.float64)) @ (self.alpha, self.beta)


def _columns(form: Form, d: Array) -> Array:
    """d [N] -> [N, 2], what alpha and beta are multiplied by."""
    if form == "bon":
        return np.stack([d, -(d**2)], axis=1)
    return np.stack([d, -d * np.log(np.where(d > 0, d, 1.0))], axis=1)  # d log d -> 0


def fit(form: Form, kl: Sequence[float], reward: Sequence[float], *, intercept: bool = False) -> Fit:
    """Fit one of the forms by least squares.

    kl          [N] nats a completion, not negative
    reward      [N] above the start's; with `intercept` in any units, the start's reward is then fitted too

    Raises ValueError for fewer different KLs than numbers to fit, or values that are not finite.
    """
    x, y = np.asarray(kl, dtype=np.float64), np.asarray(reward, dtype=np.float64)
    if x.shape != y.shape or not (np.isfinite(x).all() and np.isfinite(y).all()) or (x < 0).any():
        raise ValueError("a frontier is fitted to as many finite rewards as KLs, none of them negative")
    design = _columns(form, np.sqrt(x))
    if intercept:
        design = np.concatenate([design, np.ones((len(x), 1))], axis=1)
    rows, numbers = design.shape
    if rows < numbers or np.linalg.matrix_rank(design) < numbers:
        raise ValueError(f"{rows} points at {len(set(x.tolist()))} KLs are too few to fit {numbers} numbers")
    solved = least_squares(lambda w: design @ w - y, np.zeros(numbers), jac=lambda w: design, method="lm")
    freedom = rows - numbers
    variance = 2 * solved.cost / freedom if freedom else math.nan
    covariance = np.linalg.inv(design.T @ design) * variance
    alpha, beta = (float(value) for value in solved.x[:2])
    offset = float(solved.x[2]) if intercept else 0.0
    turn, gradient = _turning_point(form, alpha, beta)
    error = None if turn is None else float(np.sqrt(gradient @ covariance[:2, :2] @ gradient))
    return Fit(
        form=form,
        alpha=alpha,
        beta=beta,
        offset=offset,
        alpha_error=float(np.sqrt(covariance[0, 0])),
        beta_error=float(np.sqrt(covariance[1, 1])),
        turning_point=turn,
        turning_point_error=error,
        residual_std=math.sqrt(variance) if freedom else math.nan,
    )


def fit_bon(kl: Sequence[float], reward: Sequence[float], *, intercept: bool = False) -> Fit:
    """d (alpha - beta d); arguments and errors as `fit`."""
    return fit("bon", kl, reward, intercept=intercept)


def fit_rl(kl: Sequence[float], reward: Sequence[float], *, intercept: bool = False) -> Fit:
    """d (alpha - beta log d); arguments and errors as `fit`."""
    return fit("rl", kl, reward, intercept=intercept)


def _turning_point(form: Form, alpha: float, beta: float) -> tuple[float | None, Array]:
    """Where the derivative is 0 and falling, and that point's gradient with respect to (alpha, beta)."""
    none = np.zeros(2)
    if beta <= 0:
        return None, none
    if form == "bon":
        if alpha <= 0:
            return None, none
        return alpha / (2 * beta), np.array([1 / (2 * beta), -alpha / (2 * beta**2)])
    if alpha / beta > MOST_LOG_DISTANCE:
        return None, none
    turn = math.exp(alpha / beta - 1)
    return turn, turn * np.array([1 / beta, -alpha / beta**2])


# ---------------------------------------------------------------- best of n


def best_of(rewards: Tensor, chosen_by: Tensor, sizes: Sequence[int]) -> dict[str, Any]:
    """rewards, chosen_by [P, K], NaN where nobody could judge -> what the best of n samples earns, for all sizes n.

    best_of_n           mean over the prompts of which all K were judged by both; bootstrap interval
    best_of_n_kl        what choosing costs, log n - (n - 1)/n nats; exact where no two samples score alike
    best_of_prompts     how many prompts those are
    """
    known = ~(rewards.isnan() | chosen_by.isnan()).any(1)
    result: dict[str, Any] = {"best_of_prompts": int(known.sum())} if sizes else {}
    for size in sizes:
        name = f"best_of_{size}"
        earned = expected_best_of_k(rewards[known], k=size, scores=chosen_by[known])
        result[name] = float(earned.mean()) if len(earned) else None
        if len(earned):
            result[f"{name}_interval"] = list(bootstrap_interval(earned.tolist()))
        result[f"{name}_kl"] = best_of_n_kl(size)
    return result


Samples = Tensor | Sequence[Sequence[float]]


def best_of_n_rows(gold: Samples, proxy: Samples, sizes: Sequence[int]) -> list[Row]:
    """The frontier of best-of-n on samples of the starting policy: what no training at all would reach.

    gold, proxy     [P, N] of each prompt's N samples, tensors or nested lists; the choice is made by the proxy

    The KL is log n - (n - 1)/n, the gold reward the unbiased estimate over all subsets (`policy_core.selection`),
    its interval by bootstrap over prompts. Raises ValueError for a size outside 1..N, or a sample without a score.
    """
    golden, climbed = (torch.as_tensor(values).double() for values in (gold, proxy))
    if bool((golden + climbed).isnan().any()):
        raise ValueError("a sample without a score (NaN) cannot be chosen among: leave it out first")
    return rows_of_best_of({**best_of(golden, climbed, sizes), "rewards": best_of(climbed, climbed, sizes)})


def rows_of_best_of(figures: Mapping[str, Any]) -> list[Row]:
    """The frontier of best-of-n as an evaluation measured it (`best_of=[1, 2, 4]`): a split's figures."""
    climbed = figures.get("rewards") or figures  # without rewards of its own, a run climbs the task's
    rows = []
    for name in figures:
        if (match := re.fullmatch(r"best_of_(\d+)", name)) is None:
            continue
        low, high = figures.get(f"{name}_interval", (None, None))
        interval = None if low is None else (low, high)
        size = int(match[1])
        rows.append(Row(BEST_OF_N, size, figures[f"{name}_kl"], figures[name], climbed.get(name), interval))
    return rows


# ---------------------------------------------------------------- rows of runs


@dataclass(frozen=True)
class MetricNames:
    """What a run logs its KL, gold and proxy rewards under. Beside a gold of eval/ eval/kl comes before `kl`."""

    kl: str = "objective/kl"
    gold: str = "eval/sampled"
    proxy: str = "objective/scores"


def rows_of_run(folder: str | Path, names: MetricNames = MetricNames()) -> list[Row]:
    """A point for every logged step with gold, where anything could be judged.

    The KL is that of the policy that gold judged; where the run logged none, and for the proxy always, it is the
    latest that was measured until then, before the update (iterative recipes measure once a round).

    Raises UserError where there is none.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{folder}: there is no metrics.jsonl in it, so it is no run")
    rows: list[Row] = []
    latest: dict[str, float] = {}
    judged = JUDGED_KL if names.gold.startswith("eval/") else names.kl
    for line in read_metrics(path):
        latest |= {
            name: float(line[name]) for name in (names.kl, names.proxy) if math.isfinite(line.get(name, math.nan))
        }
        spent = float(line.get(judged, math.nan))
        spent = spent if math.isfinite(spent) else latest.get(names.kl, math.nan)
        if math.isfinite(spent) and math.isfinite(line.get(names.gold, math.nan)):
            kl = max(spent, 0.0)  # an estimate of a KL near 0 may fall below it
            row = Row(
                Path(folder).name, int(line["global_step"]), kl, float(line[names.gold]), latest.get(names.proxy)
            )
            rows.append(row)
    if not rows:
        raise UserError(f"{path}: no step has both {names.kl} and {names.gold}")
    return rows


# ---------------------------------------------------------------- the picture


@dataclass(frozen=True)
class Frontier:
    """Rows of each label, and what was fitted to them."""

    rows: list[Row]
    fits: dict[str, Fit] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """What the fits say, one line each."""
        return [f"{label}: {describe(fitted)}" for label, fitted in self.fits.items()]


def describe(fitted: Fit) -> str:
    """A fit in one line."""
    form = "d (alpha - beta d)" if fitted.form == "bon" else "d (alpha - beta log d)"
    numbers = (
        f"alpha {fitted.alpha:.3g} +- {fitted.alpha_error:.2g}, beta {fitted.beta:.3g} +- {fitted.beta_error:.2g}"
    )
    if fitted.turning_point is None:
        return f"{form}, {numbers}; no turning point"
    return (
        f"{form}, {numbers}; turns at d* {fitted.turning_point:.3g} +- {fitted.turning_point_error:.2g}, "
        f"a KL of {fitted.turning_point**2:.3g} nats"
    )


def frontier(rows: Sequence[Row]) -> Frontier:
    """Fit gold of every label that has at least four points: best-of-n by its form, runs by RL's."""
    fits = {}
    for label in dict.fromkeys(row.label for row in rows):
        points = [(row.kl, row.gold) for row in rows if row.label == label and row.gold is not None]
        if len({kl for kl, _ in points}) >= 4:
            form: Form = "bon" if label == BEST_OF_N else "rl"
            fits[label] = fit(form, [kl for kl, _ in points], [gold for _, gold in points], intercept=True)
    return Frontier(list(rows), fits)


def draw(found: Frontier, path: str | Path) -> None:
    """Gold (solid) and proxy (hollow) against sqrt(KL), a colour a label, fits as lines, turning points marked.

    Raises UserError if the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, label in enumerate(dict.fromkeys(row.label for row in found.rows)):
        colour = f"C{number % 10}"
        rows = [row for row in found.rows if row.label == label]
        gold = [(row.kl**0.5, row.gold) for row in rows if row.gold is not None]
        axes.scatter([d for d, _ in gold], [reward for _, reward in gold], s=16, color=colour, label=label)
        for row in rows:
            if row.gold_interval is not None:
                axes.vlines(row.kl**0.5, *row.gold_interval, color=colour, lw=1)
        proxy = [(row.kl**0.5, row.proxy) for row in rows if row.proxy is not None]
        axes.scatter([d for d, _ in proxy], [reward for _, reward in proxy], s=16, ec=colour, fc="none")
        fitted = found.fits.get(label)
        if fitted is not None:
            reach = max(row.kl for row in rows) ** 0.5
            distance = np.linspace(0, reach, 200)
            axes.plot(distance, fitted(distance), "-", color=colour, lw=1)
            if fitted.turning_point is not None and fitted.turning_point <= 1.5 * reach:
                axes.axvline(fitted.turning_point, color=colour, ls=":", lw=1)
    axes.set(xlabel="d = sqrt(KL to the start), KL in nats a completion", ylabel="reward (hollow: proxy)")
    axes.legend(fontsize="small")
    save_figure(figure, Path(path), dpi=150)
