"""What reaches the robot: late, noisy, and exactly as late as it is said to be."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from envs.capture import model_fields
from envs.randomization import Randomization
from envs.table.env import TableEnv
from tests.envs.table.scenes import REST

SIGHT = ("image", "wrist_image", "proprio")


def exactly(field: str, value: float, operation: Literal["set", "add"] = "set") -> Randomization:
    return Randomization(field, operation, (value, value))


def moves(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (count, 4))


def watched(env: TableEnv, actions: np.ndarray, seed: int = 3) -> list[dict[str, np.ndarray]]:
    """The observations of an episode, the first before the first action."""
    return [env.reset(seed=seed)[0]] + [env.step(action)[0] for action in actions]


@pytest.mark.parametrize("late", [1, 3])
def test_late_senses_are_those_of_back_then(late: int) -> None:
    """Bit for bit, with pictures of both cameras; until there is a back then, those of the beginning."""
    actions = moves(8)
    prompt = watched(TableEnv(observe=SIGHT, image_size=32), actions)
    delayed = watched(
        TableEnv(observe=SIGHT, image_size=32, randomization=[exactly("observation_latency", late)]), actions
    )
    for step, seen in enumerate(delayed):
        for name in SIGHT:
            np.testing.assert_array_equal(seen[name], prompt[max(0, step - late)][name])
    for name in SIGHT:  # and there was something to see
        assert (prompt[0][name] != prompt[-1][name]).any()


def test_looking_back_leaves_the_world_alone() -> None:
    """Late pictures that are drawn, and pictures for people between them, change nothing of what follows."""
    actions = moves(6)
    late = [exactly("observation_latency", 2)]
    watcher, blind = (TableEnv(observe=("state",), image_size=32, randomization=late) for _ in range(2))
    plain = TableEnv(observe=("state",))
    for env in (watcher, blind, plain):
        env.reset(seed=3)
    for action in actions:
        seen, unseen = watcher.step(action)[0], blind.step(action)[0]
        plain.step(action)
        np.testing.assert_array_equal(seen["state"], unseen["state"])
        watcher.observe(("image", "wrist_image"))
        # people see the present, from where the robot's camera is
        np.testing.assert_array_equal(watcher.picture(size=32), plain.picture(size=32))
    np.testing.assert_array_equal(watcher.world.data.geom_xpos, blind.world.data.geom_xpos)
    np.testing.assert_array_equal(watcher.world.data.qpos, blind.world.data.qpos)


def test_the_privileged_state_is_never_late() -> None:
    actions = moves(5)
    late = watched(TableEnv(observe=("state",), randomization=[exactly("observation_latency", 2)]), actions)
    prompt = watched(TableEnv(observe=("state",)), actions)
    for one, other in zip(late, prompt, strict=True):
        np.testing.assert_array_equal(one["state"], other["state"])


@pytest.mark.parametrize("late", [1, 2])
def test_late_actions_are_those_chosen_back_then(late: int) -> None:
    """The first steps rest with the gripper open; then the world goes as if the actions had come later."""
    actions = moves(8)
    delayed = TableEnv(observe=("state",), randomization=[exactly("action_latency", late)])
    prompt = TableEnv(observe=("state",))
    seen = watched(delayed, actions)
    expected = watched(prompt, np.concatenate((np.tile(REST, (late, 1)), actions[:-late])))
    for one, other in zip(seen, expected, strict=True):
        np.testing.assert_array_equal(one["state"], other["state"])


def test_delays_forget_the_last_episode() -> None:
    specs = [exactly("action_latency", 2), exactly("observation_latency", 2)]
    env = TableEnv(observe=("proprio",), randomization=specs)
    first = watched(env, moves(4))
    watched(env, moves(4, seed=1), seed=9)
    for one, again in zip(first, watched(env, moves(4)), strict=True):
        np.testing.assert_array_equal(one["proprio"], again["proprio"])


def test_noise_has_its_size_and_the_state_has_none() -> None:
    noisy = TableEnv(observe=("proprio", "state"), randomization=[exactly("proprio_noise", 0.01)])
    clean = TableEnv(observe=("proprio", "state"))
    actions = moves(60)
    one, other = watched(noisy, actions), watched(clean, actions)
    errors = np.array([a["proprio"] - b["proprio"] for a, b in zip(one, other, strict=True)])
    # 61 * 17 = 1037 numbers: the deviation's own standard error is 0.01 / sqrt(2 * 1037) = 2.2e-4
    assert errors.std() == pytest.approx(0.01, abs=6 * 2.2e-4)
    assert abs(errors.mean()) < 6 * 0.01 / np.sqrt(1037)
    assert one[0]["proprio"].dtype == np.float32
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a["state"], b["state"])


def test_picture_noise_reaches_the_robot_and_not_people() -> None:
    clean = TableEnv(observe=("image",), image_size=32)
    bright = TableEnv(observe=("image",), image_size=32, randomization=[exactly("image_brightness", 0.1, "add")])
    plain, changed = clean.reset(seed=3)[0]["image"], bright.reset(seed=3)[0]["image"]
    # a tenth of 255 is 25.5, rounded and cut off at 255
    np.testing.assert_allclose(changed, np.minimum(plain + 25.5, 255), atol=0.5)
    np.testing.assert_array_equal(bright.picture(size=32), plain)


def test_a_reset_draws_from_the_nominal_model() -> None:
    """After many random episodes, what is put back is bit for bit the model of a table without randomization."""
    varied, plain = TableEnv(observe=(), randomization="full"), TableEnv(observe=())
    for seed in range(6):
        varied.reset(seed=seed)
        for action in moves(2):
            varied.step(action)
    plain.reset(seed=77)
    varied.reset(seed=77)
    changed = [
        name
        for name, value in model_fields(varied.world.model).items()
        if not np.array_equal(value, model_fields(plain.world.model)[name])
    ]
    assert {"body_mass", "body_inertia", "geom_friction", "actuator_gainprm", "cam_pos", "geom_rgba"} <= set(
        changed
    )
    assert varied.randomizer is not None
    varied.randomizer.restore()
    nominal, restored = model_fields(plain.world.model), model_fields(varied.world.model)
    assert nominal.keys() == restored.keys()
    for name, value in nominal.items():
        np.testing.assert_array_equal(restored[name], value, err_msg=name)


def test_the_scene_does_not_depend_on_the_randomization() -> None:
    plain, varied = TableEnv(observe=("state",)), TableEnv(observe=("state",), randomization="full")
    one, other = plain.reset(seed=5), varied.reset(seed=5)
    assert one[1] == other[1]
    assert plain.world.things == varied.world.things
    np.testing.assert_allclose(one[0]["state"][:6], other[0]["state"][:6], atol=1e-6)


def test_randomized_episodes_are_those_of_the_seed() -> None:
    actions = moves(3)
    sight = ("image", "proprio", "state")
    fresh = watched(TableEnv(observe=sight, image_size=32, randomization="full"), actions, seed=4)
    used = TableEnv(observe=sight, image_size=32, randomization="full")
    watched(used, moves(2, seed=2), seed=8)
    for one, other in zip(fresh, watched(used, actions, seed=4), strict=True):
        for name in sight:
            np.testing.assert_array_equal(one[name], other[name])
