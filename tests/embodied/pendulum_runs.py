"""What configurations of short runs on Pendulum have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from embodied.logged.offline import CriticConfig
from embodied.logged.transitions import DataConfig
from embodied.policies.numpy_actor import StatePolicyConfig
from embodied.rollouts.workers import EnvironmentConfig
from experiment.run import RunConfig


def common(tmp_path: Path, data: Path, **more: Any) -> dict[str, Any]:
    """Of every configuration: six updates on Pendulum, whose torques reach from -2 to 2."""
    return {
        "run": RunConfig(folder=str(tmp_path / "run"), wandb="disabled", seed=2),
        "environment": EnvironmentConfig("Pendulum-v1", max_episode_steps=10, count=2, workers=0),
        "data": DataConfig(path=str(data)),
        "policy": StatePolicyConfig(hidden=(16, 16), activation="relu"),
        "critic": CriticConfig(hidden=(16, 16)),
        "batch_size": 32,
        "log_every": 2,
        "evaluate_every": 3,
        "episodes": 2,
    } | more
