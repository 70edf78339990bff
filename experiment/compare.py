"""Several runs side by side, without a server: how their configurations differ, how far they got, their curves."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiment.config import read_tree
from experiment.errors import UserError
from experiment.figures import require_png, save_figure
from experiment.metrics import COUNTERS, read_metrics, without_time

_LOWER_IS_BETTER = {
    *("loss", "error", "kl", "perplexity", "nll", "cost", "violation", "clipfrac", "approxkl"),
    *("unscored", "warnings", "duplicates", "repetition", "gap"),
}
_OWN_TO_EACH_RUN = {"run.folder", "run.name"}
_MOST_CURVES = 24
_PIPED = 240  # columns where nobody's screen limits them: metrics' names stay whole


@dataclass(frozen=True)
class Summary:
    """One metric of one run: its last value, the best with the global_step it was reached at, and the mean of all.

    How far the mean falls short of the best is what learning cost on the way (regret).
    """

    final: float
    best: float
    best_step: int
    mean: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        names: a short name for each run, in the order given.
        differences: dotted key -> the value in each run, for keys that are not the same everywhere; None where a
            run has no such key.
        summaries: metric -> a summary for each run; None where a run has no such metric.
        figure: the PNG with the curves, or None if there was nothing to draw.
    """

    names: list[str]
    differences: dict[str, list[Any]]
    summaries: dict[str, list[Summary | None]]
    figure: Path | None


def compare(
    runs: Sequence[Path | str],
    *,
    metrics: Sequence[str] = ("*",),
    over: str = "global_step",
    figure: Path | str | None = Path("compare.png"),
    console: Console | None = None,
) -> Comparison:
    """Print how runs differ in configuration and outcome, and draw their curves.

    Args:
        runs: run folders.
        metrics: names or patterns such as `eval/*`; `time/*` and the counters are never among them.
        over: the horizontal axis: global_step, env_steps, episodes, tokens or samples.
        figure: where the curves go; None draws none.
        console: where to print; by default stdout.

    Raises:
        UserError: no run was given, one is not a run folder, no metric matches, no run counts `over`, or the disk
            is full.
    """
    folders = [Path(run) for run in runs]
    if not folders:
        raise UserError("compare: name at least one run folder")
    if over not in COUNTERS:
        raise UserError(f"compare: cannot draw over {over}; choose one of {', '.join(COUNTERS)}")
    names = _short_names(folders)
    differences = config_differences([_config(folder) for folder in folders])
    rows = [[without_time(row) for row in read_metrics(folder / "metrics.jsonl")] for folder in folders]
    keys = {key: None for run in rows for row in run for key in row if key not in COUNTERS}
    chosen = sorted(key for key in keys if any(fnmatch(key, pattern) for pattern in metrics))
    if not chosen:
        raise UserError(
            f"compare: no metric matches {', '.join(metrics)}; there are {', '.join(sorted(keys)) or 'none'}"
        )
    summaries = {key: [_summary(key, run) for run in rows] for key in chosen}
    drawn = _draw(names, rows, chosen, over, require_png(figure, option="--save")) if figure is not None else None
    result = Comparison(names, differences, summaries, drawn)
    _show(result, console or Console(width=None if sys.stdout.isatty() else _PIPED))
    return result


def lower_is_better(metric: str) -> bool:
    """Whether a metric's best value is its smallest, judged by its name."""
    words = metric.lower().replace("/", "_").split("_")
    return any(word in words for word in _LOWER_IS_BETTER)


def config_differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Dotted key -> a value per configuration, for the keys that differ; a run's name and folder do not count."""
    flat = [_flatten(config) for config in configs]
    keys = {key: None for config in flat for key in config if key not in _OWN_TO_EACH_RUN}
    values = {key: [config.get(key) for config in flat] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = (
            _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {prefix + key: value}
        )
        flat.update(inner)
    return flat


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: not a run folder (no config.yaml in it)")
    return read_tree(folder / "config.yaml").values


def _short_names(folders: Sequence[Path]) -> list[str]:
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _summary(key: str, rows: Sequence[Mapping[str, float]]) -> Summary | None:
    points = [(row[key], int(row["global_step"])) for row in rows if key in row]
    if not points:
        return None
    finite = [point for point in points if math.isfinite(point[0])] or points
    best = (min if lower_is_better(key) else max)(finite, key=lambda point: point[0])
    mean = math.fsum(value for value, _ in finite) / len(finite)
    return Summary(points[-1][0], best[0], best[1], mean)


def _curve(rows: Sequence[Mapping[str, float]], key: str, over: str) -> tuple[list[float], list[float]]:
    """Values of `key` over the newest value of `over`: a row of an evaluation need not repeat the counters."""
    across, along, position = [], [], math.nan
    for row in rows:
        position = row.get(over, position)
        if key in row and math.isfinite(position):
            across.append(position)
            along.append(row[key])
    return across, along


def _draw(
    names: Sequence[str], rows: Sequence[Sequence[Mapping[str, float]]], keys: Sequence[str], over: str, path: Path
) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    keys = keys[:_MOST_CURVES]
    if not any(_curve(run, key, over)[0] for run in rows for key in keys):
        raise UserError(f"compare: none of these runs counts {over}")
    columns = min(3, len(keys))
    lines = math.ceil(len(keys) / columns)
    figure = Figure(figsize=(5 * columns, 3.2 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for index, key in enumerate(keys):
        axes = figure.add_subplot(lines, columns, index + 1)
        for name, run in zip(names, rows, strict=True):
            across, along = _curve(run, key, over)
            axes.plot(across, along, label=name, linewidth=1.2, marker="." if len(across) < 30 else None)
        axes.set_title(key, fontsize=10)
        axes.set_xlabel(over, fontsize=8)
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(names), 4))
    save_figure(figure, path, dpi=110)
    return path


def _show(result: Comparison, console: Console) -> None:
    if result.differences:
        table = Table("key", *map(escape, result.names), title="configuration: what differs", title_justify="left")
        for key, values in result.differences.items():
            table.add_row(escape(key), *("-" if value is None else escape(str(value)) for value in values))
        console.print(table)
    elif len(result.names) > 1:
        console.print("configuration: no difference")
    table = Table("metric", "best is", title="final (best @ global_step, mean)", title_justify="left")
    for name in result.names:
        table.add_column(escape(name), justify="right")
    for key, summaries in result.summaries.items():
        cells = (f"{s.final:.4g} ({s.best:.4g} @ {s.best_step}, {s.mean:.4g})" if s else "-" for s in summaries)
        table.add_row(escape(key), "lowest" if lower_is_better(key) else "highest", *cells)
    console.print(table)
    if result.figure is not None:
        hidden = len(result.summaries) - _MOST_CURVES
        more = f" (the first {_MOST_CURVES} metrics; choose others with a pattern)" if hidden > 0 else ""
        console.print(f"curves: {result.figure}{more}", soft_wrap=True, markup=False, highlight=False)
