"""HalfCheetah-v5 PPO beside stable-baselines3: return after 500k steps, and end-to-end environment steps a second.

Both sides: 8 environments, 64x64 tanh actor and critic, 256 steps, batch 256, 10 epochs, Adam 3e-4, running
normalisation of observations and rewards clipped at 10. Time is from making the environments to the end of
training, imports left out.

Speed is read from the seeds 0 and 1, whose cells follow each other with nothing else running, so a slow spell of
the machine meets all sides. The other seeds add returns and may share the machine; ours run on one core there,
which gives the same weights to the bit as on two.
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
SPEED_SEEDS = range(2)
SIDES = ("sb3", "tandem_two_cores", "tandem_one_core")
CELLS = [f"{side}-{seed}" for seed in SPEED_SEEDS for side in SIDES]
CELLS += [f"{side}-{seed}" for seed in SEEDS if seed not in SPEED_SEEDS for side in ("sb3", "tandem_one_core")]


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
    """Returns and their difference over all seeds; speeds over the seeds that ran alone."""
    sides: dict[str, dict[int, Figures]] = {side: {} for side in SIDES}
    for name, figures in results.items():
        side, seed = name.rsplit("-", 1)
        sides[side][int(seed)] = figures
    lines = [
        "| | seeds | return (mean ± SE) | env steps/s, median | times SB3's, by seed |",
        "|---|---|---|---|---|",
    ]
    for side, cells in sides.items():
        alone = [seed for seed in SPEED_SEEDS if seed in cells and seed in sides["sb3"]]
        if not alone:
            continue
        mean, error = mean_and_error([figures["return"] for figures in cells.values()])
        speed = statistics.median(_speed(cells[seed]) for seed in alone)
        ratios = ", ".join(f"{_speed(cells[seed]) / _speed(sides['sb3'][seed]):.2f}" for seed in alone)
        lines.append(f"| {side} | {len(cells)} | {mean:.0f} ± {error:.0f} | {speed:,.0f} | {ratios} |")
    common = sorted(set(sides["sb3"]) & set(sides["tandem_one_core"]))
    if len(common) > 1:
        ours, our_error = mean_and_error([sides["tandem_one_core"][seed]["return"] for seed in common])
        theirs, their_error = mean_and_error([sides["sb3"][seed]["return"] for seed in common])
        error = (our_error**2 + their_error**2) ** 0.5
        difference = f"{ours - theirs:+.0f} (SE {error:.0f})"
        lines.append(f"\nDifference in mean return over {len(common)} seeds, ours less SB3's: {difference}.")
    return "\n".join(lines)


def _speed(figures: Figures) -> float:
    return float(figures["steps"] / figures["seconds"])


if __name__ == "__main__":
    main("half_cheetah", cells=CELLS, run=run, table=table)
