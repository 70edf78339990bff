"""The table: one policy for five tasks, from pictures and words; cloned from few demonstrations, then PPO.

    python -m studies.table

A cell is a stage of a seed (`clone-0`, then `ppo-0`, then `further-0`: PPO again, for half as long), a policy to
compare (`more`: ten times the demonstrations; `longer`: cloning for as long as cloning and PPO took together) or a
floor (`no-image`, `no-words`). All are judged
on the same 200 test scenes a task, in training's words, in held-out combinations, in held-out words and with
swapped words. Cells that start from another's run need that run in runs/studies.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embodied import train_vla_bc, train_vla_ppo
from embodied.evaluate_vla import EvaluateVLAConfig, Suite, evaluate_vla_run
from embodied.recording.record import RecordConfig, record_expert
from experiment.config import build, read_tree
from experiment.metrics import read_metrics
from experiment.run import RunResult
from studies.cells import RUNS, Figures, main

CONFIGS = Path(__file__).parent.parent / "configs" / "embodied"
DEMONSTRATIONS = 100
CELLS = [f"{stage}-{seed}" for seed in range(2) for stage in ("clone", "ppo", "further")]
CELLS += ["no-image", "no-words", "more", "longer"]
BEFORE = {"ppo": "clone", "further": "ppo"}
"""The stage that a stage of PPO starts from."""
FURTHER = "total_steps=2000000"
SUITES: tuple[Suite, ...] = ("normal", "held_out", "synonyms", "swapped")
OVERRIDES: Mapping[str, tuple[str, ...]] = {
    "no-image": ("policy.ablate=image",),
    "no-words": ("policy.ablate=words",),
    "longer": ("eyes.updates=30000",),
}
"""What makes the other clones."""


def run(cell: str, options: argparse.Namespace) -> Figures:
    """Train one policy and judge it."""
    kind, _, number = cell.partition("-")
    folder = RUNS / f"table-{cell}"
    shutil.rmtree(folder, ignore_errors=True)
    if kind in BEFORE:
        overrides = [FURTHER] if kind == "further" else []
        trained = fine_tune(folder, *overrides, init=RUNS / f"table-{BEFORE[kind]}-{number}", seed=int(number))
    else:
        seed = int(number) if kind == "clone" else 0
        count = 10 * DEMONSTRATIONS if cell == "more" else DEMONSTRATIONS
        trained = clone(folder, RecordConfig(episodes=count, seed=seed, noise=0.4), *OVERRIDES.get(cell, ()))
    return {**trained, "suites": judge(folder, EvaluateVLAConfig(checkpoint="last", suites=SUITES))}


def clone(folder: Path, demonstrations: RecordConfig, *overrides: str) -> Figures:
    """Behaviour cloning with grounding; of demonstrations that are recorded where they are missing."""
    described = f"{demonstrations.episodes}-{'-'.join(demonstrations.tasks)}-{demonstrations.randomization}"
    data = RUNS / f"table-demonstrations-{described}-{demonstrations.seed}"
    record_expert(data, demonstrations)
    tree = read_tree(
        CONFIGS / "table_bc.yaml", [f"data.path={data}", *_common(folder, demonstrations.seed), *overrides]
    )
    tree.pop("recipe")
    result = train_vla_bc.train(build(tree, train_vla_bc.TrainVLABCConfig))
    return {"demonstrations": demonstrations.episodes, "seconds": result.metrics["time/elapsed"]}


def fine_tune(folder: Path, *overrides: str, init: Path, seed: int) -> Figures:
    """PPO from the last policy of the run `init`."""
    policy = init / "checkpoints" / "last" / "policy"
    tree = read_tree(CONFIGS / "table_ppo.yaml", [f"init={policy}", *_common(folder, seed), *overrides])
    tree.pop("recipe")
    return online_figures(folder, train_vla_ppo.train(build(tree, train_vla_ppo.TrainVLAPPOConfig)))


def online_figures(folder: Path, result: RunResult) -> Figures:
    """What a run that plays says of itself."""
    rows = read_metrics(folder / "metrics.jsonl")
    return {
        "env_steps": int(result.metrics["env_steps"]),
        "seconds": result.metrics["time/elapsed"],
        "steps_per_second": result.metrics["env_steps"] / result.metrics["time/elapsed"],
        "validation_curve": [
            [int(row["env_steps"]), row["eval/success_once"]] for row in rows if "eval/success_once" in row
        ],
    }


def judge(folder: Path, config: EvaluateVLAConfig) -> Figures:
    """Of every suite, successes with intervals, over all and by task."""
    return {name: _kept(suite) for name, suite in evaluate_vla_run(folder, config)["suites"].items()}


def _common(folder: Path, seed: int) -> list[str]:
    return [f"run.folder={folder}", f"run.seed={seed}", "run.wandb=disabled"]


def _kept(suite: Mapping[str, Any]) -> dict[str, Any]:
    """What a result keeps of a suite."""
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
        columns = [share(suites[name]) for name in ("normal", "held_out", "synonyms")]
        columns.append(f"{share(swapped)} / {swapped['success_of_original']:.1%}")
        lines.append(f"| {cell} | {' | '.join(columns)} |")
    tasks = list(next(iter(results.values()))["suites"]["normal"]["tasks"]) if results else []
    lines += ["", f"| policy | {' | '.join(tasks)} |", f"|---|{'---|' * len(tasks)}"]
    for cell, figures in results.items():
        by_task = figures["suites"]["normal"]["tasks"]
        lines.append(f"| {cell} | {' | '.join(share(by_task[task]) for task in tasks)} |")
    return "\n".join(lines)


def share(counts: Mapping[str, Any]) -> str:
    """The share of successes, with its interval."""
    low, high = counts["success_once_interval"]
    return f"{counts['success_once']:.1%} ({low:.1%}-{high:.1%})"


if __name__ == "__main__":
    main("table", cells=CELLS, run=run, table=table)
