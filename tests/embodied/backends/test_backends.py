"""d3rlpy's and stable-baselines3's algorithms behind our data, run folder and evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from embodied.backends import d3rlpy_backend, sb3_backend
from embodied.backends.backend import Units, play
from embodied.datasets.episode import Episode
from embodied.evaluate import EvaluateConfig
from embodied.evaluate_backend import evaluate_run
from embodied.logged.transitions import DataConfig
from embodied.rollouts.workers import EnvironmentConfig, environment_spec
from embodied.train_backend import TrainBackendConfig, train
from experiment.errors import UserError
from experiment.run import RunConfig

PENDULUM = EnvironmentConfig("Pendulum-v1", max_episode_steps=10, count=1, workers=0)


def episodes(count: int = 6, length: int = 20, *, final: bool = True) -> list[Episode]:
    rng = np.random.default_rng(0)
    made = []
    for index in range(count):
        seen = rng.standard_normal((length + 1, 3)).astype(np.float32) * 3 + 1
        actions = rng.uniform(-2, 2, (length, 1)).astype(np.float32)
        rewards = rng.standard_normal(length).astype(np.float32)
        terminated = index % 2 == 0
        made.append(Episode(seen[:-1], actions, rewards, terminated, not terminated, seen[-1] if final else None))
    return made


def config(tmp_path: Path, recorded: Path, algorithm: str, **changes: Any) -> TrainBackendConfig:
    options: dict[str, Any] = {"batch_size": 8}
    if algorithm.startswith("sb3/"):
        options |= {"learning_starts": 0, "buffer_size": 2_000}
    settings: dict[str, Any] = {
        "run": RunConfig(folder=str(tmp_path / "run"), wandb="disabled"),
        "environment": PENDULUM,
        "data": DataConfig(path=str(recorded)),
        "algorithm": algorithm,
        "options": options,
        "hidden": (8, 8),
        "total": 20,
        "log_every": 5,
        "evaluate_every": 10,
        "episodes": 2,
    }
    return TrainBackendConfig(**settings | changes)


def test_units_by_hand() -> None:
    units = Units.of(episodes(), environment_spec(PENDULUM))
    stacked = np.concatenate([e.observations for e in episodes()])
    seen = units.observations(stacked)
    np.testing.assert_allclose(seen.mean(0), 0.0, atol=1e-5)
    np.testing.assert_allclose(seen.std(0), 1.0, atol=1e-5)
    assert units.actions(np.array([[-2.0], [0.0], [2.0], [9.0]])).ravel().tolist() == [-1.0, 0.0, 1.0, 1.0]
    assert units.to_environment(np.array([[-1.0], [0.5]])).ravel().tolist() == [-2.0, 1.0]
    again = Units.from_json(json.loads(json.dumps(units.as_json())))
    np.testing.assert_allclose(again.mean, units.mean, rtol=1e-6)


def test_what_d3rlpy_offers() -> None:
    names = d3rlpy_backend.algorithms()
    assert {"AWAC", "BC", "BCQ", "BEAR", "CQL", "CalQL", "CRR", "IQL", "PLAS", "ReBRAC", "TD3PlusBC"} <= set(names)
    assert not any(name.startswith("Discrete") or name in ("DQN", "DoubleDQN", "NFQ") for name in names)


def test_d3rlpys_data_mean_what_ours_mean() -> None:
    units = Units.of(episodes(), environment_spec(PENDULUM))
    backend = d3rlpy_backend.D3rlpyBackend.of(d3rlpy_backend.configure("BC", {}, (8,)), episodes(), units)
    stored = backend.dataset.episodes
    assert [e.terminated for e in stored] == [True, False] * 3
    assert [len(e) for e in stored] == [20] * 6
    np.testing.assert_allclose(stored[1].actions, units.actions(episodes()[1].actions))
    np.testing.assert_allclose(stored[2].rewards.ravel(), episodes()[2].rewards)


@pytest.mark.parametrize("final", [True, False])
def test_the_data_set_lies_in_sb3s_replay(final: bool) -> None:
    units = Units.of(episodes(), environment_spec(PENDULUM))
    backend = sb3_backend.SB3Backend("SAC", {"buffer_size": 500}, (8,), PENDULUM, units, 0)
    count = backend.remember(episodes(final=final), units)
    assert count == (120 if final else 117)  # three cut episodes lack the observation to bootstrap from
    buffer = backend.model.replay_buffer
    assert buffer.pos == count

    def mark(row: int) -> tuple[float, float]:
        return buffer.dones[row].item(), buffer.timeouts[row].item()

    assert mark(19) == (1.0, 0.0)  # terminated
    assert mark(18) == mark(20) == (0.0, 0.0)
    assert mark(39 if final else 38) == (1.0, 1.0)  # cut: SB3 bootstraps from done * (1 - timeout) = 0
    assert buffer.timeouts.sum() == 3
    assert buffer.dones.sum() == 6
    if final:
        final_row = episodes()[1].final_observation
        assert final_row is not None
        np.testing.assert_allclose(buffer.next_observations[39, 0], units.observations(final_row))
    np.testing.assert_allclose(buffer.actions[25, 0], units.actions(episodes()[1].actions[5]), atol=1e-6)
    if not final:
        np.testing.assert_allclose(
            buffer.next_observations[38, 0], units.observations(episodes()[1].observations[19])
        )
    with pytest.raises(UserError, match="do not fit into the replay"):
        sb3_backend.SB3Backend("SAC", {"buffer_size": 100}, (8,), PENDULUM, units, 0).remember(episodes(), units)


def test_what_sb3_plays_earns_rewards_as_scaled_as_the_datas() -> None:
    units = Units.of(episodes(), environment_spec(PENDULUM), reward_scale=0.01, reward_shift=-1.0)
    backend = sb3_backend.SB3Backend("SAC", {"buffer_size": 500}, (8,), PENDULUM, units, 0)
    count = backend.remember(episodes(), units)
    buffer = backend.model.replay_buffer
    given = np.concatenate([episode.rewards for episode in episodes()])
    np.testing.assert_allclose(buffer.rewards[:count, 0], given * 0.01 - 1.0, rtol=1e-6)
    backend.learn(20)
    earned = buffer.rewards[count : count + 20, 0]  # -16.3 to 0, before it is scaled
    assert (earned > -1.17).all()
    assert (earned <= -1.0).all()
    assert np.ptp(earned) > 0.01


@pytest.mark.parametrize("final", [True, False])
def test_n_step_sums_of_sb3_stop_at_every_end(final: bool) -> None:
    made = episodes(final=final)
    units = Units.of(made, environment_spec(PENDULUM))
    options = {"buffer_size": 500, "n_steps": 3, "gamma": 0.9}
    backend = sb3_backend.SB3Backend("SAC", options, (8,), PENDULUM, units, 0)
    backend.remember(made, units)
    buffer = backend.model.replay_buffer
    rewards, kept = made[1].rewards, 20 if final else 19
    rows = np.arange(20, 20 + kept)
    sampled = buffer._get_samples(rows)  # episode 1 was cut
    sums = [sum(0.9**j * rewards[i + j] for j in range(min(3, kept - i))) for i in range(kept)]
    np.testing.assert_allclose(sampled.rewards[:, 0], sums, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sampled.discounts[-3:, 0], [0.9**3, 0.9**2, 0.9], rtol=1e-6)
    assert sampled.dones.sum() == 0
    last = episodes()[1].final_observation
    assert last is not None
    seen = np.vstack([made[1].observations, last])
    following = units.observations(seen[np.minimum(np.arange(kept) + 3, kept)])
    np.testing.assert_allclose(sampled.next_observations, following, rtol=1e-6)
    ended = buffer._get_samples(np.arange(20))  # episode 0 terminated: every sum that reaches the end says so
    assert ended.dones[:, 0].tolist() == [0.0] * 17 + [1.0] * 3


@pytest.mark.parametrize("options", [{}, {"ent_coef": 0.2}])
def test_sacs_temperature_goes_on(options: dict[str, Any], tmp_path: Path) -> None:
    units = Units.of(episodes(), environment_spec(PENDULUM))
    settings = {"buffer_size": 500, "learning_starts": 0, "batch_size": 8, "learning_rate": 0.05, **options}
    trained = sb3_backend.SB3Backend("SAC", settings, (8,), PENDULUM, units, 0)
    trained.remember(episodes(), units)
    trained.learn(30)
    trained.save(tmp_path / "sac")
    other = sb3_backend.SB3Backend("SAC", settings, (8,), PENDULUM, units, 1)
    other.restore(tmp_path / "sac")
    if options:
        assert other.model.log_ent_coef is None
    else:
        assert trained.model.log_ent_coef.item() < -0.5
        assert other.model.log_ent_coef.item() == trained.model.log_ent_coef.item()
        other.remember(episodes(), units)
        other.learn(1)  # its optimizer moves the number that was restored
        assert 0 < abs(other.model.log_ent_coef.item() - trained.model.log_ent_coef.item()) <= 0.051
    observations = np.random.default_rng(1).standard_normal((5, 3)).astype(np.float32)
    loaded = sb3_backend.load(tmp_path / "sac", PENDULUM, units)
    np.testing.assert_allclose(loaded.act(observations), trained.act(observations))


def test_a_policy_of_other_options_comes_back(tmp_path: Path) -> None:
    """State-dependent exploration is another network."""
    units = Units.of(episodes(), environment_spec(PENDULUM))
    options = {"buffer_size": 500, "use_sde": True}
    trained = sb3_backend.SB3Backend("SAC", options, (8,), PENDULUM, units, 0)
    trained.save(tmp_path / "sac")
    loaded = sb3_backend.load(tmp_path / "sac", PENDULUM, units)
    observations = np.random.default_rng(1).standard_normal((5, 3)).astype(np.float32)
    np.testing.assert_allclose(loaded.act(observations), trained.act(observations))


@pytest.mark.parametrize("total", [7, 23])
def test_all_of_the_total_is_learned(
    total: int, tmp_path: Path, pendulum_demonstrations: Path, rows_of: Callable[[Path], list[dict[str, Any]]]
) -> None:
    changes = {"total": total, "log_every": 10, "evaluate_every": 10}
    rows = rows_of(train(config(tmp_path, pendulum_demonstrations, "d3rlpy/BC", **changes)).folder)
    assert [row["samples"] for row in rows] == ([7.0] if total == 7 else [10.0, 20.0, 23.0])
    assert "eval/mean_reward" in rows[-1]


@pytest.mark.parametrize("algorithm", ["d3rlpy/BC", "sb3/SAC"])
def test_only_cut_steps_leave_nothing_to_learn_from(algorithm: str, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "steps.hdf5", "w") as file:
        for number in range(4):
            demo = file.create_group(f"data/demo_{number}")
            demo["actions"], demo["rewards"] = np.full((1, 1), number / 4), np.zeros(1)
            demo["obs/state"] = np.full((1, 3), float(number))
    with pytest.raises(UserError, match="every episode is one cut step") as error:
        train(config(tmp_path, tmp_path / "steps.hdf5", algorithm))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("algorithm", ["d3rlpy/TD3PlusBC", "d3rlpy/CQL", "sb3/SAC", "sb3/TD3"])
def test_trained_saved_evaluated_resumed(
    algorithm: str,
    tmp_path: Path,
    pendulum_demonstrations: Path,
    capsys: pytest.CaptureFixture[str],
    rows_of: Callable[[Path], list[dict[str, Any]]],
) -> None:
    settings = config(tmp_path, pendulum_demonstrations, algorithm)
    result = train(settings)
    assert result.metrics["samples"] == 20
    assert np.isfinite(result.metrics["eval/mean_reward"])
    assert any(name.startswith("train/") for name in result.metrics)
    rows = rows_of(result.folder)
    assert [row["global_step"] for row in rows] == [1, 2, 3, 4]  # an evaluation is in the row of its update
    assert [row["samples"] for row in rows if "eval/mean_reward" in row] == [10, 20]
    figures = evaluate_run(result.folder, EvaluateConfig(checkpoint="last", episodes=3))
    assert figures["eval/episodes"] == 3
    short = evaluate_run(result.folder, EvaluateConfig(checkpoint="last", episodes=2, max_episode_steps=5))
    assert short["eval/ep_len_mean"] == 5
    assert json.loads((result.folder / "eval.json").read_text())["environment"]["max_episode_steps"] == 5
    with pytest.raises(UserError, match="deterministic=false: a back end's run"):
        evaluate_run(result.folder, EvaluateConfig(checkpoint="last", deterministic=False))
    assert (result.folder / "eval.json").is_file()
    policy = result.folder / "checkpoints" / "last" / "policy"
    assert not [path for path in policy.iterdir() if path.suffix in (".pt", ".pkl", ".zip")]
    for link in ("last", "best"):
        (result.folder / "checkpoints" / link).unlink()
    (result.folder / "checkpoints" / "last").symlink_to("000000002")
    import shutil

    shutil.rmtree(result.folder / "checkpoints" / "000000004")
    train(settings, resume=result.folder)
    assert "resuming with fresh optimizers" in capsys.readouterr().err


def test_a_saved_policy_acts_as_it_did(tmp_path: Path) -> None:
    units = Units.of(episodes(), environment_spec(PENDULUM))
    observations = np.random.default_rng(1).standard_normal((5, 3)).astype(np.float32)
    theirs = d3rlpy_backend.D3rlpyBackend.of(d3rlpy_backend.configure("IQL", {}, (8,)), episodes(), units)
    theirs.learn(3)
    theirs.save(tmp_path / "d3rlpy")
    np.testing.assert_allclose(d3rlpy_backend.load(tmp_path / "d3rlpy").act(observations), theirs.act(observations))
    torch.manual_seed(3)
    other = sb3_backend.SB3Backend("TD3", {"buffer_size": 10}, (8,), PENDULUM, units, 0)
    other.save(tmp_path / "sb3")
    loaded = sb3_backend.load(tmp_path / "sb3", PENDULUM, units)
    np.testing.assert_allclose(loaded.act(observations), other.act(observations))


def test_played_with_ones_own_hands() -> None:
    """A back end that always pushes one way plays the same episodes as the environment itself."""
    import gymnasium

    class Push:
        def learn(self, count: int) -> dict[str, float]:
            return {}

        def act(self, observations: np.ndarray) -> np.ndarray:
            return np.full((len(observations), 1), 0.5, np.float32)

        def save(self, folder: Path) -> None:
            raise AssertionError("not asked for")

    units = Units.of(episodes(), environment_spec(PENDULUM))
    records = play(Push(), units, PENDULUM, [5, 6, 7], width=2)
    assert [record.length for record in records] == [10] * 3
    environment = gymnasium.make("Pendulum-v1")
    from envs.stepper import episode_seed

    for record in records:
        environment.reset(seed=record.seed)
        total = sum(float(environment.step(np.array([1.0], np.float32))[1]) for _ in range(10))
        assert record.episode_return == pytest.approx(total, abs=1e-4)
    assert [record.seed for record in records] == [episode_seed(seed, 0) for seed in (5, 6, 7)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "d3rlpy/DQN"}, "d3rlpy has no 'DQN' for continuous actions; it has AWAC"),
        ({"algorithm": "d3rlpy/IQL", "options": {"expectil": 0.8}}, r"options\.expectil: d3rlpy's IQL has no such"),
        ({"algorithm": "sb3/PPO"}, "sb3 has no 'PPO' to learn off policy; it has DDPG, SAC, TD3"),
        ({"algorithm": "sb3/SAC", "options": {"gama": 0.9}}, r"options\.gama: sb3's SAC has no such option"),
        ({"algorithm": "sb3/SAC", "options": {"seed": 3}}, r"options\.seed: sb3's SAC has no such option"),
        ({"algorithm": "sb3/SAC", "options": {"optimize_memory_usage": True}}, "options: .*optimize_memory_usage"),
        ({"algorithm": "rllib/SAC"}, "neither d3rlpy/NAME nor sb3/NAME"),
        ({"data": DataConfig()}, r"data\.path is not set"),
    ],
)
def test_what_is_not_known_is_named_and_nothing_is_left(
    changes: dict[str, Any], message: str, tmp_path: Path, pendulum_demonstrations: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train(config(tmp_path, pendulum_demonstrations, **{"algorithm": "d3rlpy/BC", **changes}))
    assert not (tmp_path / "run").exists()


def test_a_folder_without_an_algorithm(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no saved d3rlpy algorithm here"):
        d3rlpy_backend.load(tmp_path)
    units = Units.of(episodes(), environment_spec(PENDULUM))
    with pytest.raises(UserError, match="no saved sb3 algorithm here"):
        sb3_backend.load(tmp_path, PENDULUM, units)


def test_the_configuration_checks_itself() -> None:
    with pytest.raises(ValueError, match="multiple of log_every"):
        TrainBackendConfig(log_every=3, evaluate_every=10)
    with pytest.raises(ValueError, match="at least 1"):
        TrainBackendConfig(total=0)
