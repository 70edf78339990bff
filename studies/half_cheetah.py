"""HalfCheetah-v5 PPO beside stable-baselines3: return after 500k steps, and end-to-end environment steps a second.

Both sides: 8 environments, 64x64 tanh actor and critic, 256 steps, batch 256, 10 epochs, Adam 3e-4, running
normalisation of observations and rewards clipped at 10. The cells of a seed follow each other, so a slow spell of
the machine meets both. Time is from making the environments to the end of training, imports left out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

from studies.cells import RUNS, Figures, main, mean_and_error

SEEDS = range(10)
STEPS = 500_000
CONFIG = Path(__file__).parent.parent / "configs" / "embodied" / "half_cheetah_ppo.yaml"
CELLS = [
    f"{side}-{seed}"
    for seed in SEEDS
    for side in ("sb3", "tandem_two_cores", *(["tandem_one_core"] if seed < 3 else []))
]


def run_sb3(seed: int) -> Figures:
    """SB3's own PPO with VecNormalize, one torch thread (more do not help it)."""
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    torch.set_num_threads(1)
    started = time.perf_counter()
    environments = VecNormalize(make_vec_env("HalfCheetah-v5", n_envs=8, seed=seed), gamma=0.99)
    model = PPO(
        "MlpPolicy",
        environments,
        n_steps=256,
        batch_size=256,
        n_epochs=10,
        learning_rate=3e-4,
        policy_kwargs={"net_arch": {"pi": [64, 64], "vf": [64, 64]}, "activation_fn": torch.nn.Tanh},
        stats_window_size=20,
        seed=seed,
        device="cpu",
    )
    model.learn(STEPS)
    seconds = time.perf_counter() - started
    returns = [float(episode["r"]) for episode in model.ep_info_buffer or ()]
    return {"return": statistics.fmean(returns), "steps": model.num_timesteps, "seconds": seconds}


def run_tandem(seed: int, workers: int) -> Figures:
    """The recipe with its configuration, as `tandem train` runs it."""
    import shutil

    from embodied.train_ppo import TrainPPOConfig, train
    from experiment.checkpoint import load_checkpoint
    from experiment.config import build, read_tree
    from experiment.metrics import read_metrics

    folder = RUNS / f"half_cheetah-{workers}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    overrides = [f"run.folder={folder}", f"run.seed={seed}", f"environment.workers={workers}", "run.wandb=disabled"]
    tree = read_tree(CONFIG, [*overrides, f"total_steps={STEPS}"])
    tree.pop("recipe")
    config = build(tree, TrainPPOConfig)
    started = time.perf_counter()
    result = train(config)
    seconds = time.perf_counter() - started
    rows = read_metrics(folder / "metrics.jsonl")
    recent = load_checkpoint(folder / "checkpoints" / "last").state["learner"]["recent"]
    return {
        "return": statistics.fmean(record[0] for record in recent[-20:]),
        "steps": int(result.metrics["env_steps"]),
        "seconds": seconds,
        "rollout_seconds": statistics.median(row["time/rollout"] for row in rows),
        "update_seconds": statistics.median(row["time/update"] for row in rows),
    }


def run(cell: str, options: argparse.Namespace) -> Figures:
    """One side, one seed."""
    side, seed = cell.rsplit("-", 1)
    if side == "sb3":
        return run_sb3(int(seed))
    return run_tandem(int(seed), workers=2 if side == "tandem_two_cores" else 0)


def table(results: Mapping[str, Figures]) -> str:
    """Returns, their difference by seed, and speeds."""
    lines = ["| | seeds | return (mean ± SE) | env steps/s (median) | times SB3 |", "|---|---|---|---|---|"]
    sides = {
        side: {int(name.rsplit("-", 1)[1]): figures for name, figures in results.items() if name.startswith(side)}
        for side in ("sb3", "tandem_one_core", "tandem_two_cores")
    }
    speeds = {
        side: statistics.median(f["steps"] / f["seconds"] for f in cells.values())
        for side, cells in sides.items()
        if cells
    }
    for side, cells in sides.items():
        if not cells:
            continue
        mean, error = mean_and_error([f["return"] for f in cells.values()])
        ratios = [
            (f["steps"] / f["seconds"]) / (sides["sb3"][seed]["steps"] / sides["sb3"][seed]["seconds"])
            for seed, f in cells.items()
            if seed in sides["sb3"]
        ]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        lines.append(f"| {side} | {len(cells)} | {mean:.0f} ± {error:.0f} | {speeds[side]:,.0f} | {ratio} |")
    common = sorted(set(sides["sb3"]) & set(sides["tandem_two_cores"]))
    if len(common) > 1:
        ours = [sides["tandem_two_cores"][seed]["return"] for seed in common]
        theirs = [sides["sb3"][seed]["return"] for seed in common]
        (mean_ours, error_ours), (mean_theirs, error_theirs) = mean_and_error(ours), mean_and_error(theirs)
        error = (error_ours**2 + error_theirs**2) ** 0.5
        lines.append(
            f"\nDifference in mean return, ours less SB3's: {mean_ours - mean_theirs:+.0f} (SE {error:.0f})."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main("half_cheetah", cells=CELLS, run=run, table=table)
