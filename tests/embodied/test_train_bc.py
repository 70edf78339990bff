"""Behaviour cloning in miniature: it learns the teacher, resumes to the bit, and refuses what it cannot use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from embodied import train_bc
from embodied.datasets.episode import Episode
from embodied.logged.demonstrations import (
    DemonstrationBatches,
    DemonstrationTerm,
    EpisodesConfig,
    best_episodes,
)
from embodied.policies.numpy_actor import StatePolicyConfig
from embodied.policies.state_mlp import StatePolicy
from embodied.rollouts.workers import EnvironmentConfig, environment_spec
from embodied.train_bc import TrainBCConfig
from experiment.errors import NonFiniteMetric, UserError
from experiment.run import RunConfig

Rows = Callable[[Path], list[dict[str, Any]]]


@pytest.fixture
def config(tmp_path: Path, pendulum_demonstrations: Path) -> TrainBCConfig:
    return TrainBCConfig(
        run=RunConfig(folder=str(tmp_path / "run"), wandb="disabled", seed=2),
        environment=EnvironmentConfig("Pendulum-v1", max_episode_steps=10, count=2, workers=0),
        policy=StatePolicyConfig(hidden=(16, 16)),
        data=EpisodesConfig(path=str(pendulum_demonstrations)),
        updates=6,
        batch_size=32,
        held_out=0.2,
        evaluate_every=3,
        episodes=2,
    )


def elsewhere(config: TrainBCConfig, folder: Path, **changes: Any) -> TrainBCConfig:
    return replace(config, run=replace(config.run, folder=str(folder)), **changes)


def test_it_learns_the_teacher(config: TrainBCConfig, rows_of: Rows) -> None:
    config = replace(config, updates=600, evaluate_every=200, learning_rate=1e-2)
    result = train_bc.train(config)
    rows = rows_of(result.folder)
    held_out = [row["eval/loss"] for row in rows if "eval/loss" in row]
    assert len(held_out) == 3
    assert held_out[-1] < held_out[0]
    assert held_out[-1] < -0.9  # nats: a deviation near exp(-2), its lower bound, is -0.58 - 2 + 0.5 at best
    assert rows[-1]["samples"] == 600 * 32
    assert {"eval/mean_reward", "eval/mean_reward_low", "eval/ep_len_mean"} <= rows[-1].keys()
    assert rows[-1]["eval/episodes"] == 2
    policy = StatePolicy.from_pretrained(result.folder / "checkpoints" / "best" / "policy")
    assert -2.0 <= policy.log_std.item() < -1.3
    spec = environment_spec(config.environment)
    training, _ = train_bc.read(config, spec)
    mean = policy(training.observations)[0].mean
    assert float((mean - training.actions).abs().mean().detach()) < 0.1
    torch.testing.assert_close(
        policy.normalizer.mean, training.observations.double().mean((0, 1)), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_resumed_to_the_bit(
    config: TrainBCConfig, tmp_path: Path, rows_of: Rows, interrupt_at: Callable[..., None], noise: float
) -> None:
    config = replace(config, observation_noise=noise)
    whole = train_bc.train(elsewhere(config, tmp_path / "whole")).folder
    broken = elsewhere(config, tmp_path / "broken")
    interrupt_at(6, train_bc.train, broken)
    train_bc.train(broken, resume=tmp_path / "broken")
    for file in ("policy/policy.safetensors", "state.safetensors"):
        expected, found = (folder / "checkpoints/last" / file for folder in (whole, tmp_path / "broken"))
        assert found.read_bytes() == expected.read_bytes()
    assert rows_of(tmp_path / "broken") == rows_of(whole)
    assert [row["global_step"] for row in rows_of(whole)] == [3, 6]  # an update and its evaluation: one row


def test_best_is_the_lowest_held_out_loss(config: TrainBCConfig, rows_of: Rows) -> None:
    config = replace(config, updates=120, evaluate_every=10, learning_rate=0.05, episodes=0)
    result = train_bc.train(config)
    losses = {row["global_step"]: row["eval/loss"] for row in rows_of(result.folder) if "eval/loss" in row}
    best = min(losses, key=losses.__getitem__)
    assert (result.folder / "checkpoints" / "best").resolve().name == f"{best:09d}"
    assert not any(key.startswith("eval/mean") for row in rows_of(result.folder) for key in row)


def test_episodes_are_held_out_whole(config: TrainBCConfig) -> None:
    spec = environment_spec(config.environment)
    training, validation = train_bc.read(config, spec)
    assert validation is not None
    assert (training.observations.shape, training.actions.shape) == ((480, 1, 3), (480, 1, 1))
    assert validation.observations.shape == (120, 1, 3)
    seen = {tuple(row) for row in training.observations.squeeze(1).tolist()}
    assert not seen & {tuple(row) for row in validation.observations.squeeze(1).tolist()}
    again, _ = train_bc.read(config, spec)
    assert torch.equal(again.observations, training.observations)
    other, _ = train_bc.read(replace(config, run=replace(config.run, seed=3)), spec)
    assert not torch.equal(other.observations, training.observations)
    assert train_bc.read(replace(config, held_out=0.0), spec)[1] is None
    kept, most = train_bc.read(replace(config, held_out=0.99), spec)
    assert most is not None
    assert (len(kept.actions), len(most.actions)) == (60, 540)  # one episode is always left to learn from


def test_noise_is_in_standard_deviations_of_each_dimension(config: TrainBCConfig) -> None:
    training, _ = train_bc.read(config, environment_spec(config.environment))
    plain = training.draw(20_000, noise=0.0, generator=torch.Generator().manual_seed(1))
    noisy = training.draw(20_000, noise=0.5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(plain.actions, noisy.actions)
    moved = (noisy.observations - plain.observations).std(0).squeeze(0)
    torch.testing.assert_close(moved, 0.5 * training.observations.std(0).squeeze(0), rtol=0.03, atol=0.0)


def test_dry_run_does_one_update(config: TrainBCConfig) -> None:
    result = train_bc.train(replace(config, run=replace(config.run, dry_run=True)))
    assert result.metrics["global_step"] == 1


def test_a_loss_that_is_not_finite_stops_the_run(config: TrainBCConfig) -> None:
    config = replace(config, updates=100, evaluate_every=50, learning_rate=1e30)
    with pytest.raises(NonFiniteMetric) as error:  # said before the policy is played
        train_bc.train(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"environment": EnvironmentConfig("CartPole-v1", count=1, workers=0)}, "discrete"),
        ({"environment": EnvironmentConfig("HalfCheetah-v5", count=1, workers=0)}, "HalfCheetah-v5 has 17 and 6"),
        ({"environment": EnvironmentConfig("Pendulim-v1", count=1, workers=0)}, "did you mean 'Pendulum-v1'"),
        ({"data": EpisodesConfig(path="nowhere.hdf5")}, "no such file"),
        ({"data": EpisodesConfig()}, r"data\.path is not set.*data\.path=PATH"),
    ],
)
def test_what_it_cannot_use(config: TrainBCConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_bc.train(replace(config, **changes))
    assert config.run.folder is not None
    assert not Path(config.run.folder).exists()


def test_the_configuration_checks_itself() -> None:
    with pytest.raises(ValueError, match="held_out"):
        TrainBCConfig(held_out=1.0)


def test_a_bounded_clone_reaches_from_bound_to_bound(config: TrainBCConfig) -> None:
    policy = replace(config.policy, head="bounded")
    config = replace(config, policy=policy, updates=600, evaluate_every=600, learning_rate=1e-2, episodes=0)
    run = train_bc.train(config).folder
    clone = StatePolicy.from_pretrained(run / "checkpoints" / "last" / "policy")
    assert clone.action_reach.tolist() == [2.0]
    training, _ = train_bc.read(config, environment_spec(config.environment))
    actions = clone.to_environment(clone(training.observations)[0].mode())
    assert float((actions - training.actions).abs().mean().detach()) < 0.1


def test_a_clone_fits_one_deviation(config: TrainBCConfig) -> None:
    with pytest.raises(ValueError, match=r"policy\.head must be 'gaussian' or 'bounded'"):
        replace(config, policy=replace(config.policy, head="squashed"))
    with pytest.raises(ValueError, match="best must be in"):
        EpisodesConfig(best=0.0)


@pytest.fixture
def several_keys(tmp_path: Path) -> Path:
    """Four demonstrations of five steps, the last two successful: `arm` [5, 3], `lamp` [5] and `object` [5, 2]."""
    path = tmp_path / "several.hdf5"
    with h5py.File(path, "w") as file:
        for number in range(4):
            demo = file.create_group(f"data/demo_{number}")
            demo["actions"] = np.full((5, 1), number / 4)
            demo["obs/arm"] = np.arange(15).reshape(5, 3) + 100.0 * number
            demo["obs/lamp"] = np.full(5, -1.0 - number)
            demo["obs/object"] = np.full((5, 2), -9.0)
            demo["success"] = np.array([False] * 4 + [number >= 2])
        file["mask/train"] = np.array([b"demo_0", b"demo_3"])
    return path


def test_chosen_vectors_and_episodes_are_cloned(config: TrainBCConfig, several_keys: Path) -> None:
    spec = environment_spec(config.environment)
    several = replace(config, data=EpisodesConfig(path=str(several_keys)), held_out=0.0)

    def of(**choice: Any) -> TrainBCConfig:
        return replace(several, data=replace(several.data, **choice))

    with pytest.raises(UserError, match=r"observations have 6 dimensions .* or other observation keys"):
        train_bc.read(several, spec)
    training, _ = train_bc.read(of(observation_keys=("arm",)), spec)
    assert training.observations[:, 0, 0].tolist() == [
        100.0 * demo + 3 * step for demo in range(4) for step in range(5)
    ]
    training, _ = train_bc.read(of(observation_keys=("object", "lamp")), spec)
    assert training.observations[::5, 0].tolist() == [[-9.0, -9.0, -1.0 - demo] for demo in range(4)]
    arm = of(observation_keys=("arm",), subset="train")
    training, _ = train_bc.read(arm, spec)
    assert training.observations[::5, 0, 0].tolist() == [0.0, 300.0]
    result = train_bc.train(arm)
    policy = StatePolicy.from_pretrained(result.folder / "checkpoints" / "last" / "policy")
    assert policy.normalizer.mean.tolist() == [156.0, 157.0, 158.0]
    with pytest.raises(UserError, match="has no observation 'leg'; it has arm, lamp, object"):
        train_bc.read(of(observation_keys=("leg",)), spec)
    with pytest.raises(UserError, match="test"):
        train_bc.read(of(subset="test"), spec)


def test_ppos_term_takes_the_same_data(config: TrainBCConfig, several_keys: Path) -> None:
    term = DemonstrationTerm(path=str(several_keys), observation_keys=("arm",), subset="train")
    batches = DemonstrationBatches.load(term, environment_spec(config.environment), seed=0)
    assert batches is not None
    assert batches.observations[::5, 0].tolist() == [0.0, 300.0]


def test_without_rewards_the_successful_are_the_best(config: TrainBCConfig, several_keys: Path) -> None:
    best = EpisodesConfig(path=str(several_keys), observation_keys=("arm",), best=0.5)
    training, _ = train_bc.read(replace(config, data=best, held_out=0.0), environment_spec(config.environment))
    assert training.observations[::5, 0, 0].tolist() == [200.0, 300.0]


@pytest.mark.parametrize("success", [None, True, False])
def test_where_nothing_tells_them_apart_there_is_no_best(success: bool | None) -> None:
    def episode(reward: float, success: bool | None = success) -> Episode:
        nothing = np.zeros((2, 1), np.float32)
        return Episode(nothing, nothing, np.full(2, reward, np.float32), False, True, success=success)

    alike = [episode(0.0)] * 3
    with pytest.raises(UserError, match=r"best=0\.5: all 3 episodes have the same return") as error:
        best_episodes(alike, 0.5)
    assert "\n" not in str(error.value)
    assert best_episodes(alike, 1.0) == alike
    unequal = [*alike, episode(1.0, success=False), episode(1.0, success=True)]  # returns first, then success
    assert best_episodes(unequal, 0.2) == unequal[4:]
    assert best_episodes(unequal, 0.4) == unequal[3:]


def test_no_best_no_folder(config: TrainBCConfig) -> None:
    with pytest.raises(UserError, match=r"best=0\.5: all 10 episodes have the same return"):
        train_bc.train(replace(config, data=replace(config.data, best=0.5)))
    assert not Path(config.run.folder or "").exists()
