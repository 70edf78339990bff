"""The table: how many control steps a decision should be, at equal numbers of control steps; one task.

    python -m studies.table_chunks

For each length a clone of the same demonstrations of stacking, then PPO for CONTROL_STEPS control steps. A decision
costs a look (a picture drawn and read), so short chunks see more and are slower.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping

from embodied.evaluate_vla import EvaluateVLAConfig
from embodied.recording.record import RecordConfig
from studies.cells import RUNS, Figures, main
from studies.table import clone, fine_tune, judge, share

TASK = "stack"
DEMONSTRATIONS = 100
CONTROL_STEPS = 600_000
LENGTHS = (1, 4, 8)
CELLS = [f"{length}-{seed}" for seed in range(2) for length in LENGTHS]


def run(cell: str, options: argparse.Namespace) -> Figures:
    """Clone, judge, fine-tune, judge."""
    length, seed = map(int, cell.split("-"))
    cloned, tuned = (RUNS / f"table_chunks-{cell}-{stage}" for stage in ("clone", "ppo"))
    for folder in (cloned, tuned):
        shutil.rmtree(folder, ignore_errors=True)
    demonstrations = RecordConfig(tasks=(TASK,), episodes=DEMONSTRATIONS, noise=0.4, seed=seed)
    overrides = ("eyes.updates=2500", "grounding.scenes=6000", f"policy.chunk={length}")
    config = EvaluateVLAConfig(checkpoint="last", suites=("normal",), tasks=(TASK,), episodes=400)
    cloning = clone(cloned, demonstrations, *overrides)
    before = judge(cloned, config)
    # as many control steps an update, whatever their number in a decision
    trained = fine_tune(
        tuned,
        f"environment.tasks=[{TASK}]",
        f"horizon={64 // length}",
        f"total_steps={CONTROL_STEPS}",
        f"ppo.minibatch_size={2048 // length}",
        init=cloned,
        seed=seed,
    )
    return {"cloning": cloning, **trained, "before": before["normal"], "after": judge(tuned, config)["normal"]}


def table(results: Mapping[str, Figures]) -> str:
    """Success before and after, and speed."""
    lines = ["| control steps a decision | seed | clone | then PPO | control steps/s |", "|---|---|---|---|---|"]
    for cell, figures in results.items():
        length, seed = cell.split("-")
        columns = [share(figures["before"]), share(figures["after"]), f"{figures['steps_per_second']:,.0f}"]
        lines.append(f"| {length} | {seed} | {' | '.join(columns)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main("table_chunks", cells=CELLS, run=run, table=table)
