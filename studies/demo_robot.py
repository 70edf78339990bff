"""The demo's robot with five seeds: is what PPO adds to a few minutes' clone visible every time?

    python -m studies.demo_robot

A cell is what `tandem demo` does for the robot: 12 demonstrations of reach, push and pick, a clone, PPO for
550,000 control steps; both are judged on the same 200 test scenes a task.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from typing import Any

from studies.cells import RUNS, Figures, main

CELLS = [f"seed-{seed}" for seed in range(5)]


def run(cell: str, options: argparse.Namespace) -> Figures:
    """Record, clone, fine-tune and judge."""
    from tandem.demo_robot import run_robot

    folder = RUNS / f"demo_robot-{cell}"
    shutil.rmtree(folder, ignore_errors=True)
    outcome = run_robot(folder, dry_run=False, seed=int(cell.partition("-")[2]))
    return {"before": _kept(outcome.before), "after": _kept(outcome.after)}


def _kept(suite: Mapping[str, Any]) -> dict[str, Any]:
    names = ("episodes", "success_once", "success_once_interval")
    tasks = {task: {name: counts[name] for name in names} for task, counts in suite["tasks"].items()}
    return {**{name: suite[name] for name in names}, "tasks": tasks}


def table(results: Mapping[str, Figures]) -> str:
    """Success before and after, over all three tasks and by task."""
    lines = ["| seed | clone | then PPO | reach | push | pick |", "|---|---|---|---|---|---|"]
    for cell, figures in results.items():
        columns = [_share(figures["before"]), _share(figures["after"])]
        for task, before in figures["before"]["tasks"].items():
            columns.append(f"{before['success_once']:.2f} → {figures['after']['tasks'][task]['success_once']:.2f}")
        lines.append(f"| {cell.partition('-')[2]} | {' | '.join(columns)} |")
    return "\n".join(lines)


def _share(counts: Mapping[str, Any]) -> str:
    low, high = counts["success_once_interval"]
    return f"{counts['success_once']:.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    main("demo_robot", cells=CELLS, run=run, table=table)
