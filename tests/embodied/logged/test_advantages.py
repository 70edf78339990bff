"""What an IQL run thinks of steps: by its own networks, in the environment's units; and runs that cannot judge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from embodied import train_bc, train_iql
from embodied.logged.advantages import AdvantageConfig, StepJudge, step_weights
from embodied.logged.demonstrations import EpisodesConfig
from embodied.logged.offline import CriticConfig
from embodied.logged.transitions import DataConfig
from embodied.policies.numpy_actor import StatePolicyConfig
from embodied.policies.state_mlp import StatePolicy
from embodied.rollouts.workers import EnvironmentConfig
from embodied.train_bc import TrainBCConfig
from embodied.train_iql import TrainIQLConfig
from experiment.checkpoint import load_checkpoint
from experiment.errors import UserError
from experiment.run import RunConfig
from policy_core.critics import EnsembleCritic


@pytest.fixture
def run(tmp_path: Path, pendulum_demonstrations: Path) -> Path:
    """IQL on Pendulum, whose torques reach from -2 to 2, for a moment."""
    config = TrainIQLConfig(
        run=RunConfig(folder=str(tmp_path / "iql"), wandb="disabled", seed=2),
        environment=EnvironmentConfig("Pendulum-v1", max_episode_steps=10, count=2, workers=0),
        data=DataConfig(path=str(pendulum_demonstrations)),
        policy=StatePolicyConfig(hidden=(16, 16), activation="relu"),
        critic=CriticConfig(members=3, hidden=(8, 8), layer_norm=True),
        updates=20,
        batch_size=32,
        episodes=0,
    )
    return train_iql.train(config).folder


STATES = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, -3.0], [-1.0, 0.0, 8.0]])
TORQUES = torch.tensor([[1.0], [-2.0], [0.5]])


def test_advantages_are_the_slow_critics_less_the_value(run: Path) -> None:
    checkpoint = load_checkpoint(run / "checkpoints" / "last")
    modules = checkpoint.state["parts"]["modules"]
    critics = EnsembleCritic(3, 3, 1, (8, 8), layer_norm=True)
    critics.load_state_dict(modules["target"])
    policy = StatePolicy.from_pretrained(checkpoint.folder / "policy")
    with torch.no_grad():
        features = policy.normalizer(STATES)
        expected = critics(features, TORQUES / 2.0).min(0).values - policy.values(STATES)
    found = StepJudge.load(run, states=3, actions=1).advantages(STATES, TORQUES)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    weights = step_weights(AdvantageConfig(str(run), inverse_temperature=2.0, max_weight=1.01), STATES, TORQUES)
    assert weights is not None
    torch.testing.assert_close(weights, (2.0 * expected).exp().clamp(max=1.01), rtol=1e-5, atol=1e-6)
    assert step_weights(AdvantageConfig(), STATES, TORQUES) is None


def test_runs_that_cannot_judge(run: Path, tmp_path: Path, pendulum_demonstrations: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is no run; train embodied/iql"):
        StepJudge.load(tmp_path / "nowhere", states=3, actions=1)
    with pytest.raises(UserError, match=r"judges 1 actions in states of 3 numbers, the data set has 4 and 16"):
        StepJudge.load(run, states=16, actions=4)
    cloned = train_bc.train(
        TrainBCConfig(
            run=RunConfig(folder=str(tmp_path / "bc"), wandb="disabled", dry_run=True),
            environment=EnvironmentConfig("Pendulum-v1", max_episode_steps=10, count=2, workers=0),
            data=EpisodesConfig(path=str(pendulum_demonstrations)),
        )
    ).folder
    with pytest.raises(UserError, match=r"is a run of embodied/bc, not of embodied/iql"):
        StepJudge.load(cloned, states=3, actions=1)
    with pytest.raises(ValueError, match="max_weight must be positive"):
        AdvantageConfig(max_weight=0.0)
    with pytest.raises(UserError, match="has no finite opinion"):
        step_weights(AdvantageConfig(str(run), max_weight=1.0), STATES * torch.nan, TORQUES)
