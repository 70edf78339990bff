"""The Adroit door: its reward by hand, its success, and the published demonstrations replayed in it."""

import os
from pathlib import Path
from typing import Any

import gymnasium_robotics
import h5py
import numpy as np
import pytest

from envs.adroit_door import AdroitDoor, dapg_reward
from envs.make import describe, make_environment

_REPOSITORY = Path(__file__).parents[2]
_DEMONSTRATIONS = (
    Path(os.environ.get("TANDEM_DATA", _REPOSITORY.parent / "shared" / "data")) / "adroit_door_human.hdf5"
)

_CHECKED = ("1.4.2",)  # versions of gymnasium-robotics whose stock reward was looked at


def _door(**options: Any) -> AdroitDoor:
    env = make_environment("tandem/AdroitDoor-v0", options=options).unwrapped
    assert isinstance(env, AdroitDoor)
    return env


def _terms(env: AdroitDoor) -> tuple[float, float]:
    """The reaching term's distance, and the rest of the published reward, from the simulation itself."""
    palm, handle = (env.data.site(name).xpos for name in ("S_grasp", "S_handle"))
    distance = float(np.linalg.norm(palm - handle))
    angle = float(env.data.joint("door_hinge").qpos[0])
    bonus = 2.0 * (angle > 0.2) + 8.0 * (angle > 1.0) + 10.0 * (angle > 1.35)
    rest = -0.1 * (angle - 1.57) ** 2 - 1e-5 * float(np.sum(env.data.qvel**2)) + bonus
    return distance, rest


@pytest.mark.parametrize(
    "angle, expected",
    [
        # -0.1 * |(3, 0, 4)| = -0.5;  -1e-5 * 30 * 10**2 = -0.03
        (0.0, -0.5 - 0.03 - 0.24649),
        (0.2, -0.5 - 0.03 - 0.18769),
        (0.57, -0.5 - 0.03 - 0.1 + 2.0),
        (1.07, -0.5 - 0.03 - 0.025 + 10.0),
        (1.35, -0.5 - 0.03 - 0.00484 + 10.0),
        (1.57, -0.5 - 0.03 + 20.0),
    ],
)
def test_the_published_reward_by_hand(angle: float, expected: float) -> None:
    reward = dapg_reward(np.array([3.0, 0.0, -4.0]), angle, np.full(30, 10.0))
    assert reward == pytest.approx(expected, abs=1e-12)


def test_the_reward_is_computed_from_the_simulation_after_the_step() -> None:
    env, rng = _door(), np.random.default_rng(0)
    env.reset(seed=1)
    for _ in range(30):
        _, reward, *_ = env.step(rng.uniform(-1, 1, 28))
        distance, rest = _terms(env)
        assert reward == pytest.approx(-0.1 * distance + rest, abs=1e-12)


@pytest.mark.skipif(gymnasium_robotics.__version__ not in _CHECKED, reason="an unchecked stock reward")
def test_the_stock_reward_pays_for_staying_away_from_the_handle() -> None:
    env, rng = _door(reward="stock"), np.random.default_rng(0)
    env.reset(seed=1)
    for _ in range(30):
        _, reward, *_ = env.step(rng.uniform(-1, 1, 28))
        distance, rest = _terms(env)
        assert reward == pytest.approx(+0.1 * distance + rest, abs=1e-12)


def test_it_is_registered_with_a_configurable_limit() -> None:
    spec = describe(make_environment("tandem/AdroitDoor-v0"))
    assert (spec.observation_dim, spec.action_dim, spec.max_episode_steps) == (39, 28, 200)
    assert spec.action_low is not None
    assert spec.action_high is not None
    assert (set(spec.action_low), set(spec.action_high)) == ({-1.0}, {1.0})
    longer = make_environment("tandem/AdroitDoor-v0", max_episode_steps=250)
    assert describe(longer).max_episode_steps == 250


def test_success_is_an_angle_of_at_least_1_35() -> None:
    env = _door()
    env.reset(seed=0)
    state = env.get_env_state()
    hinge = env.model.joint("door_hinge").qposadr[0]
    for angle, success in ((1.30, False), (1.45, True)):
        state["qpos"][hinge] = angle
        env.set_env_state(state)
        *_, terminated, truncated, info = env.step(np.zeros(28))
        assert info == {"success": success}
        assert (terminated, truncated) == (False, False)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="'dapg' or 'stock', got 'sparse'"):
        make_environment("tandem/AdroitDoor-v0", options={"reward": "sparse"})


needs_demonstrations = pytest.mark.skipif(
    not _DEMONSTRATIONS.exists(), reason=f"{_DEMONSTRATIONS} is absent; TANDEM_DATA names its folder"
)


@pytest.mark.needs_data
@needs_demonstrations
def test_the_recorded_rewards_have_the_published_form() -> None:
    """Recorded reward t is that of recorded observation t + 1, less the velocity cost, which is not recorded."""
    residuals, wrong_sign = [], []
    with h5py.File(_DEMONSTRATIONS) as file:
        for demo in file["data"].values():
            observations = demo["obs/state"][1:].astype(np.float64)
            palm_to_handle, angles = observations[:, 35:38], observations[:, 28]
            without_velocity = [
                dapg_reward(p, a, np.zeros(30)) for p, a in zip(palm_to_handle, angles, strict=True)
            ]
            difference = demo["rewards"][:-1] - np.array(without_velocity)
            residuals.append(difference)
            wrong_sign.append(difference - 0.2 * np.linalg.norm(palm_to_handle, axis=1))
    assert len(np.concatenate(residuals)) == 6729 - 25
    assert np.concatenate(residuals).min() > -0.025
    assert np.concatenate(residuals).max() < 1e-5
    assert np.concatenate(wrong_sign).min() < -0.1  # +0.1 * distance would not explain them


@pytest.mark.needs_data
@pytest.mark.slow
@needs_demonstrations
def test_the_published_demonstrations_replay() -> None:
    env = _door()
    returns, stock_returns, errors, within, whole = [], [], [], 0, 0
    with h5py.File(_DEMONSTRATIONS) as file:
        for demo in file["data"].values():
            env.reset(seed=0)
            env.set_env_state({k: v[()].astype(np.float64) for k, v in demo["initial_state"].items()})
            observation = env._get_obs()
            np.testing.assert_allclose(observation[32:35], demo["obs/state"][0, 32:35], atol=1e-6)  # handle
            total, reaching, success = 0.0, 0.0, []
            for action in demo["actions"][()]:
                before = observation
                observation, reward, *_, info = env.step(action)
                total += reward
                reaching += 0.1 * float(np.linalg.norm(observation[35:38]))
                success.append(info["success"])
            returns.append(total)
            stock_returns.append(total + 2 * reaching)
            errors.append(np.abs(before - demo["obs/state"][-1]).max())
            within += any(success[:200])
            whole += any(success)
    assert len(returns) == 25
    assert np.mean(returns) == pytest.approx(796, abs=2)  # 794 recorded
    assert np.mean(stock_returns) == pytest.approx(803, abs=2)
    assert (within, whole) == (7, 8)
    assert np.median(errors) < 0.05
