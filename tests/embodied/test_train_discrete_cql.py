"""CQL over choices, from a data set of CartPole that d3rlpy wrote to an evaluated policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from d3rlpy.constants import ActionSpace
from d3rlpy.dataset import MDPDataset

from embodied import train_discrete_cql, train_ppo
from embodied.datasets.formats import read_dataset
from embodied.evaluate import EvaluateConfig, evaluate_run
from embodied.logged.offline import CriticConfig
from embodied.logged.played import play_policies, run_to_play
from embodied.logged.transitions import DataConfig
from embodied.policies.numpy_actor import Spaces, StatePolicyConfig
from embodied.policies.state_mlp import StatePolicy
from embodied.rollouts.workers import EnvironmentConfig
from embodied.train_discrete_cql import TrainDiscreteCQLConfig
from embodied.train_ppo import TrainPPOConfig
from experiment.errors import UserError
from experiment.run import RunConfig


@pytest.fixture(scope="module")
def balanced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CartPole by a rule that balances, which does something else in one of three steps."""
    environment = gymnasium.make("CartPole-v1", max_episode_steps=100)
    rng = np.random.default_rng(0)
    columns: dict[str, list[Any]] = {
        name: [] for name in ("observations", "actions", "rewards", "terminals", "timeouts")
    }
    for seed in range(60):
        observation, _ = environment.reset(seed=seed)
        ended = False
        while not ended:
            action = int(observation[2] + observation[3] > 0)
            if rng.random() < 1 / 3:
                action = 1 - action
            following, reward, terminated, truncated, _ = environment.step(action)
            row = (observation, action, reward, terminated, truncated)
            for name, value in zip(columns, row, strict=True):
                columns[name].append(value)
            observation, ended = following, terminated or truncated
    arrays = {name: np.array(values) for name, values in columns.items()}
    path = tmp_path_factory.mktemp("cart") / "cart.h5"
    with path.open("w+b") as file:
        MDPDataset(**arrays, action_space=ActionSpace.DISCRETE).dump(file)
    return path


def config_of(folder: Path, data: Path, **changes: Any) -> TrainDiscreteCQLConfig:
    config = TrainDiscreteCQLConfig(
        run=RunConfig(folder=str(folder), wandb="disabled", seed=3),
        environment=EnvironmentConfig("CartPole-v1", max_episode_steps=100, count=2, workers=0),
        data=DataConfig(path=str(data)),
        policy=StatePolicyConfig(hidden=(32, 32), activation="relu"),
        batch_size=64,
        updates=6,
        log_every=2,
        evaluate_every=3,
        episodes=2,
    )
    return replace(config, **changes)


def test_it_balances_better_than_what_it_was_shown(tmp_path: Path, balanced: Path) -> None:
    settings = {"updates": 1500, "evaluate_every": 1500, "log_every": 500, "learning_rate": 1e-3}
    run = train_discrete_cql.train(config_of(tmp_path / "run", balanced, **settings)).folder
    shown = float(np.mean([len(episode) for episode in read_dataset(balanced)]))
    figures = evaluate_run(run, EvaluateConfig(checkpoint="last", episodes=20, workers=0))
    assert shown < 70
    assert figures["eval/mean_reward"] > shown + 20


def test_it_resumes_to_the_bit(
    tmp_path: Path, balanced: Path, interrupt_at: Callable[..., None], rows_of: Callable[..., Any]
) -> None:
    whole, broken = (config_of(tmp_path / name, balanced) for name in ("whole", "broken"))
    train_discrete_cql.train(whole)
    interrupt_at(6, train_discrete_cql.train, broken)
    train_discrete_cql.train(broken, resume=tmp_path / "broken")
    for file in ("policy/policy.safetensors", "state.safetensors"):
        expected, found = (tmp_path / name / "checkpoints/last" / file for name in ("whole", "broken"))
        assert found.read_bytes() == expected.read_bytes()
    assert rows_of(tmp_path / "broken") == rows_of(tmp_path / "whole")


def test_the_best_choice_is_taken_wherever_it_is_asked(tmp_path: Path, balanced: Path) -> None:
    """Values are no logits: where two differ by 0.5, sampling by them would take the worse one in 38 of 100."""
    run = train_discrete_cql.train(config_of(tmp_path / "run", balanced)).folder
    folder = run / "checkpoints" / "last" / "policy"
    environment, _ = run_to_play(run, "last")
    policy = StatePolicy.from_pretrained(folder)
    for deterministic in (False, True):
        for episode in play_policies([folder], environment, steps=200, seed=0, deterministic=deterministic):
            best = policy(torch.from_numpy(episode.observations))[0].mode()
            assert episode.actions[:, 0].tolist() == best.tolist()
    settings = EvaluateConfig(checkpoint="last", episodes=5, workers=0)
    sampled = evaluate_run(run, replace(settings, deterministic=False))
    assert sampled["eval/mean_reward"] == evaluate_run(run, settings)["eval/mean_reward"]
    ppo = TrainPPOConfig(environment=EnvironmentConfig("CartPole-v1", workers=0), init=str(folder))
    with pytest.raises(UserError, match=r"^init: .* says what choices are worth, not how often to take them$"):
        train_ppo.train(ppo)
    with pytest.raises(ValueError, match=r"policy\.head 'values' is no distribution"):
        TrainPPOConfig(policy=StatePolicyConfig(head="values"))
    with pytest.raises(ValueError, match=r"policy\.head 'values' is of choices"):
        StatePolicy(Spaces(3, 2), StatePolicyConfig(head="values"))


def test_the_policy_takes_the_choice_of_the_highest_value(tmp_path: Path, balanced: Path) -> None:
    run = train_discrete_cql.train(config_of(tmp_path / "run", balanced)).folder
    policy = StatePolicy.from_pretrained(run / "checkpoints" / "last" / "policy")
    features = torch.randn(20, 4)
    values = train_discrete_cql.values_of(policy)(features)
    assert values.shape == (20, 2)
    assert policy.distribution_of(features).mode().tolist() == values.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            "Pendulum-v1",
            r"Pendulum-v1 has continuous actions; this recipe needs discrete ones \(see embodied/cql\)",
        ),
        ("Acrobot-v1", r"observations have 4 dimensions and actions 1, but Acrobot-v1 has 6 and one choice of 3"),
    ],
)
def test_another_environment_is_named(environment: str, message: str, tmp_path: Path, balanced: Path) -> None:
    config = config_of(tmp_path / "run", balanced)
    config = replace(config, environment=replace(config.environment, id=environment))
    with pytest.raises(UserError, match=message):
        train_discrete_cql.train(config)
    assert not (tmp_path / "run").exists()


def test_choices_that_there_are_not(tmp_path: Path, balanced: Path) -> None:
    wrong = tmp_path / "wrong.h5"
    wrong.write_bytes(balanced.read_bytes())
    with h5py.File(wrong, "r+") as file:
        file["actions_0"][-1] = 2
    with pytest.raises(UserError, match=r"actions from 0 to 2 are not the choices 0 to 1 of CartPole-v1"):
        train_discrete_cql.train(config_of(tmp_path / "run", wrong))


def test_a_section_that_does_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"critic: the policy is the critic here; set policy\.hidden"):
        TrainDiscreteCQLConfig(critic=CriticConfig(members=3))
