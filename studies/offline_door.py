"""The Adroit door from 25 human demonstrations: offline, then online with them in half of every batch.

    python -m studies.offline_door --data door_human.hdf5 --share 1/2      and, beside it, --share 2/2

Limit and reward are those of studies.adroit_door, whose PPO from a clone stands beside (`bc_ppo`). A cell is a
method of a seed: `bc`, `iql`, `cql` and `cal_ql` offline, `rlpd` online from nothing but the data, `cal_ql_online`
and `iql_online` from that seed's Cal-QL and IQL, `iql_ppo` PPO from that seed's IQL as the other study does from a
clone. Every run has one thread, so that two go on at once on two cores.

A cell has 40 minutes, so the online methods get less than the papers give them: RLPD 4 critics instead of 10,
an update for every second environment step instead of 20 a step, and 150,000 steps, IQL 200,000 steps, Cal-QL 4
sampled actions of each source instead of the 10 of its offline half, 100,000 environment steps and a gradient
step for every fourth of them. Its targets have no entropy bonus, as offline. CQL and Cal-QL multiply matrices
in bfloat16.
What they earn here is no upper bound of either method.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from itertools import pairwise

from embodied.evaluate import EvaluateConfig, evaluate_run
from experiment.metrics import read_metrics
from studies.cells import RUNS, Figures, main, read_results, regret, require
from tandem.recipes import find_config, read_plan

WATCHED = ("episodes=50", "evaluate_every=100")
"""Of the online methods: validation episodes, and the rounds (of 128 environment steps) between evaluations."""
METHODS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "bc": ("bc", ("data.path=DATA", "evaluate_every=2000")),
    "iql": ("iql", ("data.path=DATA",)),
    "cql": ("cal_ql", ("data.path=DATA", "calibrated=false", "precision=bf16")),
    "cal_ql": ("cal_ql", ("data.path=DATA", "precision=bf16")),
    "rlpd": ("rlpd", ("data.path=DATA", *WATCHED, "critic.members=4", "total_steps=150000")),
    "cal_ql_online": (
        "rlpd",
        (
            "data.path=DATA",
            *WATCHED,
            f"init={RUNS / 'offline_door-cal_ql-SEED'}",
            "critic.members=2",
            "critic.layer_norm=false",
            "sac.target_critics=null",
            "sac.soft_backup=false",
            "conservative={weight: 1.0, samples: 4}",
            "total_steps=100000",
            "updates_per_step=0.25",
            "precision=bf16",
        ),
    ),
    "iql_online": (
        "iql_online",
        ("data.path=DATA", *WATCHED, f"init={RUNS / 'offline_door-iql-SEED'}", "total_steps=200000"),
    ),
    "iql_ppo": (
        "ppo",
        (f"init={RUNS / 'offline_door-iql-SEED' / 'checkpoints' / 'last' / 'policy'}", "demonstrations.path=DATA"),
    ),
}
"""The configuration that each begins with, and what it changes there (DATA, SEED: those of the cell)."""
STARTS = {"cal_ql_online": "cal_ql", "iql_online": "iql", "iql_ppo": "iql"}
"""Methods that go on from another one's run."""
CELLS = [f"{method}-{seed}" for seed in range(2) for method in METHODS]
GOOD = 0.9
"""The share of successes that counts the environment steps to it."""
READ = (
    "Last and best: 500 test episodes. Steps: the environment steps of training at the first of two validations in"
    " a row with success in at least nine episodes of ten; 0 is a policy that never practised, '-' that there are"
    " none. Regret: how far validations on the way fell short of success in every episode, on average. A validation"
    " has 50 episodes online, 20 offline, 40 of bc, bc_ppo and iql_ppo; online they are 12,800 steps apart, of"
    " bc_ppo and iql_ppo 128,000."
)


def run(cell: str, options: argparse.Namespace) -> Figures:
    """Train with one method and seed, judge the last policy on 500 test episodes."""
    method, _, seed = cell.partition("-")
    if method in STARTS:
        require("offline_door", f"{STARTS[method]}-{seed}")
    folder = RUNS / f"offline_door-{cell}"
    shutil.rmtree(folder, ignore_errors=True)
    common = [f"run.folder={folder}", f"run.seed={seed}", "run.wandb=disabled", "run.threads=1"]
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
    }


def steps_to_good(curve: Sequence[Sequence[float]]) -> int | None:
    """Environment steps at the first of two evaluations in a row that reach `GOOD`; None where there are none.

    curve: (environment steps, share of successes) in order. One evaluation of many may reach it by luck.
    """
    pairs = pairwise(curve)
    return next((int(step) for (step, now), (_, then) in pairs if min(now, then) >= GOOD), None)


def table(results: Mapping[str, Figures]) -> str:
    """Success of last and best policy, the environment steps to nine successes in ten, and regret."""
    columns = ["method and seed", "last", "best", "environment steps to 90% (validation)", "regret"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    shown = {cell: results[cell] for cell in CELLS if cell in results}
    for cell, figures in read_results("adroit_door").items():
        judged = {which: figures[which]["published reward, 200 steps"] for which in ("last", "best")}
        seed = cell.rpartition("-")[2]
        shown[f"bc_ppo-{seed}"] = {**judged, "validation_curve": figures["validation_curve"]}
    for cell, figures in shown.items():
        columns = [_success(figures[which]) for which in ("last", "best")]
        steps, short = steps_to_good(figures["validation_curve"]), regret(figures["validation_curve"])
        columns += ["-" if steps is None else f"{steps:,}", "" if short is None else f"{short:.1%}"]
        lines.append(f"| {cell} | {' | '.join(columns)} |")
    return "\n".join([*lines, "", READ])


def _success(figures: Mapping[str, float]) -> str:
    low, high = figures["eval/success_once_low"], figures["eval/success_once_high"]
    return f"{figures['eval/success_once']:.1%} ({low:.1%}-{high:.1%})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the demonstrations are, which are not part of the product."""
    parser.add_argument("--data", help="the human demonstrations, robomimic-layout HDF5")


if __name__ == "__main__":
    main("offline_door", cells=CELLS, run=run, table=table, add_arguments=add_arguments)
