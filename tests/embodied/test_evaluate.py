"""Judging a policy: intervals by hand, seeds that are its own, eval.json, and a video that can be played."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from gymnasium.envs.mujoco.mujoco_env import MujocoEnv

from embodied import train_ppo
from embodied.evaluate import (
    TEST_SEEDS,
    VALIDATION_SEEDS,
    EvaluateConfig,
    evaluate_policy,
    evaluate_run,
    film,
    score,
    seeds,
    summarize,
)
from embodied.policies.numpy_actor import Spaces, StatePolicyConfig
from embodied.policies.state_mlp import StatePolicy
from embodied.rollouts.workers import EnvironmentConfig, environment_seed
from embodied.train_ppo import TrainPPOConfig
from envs.stepper import EpisodeRecord, Stepper, episode_seed
from experiment.errors import UserError
from experiment.run import RunConfig
from experiment.statistics import bootstrap_interval

Make = Callable[..., StatePolicy]
PENDULUM = EnvironmentConfig("InvertedPendulum-v5", max_episode_steps=6, count=2, workers=0)


def record(total: float, length: int = 10, once: bool | None = None, end: bool | None = None) -> EpisodeRecord:
    return EpisodeRecord(total, length, once, end, terminated=False, truncated=True, number=0, seed=0)


# ------------------------------------------------------------------ figures


def test_figures_by_hand() -> None:
    """Wilson's interval of 3 in 4 at 95% is 0.3006 to 0.9544 (Newcombe's table of the method gives 30.06%)."""
    records = [record(1.0, 10, True, True), record(2.0, 20, True, False), record(6.0, 30, True, False)]
    summary = summarize([*records, record(7.0, 40, False, False)])
    assert summary["eval/episodes"] == 4
    assert summary["eval/mean_reward"] == 4.0
    assert summary["eval/ep_len_mean"] == 25.0
    assert summary["eval/success_once"] == 0.75
    assert summary["eval/success_at_end"] == 0.25
    assert summary["eval/success_once_low"] == pytest.approx(0.3006, abs=1e-4)
    assert summary["eval/success_once_high"] == pytest.approx(0.9544, abs=1e-4)
    assert summary["eval/success_at_end_low"] == pytest.approx(1 - 0.9544, abs=1e-4)
    low, high = bootstrap_interval([1.0, 2.0, 6.0, 7.0])
    assert (summary["eval/mean_reward_low"], summary["eval/mean_reward_high"]) == (low, high)
    assert 1.0 <= low < 4.0 < high <= 7.0


def test_best_is_by_success_from_the_first_one_on() -> None:
    unknown, seldom, often = (
        score({"eval/mean_reward": reward, **({} if success is None else {"eval/success_once": success})})
        for reward, success in ((900.0, None), (-5.0, 0.05), (-9.0, 0.9))
    )
    assert unknown.value == 900.0
    by_rank = sorted([often, unknown, seldom], key=lambda metric: (metric.rank, metric.value))
    assert by_rank == [unknown, seldom, often]


def test_success_where_any_episode_reports_it() -> None:
    """Many environments speak of success only where there is one."""
    assert not any("success" in name for name in summarize([record(1.0), record(2.0)]))
    some = summarize([record(1.0, once=True, end=True), record(2.0), record(3.0), record(2.0, once=True)])
    assert some["eval/success_once"] == 0.5
    assert some["eval/success_at_end"] == 0.25
    assert summarize([record(1.0, once=True, end=False)], prefix="test")["test/success_once"] == 1.0


def test_seeds_of_training_validation_and_test_are_disjoint() -> None:
    assert seeds(5, 3) == [5, 6, 7]
    training = {
        environment_seed(seed, row) for seed in (0, 1, 9_999, 10_000, 20_000, 2**32 - 1) for row in range(64)
    }
    validation, test = set(seeds(VALIDATION_SEEDS, 10_000)), set(seeds(TEST_SEEDS, 10_000))
    assert not training & validation
    assert not training & test
    assert not validation & test
    drawn = [{episode_seed(s, 0) for s in sorted(part)[:500]} for part in (training, validation, test)]
    assert len(drawn[0] | drawn[1] | drawn[2]) == sum(map(len, drawn))


def test_the_settings_check_themselves() -> None:
    for wrong in ({"episodes": 0}, {"videos": -1}, {"workers": -1}):
        with pytest.raises(ValueError, match="at least 1"):
            EvaluateConfig(**wrong)  # type: ignore[arg-type]


# ------------------------------------------------------------------ a policy


def test_episodes_are_those_of_the_test_seeds_and_the_policys_mode(make_policy: Make) -> None:
    """Against a loop that knows neither workers nor the numpy actor."""
    import torch

    policy = make_policy(Spaces(4, 1))
    found = evaluate_policy(policy, PENDULUM, EvaluateConfig(episodes=3, workers=0))
    returns = []
    for seed in range(TEST_SEEDS, TEST_SEEDS + 3):
        stepper = Stepper(PENDULUM.id, [seed], 6)
        observation, done = stepper.reset(), False
        while not done:
            result = stepper.step(policy(torch.from_numpy(observation))[0].mean.detach().numpy())
            observation, done = result.observations, bool(result.episodes)
        returns.append(result.episodes[0].episode_return)
        stepper.close()
    assert found["eval/mean_reward"] == pytest.approx(np.mean(returns))
    assert found["eval/episodes"] == 3


def test_it_does_not_depend_on_the_number_of_workers(make_policy: Make) -> None:
    policy = make_policy(Spaces(4, 2, True))
    environment = EnvironmentConfig("CartPole-v1", max_episode_steps=60, count=3, workers=2)
    for deterministic in (True, False):
        config = EvaluateConfig(episodes=5, deterministic=deterministic)
        alone = evaluate_policy(policy, environment, replace(config, workers=0))
        assert evaluate_policy(policy, environment, replace(config, workers=2)) == alone
        assert alone["eval/episodes"] == 5


def test_a_policy_for_another_environment_is_refused(make_policy: Make) -> None:
    with pytest.raises(UserError, match=r"InvertedPendulum-v5: the policy was made for .*observation_size=9"):
        evaluate_policy(make_policy(Spaces(9, 1)), PENDULUM, EvaluateConfig(episodes=1, workers=0))


# ------------------------------------------------------------------ a run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = TrainPPOConfig(
        run=RunConfig(folder=str(tmp_path_factory.mktemp("evaluate") / "run"), wandb="disabled"),
        environment=PENDULUM,
        policy=StatePolicyConfig(hidden=(8,)),
        total_steps=64,
        horizon=16,
    )
    return train_ppo.train(config).folder


def test_evaluate_run_writes_what_it_returns(run: Path) -> None:
    config = EvaluateConfig(checkpoint="last", episodes=4, workers=0)
    figures = evaluate_run(run, config)
    written: dict[str, Any] = json.loads((run / "eval.json").read_text())
    assert written["figures"] == figures
    assert written["checkpoint"] == "000000002"
    assert written["first_seed"] == TEST_SEEDS
    assert written["config"]["episodes"] == 4
    assert written["environment"]["id"] == PENDULUM.id
    assert figures == evaluate_run(run, config)
    assert figures["eval/ep_len_mean"] <= 6
    longer = evaluate_run(run, replace(config, max_episode_steps=20))
    assert longer["eval/ep_len_mean"] > figures["eval/ep_len_mean"]
    other = evaluate_run(run, replace(config, environment_id="InvertedPendulum-v4"))
    assert other["eval/episodes"] == 4
    assert json.loads((run / "eval.json").read_text())["environment"]["id"] == "InvertedPendulum-v4"


def test_a_checkpoint_that_is_not_there(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint 'best' to evaluate"):
        evaluate_run(run, EvaluateConfig(checkpoint="best", episodes=1))  # nothing was evaluated in training
    assert evaluate_run(run, EvaluateConfig(episodes=1))["eval/episodes"] == 1.0  # so the last is taken
    with pytest.raises(UserError):
        evaluate_run(tmp_path, EvaluateConfig(episodes=1))


def frames_of(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_a_video_shows_what_the_policy_does(make_policy: Make, tmp_path: Path) -> None:
    policy = make_policy(Spaces(4, 1))
    for name, push in (("left", -3.0), ("right", 3.0)):
        policy.actor.bias.data.fill_(push)
        policy.actor.weight.data.zero_()
        film(policy, PENDULUM, tmp_path / name, seed=0)
    left, right = frames_of(tmp_path / "left"), frames_of(tmp_path / "right")
    assert abs(left[0].astype(int) - right[0]).max() < 30  # they begin alike, but for what the codec makes of it
    assert (abs(left[-1].astype(int) - right[-1]) > 60).sum() > 200


def test_a_video_has_a_frame_for_every_step(run: Path) -> None:
    figures = evaluate_run(run, EvaluateConfig(checkpoint="last", episodes=2, videos=1, workers=0))
    frames = frames_of(run / "videos" / "eval-0.mp4")
    assert not (run / "videos" / "eval-1.mp4").exists()
    assert len(frames) == 6 + 1
    assert figures["eval/ep_len_mean"] == 6  # so the filmed one was not shorter either
    assert frames[0].shape == (480, 480, 3)
    assert all(frame.std() > 5 for frame in frames)  # something is to be seen


def without_graphics(self: MujocoEnv) -> np.ndarray:
    raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")


def test_no_graphics_is_one_line_and_the_figures_are_kept(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MujocoEnv, "render", without_graphics)
    (run / "eval.json").unlink(missing_ok=True)
    (run / "videos" / "eval-0.mp4").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"videos: cannot draw .*MUJOCO_GL=egl .*libegl1") as error:
        evaluate_run(run, EvaluateConfig(checkpoint="last", episodes=2, videos=1, workers=0))
    assert "\n" not in str(error.value)
    assert json.loads((run / "eval.json").read_text())["figures"]["eval/episodes"] == 2
    assert not (run / "videos").exists() or not list((run / "videos").iterdir())


def test_an_environment_without_pictures(make_policy: Make, tmp_path: Path) -> None:
    odd = EnvironmentConfig("tests.embodied.odd_environments:Odd-v0", count=1, workers=0)
    with pytest.raises(UserError, match=r"videos: .*cannot render images"):
        film(make_policy(Spaces(2, 1)), odd, tmp_path / "a.mp4", seed=0)
    assert not list(tmp_path.iterdir())
