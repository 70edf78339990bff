"""The table: one policy for five tasks, from pictures and words; cloned from 500 demonstrations, then PPO.

    python -m studies.table

A cell is a stage of a seed (`clone-0`, `ppo-0`, ...), a policy to compare (`more`: ten times the demonstrations;
`longer`: cloning for as long as cloning and PPO took together) or a floor (`no-image`, `no-words`). All are judged
on the same 200 test scenes a task, in training's words, in held-out combinations, in held-out words and with
swapped words. Cells that start from another's run need that run in runs/studies.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embodied.evaluate_vla import Suite
from studies.cells import RUNS, Figures, main

CONFIGS = Path(__file__).parent.parent / "configs" / "embodied"
DEMONSTRATIONS = 500
CELLS = ["clone-0", "ppo-0", "clone-1", "ppo-1", "no-image", "no-words", "more", "longer"]
SUITES: tuple[Suite, ...] = ("normal", "held_out", "synonyms", "swapped")
OVERRIDES: Mapping[str, tuple[str, ...]] = {
    "no-image": ("policy.ablate=image",),
    "no-words": ("policy.ablate=words",),
    "longer": ("updates=36000",),
}
"""What makes the other clones."""


def run(cell: str, options: argparse.Namespace) -> Figures:
    """Train one policy and judge it."""
    from embodied.evaluate_vla import EvaluateVLAConfig, evaluate_vla_run

    kind, _, number = cell.partition("-")
    folder = RUNS / f"table-{cell}"
    shutil.rmtree(folder, ignore_errors=True)
    trained = fine_tune(folder, int(number)) if kind == "ppo" else clone(cell, folder)
    judged = evaluate_vla_run(folder, EvaluateVLAConfig(checkpoint="last", suites=SUITES))
    suites = {name: _kept(suite) for name, suite in judged["suites"].items()}
    return {**trained, "suites": suites}


def clone(cell: str, folder: Path) -> Figures:
    """Behaviour cloning with grounding; of demonstrations that are recorded where they are missing."""
    from embodied.record import RecordConfig, record_expert
    from embodied.train_vla_bc import TrainVLABCConfig, train
    from experiment.config import build, read_tree

    seed = int(cell.partition("-")[2]) if cell.startswith("clone") else 0
    count = 10 * DEMONSTRATIONS if cell == "more" else DEMONSTRATIONS
    demonstrations = RUNS / f"table-demonstrations-{count}-{seed}"
    record_expert(demonstrations, RecordConfig(episodes=count, seed=seed, noise=0.4))
    overrides = [f"dataset={demonstrations}", *_common(folder, seed), *OVERRIDES.get(cell, ())]
    tree = read_tree(CONFIGS / "table_bc.yaml", overrides)
    tree.pop("recipe")
    result = train(build(tree, TrainVLABCConfig))
    return {"demonstrations": count, "seconds": result.metrics["time/elapsed"]}


def fine_tune(folder: Path, seed: int) -> Figures:
    """PPO from the clone of the same seed."""
    from embodied.train_vla_ppo import TrainVLAPPOConfig, train
    from experiment.config import build, read_tree
    from experiment.metrics import read_metrics

    init = RUNS / f"table-clone-{seed}" / "checkpoints" / "last" / "policy"
    tree = read_tree(CONFIGS / "table_ppo.yaml", [f"init={init}", *_common(folder, seed)])
    tree.pop("recipe")
    result = train(build(tree, TrainVLAPPOConfig))
    rows = read_metrics(folder / "metrics.jsonl")
    return {
        "env_steps": int(result.metrics["env_steps"]),
        "seconds": result.metrics["time/elapsed"],
        "steps_per_second": result.metrics["env_steps"] / result.metrics["time/elapsed"],
        "validation_curve": [
            [int(row["env_steps"]), row["eval/success_once"]] for row in rows if "eval/success_once" in row
        ],
    }


def _common(folder: Path, seed: int) -> list[str]:
    return [f"run.folder={folder}", f"run.seed={seed}", "run.wandb=disabled"]


def _kept(suite: Mapping[str, Any]) -> dict[str, Any]:
    """What a result keeps of a suite: successes with intervals, over all and by task."""
    names = ("episodes", "successes", "success_once", "success_once_interval", "success_of_original")
    kept = {name: suite[name] for name in names if name in suite}
    kept["tasks"] = {
        task: {name: value[name] for name in names if name in value} for task, value in suite["tasks"].items()
    }
    return kept


def table(results: Mapping[str, Figures]) -> str:
    """Success by suite, and by task in training's words."""
    lines = ["| policy | normal | held-out combinations | held-out words | swapped: new / old object |"]
    lines.append("|---|---|---|---|---|")
    for cell, figures in results.items():
        suites = figures["suites"]
        swapped = suites["swapped"]
        columns = [_share(suites[name]) for name in ("normal", "held_out", "synonyms")]
        columns.append(f"{_share(swapped)} / {swapped['success_of_original']:.1%}")
        lines.append(f"| {cell} | {' | '.join(columns)} |")
    tasks = list(next(iter(results.values()))["suites"]["normal"]["tasks"]) if results else []
    lines += ["", f"| policy | {' | '.join(tasks)} |", f"|---|{'---|' * len(tasks)}"]
    for cell, figures in results.items():
        by_task = figures["suites"]["normal"]["tasks"]
        lines.append(f"| {cell} | {' | '.join(_share(by_task[task]) for task in tasks)} |")
    return "\n".join(lines)


def _share(counts: Mapping[str, Any]) -> str:
    low, high = counts["success_once_interval"]
    return f"{counts['success_once']:.1%} ({low:.1%}-{high:.1%})"


if __name__ == "__main__":
    main("table", cells=CELLS, run=run, table=table)
