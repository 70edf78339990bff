"""The environment: what it is asked, what it answers, what it refuses, and its state in another process."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from envs import capture
from envs.table import camera
from envs.table.env import ENTRIES, TIME_LIMIT, TableEnv, TableStateEnv
from envs.table.language import TASKS, Goal, held_out, parse
from envs.table.tasks import TASK, destination
from tests.envs.table.scenes import BAR, CUBE, REST, above, asked, bring, teleport

STATE_ID, TABLE_ID = "envs.make:tandem/TableState-v0", "envs.make:tandem/Table-v0"
HELD, ELAPSED = 37, 38  # of the privileged state: shares of the time to hold and of the time limit


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


# ---------------------------------------------------------------- Gymnasium


@pytest.mark.parametrize("env_id", [TABLE_ID, STATE_ID])
def test_gymnasium_finds_nothing_wrong(env_id: str) -> None:
    env = gymnasium.make(env_id, render_mode="rgb_array", disable_env_checker=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env.unwrapped)
    # unbounded numbers are meant so
    assert not [str(w.message) for w in caught if "infinity" not in str(w.message)]
    env.reset(seed=0)
    frame: Any = env.render()
    assert (frame.shape, frame.dtype) == ((256, 256, 3), np.uint8)
    env.close()


@pytest.mark.parametrize("env_id", [TABLE_ID, STATE_ID])
def test_time_runs_out_after_64_steps(env_id: str) -> None:
    extra: dict[str, Any] = {"observe": ("state",)} if env_id == TABLE_ID else {}
    env = gymnasium.make(env_id, **extra)
    env.reset(seed=0)
    ends = [env.step(REST.astype(np.float32))[2:4] for _ in range(TIME_LIMIT)]
    assert ends == [(False, False)] * 63 + [(False, True)]
    assert TableEnv(observe=()).render() is None
    env.close()


def test_the_flat_environment_is_the_same_table() -> None:
    flat, table = TableStateEnv(tasks="push+reach"), TableEnv(tasks=("push", "reach"), observe=("state",))
    one, other = flat.reset(seed=3), table.reset(seed=3)
    np.testing.assert_array_equal(one[0], other[0]["state"])
    assert one[1] == other[1]
    rng = np.random.default_rng(0)
    for action in rng.uniform(-1, 1, (10, 4)):
        (seen, *rest), (entries, *expected) = flat.step(action), table.step(action)
        np.testing.assert_array_equal(seen, entries["state"])
        assert rest == expected
    assert {flat.reset()[1]["task"] for _ in range(30)} == {"push", "reach"}


# ---------------------------------------------------------------- what is observed


def test_an_observation_has_what_was_named() -> None:
    env = TableEnv(observe=ENTRIES, image_size=24)
    seen, info = env.reset(seed=0)
    assert tuple(seen) == ENTRIES
    assert env.observation_space.contains(seen)
    assert seen["image"].shape == seen["wrist_image"].shape == (24, 24, 3)
    assert (seen["image"] != seen["wrist_image"]).any()
    assert seen["instruction"] == info["instruction"] == env.instruction
    assert parse(info["instruction"]) == env.goal
    assert (info["task"], info["goal"]) == (env.goal.task, env.goal.key)
    same(env.observe(("state", "proprio")), {name: seen[name] for name in ("state", "proprio")})
    assert env.observe(()) == {}


def test_pictures_are_drawn_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    real = camera.picture

    def counted(model: Any, data: Any, name: str, height: int, width: int) -> Any:
        drawn.append(name)
        return real(model, data, name, height, width)

    monkeypatch.setattr(camera, "picture", counted)
    for randomization in (None, "full"):
        env = TableEnv(observe=("proprio", "instruction", "state"), image_size=16, randomization=randomization)
        env.reset(seed=0)
        for _ in range(3):
            env.step(REST)
        env.observe(("state",))
        assert drawn == []
        env.observe(("state", "image"))
        assert drawn == ["front"]
        env.observe(("wrist_image",))
        assert drawn == ["front", "wrist"]
        drawn.clear()
    both = TableEnv(observe=("image", "wrist_image"), image_size=16)
    both.reset(seed=0)
    both.step(REST)
    assert drawn == ["front", "wrist"] * 2


def test_a_picture_shows_the_scene() -> None:
    """Seen from the front camera opposite the robot, +x is down and +y is right; a red cube is where it lies."""
    env = TableEnv(observe=("image",), image_size=64)
    env.reset(seed=1, options={"goal": asked("push", pad="white")})
    for index in range(4):
        teleport(env.world, index, (-0.05, 0.30 - 0.1 * index, -0.5))  # out of sight
    thing, found = env.slots.thing, {}
    for place in ((0.1, 0.0), (-0.1, 0.0), (0.1, 0.15), (0.1, -0.15)):
        teleport(env.world, thing, (*place, 0.023))
        image = env.observe(("image",))["image"].astype(int)
        red = (image[..., 0] > 100) & (image[..., 1] < 70) & (image[..., 2] < 70)
        assert 4 < red.sum() < 200
        found[place] = np.argwhere(red).mean(axis=0)
    assert found[0.1, 0.0][0] > found[-0.1, 0.0][0] + 5
    assert found[0.1, 0.15][1] > found[0.1, 0.0][1] + 5
    assert found[0.1, -0.15][1] < found[0.1, 0.0][1] - 5


@pytest.mark.parametrize("task", ["pick", "place"])
def test_the_state_tells_how_long_the_goal_has_held(task: str) -> None:
    env = TableEnv(tasks=(task,), observe=("state",), end_on_success=False)
    seen, _ = env.reset(seed=2)
    assert (seen["state"][HELD], seen["state"][ELAPSED]) == (0.0, 0.0)
    seen = env.step(REST)[0]
    assert seen["state"][ELAPSED] == pytest.approx(1 / 64)
    if task == "place":
        teleport(env.world, env.slots.thing, env.destination)
        env.world.lifted[env.slots.thing] = 0.1
        held = [env.step(REST)[0]["state"][HELD] for _ in range(4)]
        np.testing.assert_allclose(held, [0.2, 0.4, 0.6, 0.8], rtol=1e-6)


# ---------------------------------------------------------------- seeds


def test_an_episode_is_that_of_its_seed() -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (10, 4))
    fresh, used = TableEnv(image_size=16), TableEnv(image_size=16)
    used.reset(seed=99)
    for action in actions[::-1]:
        used.step(action)
    one, other = fresh.reset(seed=5), used.reset(seed=5)
    same(one[0], other[0])
    assert one[1] == other[1]
    for action in actions:
        one_step, other_step = fresh.step(action), used.step(action)
        same(one_step[0], other_step[0])
        assert one_step[1:] == other_step[1:]
    np.testing.assert_array_equal(fresh.reset()[0]["state"], used.reset()[0]["state"])  # the next one too
    assert fresh.reset(seed=6)[1] != one[1]


def test_training_episodes_keep_to_training_combinations() -> None:
    for kind in ("train", "held_out"):
        env = TableEnv(observe=(), combinations=kind)
        env.reset(seed=0)
        for _ in range(150):
            env.reset()
            assert held_out(env.goal) == (kind == "held_out")
            assert parse(env.instruction) == env.goal


def test_phrasing() -> None:
    env = TableEnv(observe=(), phrasing="synonyms")
    trained = TableEnv(observe=())
    for seed in range(20):
        env.reset(seed=seed)
        trained.reset(seed=seed)
        assert env.goal == trained.goal == parse(env.instruction)
        assert env.instruction != trained.instruction


# ---------------------------------------------------------------- what a reset is told


@pytest.mark.parametrize("task", TASKS)
def test_a_task_may_be_asked_for(task: str) -> None:
    env = TableEnv(tasks=("reach",), observe=())
    assert env.reset(seed=0, options={"task": task})[1]["task"] == task
    assert env.reset()[1]["task"] == "reach"  # only that once


def test_a_goal_may_be_asked_for() -> None:
    env = TableEnv(observe=())
    goal = asked("stack", base=BAR)
    for seed in range(5):
        _, info = env.reset(seed=seed, options={"goal": goal})
        assert env.goal == goal
        assert parse(info["instruction"]) == goal
        assert env.world.things[env.slots.thing] == CUBE
        assert env.slots.base is not None
        assert env.world.things[env.slots.base] == BAR
        np.testing.assert_allclose(env.destination, destination(env.world, env.slots))


@pytest.mark.parametrize(
    "sentence, goal",
    [
        ("push the red cube to the cyan pad", asked("push", pad="cyan")),
        ("Please PUSH the red block, to the cyan mat!", asked("push", pad="cyan")),
        ("hoist the blue brick", asked("pick", thing=BAR)),
        ("stack red box on the blue bar", asked("stack", base=BAR)),
    ],
)
def test_an_understood_sentence_is_played(sentence: str, goal: Goal) -> None:
    env = TableEnv(observe=("instruction",))
    seen, info = env.reset(seed=0, options={"instruction": sentence})
    assert seen["instruction"] == info["instruction"] == sentence  # as it was typed
    assert env.goal == goal
    assert env.judged
    assert goal.thing in env.world.things


@pytest.mark.parametrize("reward", ["sparse", "dense"])
@pytest.mark.parametrize("sentence", ["sing a song", "push the red cube", "stack the red cube on the red cube", ""])
def test_what_is_not_understood_is_never_a_success(sentence: str, reward: Any) -> None:
    env = TableEnv(tasks=("reach",), observe=("instruction",), reward=reward)
    seen, _ = env.reset(seed=0, options={"instruction": sentence})
    assert seen["instruction"] == sentence
    assert not env.judged
    world, slots = env.world, env.slots
    point = world.positions[slots.thing] + [0, 0, world.half_heights[slots.thing]]
    bring(world, above(point, 0.1), steps=20)
    bring(world, point, steps=10)
    assert TASK["reach"].done(world, slots)  # progress was made, too
    assert env.step(REST)[1:] == (0.0, False, False, {"success": False, "is_success": False})
    env.reset(seed=0)
    assert env.judged


@pytest.mark.parametrize("task", TASKS)
def test_swapped_words_name_another_object_of_the_same_scene(task: str) -> None:
    plain, swapped = TableEnv(observe=()), TableEnv(observe=())
    for seed in range(10):
        plain.reset(seed=seed, options={"task": task})
        _, info = swapped.reset(seed=seed, options={"task": task, "swap": True})
        assert swapped.world.things == plain.world.things
        assert swapped.world.pads == plain.world.pads
        np.testing.assert_array_equal(swapped.world.data.qpos, plain.world.data.qpos)
        assert swapped.other == plain.goal
        assert swapped.goal.thing != plain.goal.thing
        assert (swapped.goal.task, swapped.goal.pad, swapped.goal.base) == (task, plain.goal.pad, plain.goal.base)
        assert parse(info["instruction"]) == swapped.goal
        assert swapped.step(REST)[-1].keys() == {"success", "is_success", "success_of_original"}
        assert plain.step(REST)[-1].keys() == {"success", "is_success"}


def test_success_of_the_original_words_is_reported_beside() -> None:
    env = TableEnv(observe=(), end_on_success=False)
    env.reset(seed=0, options={"task": "push", "swap": True})
    assert env.other is not None
    for goal, answer in ((env.other, (False, True)), (env.goal, (True, False))):
        index = env.world.things.index(goal.thing)
        before = env.world.positions[index].copy()
        teleport(env.world, index, [*env.destination[:2], env.world.half_heights[index]])
        info = env.step(REST)[-1]
        assert (info["success"], info["success_of_original"]) == answer
        teleport(env.world, index, before)
    env.reset(seed=0, options={"task": "place", "swap": True})
    assert env.other is not None
    index = env.world.things.index(env.other.thing)
    teleport(env.world, index, [*env.destination[:2], env.world.half_heights[index]])
    env.world.lifted[index] = 0.1
    assert [env.step(REST)[-1]["success_of_original"] for _ in range(6)] == [False] * 4 + [True] * 2


# ---------------------------------------------------------------- ends


@pytest.mark.parametrize("reward", ["dense", "sparse"])
def test_a_named_object_out_of_reach_ends_the_episode_without_success(reward: str) -> None:
    env = TableEnv(observe=(), reward=reward)  # type: ignore[arg-type]
    for lost in ("thing", "base", "another"):
        env.reset(seed=0, options={"goal": asked("stack", base=BAR)})
        named = (env.slots.thing, env.slots.base)
        other = next(index for index in range(4) if index not in named)
        index = {"thing": env.slots.thing, "base": env.slots.base, "another": other}[lost]
        assert index is not None
        teleport(env.world, index, (0.30, 0.0, env.world.half_heights[index]))
        _, reward_got, terminated, truncated, info = env.step(REST)
        assert terminated is (lost != "another")
        assert not truncated
        assert not info["success"]
        assert reward_got < 0.01


def test_success_ends_the_episode_only_if_it_shall() -> None:
    for ends in (True, False):
        env = TableEnv(observe=(), end_on_success=ends, reward="sparse")
        env.reset(seed=0, options={"task": "push"})
        teleport(env.world, env.slots.thing, env.destination)
        assert env.step(REST)[1:] == (1.0, ends, False, {"success": True, "is_success": True})
        teleport(env.world, env.slots.thing, env.destination - [0.06 * np.sign(env.destination[0]), 0, 0])
        assert not env.step(REST)[-1]["success"]  # success is about now


# ---------------------------------------------------------------- refusals


def test_actions_are_checked_and_clipped() -> None:
    env = TableEnv(observe=("state",))
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"^the action is not finite: \[0\.0, nan, 0\.0, -1\.0\]$"):
        env.step(np.array([0.0, np.nan, 0.0, -1.0]))
    with pytest.raises(ValueError, match=r"^the action is not finite: \[inf, 0\.0, 0\.0, -1\.0\]$"):
        env.step(np.array([np.inf, 0.0, 0.0, -1.0]))
    with pytest.raises(ValueError, match=r"^the action must be \[4\], got \[3\]$"):
        env.step(np.zeros(3))
    with pytest.raises(ValueError, match=r"^the action must be \[4\], got \[1, 4\]$"):
        env.step(np.zeros((1, 4)))
    assert env.elapsed == 0  # none of them was carried out
    clipped = TableEnv(observe=("state",))
    clipped.reset(seed=0)
    same(env.step(np.array([9.0, -3.0, 0.0, -7.0]))[0], clipped.step(np.array([1.0, -1.0, 0.0, -1.0]))[0])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"tasks": ("reach", "pik")}, "there is no task 'pik': choose from reach, push, pick, place, stack; "),
        ({"tasks": ("pik",)}, "did you mean 'pick'?"),
        ({"tasks": "fly"}, "there is no task 'fly': choose from reach, push, pick, place, stack"),
        ({"tasks": ()}, "tasks must name one at least"),
        ({"observe": ("images",)}, "there is no observation 'images': choose from image, wrist_image, proprio, in"),
        ({"combinations": "test"}, "there is no combinations 'test': choose from train, held_out, all"),
        ({"phrasing": "synonym"}, "there is no phrasing 'synonym': choose from train, synonyms; did you mean 'syn"),
        ({"reward": "dens"}, "there is no reward 'dens': choose from dense, sparse; did you mean 'dense'?"),
        ({"image_size": 15}, "image_size must be from 16 to 640 pixels, got 15"),
        ({"image_size": 641}, "image_size must be from 16 to 640 pixels, got 641"),
        (
            {"randomization": "ful"},
            "there is no randomization 'ful': choose from none, mild, full, reality; did yo",
        ),
    ],
)
def test_what_cannot_be_made_says_why(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        TableEnv(**arguments)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"taks": "reach"},
            "there is no reset option 'taks': choose from task, goal, instruction, swap; did you mean",
        ),
        ({"task": "reech"}, "there is no task 'reech': choose from reach, push, pick, place, stack; did you mean"),
        ({"goal": "reach red cube"}, "the reset option 'goal' must be a Goal, got 'reach red cube'"),
        ({"instruction": "reach the red cube", "swap": True}, "the reset option 'swap' draws its own instruction"),
    ],
)
def test_what_cannot_be_reset_says_why(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        TableEnv(observe=()).reset(seed=0, options=options)
    assert str(refusal.value).startswith(message)


# ---------------------------------------------------------------- random play


@pytest.mark.parametrize("task", TASKS)
def test_chance_does_not_do_it(task: str) -> None:
    """The seeds are fixed; a policy of 5% would have two or more among 24 in a third of the draws."""
    env, rng = TableEnv(tasks=(task,), observe=()), np.random.default_rng(0)
    successes = 0
    for seed in range(24):
        env.reset(seed=seed)
        for _ in range(TIME_LIMIT):
            *_, terminated, _, info = env.step(rng.uniform(-1, 1, 4))
            if terminated:
                break
        successes += info["success"]
    assert successes <= 1
    assert sum(warning.number for warning in env.world.data.warning) == 0


# ---------------------------------------------------------------- its state elsewhere

LATE = [
    {"field": "observation_latency", "operation": "set", "range": (2, 2)},
    {"field": "action_latency", "operation": "set", "range": (1, 1)},
]


def moved(env: TableEnv, steps: int, seed: int = 0) -> None:
    env.reset(seed=seed)
    for action in np.random.default_rng(seed).uniform(-1, 1, (steps, 4)):
        env.step(action)


@pytest.mark.parametrize(
    "randomization, steps, observe",
    [
        (None, 0, ("proprio", "state")),
        (None, 25, ("image", "proprio", "instruction", "state")),
        ("full", 1, ("image", "proprio", "state")),
        ("full", 17, ("proprio", "state")),
        (LATE, 9, ("image", "wrist_image", "proprio", "state")),
    ],
)
def test_a_captured_table_goes_on_bit_for_bit(randomization: Any, steps: int, observe: tuple[str, ...]) -> None:
    """In a table that never was used and in one that was elsewhere, for 20 steps and into the next episode."""

    def make() -> TableEnv:
        return TableEnv(observe=observe, image_size=16, randomization=randomization)

    original, unused, used = make(), make(), make()
    nominal = [capture.nominal_fields(env) for env in (original, unused, used)]
    assert capture.obstacle(original, capture.nominal_fields(original)) is None
    moved(original, steps, seed=7)
    moved(used, 12, seed=8)
    state = capture.capture(original, nominal[0])
    for env, fields in ((unused, nominal[1]), (used, nominal[2])):
        capture.restore(env, state, fields)
        assert (env.goal, env.slots, env.instruction) == (original.goal, original.slots, original.instruction)
    actions = np.random.default_rng(1).uniform(-1, 1, (20, 4))
    for action in actions:
        expected, *results = original.step(action), unused.step(action), used.step(action)
        for result in results:
            same(result[0], expected[0])
            assert result[1:] == expected[1:]
    for env in (unused, used):
        np.testing.assert_array_equal(env.world.data.qpos, original.world.data.qpos)
        np.testing.assert_array_equal(env.world.data.qvel, original.world.data.qvel)
    expected_start, *starts = original.reset(), unused.reset(), used.reset()
    for start in starts:
        same(start[0], expected_start[0])
        assert start[1] == expected_start[1]


def test_sleeping_bodies_sleep_on_in_the_copy() -> None:
    original, copy = TableEnv(observe=("state",)), TableEnv(observe=("state",))
    nominal = capture.nominal_fields(original)
    original.reset(seed=1, options={"task": "push"})
    for _ in range(30):
        original.step(REST)
    asleep = original.world.data.tree_asleep.copy()
    assert (asleep >= 0).sum() == 4  # the four objects; the arm never sleeps
    capture.restore(copy, capture.capture(original, nominal), nominal)
    np.testing.assert_array_equal(copy.world.data.tree_asleep, asleep)
    for step in range(20):  # down among them
        action = np.array([0.4, np.sin(step), -1.0 if step < 8 else 0.0, 1.0])
        same(original.step(action)[0], copy.step(action)[0])
    np.testing.assert_array_equal(copy.world.data.qpos, original.world.data.qpos)
