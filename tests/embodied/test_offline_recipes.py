"""Learning from logged data in miniature: every recipe runs, resumes to the bit, and refuses what it cannot use."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from embodied import train_awac, train_cql, train_iql, train_ppo, train_td3_bc
from embodied.evaluate import EvaluateConfig, evaluate_run
from embodied.logged.transitions import DataConfig
from embodied.policies.numpy_actor import StatePolicyConfig
from embodied.policies.state_mlp import StatePolicy
from embodied.rollouts.rollout import Collector
from embodied.rollouts.workers import EnvironmentConfig
from embodied.train_awac import TrainAWACConfig
from embodied.train_bc import TrainBCConfig
from embodied.train_cql import TrainCQLConfig
from embodied.train_dt import TrainDTConfig
from embodied.train_iql import TrainIQLConfig
from embodied.train_ppo import TrainPPOConfig
from embodied.train_td3_bc import TrainTD3BCConfig
from experiment.errors import UserError
from experiment.run import RunConfig
from policy_core.cql import CQLConfig
from policy_core.ppo import PPOConfig
from policy_core.td3_bc import TD3BCConfig
from tests.embodied.pendulum_runs import common

Rows = Callable[[Path], list[dict[str, Any]]]


OFFLINE: dict[str, tuple[ModuleType, Callable[..., Any]]] = {
    "iql": (train_iql, TrainIQLConfig),
    "awac": (train_awac, TrainAWACConfig),
    "cql": (train_cql, lambda **c: TrainCQLConfig(**c, cql=CQLConfig(samples=3, rows=10))),
    "cal_ql": (
        train_cql,
        lambda **c: TrainCQLConfig(**c, calibrated=True, cql=CQLConfig(samples=3, threshold=1.0)),
    ),
    "td3_bc": (train_td3_bc, TrainTD3BCConfig),
    "rebrac": (
        train_td3_bc,
        lambda **c: TrainTD3BCConfig(**c, td3_bc=TD3BCConfig(alpha=1.0, critic_penalty=0.1, distance="sum")),
    ),
}
SIX = {"updates": 6}


@pytest.mark.parametrize("name", OFFLINE)
def test_resumed_to_the_bit(
    name: str, tmp_path: Path, pendulum_demonstrations: Path, rows_of: Rows, interrupt_at: Callable[..., None]
) -> None:
    module, make = OFFLINE[name]
    config = make(**common(tmp_path, pendulum_demonstrations, **SIX))
    whole, broken = (
        replace(config, run=replace(config.run, folder=str(tmp_path / n))) for n in ("whole", "broken")
    )
    module.train(whole)
    interrupt_at(6, module.train, broken)
    module.train(broken, resume=tmp_path / "broken")
    for file in ("policy/policy.safetensors", "state.safetensors"):
        expected, found = (tmp_path / n / "checkpoints/last" / file for n in ("whole", "broken"))
        assert found.read_bytes() == expected.read_bytes()
    rows = rows_of(tmp_path / "whole")
    assert rows_of(tmp_path / "broken") == rows
    assert rows[-1]["global_step"] == 6
    assert {"eval/mean_reward", "eval/mean_reward_low"} <= rows[-1].keys()
    assert any("train/critic_loss" in row for row in rows)


@pytest.mark.parametrize("name", OFFLINE)
def test_the_policy_acts_within_the_bounds_and_in_the_environments_units(
    name: str, tmp_path: Path, pendulum_demonstrations: Path
) -> None:
    module, make = OFFLINE[name]
    run = module.train(make(**common(tmp_path, pendulum_demonstrations, **SIX))).folder
    policy = StatePolicy.from_pretrained(run / "checkpoints" / "last" / "policy")
    assert policy.action_reach.tolist() == [2.0]
    observations = torch.randn(50, 3)
    actions = policy.to_environment(policy(observations)[0].mode())
    assert float(actions.abs().max().detach()) <= 2.0
    weights = np.zeros(10_000, np.float32)
    policy.export_actor(weights)
    from embodied.policies.numpy_actor import NumpyActor

    actor = NumpyActor(policy.spaces, policy.config)
    actor.load(weights)
    np.testing.assert_allclose(actor.act(observations.numpy(), None), actions.detach().numpy(), atol=1e-5)
    figures = evaluate_run(run, EvaluateConfig(checkpoint="last", episodes=2, workers=0))
    assert figures["eval/episodes"] == 2


@pytest.mark.parametrize("head", ["bounded", "squashed"])
def test_numpy_and_torch_sample_alike(head: str, make_policy: Callable[..., StatePolicy]) -> None:
    from embodied.policies.numpy_actor import NumpyActor, Spaces

    policy = make_policy(Spaces(4, 2), head=head)
    policy.set_action_bounds(torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 3.0]))
    actor = NumpyActor(policy.spaces, policy.config)
    weights = np.zeros(actor.size, np.float32)
    policy.export_actor(weights)
    actor.load(weights)
    observations = torch.randn(30, 4)
    noise = actor.noise(np.random.default_rng(0), 30)
    distribution = policy(observations)[0]
    if head == "bounded":
        expected = distribution.mean + torch.from_numpy(noise) * distribution.log_std.exp()
    else:
        expected = distribution.from_noise(torch.from_numpy(noise))[0]
    expected = policy.to_environment(expected).detach()
    np.testing.assert_allclose(actor.act(observations.numpy(), noise), expected.numpy(), rtol=1e-4, atol=1e-4)
    log_probs = policy.evaluate(observations, expected).log_probs
    torch.testing.assert_close(log_probs, distribution.log_prob(policy.to_learner(expected)), rtol=1e-4, atol=1e-4)


def two_ways(path: Path, *, good: int) -> Path:
    """Pendulum-shaped data, every episode one decision: torque 1.5 earns 1, torque -1.5 nothing."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for number in range(200):
            demo = file.create_group(f"data/demo_{number}")
            pays = number % 10 < good
            demo["obs/state"] = rng.standard_normal((2, 3)).astype(np.float32)
            demo["actions"] = np.array([[1.5 if pays else -1.5]] * 1, np.float32)
            demo["rewards"] = np.array([float(pays)], np.float32)
            demo["dones"] = np.array([1], np.int64)
    return path


@pytest.mark.parametrize("name", OFFLINE)
def test_the_better_of_two_ways_is_learned_where_cloning_would_take_the_other(name: str, tmp_path: Path) -> None:
    data = two_ways(tmp_path / "ways.hdf5", good=3)
    module, make = OFFLINE[name]
    settings = common(tmp_path, data, updates=200, episodes=0, evaluate_every=200, batch_size=64)
    config = make(**settings | {"data": DataConfig(path=str(data), gamma=0.0)})
    rates = {
        f: 1e-2 for f in ("learning_rate", "policy_learning_rate", "critic_learning_rate") if hasattr(config, f)
    }
    config = replace(config, **rates)
    if name == "iql":
        config = replace(config, iql=replace(config.iql, inverse_temperature=20.0))
    if name in ("cql", "cal_ql"):
        config = replace(config, cql=CQLConfig(samples=3, weight=0.1))
    if name == "awac":
        config = replace(config, awac=replace(config.awac, temperature=0.05))
    run = module.train(config).folder
    policy = StatePolicy.from_pretrained(run / "checkpoints" / "last" / "policy")
    actions = policy.to_environment(policy(torch.randn(200, 3))[0].mode()).detach()
    assert float(actions.mean()) > 0.8


def test_ppo_goes_on_from_iql_where_it_stopped(tmp_path: Path, pendulum_demonstrations: Path) -> None:
    config = TrainIQLConfig(**common(tmp_path, pendulum_demonstrations, updates=200, evaluate_every=200))
    run = train_iql.train(config).folder
    folder = run / "checkpoints" / "last" / "policy"
    start = StatePolicy.from_pretrained(folder)
    ppo = TrainPPOConfig(
        run=RunConfig(folder=str(tmp_path / "ppo"), wandb="disabled", checkpoint_every=1),
        environment=config.environment,
        ppo=PPOConfig(epochs=1, minibatch_size=16, critic_warmup=2),
        init=str(folder),
        total_steps=3 * 2 * 16,
        horizon=16,
    )
    train_ppo.train(ppo)
    warmed = StatePolicy.from_pretrained(tmp_path / "ppo" / "checkpoints" / "000000002" / "policy")
    observations = torch.randn(20, 3)
    torch.testing.assert_close(warmed(observations)[0].mode(), start(observations)[0].mode())  # the critic alone
    assert not torch.equal(warmed(observations)[1], start(observations)[1])
    with Collector(config.environment, start, steps=16, seed=0) as collector:
        experience = collector.collect(start)
    torch.testing.assert_close(  # what PPO will take for the acting policy's log-probs is what acted
        start.to_learner(experience.actions), (experience.actions - start.action_centre) / start.action_reach
    )


def test_ppo_takes_iqls_values_over_in_its_own_units(tmp_path: Path, pendulum_demonstrations: Path) -> None:
    unlike = tmp_path / "unlike.hdf5"
    shutil.copy(pendulum_demonstrations, unlike)
    with h5py.File(unlike, "r+") as file:
        for number, demo in enumerate(file["data"].values()):
            demo["rewards"][...] = -number
    settings = common(tmp_path, unlike, updates=50, evaluate_every=50)
    data = DataConfig(path=str(unlike), rewards="returns")
    run = train_iql.train(TrainIQLConfig(**settings | {"data": data})).folder
    start = StatePolicy.from_pretrained(run / "checkpoints" / "last" / "policy")
    assert start.value_units is not None
    assert start.value_units.scale > 1.5  # returns that span less than 600 are made to span 1,000
    ppo = TrainPPOConfig(
        run=RunConfig(folder=str(tmp_path / "ppo"), wandb="disabled"),
        environment=settings["environment"],
        ppo=PPOConfig(learning_rate=1e-12),
        init=str(run / "checkpoints" / "last" / "policy"),
        total_steps=32,
        horizon=16,
    )
    train_ppo.train(ppo)
    after = StatePolicy.from_pretrained(tmp_path / "ppo" / "checkpoints" / "last" / "policy")
    assert after.value_units is not None
    assert after.value_units.scale < 1  # Pendulum's returns spread by more than 1
    observations = torch.randn(20, 3)
    factor = after.value_units.scale / start.value_units.scale
    torch.testing.assert_close(
        after.values(observations), factor * start.values(observations), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("name", ["cql", "td3_bc"])
def test_ppo_goes_on_from_any_head(name: str, tmp_path: Path, pendulum_demonstrations: Path) -> None:
    module, make = OFFLINE[name]
    run = module.train(make(**common(tmp_path, pendulum_demonstrations, **SIX))).folder
    ppo = TrainPPOConfig(
        run=RunConfig(folder=str(tmp_path / "ppo"), wandb="disabled"),
        environment=EnvironmentConfig("Pendulum-v1", max_episode_steps=10, count=2, workers=0),
        ppo=PPOConfig(epochs=2, minibatch_size=16, entropy_coef=0.01),
        init=str(run / "checkpoints" / "last" / "policy"),
        total_steps=3 * 2 * 16,
        horizon=16,
    )
    metrics = train_ppo.train(ppo).metrics
    assert abs(metrics["train/approx_kl"]) < 1.0
    assert ("train/std" in metrics) == (name == "td3_bc")
    after = StatePolicy.from_pretrained(tmp_path / "ppo" / "checkpoints" / "last" / "policy")
    assert after.config.head == ("squashed" if name == "cql" else "bounded")
    assert after.action_reach.tolist() == [2.0]


def test_bf16_stays_near_float32(tmp_path: Path, pendulum_demonstrations: Path) -> None:
    policies = {}
    for precision in ("float32", "bf16"):
        settings = common(tmp_path, pendulum_demonstrations, updates=5, episodes=0, precision=precision)
        settings["run"] = RunConfig(folder=str(tmp_path / precision), wandb="disabled")
        run = train_iql.train(TrainIQLConfig(**settings)).folder
        policies[precision] = StatePolicy.from_pretrained(run / "checkpoints" / "last" / "policy").state_dict()
    for name, tensor in policies["float32"].items():
        torch.testing.assert_close(policies["bf16"][name], tensor, rtol=0.05, atol=0.01)
    assert any(not torch.equal(policies["bf16"][name], tensor) for name, tensor in policies["float32"].items())


def test_only_the_best_episodes_are_kept(tmp_path: Path) -> None:
    config = TrainIQLConfig(**common(tmp_path, two_ways(tmp_path / "ways.hdf5", good=3)))
    config = replace(config, data=replace(config.data, best=0.3))
    episodes = train_iql.Inputs.read(config).episodes
    assert len(episodes) == 60
    assert {float(episode.rewards.sum()) for episode in episodes} == {1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": DataConfig()}, "data.path is not set"),
        ({"data": DataConfig(path="nowhere.hdf5")}, "nowhere.hdf5: no such"),
        ({"environment": EnvironmentConfig("CartPole-v1", count=1, workers=0)}, "discrete actions"),
        ({"environment": EnvironmentConfig("HalfCheetah-v5", count=1, workers=0)}, "HalfCheetah-v5 has 17 and 6"),
        (
            {"policy": StatePolicyConfig(head="squashed")},
            "policy.head: 'squashed' is not what this algorithm learns",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_left(
    changes: dict[str, Any], message: str, tmp_path: Path, pendulum_demonstrations: Path
) -> None:
    config = replace(TrainIQLConfig(**common(tmp_path, pendulum_demonstrations)), **changes)
    with pytest.raises(UserError, match=message):
        train_iql.train(config)
    assert not (tmp_path / "run").exists()


def test_a_run_is_as_good_as_its_policys_folder(tmp_path: Path, pendulum_demonstrations: Path) -> None:
    """And one that judged none of its checkpoints is evaluated by its last."""
    run = train_iql.train(TrainIQLConfig(**common(tmp_path, pendulum_demonstrations, updates=2, episodes=0))).folder
    assert evaluate_run(run, EvaluateConfig(episodes=2))["eval/episodes"] == 2.0
    named, whole = StatePolicy.from_pretrained(run), StatePolicy.from_pretrained(run / "checkpoints/last/policy")
    assert all(torch.equal(one, other) for one, other in zip(named.parameters(), whole.parameters(), strict=True))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, pendulum_demonstrations: Path) -> None:
    config = TrainIQLConfig(**common(tmp_path, pendulum_demonstrations, learning_rate=1e30, log_every=1))
    with pytest.raises(UserError, match="lower the learning rates"):
        train_iql.train(config)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (TrainIQLConfig, {"updates": 0}, "updates"),
        (TrainIQLConfig, {"episodes": -1}, "episodes"),
        (DataConfig, {"gamma": 1.5}, "gamma must be"),
        (DataConfig, {"n_steps": 0}, "gamma must be"),
        (DataConfig, {"best": 0.0}, "best must be"),
        (TrainTD3BCConfig, {"exploration": 0.0}, "exploration must be positive"),
        (TrainTD3BCConfig, {"critic_learning_rate": -1.0}, "critic_learning_rate must not be negative"),
        (TrainDTConfig, {"learning_rate": -1.0}, "learning_rate and weight_decay must not be negative"),
        (TrainBCConfig, {"learning_rate": -1.0}, "learning_rate must not be negative"),
    ],
)
def test_the_configurations_check_themselves(kind: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)
