"""The Adroit door from 25 human demonstrations: offline, then online with them in half of every batch.

    python -m studies.offline_door --data door_human.hdf5

Limit and reward are those of studies.adroit_door, whose PPO stands beside. A cell is a method of a seed: `bc`,
`iql`, `cql` and `cal_ql` offline, `rlpd` online from nothing but the data, `cal_ql_online` from that seed's Cal-QL.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping

from embodied.evaluate import EvaluateConfig, evaluate_run
from experiment.metrics import read_metrics
from studies.cells import RUNS, Figures, main
from tandem.recipes import find_config, read_plan

METHODS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "bc": ("bc", ("demonstrations=DATA",)),
    "iql": ("iql", ("data.path=DATA",)),
    "cql": ("cal_ql", ("data.path=DATA", "calibrated=false")),
    "cal_ql": ("cal_ql", ("data.path=DATA",)),
    "rlpd": ("rlpd", ("data.path=DATA",)),
    "cal_ql_online": (
        "rlpd",
        (
            "data.path=DATA",
            f"init={RUNS / 'offline_door-cal_ql-SEED'}",
            "critic.members=2",
            "critic.layer_norm=false",
            "sac.target_critics=null",
            "conservative={weight: 1.0}",
        ),
    ),
}
"""The configuration that each begins with, and what it changes there (DATA, SEED: those of the cell)."""
CELLS = [f"{method}-{seed}" for seed in range(2) for method in METHODS]
GOOD = 0.9
"""The share of successes that counts the environment steps to it."""


def run(cell: str, options: argparse.Namespace) -> Figures:
    """Train with one method and seed, judge the last policy on 500 test episodes."""
    method, _, seed = cell.partition("-")
    folder = RUNS / f"offline_door-{cell}"
    shutil.rmtree(folder, ignore_errors=True)
    common = [f"run.folder={folder}", f"run.seed={seed}", "run.wandb=disabled"]
    config, own = METHODS[method]
    chosen = [override.replace("SEED", seed).replace("DATA", str(options.data)) for override in own]
    plan = read_plan(find_config(f"embodied/adroit_door_{config}"), [*common, *chosen])
    result = plan.module.train(plan.config)
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
