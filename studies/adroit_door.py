"""The Adroit door from 25 human demonstrations: cloning, then PPO, judged on test episodes.

    python -m studies.adroit_door --data door_human.hdf5

Training uses hand_dapg's published reward and the stock limit of 200 steps. Both policies are then judged under
that limit and under 300 steps, with gymnasium-robotics' own environment and reward beside. The curve is in the run.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from studies.cells import RUNS, Figures, main

CONFIGS = Path(__file__).parent.parent / "configs" / "embodied"
CELLS = ["seed-0", "seed-1"]

SETTINGS: dict[str, dict[str, Any]] = {
    "published reward, 200 steps": {"episodes": 500},
    "published reward, 300 steps": {"max_episode_steps": 300},
    "stock reward, 200 steps": {"options": {"reward": "stock"}},
    "stock environment": {"environment_id": "AdroitHandDoor-v1", "max_episode_steps": 200},
    "published reward, 200 steps, sampled": {"deterministic": False},
}


def run(cell: str, options: argparse.Namespace) -> Figures:
    """Clone and fine-tune with one seed."""
    from embodied.evaluate import EvaluateConfig, evaluate_run
    from embodied.train_bc import TrainBCConfig
    from embodied.train_bc import train as train_bc
    from embodied.train_ppo import TrainPPOConfig
    from embodied.train_ppo import train as train_ppo
    from experiment.config import build, read_tree
    from experiment.metrics import read_metrics

    seed = int(cell.rpartition("-")[2])
    folders = {stage: RUNS / f"adroit_door-{stage}-{seed}" for stage in ("bc", "ppo")}
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)

    def config_of(stage: str, schema: type, *overrides: str) -> Any:
        common = [f"run.folder={folders[stage]}", f"run.seed={seed}", "run.wandb=disabled"]
        tree = read_tree(CONFIGS / f"adroit_door_{stage}.yaml", [*common, *overrides])
        tree.pop("recipe")
        return build(tree, schema)

    train_bc(config_of("bc", TrainBCConfig, f"data.path={options.data}"))
    clone = folders["bc"] / "checkpoints" / "last" / "policy"
    result = train_ppo(config_of("ppo", TrainPPOConfig, f"init={clone}", f"demonstrations.path={options.data}"))

    def judged(stage: str, checkpoint: Literal["best", "last"]) -> dict[str, Any]:
        return {
            name: evaluate_run(folders[stage], EvaluateConfig(checkpoint=checkpoint, **setting))
            for name, setting in SETTINGS.items()
        }

    rows = read_metrics(folders["ppo"] / "metrics.jsonl")
    curve = [[int(row["env_steps"]), row["eval/success_once"]] for row in rows if "eval/success_once" in row]
    return {
        "env_steps": int(result.metrics["env_steps"]),
        "best_update": result.metrics["best/step"],
        "clone": judged("bc", "last"),
        "last": judged("ppo", "last"),
        "best": judged("ppo", "best"),
        "validation_curve": curve,
        "training_curve": [[int(row["env_steps"]), row["env/success_once"]] for row in rows[::10]],
    }


def table(results: Mapping[str, Figures]) -> str:
    """Success of clone, last and best policy in every setting."""
    lines = ["| seed | setting | clone | PPO, last | PPO, best |", "|---|---|---|---|---|"]
    for cell, figures in results.items():
        for setting in SETTINGS:
            columns = [_success(figures[policy][setting]) for policy in ("clone", "last", "best")]
            lines.append(f"| {cell.rpartition('-')[2]} | {setting} | {' | '.join(columns)} |")
    return "\n".join(lines)


def _success(figures: Mapping[str, float]) -> str:
    low, high = figures["eval/success_once_low"], figures["eval/success_once_high"]
    return f"{figures['eval/success_once']:.1%} ({low:.1%}-{high:.1%}), return {figures['eval/mean_reward']:.0f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the demonstrations are, which are not part of the product."""
    parser.add_argument("--data", help="the human demonstrations, robomimic-layout HDF5")


if __name__ == "__main__":
    main("adroit_door", cells=CELLS, run=run, table=table, add_arguments=add_arguments)
