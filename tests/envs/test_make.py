"""make_environment: what it makes, and the one line it gives when it cannot."""

import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from envs.make import describe, make_environment


class _Odd(gymnasium.Env):
    """An environment whose spaces the tests choose."""

    def __init__(self, observation_space: gymnasium.Space, action_space: gymnasium.Space) -> None:
        self.observation_space, self.action_space = observation_space, action_space


def _broken(**arguments: object) -> gymnasium.Env:
    raise AssertionError


_BOX = gymnasium.spaces.Box(-1.0, 1.0, (3,))
_PICTURE = gymnasium.spaces.Box(0, 255, (8, 8, 3), np.uint8)


def test_the_spec_of_a_continuous_environment() -> None:
    env = make_environment("Pendulum-v1", max_episode_steps=7)
    spec = describe(env)
    assert (spec.env_id, spec.observation_dim, spec.action_dim) == ("Pendulum-v1", 3, 1)
    assert not spec.discrete
    assert spec.max_episode_steps == 7
    assert spec.action_low is not None
    assert spec.action_high is not None
    assert (spec.action_low.tolist(), spec.action_high.tolist()) == ([-2.0], [2.0])
    env.reset(seed=0)
    ends = [env.step(np.zeros(1, np.float32))[3] for _ in range(7)]
    assert ends == [False] * 6 + [True]


def test_the_spec_of_a_discrete_environment() -> None:
    spec = describe(make_environment("CartPole-v1"))
    assert (spec.observation_dim, spec.action_dim, spec.discrete) == (4, 2, True)
    assert spec.action_low is None
    assert spec.max_episode_steps == 500


def test_options_reach_the_constructor() -> None:
    env = make_environment("Pendulum-v1", options={"g": 3.0})
    assert env.unwrapped.g == 3.0  # type: ignore[attr-defined]


def test_an_environment_of_a_package_in_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_robots.py").write_text(
        "import gymnasium\n"
        "gymnasium.register('Mine-v0', 'gymnasium.envs.classic_control:PendulumEnv', max_episode_steps=5)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        spec = describe(make_environment("my_robots:Mine-v0"))
    finally:
        gymnasium.registry.pop("Mine-v0", None)
        sys.modules.pop("my_robots", None)
    assert (spec.env_id, spec.max_episode_steps) == ("Mine-v0", 5)


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "import no_such_driver.low",
            r"No module named 'no_such_driver'\); install 'no_such_driver', which it imports",
        ),
        ("import no_such_driver.low", r"which it imports, with `pip install no_such_driver`$"),
        ("from math import no_such_name", r"which cannot be imported \(cannot import name .*\)$"),
    ],
)
def test_what_a_package_imports_may_be_missing(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_other_robots.py").write_text(f"{text}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=message):
        make_environment("my_other_robots:Mine-v0")


def test_gymnasium_robotics_is_registered_when_needed() -> None:
    assert describe(make_environment("AdroitHandPen-v1")).action_dim == 24


@pytest.mark.parametrize(
    "env_id, message",
    [
        ("HalfCheeta-v5", "did you mean 'HalfCheetah-v5'"),
        ("HalfCheetah-v9", "did you mean 'HalfCheetah-v"),
        ("ALE/Pong-v5", "pip install 'ale-py'"),
        ("Zzzz-v0", "write 'package:Zzzz-v0'"),
        ("no_such_package:Foo-v0", "pip install no_such_package"),
        ("Lacking-v0", "cannot be made: No module named 'no_such_module'"),
        ("Broken-v0", "cannot be made: AssertionError"),
        ("a:b:c", "malformed"),
        ("", "malformed"),
        ("Blackjack-v1", "only a flat Box [D] is supported"),
    ],
)
def test_what_cannot_be_made_is_said_in_one_line(
    env_id: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, entry_point in (("Lacking-v0", "no_such_module:Env"), ("Broken-v0", _broken)):
        monkeypatch.setitem(gymnasium.registry, name, gymnasium.envs.registration.EnvSpec(name, entry_point))
    with pytest.raises(ValueError) as error:
        make_environment(env_id)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_options_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"does not accept its options.*wind"):
        make_environment("CartPole-v1", options={"wind": 1.0})
    with pytest.raises(ValueError, match="at least 1, got 0"):
        make_environment("CartPole-v1", max_episode_steps=0)


@pytest.mark.parametrize(
    "observations, actions, message",
    [
        (_PICTURE, _BOX, "only a flat Box [D] is supported"),
        (_BOX, gymnasium.spaces.MultiDiscrete([2, 3]), "only a flat Box [A] or Discrete is supported"),
        (_BOX, _PICTURE, "only a flat Box [A] or Discrete is supported"),
    ],
)
def test_spaces_that_are_not_supported(
    observations: gymnasium.Space, actions: gymnasium.Space, message: str
) -> None:
    with pytest.raises(ValueError) as error:
        describe(_Odd(observations, actions))
    assert message in str(error.value)


def test_making_a_model_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_environment("HalfCheetah-v5")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
