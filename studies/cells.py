"""A study is a queue of cells, each at most 40 minutes, each one JSON file with the command that made it.

    python -m studies.NAME              run the cells that have no result yet, one process a cell
    python -m studies.NAME --cell CELL  run one cell here (again, if it has a result)
    python -m studies.NAME --table      print the table of the results there are
    python -m studies.NAME --share 1/2  every second cell, beside another process with --share 2/2

Interrupt it at will: what is finished stays, what was under way is run again.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiment.checkpoint import write_atomically

RESULTS = Path(__file__).parent.parent / "results"
RUNS = Path(__file__).parent.parent / "runs" / "studies"

Figures = dict[str, Any]


def result_path(study: str, cell: str) -> Path:
    """results/STUDY/CELL.json."""
    return RESULTS / study / f"{cell}.json"


def write_result(study: str, cell: str, figures: Figures, seconds: float, arguments: Sequence[str]) -> Path:
    """Keep a cell's figures with what is needed to judge and repeat them; whole or not at all."""
    path = result_path(study, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "study": study,
        "cell": cell,
        # of a data file, its name: where it lay is nobody else's business
        "command": shlex.join(
            ["python", "-m", f"studies.{study}", "--cell", cell, *(Path(a).name for a in arguments)]
        ),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "machine": machine(),
        "figures": figures,
    }
    write_atomically(path, json.dumps(report, indent=2) + "\n")
    return path


def read_results(study: str) -> dict[str, Figures]:
    """The figures of every finished cell."""
    folder = RESULTS / study
    return {path.stem: json.loads(path.read_text())["figures"] for path in sorted(folder.glob("*.json"))}


def require(study: str, cell: str) -> None:
    """SystemExit, in one line, if another cell that is needed has no result: its run may be there, half trained."""
    if not result_path(study, cell).exists():
        raise SystemExit(f"{study}: {cell} is needed first and has no result yet; make it with --cell {cell}")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    packages = (
        "torch",
        "mujoco",
        "gymnasium",
        "gymnasium-robotics",
        "stable-baselines3",
        "d3rlpy",
        "transformers",
        "numpy",
    )
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_at_end": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main(
    study: str,
    *,
    cells: Sequence[str],
    run: Callable[[str, argparse.Namespace], Figures],
    table: Callable[[Mapping[str, Figures]], str],
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
) -> None:
    """The command line of a study.

    run         does one cell in this process and returns its figures
    table       prints what the figures say, as Markdown
    """
    parser = argparse.ArgumentParser(prog=f"python -m studies.{study}")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--cell", choices=cells, metavar="CELL", help=f"one of {', '.join(cells)}")
    what.add_argument("--table", action="store_true", help="print the table of the results there are")
    parser.add_argument("--share", default="1/1", help="i/n: only every n-th cell, from the i-th (several queues)")
    if add_arguments is not None:
        add_arguments(parser)
    options = parser.parse_args()
    if options.table:
        results = read_results(study)
        print(table(results) if results else f"{study}: no cell has a result yet")
    elif options.cell:
        started = time.perf_counter()
        figures = run(options.cell, options)
        path = write_result(study, options.cell, figures, time.perf_counter() - started, _own_arguments())
        print(f"{path}: {json.dumps(figures)}")
    else:
        index, count = map(int, options.share.split("/"))
        failed = []
        for cell in cells[index - 1 :: count]:
            if not result_path(study, cell).exists():
                print(f"{datetime.datetime.now():%H:%M:%S} {study}: {cell}", flush=True)
                command = [sys.executable, "-m", f"studies.{study}", "--cell", cell, *_own_arguments()]
                if subprocess.run(command, check=False).returncode:
                    failed.append(cell)
        if failed:
            raise SystemExit(
                f"{study}: no result of {', '.join(failed)}: the reasons are above; the same command tries again"
            )


def _own_arguments() -> list[str]:
    """The command line without what chooses cells: the study's own options, to pass on and to record."""
    kept, skip = [], False
    for argument in sys.argv[1:]:
        if skip or argument in ("--cell", "--share"):
            skip = not skip
            continue
        kept.append(argument)
    return kept


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (n - 1); the error of one value is NaN."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, float("nan")
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, (variance / len(values)) ** 0.5


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> list[float]:
    """first - second where both have a value (by seed, say), in order."""
    return [first[key] - second[key] for key in sorted(first.keys() & second.keys())]


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95% interval by Student's t (n - 1 degrees of freedom); the bounds of one value are NaN."""
    from scipy.stats import t as student  # not above: studies.dataset_memory measures what it imports, too

    mean, error = mean_and_error(values)
    half = error * float(student.ppf(0.975, max(len(values) - 1, 1)))
    return mean, mean - half, mean + half


def regret(curve: Sequence[Sequence[float]]) -> float | None:
    """Mean shortfall from success in every episode over the evaluations made on the way; None without practice.

    curve: (environment steps, share of successes), equally spaced from the first step after 0 on. It is the
    cumulative regret of Nakamoto et al. 2023 (Cal-QL, arXiv:2303.05479), as a mean: the area above the curve.
    """
    shortfalls = [1.0 - success for steps, success in curve if steps > 0]
    return sum(shortfalls) / len(shortfalls) if shortfalls else None


def difference(values: Sequence[float], *, scale: float = 1.0, digits: int = 1) -> str:
    """Mean of paired differences and its `interval`, for a table; empty without values."""
    if not values:
        return ""
    mean, low, high = interval([scale * value for value in values])
    bounds = "one pair" if len(values) == 1 else f"{low:+.{digits}f} to {high:+.{digits}f}"
    return f"{mean:+.{digits}f} ({bounds})"
