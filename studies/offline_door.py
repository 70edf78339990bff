"""The Adroit door from 25 human demonstrations: offline, then online with them in half of every batch.

    python -m studies.offline_door --data door_human.hdf5

Limit and reward are those of studies.adroit_door, whose PPO stands beside. A cell is a method of a seed: `iql` and
`cal_ql` offline, `rlpd` online from nothing but the data, `cal_ql_online` from the Cal-QL run of the same seed.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiment.config import build, read_tree
from experiment.metrics import read_metrics
from studies.cells import RUNS, Figures, main

CONFIGS = Path(__file__).parent.parent / "configs" / "embodied"
METHODS = ("iql", "cal_ql", "rlpd", "cal_ql_online")
CELLS = [f"{method}-{seed}" for seed in range(2) for method in METHODS]
GOOD = 0.9
"""The share of successes that counts the environment steps to it."""


def run(cell: str, options: argparse.Namespace) -> Figures:
    """Train with one method and seed, judge the last policy on 500 test episodes."""
    from embodied import train_cql, train_iql, train_rlpd
    from embodied.evaluate import EvaluateConfig, evaluate_run

    method, _, seed = cell.partition("-")
    folder = RUNS / f"offline_door-{cell}"
    shutil.rmtree(folder, ignore_errors=True)
    module: Any
    module, kind, config, more = {
        "iql": (train_iql, train_iql.TrainIQLConfig, "iql", ()),
        "cal_ql": (train_cql, train_cql.TrainCQLConfig, "cal_ql", ()),
        "rlpd": (train_rlpd, train_rlpd.TrainRLPDConfig, "rlpd", ()),
        "cal_ql_online": (
            train_rlpd,
            train_rlpd.TrainRLPDConfig,
            "rlpd",
            (
                f"init={RUNS / f'offline_door-cal_ql-{seed}'}",
                "critic.members=2",
                "critic.layer_norm=false",
                "sac.target_critics=null",
                "conservative={weight: 1.0}",
            ),
        ),
    }[method]
    common = [f"data.path={options.data}", f"run.folder={folder}", f"run.seed={seed}", "run.wandb=disabled"]
    tree = read_tree(CONFIGS / f"adroit_door_{config}.yaml", [*common, *more])
    tree.pop("recipe")
    result = module.train(build(tree, kind))
    rows = read_metrics(folder / "metrics.jsonl")
    steps = [(int(row.get("env_steps", 0)), row["eval/success_once"]) for row in rows if "eval/success_once" in row]
    return {
        "seconds": result.metrics["time/elapsed"],
        "last": evaluate_run(folder, EvaluateConfig(checkpoint="last", episodes=500)),
        "best": evaluate_run(folder, EvaluateConfig(checkpoint="best", episodes=500)),
        "validation_curve": steps,
        "steps_to_good": next((step for step, success in steps if success >= GOOD), None),
    }


def table(results: Mapping[str, Figures]) -> str:
    """Success of last and best policy, and the environment steps to nine successes in ten."""
    lines = ["| method and seed | last | best | environment steps to 90% (validation) |", "|---|---|---|---|"]
    for cell, figures in results.items():
        columns = [_success(figures[which]) for which in ("last", "best")]
        lines.append(f"| {cell} | {' | '.join(columns)} | {figures['steps_to_good'] or '-'} |")
    return "\n".join(lines)


def _success(figures: Mapping[str, float]) -> str:
    low, high = figures["eval/success_once_low"], figures["eval/success_once_high"]
    return f"{figures['eval/success_once']:.1%} ({low:.1%}-{high:.1%})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The demonstrations are not part of the product."""
    parser.add_argument("--data", help="the human demonstrations, robomimic-layout HDF5")


if __name__ == "__main__":
    main("offline_door", cells=CELLS, run=run, table=table, add_arguments=add_arguments)
