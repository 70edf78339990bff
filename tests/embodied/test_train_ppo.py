"""PPO in miniature: it learns, resumes to the bit, starts gently from a clone, and refuses what it cannot use."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from embodied import train_bc, train_ppo
from embodied.logged.demonstrations import DemonstrationTerm, EpisodesConfig
from embodied.policies.numpy_actor import Spaces, StatePolicyConfig
from embodied.policies.state_mlp import StatePolicy
from embodied.rollouts.rollout import Collector
from embodied.rollouts.workers import EnvironmentConfig
from embodied.train_bc import TrainBCConfig
from embodied.train_ppo import EvaluationConfig, TrainPPOConfig
from experiment.errors import UserError
from experiment.run import RunConfig
from policy_core.kl import KLConfig
from policy_core.ppo import PPOConfig

Rows = Callable[[Path], list[dict[str, Any]]]
Make = Callable[..., StatePolicy]
Capsys = pytest.CaptureFixture[str]
ODD = "tests.embodied.odd_environments:Odd-v0"


@pytest.fixture
def config(tmp_path: Path) -> TrainPPOConfig:
    """Six updates of Pendulum."""
    return TrainPPOConfig(
        run=RunConfig(folder=str(tmp_path / "run"), wandb="disabled", seed=4, checkpoint_every=3),
        environment=EnvironmentConfig("Pendulum-v1", max_episode_steps=25, count=3, workers=0),
        policy=StatePolicyConfig(hidden=(8, 8)),
        ppo=PPOConfig(epochs=2, minibatch_size=16, schedule="linear"),
        total_steps=6 * 3 * 16,
        horizon=16,
    )


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, pendulum_demonstrations: Path) -> Path:
    """A cloned policy of Pendulum."""
    config = TrainBCConfig(
        run=RunConfig(folder=str(tmp_path_factory.mktemp("bc") / "run"), wandb="disabled"),
        environment=EnvironmentConfig("Pendulum-v1", count=1, workers=0),
        policy=StatePolicyConfig(hidden=(8, 8)),
        data=EpisodesConfig(path=str(pendulum_demonstrations)),
        updates=150,
        learning_rate=1e-2,
        episodes=0,
    )
    return train_bc.train(config).folder / "checkpoints" / "best" / "policy"


def elsewhere(config: TrainPPOConfig, folder: Path, **changes: Any) -> TrainPPOConfig:
    return replace(config, run=replace(config.run, folder=str(folder)), **changes)


def policy_of(folder: Path, checkpoint: str = "last") -> StatePolicy:
    return StatePolicy.from_pretrained(folder / "checkpoints" / checkpoint / "policy")


# ------------------------------------------------------------------ learning


def test_it_learns_to_balance_a_pole(tmp_path: Path) -> None:
    """Above 150 of 500 within 25,600 steps, from 20; 120 is what a policy gets that only slows its fall."""
    config = TrainPPOConfig(
        run=RunConfig(folder=str(tmp_path / "run"), wandb="disabled", checkpoint_every=100, seed=1),
        environment=EnvironmentConfig("CartPole-v1", count=8, workers=0),
        ppo=PPOConfig(learning_rate=1e-3, epochs=8, minibatch_size=128),
        evaluation=EvaluationConfig(every=25, episodes=20),
        total_steps=25_600,
        horizon=64,
    )
    result = train_ppo.train(config)
    assert result.metrics["env_steps"] == 25_600
    assert result.metrics["eval/mean_reward"] > 150
    assert result.metrics["best/metric"] >= result.metrics["eval/mean_reward"]
    assert result.metrics["rollout/ep_rew_mean"] > 60


def test_what_is_logged(config: TrainPPOConfig, rows_of: Rows) -> None:
    result = train_ppo.train(replace(config, evaluation=EvaluationConfig(every=3, episodes=2)))
    rows = rows_of(result.folder)
    assert [row["global_step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["env_steps"] for row in rows] == [48.0 * update for update in range(1, 7)]
    names = {
        "train/policy_loss",
        "train/value_loss",
        "train/entropy",
        "train/approx_kl",
        "train/clip_fraction",
        "train/explained_variance",
        "train/learning_rate",
        "train/std",
        "train/grad_norm",
        "train/updates",
        "rollout/ep_rew_mean",
        "rollout/ep_len_mean",
        "episodes",
    }
    assert names <= rows[-1].keys()
    assert rows[0]["train/updates"] == 2 * 3  # epochs times minibatches
    assert rows[0]["episodes"] == 0
    assert rows[1]["episodes"] == 3  # limit 25, after 32 steps
    assert rows[-1]["rollout/ep_len_mean"] == 25
    assert [row["train/learning_rate"] for row in rows] == pytest.approx([3e-4 * (1 - u / 6) for u in range(6)])
    assert ["eval/mean_reward" in row for row in rows] == [False, False, True, False, False, True]
    assert "time/fps" in result.metrics
    assert "env/success_once" not in rows[-1]


def test_success_is_logged_where_the_environment_reports_it(config: TrainPPOConfig, rows_of: Rows) -> None:
    door = EnvironmentConfig("tandem/AdroitDoor-v0", max_episode_steps=8, count=2, workers=0)
    evaluation = EvaluationConfig(every=1, episodes=2)
    result = train_ppo.train(replace(config, environment=door, total_steps=32, evaluation=evaluation))
    row = rows_of(result.folder)[-1]
    assert row["env/success_once"] == row["env/success_at_end"] == row["eval/success_once"] == 0.0
    assert row["eval/success_once_high"] > 0.5
    assert result.metrics["best/metric"] == 0.0


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Hopper-v5"])
def test_two_runs_of_one_seed_are_one(config: TrainPPOConfig, tmp_path: Path, rows_of: Rows, env_id: str) -> None:
    config = replace(config, environment=EnvironmentConfig(env_id, count=3, workers=0))
    folders = [train_ppo.train(elsewhere(config, tmp_path / name)).folder for name in "ab"]
    other = elsewhere(config, tmp_path / "c")
    folders.append(train_ppo.train(replace(other, run=replace(other.run, seed=5))).folder)
    assert rows_of(folders[0]) == rows_of(folders[1])
    assert rows_of(folders[0]) != rows_of(folders[2])


# ------------------------------------------------------------------ resuming


def from_clone(clone: Path, demonstrations: Path) -> dict[str, Any]:
    return {
        "init": str(clone),
        "log_std": -1.0,
        "kl": KLConfig(coef=0.05, target=0.2, horizon=10.0),
        "demonstrations": DemonstrationTerm(path=str(demonstrations), coef=0.1, batch_size=16),
    }


@pytest.mark.parametrize(
    "case", ["pendulum", "cart pole", "two workers", "from a clone", "warm-up ends at the cut"]
)
def test_resumed_to_the_bit(
    case: str,
    config: TrainPPOConfig,
    tmp_path: Path,
    rows_of: Rows,
    interrupt_at: Callable[..., None],
    clone: Path,
    pendulum_demonstrations: Path,
) -> None:
    changes: dict[str, Any] = {"evaluation": EvaluationConfig(every=2, episodes=2)}
    if case == "cart pole":
        changes["environment"] = EnvironmentConfig("CartPole-v1", count=3, workers=0)
    elif case == "two workers":
        changes["environment"] = EnvironmentConfig("Hopper-v5", max_episode_steps=20, count=3, workers=2)
    elif case == "from a clone":
        changes |= from_clone(clone, pendulum_demonstrations)
        changes["ppo"] = replace(config.ppo, critic_warmup=1)
    elif case == "warm-up ends at the cut":
        changes |= from_clone(clone, pendulum_demonstrations)
        changes["ppo"] = replace(config.ppo, critic_warmup=4)  # evaluation saves at 4; the cut comes at 5
    config = replace(config, **changes)
    whole = train_ppo.train(elsewhere(config, tmp_path / "whole")).folder
    broken = elsewhere(config, tmp_path / "broken")
    interrupt_at(5, train_ppo.train, broken)
    train_ppo.train(broken, resume=tmp_path / "broken")
    for file in ("policy/policy.safetensors", "state.safetensors", "state.json"):
        expected, found = (folder / "checkpoints/last" / file for folder in (whole, tmp_path / "broken"))
        assert found.read_bytes() == expected.read_bytes(), file
    assert rows_of(tmp_path / "broken") == rows_of(whole)
    assert (tmp_path / "broken/checkpoints/best").resolve().name == (whole / "checkpoints/best").resolve().name


def test_an_environment_that_cannot_be_captured_resumes_with_new_episodes(
    config: TrainPPOConfig, interrupt_at: Callable[..., None], make_policy: Make, capsys: Capsys
) -> None:
    config = replace(
        config, environment=EnvironmentConfig(ODD, options={"fault": "unreadable"}, count=3, workers=0)
    )
    with Collector(config.environment, make_policy(Spaces(2, 1)), steps=1, seed=0) as collector:
        assert "port" in str(collector.workers.capture_obstacle())
    interrupt_at(5, train_ppo.train, config)
    assert config.run.folder is not None
    assert train_ppo.train(config, resume=Path(config.run.folder)).metrics["global_step"] == 6
    assert "new episodes, not bit for bit: Odd.port" in capsys.readouterr().err


# ------------------------------------------------------------------ from a clone


def test_a_clone_starts_as_it_is(
    config: TrainPPOConfig, clone: Path, pendulum_demonstrations: Path, rows_of: Rows
) -> None:
    config = replace(config, **from_clone(clone, pendulum_demonstrations))
    kl = KLConfig(coef=0.5, target=1e-9, horizon=1.0)
    result = train_ppo.train(replace(config, kl=kl, ppo=replace(config.ppo, critic_warmup=4)))
    rows = rows_of(result.folder)
    before = StatePolicy.from_pretrained(clone)
    warm, after = policy_of(result.folder, "000000003"), policy_of(result.folder)
    observations = torch.randn(50, 3)
    assert torch.equal(warm(observations)[0].mean, before(observations)[0].mean)
    assert warm.log_std.item() == -1.0
    assert not torch.equal(warm.values(observations), before.values(observations))
    assert not torch.equal(after(observations)[0].mean, before(observations)[0].mean)
    assert torch.equal(after.normalizer.mean, before.normalizer.mean)  # the clone's own, and it stays
    assert ["train/policy_loss" in row for row in rows] == [False] * 4 + [True] * 2
    assert ["train/demonstration_nll" in row for row in rows] == [False] * 4 + [True] * 2
    assert all("objective/kl" in row for row in rows)
    # a frozen policy says nothing of the KL; the fifth update steers it, and the sixth takes the new coefficient
    assert [row["objective/kl_coef"] for row in rows] == [0.5] * 5 + [pytest.approx(0.4)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": (9, 9)}, r"^policy\.hidden: the policy that init names brings its own, \(.*\)$"),
        ({"log_std": 0.3}, r"^policy\.log_std: .*; log_std sets where it begins to explore$"),
        ({"normalize_observations": False}, r"^policy\.normalize_observations: .* brings its own, True$"),
    ],
)
def test_a_clone_brings_its_own_shape(
    config: TrainPPOConfig, clone: Path, pendulum_demonstrations: Path, changes: dict[str, Any], message: str
) -> None:
    started = replace(config, **from_clone(clone, pendulum_demonstrations))
    with pytest.raises(UserError, match=message):
        train_ppo.train(replace(started, policy=StatePolicyConfig(**changes)))


def test_the_kl_is_to_the_clone(config: TrainPPOConfig, clone: Path, rows_of: Rows) -> None:
    """Where only the deviation differs the KL is known: log(s0/s1) + s1^2 / (2 s0^2) - 1/2 nats a decision."""
    reference = StatePolicy.from_pretrained(clone)
    with torch.no_grad():
        wide = float(reference.log_std) + 0.5
    config = replace(
        config,
        init=str(clone),
        log_std=wide,
        kl=KLConfig(coef=0.1, unit="decision"),
        horizon=600,
        total_steps=2 * 1800,
        ppo=replace(config.ppo, critic_warmup=2, minibatch_size=600),
    )
    rows = rows_of(train_ppo.train(config).folder)
    expected = -0.5 + 0.5 * float(torch.tensor(1.0).exp()) - 0.5
    for row in rows:
        assert row["objective/kl"] == pytest.approx(expected, abs=0.15)  # four standard errors of 1800 samples
        assert row["objective/kl_coef"] == 0.1


@pytest.mark.parametrize("coef", [0.0, 0.1])
def test_it_resumes_without_what_it_began_with(
    coef: float, config: TrainPPOConfig, clone: Path, tmp_path: Path, rows_of: Rows
) -> None:
    start = tmp_path / "start"
    shutil.copytree(clone, start)
    ppo = replace(config.ppo, schedule="constant")
    config = replace(config, init=str(start), kl=KLConfig(coef=coef), ppo=ppo)
    whole = train_ppo.train(elsewhere(config, tmp_path / "whole")).folder
    half = elsewhere(config, tmp_path / "half", total_steps=config.total_steps // 2)
    train_ppo.train(half)
    shutil.rmtree(start)
    train_ppo.train(elsewhere(config, tmp_path / "half"), resume=tmp_path / "half")
    assert ("objective/kl" in rows_of(whole)[-1]) == (coef > 0)
    if coef:
        assert rows_of(tmp_path / "half")[-1]["objective/kl"] == rows_of(whole)[-1]["objective/kl"]


def test_a_strong_kl_holds_the_policy(config: TrainPPOConfig, clone: Path, tmp_path: Path) -> None:
    """Both ways of placing it: less distance from the clone than without."""
    free = replace(
        config, init=str(clone), ppo=replace(config.ppo, learning_rate=3e-3, schedule="constant", epochs=5)
    )
    settings = {
        "free": KLConfig(),
        "loss": KLConfig(coef=50.0, placement="loss", estimator="k2"),
        "reward": KLConfig(coef=50.0),
    }
    observations, before = torch.randn(200, 3), StatePolicy.from_pretrained(clone)
    moved = {}
    for name, kl in settings.items():
        folder = train_ppo.train(elsewhere(free, tmp_path / name, kl=kl, total_steps=20 * 48)).folder
        moved[name] = float((policy_of(folder)(observations)[0].mean - before(observations)[0].mean).abs().mean())
    assert moved["loss"] < 0.5 * moved["free"]
    assert moved["reward"] < moved["free"]


def test_the_adaptive_coefficient_moves_and_is_logged(config: TrainPPOConfig, clone: Path, rows_of: Rows) -> None:
    config = replace(config, init=str(clone), kl=KLConfig(coef=0.5, target=1e3, horizon=1.0))
    coefficients = [row["objective/kl_coef"] for row in rows_of(train_ppo.train(config).folder)]
    assert coefficients == pytest.approx([0.5 * 0.8**update for update in range(6)])


# ------------------------------------------------------------------ what stops it


@pytest.mark.parametrize("fault", ["nan reward", "nan observation"])
@pytest.mark.parametrize("workers", [0, 2])
def test_nan_from_an_environment_stops_the_run_with_its_checkpoint_kept(
    config: TrainPPOConfig, fault: str, workers: int
) -> None:
    odd = EnvironmentConfig(ODD, options={"fault": fault, "at": 16 * 4 + 8}, count=3, workers=workers)
    with pytest.raises(UserError, match=r"(not finite|NaN).*checkpoint") as error:
        train_ppo.train(replace(config, environment=odd))
    assert "\n" not in str(error.value)
    assert config.run.folder is not None
    policy = policy_of(Path(config.run.folder))
    assert (Path(config.run.folder) / "checkpoints/last").resolve().name == "000000003"
    assert all(bool(torch.isfinite(tensor).all()) for tensor in policy.state_dict().values())


def test_dry_run_does_one_update(config: TrainPPOConfig) -> None:
    result = train_ppo.train(replace(config, run=replace(config.run, dry_run=True)))
    assert result.metrics["global_step"] == 1


def test_another_environments_policy_is_refused(config: TrainPPOConfig, make_policy: Make, tmp_path: Path) -> None:
    make_policy(Spaces(4, 2, True)).save_pretrained(tmp_path / "cart pole")
    with pytest.raises(UserError, match=r"init: .*cart pole is a policy for .*observation_size=4"):
        train_ppo.train(replace(config, init=str(tmp_path / "cart pole")))
    assert config.run.folder is not None
    assert not Path(config.run.folder).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "nowhere"}, "nowhere: no policy here"),
        ({"environment": EnvironmentConfig("Pendulim-v1", count=1, workers=0)}, "did you mean 'Pendulum-v1'"),
        ({"demonstrations": DemonstrationTerm(path="nowhere.hdf5")}, r"nowhere\.hdf5: no such file"),
        ({"log_std": 0.0}, "log_std is for a policy to start from"),
    ],
)
def test_what_is_missing_is_named_and_nothing_is_left(
    config: TrainPPOConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train_ppo.train(replace(config, **changes))
    assert config.run.folder is not None
    assert not Path(config.run.folder).exists()


def test_the_configuration_checks_itself() -> None:
    with pytest.raises(ValueError, match=r"kl\.coef needs init"):
        TrainPPOConfig(kl=KLConfig(coef=0.1))
    with pytest.raises(ValueError, match="aggregation must be 'decision'"):
        TrainPPOConfig(ppo=PPOConfig(aggregation="episode"))
