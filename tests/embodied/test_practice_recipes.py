"""Going on online with prior data, in miniature: from the offline recipe's run, from nothing, and after a break."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from embodied import (
    train_awac,
    train_awac_online,
    train_cql,
    train_iql,
    train_iql_online,
    train_rlpd,
)
from embodied.logged.offline import CriticConfig, Inputs
from embodied.logged.practice import PracticeConfig
from embodied.logged.transitions import DataConfig
from embodied.policies.state_mlp import StatePolicy
from embodied.rollouts.rollout import Collector
from embodied.rollouts.workers import EnvironmentConfig
from embodied.train_awac import TrainAWACConfig
from embodied.train_awac_online import TrainAWACOnlineConfig
from embodied.train_cql import TrainCQLConfig
from embodied.train_iql import TrainIQLConfig
from embodied.train_iql_online import TrainIQLOnlineConfig
from embodied.train_rlpd import TrainRLPDConfig
from experiment.checkpoint import load_checkpoint
from experiment.errors import UserError
from experiment.run import RunConfig
from policy_core import sac
from policy_core.awac import AWACConfig
from policy_core.cql import CQLConfig
from policy_core.iql import IQLConfig
from tests.embodied.pendulum_runs import common

Rows = Callable[[Path], list[dict[str, Any]]]
ROUNDS: dict[str, Any] = {
    "total_steps": 48,
    "horizon": 4,
    "random_steps": 16,
    "replay_size": 2_000,
    "updates_per_step": 0.5,
}
"""Six rounds of eight steps."""


@dataclass(frozen=True)
class Pair:
    """An offline recipe and the one that goes on from it; a metric that only the latter's learning has."""

    offline: ModuleType
    online: ModuleType
    make_offline: Callable[..., Any]
    make_online: Callable[..., Any]
    learned: str


PAIRS = {
    "iql": Pair(train_iql, train_iql_online, TrainIQLConfig, TrainIQLOnlineConfig, "train/advantage_weight"),
    "awac": Pair(train_awac, train_awac_online, TrainAWACConfig, TrainAWACOnlineConfig, "train/advantage"),
    "sac": Pair(train_cql, train_rlpd, TrainCQLConfig, TrainRLPDConfig, "train/temperature"),
    "cal_ql": Pair(
        train_cql,
        train_rlpd,
        lambda **c: TrainCQLConfig(**c, calibrated=True, cql=CQLConfig(samples=3)),
        lambda **c: TrainRLPDConfig(**c, conservative=CQLConfig(samples=2)),
        "train/conservative_gap",
    ),
}
each_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


def offline_run(pair: Pair, tmp_path: Path, path: Path, **more: Any) -> Path:
    """The folder of a few updates."""
    folder: Path = pair.offline.train(pair.make_offline(**common(tmp_path, path, updates=5) | more)).folder
    return folder


def online(pair: Pair, tmp_path: Path, path: Path, **more: Any) -> Any:
    """The configuration of six rounds in the folder `online`."""
    settings = common(tmp_path, path, **ROUNDS)
    settings["run"] = RunConfig(folder=str(tmp_path / "online"), wandb="disabled", seed=3)
    return pair.make_online(**settings | more)


@each_pair
def test_resumed_to_the_bit(
    pair: Pair, tmp_path: Path, pendulum_demonstrations: Path, rows_of: Rows, interrupt_at: Callable[..., None]
) -> None:
    config = online(pair, tmp_path, pendulum_demonstrations)
    whole, broken = (
        replace(config, run=replace(config.run, folder=str(tmp_path / n))) for n in ("whole", "broken")
    )
    pair.online.train(whole)
    interrupt_at(6, pair.online.train, broken)
    pair.online.train(broken, resume=tmp_path / "broken")
    for file in ("policy/policy.safetensors", "state.safetensors"):
        expected, found = (tmp_path / n / "checkpoints/last" / file for n in ("whole", "broken"))
        assert found.read_bytes() == expected.read_bytes()
    rows = rows_of(tmp_path / "whole")
    assert rows_of(tmp_path / "broken") == rows
    assert rows[-1]["global_step"] == 6
    assert {"eval/mean_reward", "eval/mean_reward_low", "train/critic_loss", pair.learned} <= rows[-1].keys()


@each_pair
def test_begins_with_what_the_offline_run_learned(
    pair: Pair, tmp_path: Path, pendulum_demonstrations: Path
) -> None:
    run = offline_run(pair, tmp_path, pendulum_demonstrations)
    config = online(pair, tmp_path, pendulum_demonstrations, init=str(run), episodes=0, random_steps=1_000)
    after = pair.online.train(config).folder  # too short to learn anything: it is what it began from
    offline, now = (load_checkpoint(folder / "checkpoints" / "last").state for folder in (run, after))
    before, found = offline["parts"]["modules"], now["learner"]["parts"]["modules"]
    assert found.keys() >= {"policy", "critic", "target"}
    for module, state in found.items():
        for name, tensor in state.items():
            assert torch.equal(tensor, before[module][name]), (module, name)
    learning = replace(config, random_steps=0, run=replace(config.run, folder=str(tmp_path / "learning")))
    metrics = pair.online.train(learning).metrics
    assert np.isfinite(metrics[pair.learned])
    assert metrics["env_steps"] == 48


@pytest.mark.parametrize(
    ("every", "expected"), [(1, [1] * 8), (4, [0, 0, 0, 1] * 2), (3, [0, 0, 1, 0, 0, 1, 0, 1])]
)
def test_the_policy_of_rlpd_learns_as_often_as_it_is_told(
    tmp_path: Path, pendulum_demonstrations: Path, monkeypatch: pytest.MonkeyPatch, every: int, expected: list[int]
) -> None:
    """At the end of every round in any case. The papers' 20 updates of the critics go with one of the policy."""
    improved: list[int] = []
    original = sac.update

    def update(*given: Any, improve: bool, **more: Any) -> Any:
        improved.append(int(improve))
        return original(*given, improve=improve, **more)

    monkeypatch.setattr(sac, "update", update)
    settings = {"total_steps": 8, "updates_per_step": 1.0, "random_steps": 0, "episodes": 0, "policy_every": every}
    train_rlpd.train(online(PAIRS["sac"], tmp_path, pendulum_demonstrations, **settings))
    assert improved == expected


def one_decision(path: Path) -> Path:
    """Episodes of the environment Target in which nobody ever took an action above 0."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for number in range(200):
            action = rng.uniform(-1.0, 0.0, (1, 1)).astype(np.float32)
            demo = file.create_group(f"data/demo_{number}")
            demo["obs/state"] = rng.uniform(-1.0, 1.0, (1, 1)).astype(np.float32)
            demo["actions"] = action
            demo["rewards"] = 1.0 - (action[0] - 0.5) ** 2
            demo["dones"] = np.array([1], np.int64)
    return path


@pytest.mark.parametrize("name", ["iql", "awac", "sac"])
def test_practice_finds_what_the_data_lack(name: str, tmp_path: Path) -> None:
    """The best action is 0.5, and nobody took one above 0."""
    pair = PAIRS[name]
    data = one_decision(tmp_path / "data.hdf5")
    settings = common(tmp_path, data, episodes=0, batch_size=128)
    settings["environment"] = EnvironmentConfig("tests.embodied.odd_environments:Target-v0", count=4, workers=0)
    settings["data"] = DataConfig(path=str(data), done_means="terminated", gamma=0.0)
    rates = ("learning_rate",) if name == "iql" else ("policy_learning_rate", "critic_learning_rate")
    settings |= dict.fromkeys(rates, 3e-3)
    own: dict[str, dict[str, Any]] = {
        "iql": {"iql": IQLConfig(expectile=0.5, inverse_temperature=20.0), "log_std_bounds": (-1.5, 0.0)},
        "awac": {"awac": AWACConfig(temperature=0.1)},
    }
    settings |= own.get(name, {})
    means = {}
    before = pair.offline.train(pair.make_offline(**settings | {"updates": 300, "evaluate_every": 300})).folder
    practice = {**settings, **ROUNDS, "total_steps": 1_200, "random_steps": 0, "evaluate_every": 75, "horizon": 4}
    practice |= {"updates_per_step": 1.0, "replay_size": 4_000, "init": str(before)}
    practice["run"] = RunConfig(folder=str(tmp_path / "online"), wandb="disabled")
    after = pair.online.train(pair.make_online(**practice)).folder
    for when, folder in (("before", before), ("after", after)):
        policy = StatePolicy.from_pretrained(folder / "checkpoints" / "last" / "policy")
        with torch.no_grad():
            chosen = policy.to_environment(policy(torch.linspace(-1, 1, 21).unsqueeze(1))[0].mode())
        means[when] = float(chosen.mean())
    print(name, means)
    assert means["before"] < 0.0 < 0.1 < means["after"] < 0.6


def test_an_evaluation_says_after_how_many_environment_steps(
    tmp_path: Path, pendulum_demonstrations: Path, rows_of: Rows
) -> None:
    shown = {"evaluate_every": 1, "total_steps": 16, "random_steps": 1_000}
    config = online(PAIRS["sac"], tmp_path, pendulum_demonstrations, **shown)
    rows = [row for row in rows_of(train_rlpd.train(config).folder) if "eval/mean_reward" in row]
    assert [(row["global_step"], row["env_steps"]) for row in rows] == [(1, 8.0), (2, 16.0)]


def test_rounds_and_updates_by_hand() -> None:
    config = PracticeConfig(
        environment=EnvironmentConfig(count=4), horizon=5, total_steps=101, updates_per_step=0.5, random_steps=41
    )
    assert (config.steps, config.rounds) == (20, 6)
    assert [config.updates_of(number) for number in (1, 2, 3, 6)] == [0, 0, 10, 10]
    dry = replace(config, run=RunConfig(dry_run=True))
    assert (dry.rounds, dry.updates_of(1)) == (1, 1)
    assert replace(config, updates_per_step=0.001).updates_of(6) == 1


def test_a_part_of_a_batch_is_prior_data(tmp_path: Path, pendulum_demonstrations: Path) -> None:
    config = online(PAIRS["iql"], tmp_path, pendulum_demonstrations, prior=0.25)
    practice, _ = train_iql_online.build(config, Inputs.read(config))
    memory = practice.memory
    with Collector(config.environment, practice.policy, steps=4, seed=0) as collector:
        practice.remember(collector.collect(practice.policy), config)
    memory.prior.transitions.rewards.fill_(123.0)
    batch, returns = memory.draw(config, practice.parts.generator)
    assert (batch.rewards == 123.0).tolist() == [True] * 8 + [False] * 24
    assert len(returns) == 32
    assert len(memory.replay) == 8


def test_own_rewards_are_in_the_datas_units(tmp_path: Path, pendulum_demonstrations: Path) -> None:
    data = DataConfig(path=str(pendulum_demonstrations), shift=-1.0)
    config = online(PAIRS["iql"], tmp_path, pendulum_demonstrations, data=data)
    practice, _ = train_iql_online.build(config, Inputs.read(config))
    practice.parts.scale = 0.25  # as data.rewards "returns" would have it
    with Collector(config.environment, practice.policy, steps=4, seed=0) as collector:
        experience = collector.collect(practice.policy)
    practice.remember(experience, config)
    assert practice.memory.replay.columns is not None
    found = practice.memory.replay.columns.rewards[:8]
    torch.testing.assert_close(found, experience.rewards.flatten() * 0.25 - 1.0)


@pytest.mark.parametrize(("given", "wanted"), [("iql", "sac"), ("cal_ql", "iql"), ("iql", "awac")])
def test_a_run_of_another_recipe_is_refused(
    given: str, wanted: str, tmp_path: Path, pendulum_demonstrations: Path
) -> None:
    run = offline_run(PAIRS[given], tmp_path, pendulum_demonstrations)
    config = online(PAIRS[wanted], tmp_path, pendulum_demonstrations, init=str(run))
    theirs, ours = ({"sac": "cql", "cal_ql": "cql"}.get(name, name) for name in (given, wanted))
    with pytest.raises(UserError, match=f"is a run of embodied/{theirs}: give a run of embodied/{ours}"):
        PAIRS[wanted].online.train(config)
    assert not (tmp_path / "online").exists()


def test_what_is_no_run_is_told(tmp_path: Path, pendulum_demonstrations: Path) -> None:
    policy = offline_run(PAIRS["iql"], tmp_path, pendulum_demonstrations) / "checkpoints" / "last" / "policy"
    for place in (policy, tmp_path / "nowhere"):
        config = online(PAIRS["iql"], tmp_path, pendulum_demonstrations, init=str(place))
        with pytest.raises(UserError, match=f"{place} is not a run's folder: give that of a run of embodied/iql$"):
            train_iql_online.train(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 0.9}, r"were learned with data\.gamma=0\.99, here it is 0\.9: say data\.gamma=0\.99$"),
        ({"shift": -1.0}, r"were learned with data\.shift=0\.0, here it is -1\.0"),
    ],
)
def test_values_in_other_units_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path, pendulum_demonstrations: Path
) -> None:
    run = offline_run(PAIRS["sac"], tmp_path, pendulum_demonstrations)
    other = DataConfig(path=str(pendulum_demonstrations), **change)
    with pytest.raises(UserError, match=message):
        train_rlpd.train(online(PAIRS["sac"], tmp_path, pendulum_demonstrations, init=str(run), data=other))
    assert not (tmp_path / "online").exists()


def changed(path: Path, out: Path, column: str, change: Callable[[Any], None]) -> Path:
    """A copy of the demonstrations in which `change` was done to a column of every episode."""
    shutil.copy(path, out)
    with h5py.File(out, "r+") as file:
        for demo in file["data"].values():
            change(demo[column])
    return out


@pytest.mark.parametrize("name", ["iql", "awac", "sac"])
def test_values_of_rewards_scaled_by_other_data_are_refused(
    name: str, tmp_path: Path, pendulum_demonstrations: Path
) -> None:
    pair = PAIRS[name]

    def earning(times: float) -> Callable[[Any], None]:
        def change(rewards: Any) -> None:
            rewards[...] = times * int(rewards.parent.name.rpartition("_")[2])

        return change

    def scaled(path: Path) -> DataConfig:
        return DataConfig(path=str(path), rewards="returns")

    poorer, richer = (
        changed(pendulum_demonstrations, tmp_path / name, "rewards", earning(times))
        for name, times in (("poorer.hdf5", 1.0), ("richer.hdf5", 2.0))
    )
    run = offline_run(pair, tmp_path, poorer, data=scaled(poorer))
    config = online(pair, tmp_path, richer, init=str(run), data=scaled(richer))
    with pytest.raises(UserError, match=r"are of rewards times .* those of .*richer\.hdf5 times "):
        pair.online.train(config)
    assert not (tmp_path / "online").exists()
    pair.online.train(replace(config, data=scaled(poorer)))


def test_observations_in_other_units_are_refused(tmp_path: Path, pendulum_demonstrations: Path) -> None:
    def shift(observations: Any) -> None:
        observations[...] += 100.0

    run = offline_run(PAIRS["sac"], tmp_path, pendulum_demonstrations)
    far = changed(pendulum_demonstrations, tmp_path / "far.hdf5", "obs/state", shift)
    with pytest.raises(UserError, match=r"was trained in other units: 100% of the numbers observed in .*far\.hdf5"):
        train_rlpd.train(online(PAIRS["sac"], tmp_path, far, init=str(run)))


@each_pair
def test_resumes_without_the_run_that_it_began_with(
    pair: Pair, tmp_path: Path, pendulum_demonstrations: Path
) -> None:
    run = offline_run(pair, tmp_path, pendulum_demonstrations)
    config = online(pair, tmp_path, pendulum_demonstrations, init=str(run), evaluate_every=1, episodes=0)
    pair.online.train(replace(config, total_steps=16))
    run.rename(tmp_path / "elsewhere")
    assert pair.online.train(config, resume=tmp_path / "online").metrics["env_steps"] == 48


@each_pair
def test_what_is_not_finite_stops_the_run_before_anything_is_played(
    pair: Pair, tmp_path: Path, pendulum_demonstrations: Path
) -> None:
    rates = ("learning_rate",) if pair.offline is train_iql else ("policy_learning_rate", "critic_learning_rate")
    config = online(pair, tmp_path, pendulum_demonstrations, random_steps=0, **dict.fromkeys(rates, 1e30))
    with pytest.raises(UserError, match=r"^round \d: train/\w+ is (nan|-?inf); lower the learning rates"):
        pair.online.train(config)


def test_the_multiplier_goes_on(tmp_path: Path, pendulum_demonstrations: Path) -> None:
    lagrange = CQLConfig(samples=2, threshold=1.0)
    config = TrainCQLConfig(**common(tmp_path, pendulum_demonstrations, updates=5), calibrated=True, cql=lagrange)
    run = train_cql.train(replace(config, policy_learning_rate=0.1)).folder
    learned = load_checkpoint(run / "checkpoints" / "last").state["parts"]["modules"]["multiplier"]
    settings = {"conservative": lagrange, "policy_learning_rate": 1e-3, "init": str(run), "evaluate_every": 1}
    practice = online(PAIRS["sac"], tmp_path, pendulum_demonstrations, random_steps=0, total_steps=8, **settings)
    metrics = train_rlpd.train(practice).metrics
    began = float(next(iter(learned.values())).exp())
    assert abs(began - 1.0) > 0.1
    assert metrics["train/multiplier"] == pytest.approx(began, rel=0.01)
    assert metrics["train/multiplier"] != pytest.approx(began, rel=1e-6)


def test_critics_of_other_sizes_are_named(tmp_path: Path, pendulum_demonstrations: Path) -> None:
    run = offline_run(PAIRS["sac"], tmp_path, pendulum_demonstrations)
    other = CriticConfig(members=3, hidden=(16, 16), layer_norm=True)
    config = online(PAIRS["sac"], tmp_path, pendulum_demonstrations, init=str(run), critic=other)
    with pytest.raises(UserError, match=r"it has critic.members=2 critic.layer_norm=false; say so here$"):
        train_rlpd.train(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": 1.0}, "prior"),
        ({"replay_size": 10}, "replay_size"),
        ({"data": DataConfig(n_steps=3)}, r"data\.n_steps: own episodes"),
        ({"updates_per_step": 0.0}, "updates_per_step must be positive"),
    ],
)
def test_the_configurations_check_themselves(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainIQLOnlineConfig(**options)
