"""The table: GRPO beside PPO at equal numbers of control steps, from the same clone.

    python -m studies.table_methods

Both start from the clone of `studies.table`, which must have run, and play all five tasks. GRPO has no critic:
groups of eight episodes with the same task and scene, and success alone as reward. PPO gets the control steps that
GRPO's UPDATES took.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path

from embodied import train_vla_grpo
from embodied.evaluate_vla import EvaluateVLAConfig
from experiment.config import build, read_tree
from studies.cells import RUNS, Figures, main, read_results
from studies.table import CONFIGS, fine_tune, judge, online_figures, share

UPDATES = 600
"""Updates of GRPO, of 32 episodes each."""
CELLS = [f"{method}-{seed}" for seed in range(2) for method in ("clone", "grpo", "ppo")]


def run(cell: str, options: argparse.Namespace) -> Figures:
    """Train one policy, or none, and judge it."""
    method, _, number = cell.partition("-")
    folder, clone = RUNS / f"table_methods-{cell}", RUNS / f"table-clone-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    trained: Figures = {}
    if method == "ppo":
        steps = read_results("table_methods")[f"grpo-{number}"]["env_steps"]
        trained = fine_tune(folder, f"total_steps={steps}", init=clone, seed=int(number))
    elif method == "grpo":
        trained = grpo(folder, clone, seed=int(number))
    config = EvaluateVLAConfig(checkpoint="last", suites=("normal",))
    return {**trained, "suites": judge(folder if trained else clone, config)}


def grpo(folder: Path, clone: Path, seed: int) -> Figures:
    """GRPO from the last policy of the run `clone`."""
    overrides = [
        f"init={clone / 'checkpoints' / 'last' / 'policy'}",
        f"run.folder={folder}",
        f"run.seed={seed}",
        "run.wandb=disabled",
        f"updates={UPDATES}",
    ]
    tree = read_tree(CONFIGS / "table_grpo.yaml", overrides)
    tree.pop("recipe")
    return online_figures(folder, train_vla_grpo.train(build(tree, train_vla_grpo.TrainVLAGRPOConfig)))


def table(results: Mapping[str, Figures]) -> str:
    """Success over all tasks and by task."""
    tasks = list(next(iter(results.values()))["suites"]["normal"]["tasks"]) if results else []
    lines = [
        f"| policy | control steps | all | {' | '.join(tasks)} |",
        f"|---|---|---|{'---|' * len(tasks)}",
    ]
    for cell, figures in results.items():
        suite = figures["suites"]["normal"]
        by_task = " | ".join(f"{suite['tasks'][task]['success_once']:.1%}" for task in tasks)
        lines.append(f"| {cell} | {figures.get('env_steps', 0):,} | {share(suite)} | {by_task} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main("table_methods", cells=CELLS, run=run, table=table)
