"""The table: does domain randomization carry a policy to a reality that it never met?

    python -m studies.table_transfer

The "reality" preset has friction, gains, latency, a camera, light and colours of its own, outside what "full" draws
from. A cell clones two tasks and fine-tunes them with PPO, in the plain simulation or under "full" (demonstrations,
grounding and play alike), and is judged on the same scenes in the plain simulation and in reality.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping

from embodied.evaluate_vla import EvaluateVLAConfig
from embodied.recording.record import RecordConfig
from studies.cells import RUNS, Figures, main
from studies.table import clone, fine_tune, judge, share

TASKS = ("pick", "place")
DEMONSTRATIONS = 150
CONTROL_STEPS = 300_000
PRESETS = ("none", "full")
CELLS = [f"{preset}-{seed}" for seed in range(3) for preset in PRESETS]


def run(cell: str, options: argparse.Namespace) -> Figures:
    """Clone, fine-tune, judge here and there."""
    preset, _, number = cell.partition("-")
    seed = int(number)
    cloned, tuned = (RUNS / f"table_transfer-{cell}-{stage}" for stage in ("clone", "ppo"))
    for folder in (cloned, tuned):
        shutil.rmtree(folder, ignore_errors=True)
    demonstrations = RecordConfig(tasks=TASKS, episodes=DEMONSTRATIONS, noise=0.4, seed=seed, randomization=preset)
    drawn = (f"grounding.randomization={preset}", "grounding.scenes=5000")
    cloning = clone(cloned, demonstrations, "eyes.updates=2000", *drawn)
    trained = fine_tune(
        tuned,
        f"environment.tasks=[{','.join(TASKS)}]",
        f"environment.randomization={preset}",
        f"perception.grounding.randomization={preset}",
        "perception.grounding.scenes=2000",
        f"total_steps={CONTROL_STEPS}",
        init=cloned,
        seed=seed,
    )
    config = EvaluateVLAConfig(
        checkpoint="last", suites=("normal", "randomized"), tasks=TASKS, episodes=200, randomization="reality"
    )
    return {"cloning": cloning, **trained, "suites": judge(tuned, config)}


def table(results: Mapping[str, Figures]) -> str:
    """Success here and there, over all and by task."""
    lines = [
        f"| trained under | seed | simulation | reality | {' | '.join(f'{task}, reality' for task in TASKS)} |",
        "|---|---|---|---|---|---|",
    ]
    for cell, figures in results.items():
        preset, _, seed = cell.partition("-")
        here, there = figures["suites"]["normal"], figures["suites"]["randomized"]
        columns = [share(here), share(there), *(share(there["tasks"][task]) for task in TASKS)]
        lines.append(f"| {preset} | {seed} | {' | '.join(columns)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main("table_transfer", cells=CELLS, run=run, table=table)
