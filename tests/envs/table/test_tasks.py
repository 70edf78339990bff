"""Success and progress of each task, in worlds made for it: objects are put in place, and next to it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from envs.table import tasks
from envs.table.env import TableEnv
from envs.table.language import TASKS, Goal, Thing
from envs.table.scene import HALF_EXTENTS
from envs.table.tasks import TASK, Slots, air, destination, locate, top
from envs.table.world import TableWorld
from tests.envs.table.scenes import (
    BAR,
    CUBE,
    PADS_XY,
    REST,
    TOWER,
    above,
    asked,
    bring,
    grasped,
    hand_laid_world,
    teleport,
)

ON_WHITE, ON_BAR = Slots(0, pad=0), Slots(0, base=1)
SLOTS = {"reach": Slots(0), "push": ON_WHITE, "pick": Slots(0), "place": ON_WHITE, "stack": ON_BAR}
FAR = np.array([0.0, -0.2, 0.2])
GOALS = {
    "reach": asked("reach"),
    "push": asked("push", pad="white"),
    "pick": asked("pick"),
    "place": asked("place", pad="white"),
    "stack": asked("stack", base=BAR),
}


def progress(task: str, world: TableWorld) -> float:
    value = TASK[task].progress(world, SLOTS[task])
    assert 0.0 <= value <= 1.0
    return value


def done(task: str, world: TableWorld) -> bool:
    return TASK[task].done(world, SLOTS[task])


def at(dx: float = 0.0, dy: float = 0.0, dz: float = 0.0) -> TableWorld:
    """The hand-laid world with its cube on the white pad, off its middle by this much."""
    world = hand_laid_world()
    teleport(world, 0, (dx, dy, 0.023 + dz))
    return world


def on_bar(dx: float = 0.0, dy: float = 0.0, dz: float = 0.0) -> TableWorld:
    """The hand-laid world with its cube on the bar."""
    world = hand_laid_world()
    x, y, _ = world.positions[1]
    teleport(world, 0, (x + dx, y + dy, 0.030 + 0.023 + dz))
    return world


def test_things_are_located() -> None:
    world = hand_laid_world()
    assert locate(asked("stack", base=BAR, thing=TOWER), world) == Slots(2, base=1)
    assert locate(asked("push", pad="black"), world) == Slots(0, pad=1)
    with pytest.raises(
        ValueError, match="the goal names red bar, the scene has red cube, blue bar, green tower, ye"
    ):
        locate(Goal("reach", Thing("red", "bar")), world)
    with pytest.raises(ValueError, match="the goal names cyan, the scene has white, black"):
        locate(asked("push", pad="cyan"), world)


def test_destinations_and_tops() -> None:
    world = hand_laid_world()
    np.testing.assert_allclose(destination(world, Slots(2, pad=1)), [*PADS_XY[1], 0.036], atol=1e-12)
    # the tower on the bar: 2 * 15 mm, then half of 72 mm
    np.testing.assert_allclose(destination(world, Slots(2, base=1)), [-0.1, 0.1, 0.066], atol=1e-9)
    np.testing.assert_allclose(destination(world, Slots(0)), [0.1, 0.1, 0.023], atol=1e-12)
    np.testing.assert_allclose(top(world, 2), [-0.1, -0.1, 0.072], atol=1e-12)
    assert air(world, 3) == pytest.approx(0.0, abs=1e-12)


def test_holds_are_half_a_second_where_things_move() -> None:
    assert {name: task.hold for name, task in TASK.items()} == {
        "reach": 1,
        "push": 1,
        "pick": 5,
        "place": 5,
        "stack": 5,
    }


# ---------------------------------------------------------------- reach


@pytest.mark.parametrize("offset, reached", [(0.0, True), (0.024, True), (0.026, False)])
@pytest.mark.parametrize("axis", range(3))
def test_reach(axis: int, offset: float, reached: bool) -> None:
    world = hand_laid_world()
    place = world.tool.copy()
    place[axis] += offset
    teleport(world, 0, place - [0, 0, 0.023])  # its top is at the tool but for the offset
    assert done("reach", world) is reached
    assert progress("reach", world) == pytest.approx(1 - np.tanh(5 * offset), abs=1e-9)


# ---------------------------------------------------------------- push


@pytest.mark.parametrize("dx, dy", [(0, 0), (0.044, 0), (0, -0.044), (0.044, 0.044)])
def test_push_on_the_pad(dx: float, dy: float) -> None:
    assert done("push", at(dx, dy))


@pytest.mark.parametrize("dx, dy, dz", [(0.046, 0, 0), (0, -0.046, 0), (0, 0, 0.013)])
def test_push_beside_or_above_the_pad(dx: float, dy: float, dz: float) -> None:
    assert not done("push", at(dx, dy, dz))


@pytest.mark.parametrize("lifted, pushed", [(0.019, True), (0.021, False)])
def test_push_refuses_what_was_lifted(lifted: float, pushed: bool) -> None:
    world = at()
    world.lifted[0] = lifted
    assert done("push", world) is pushed
    assert (progress("push", world) > 0) is pushed


def test_push_by_hand_and_the_other_pad() -> None:
    """A cube that was carried is refused on the pad although it lies there; the black pad is another pad."""
    world = grasped()
    bring(world, above(world.tool, 0.1), grip=1.0, steps=8)
    teleport(world, 0, (0.0, 0.0, 0.023))
    bring(world, FAR, steps=3)
    assert air(world, 0) < 0.003
    assert not done("push", world)
    assert not TASK["push"].done(at(), Slots(0, pad=1))


def test_push_progress() -> None:
    world = hand_laid_world()
    half = HALF_EXTENTS[world.things[0].shape][0]
    start = world.positions[0] + [half + 0.02 + 0.02, 0, 0]  # the pad is as far in x as in y: along x, from beyond
    start[2] = 0.025
    near = 1 - np.tanh(5 * np.linalg.norm(world.tool - start))
    expected = 0.3 * near + 0.7 * (1 - np.tanh(5 * np.hypot(0.1, 0.1)))
    assert progress("push", world) == pytest.approx(expected, abs=1e-9)


# ---------------------------------------------------------------- pick


def test_pick_needs_air_and_grip() -> None:
    world = grasped()
    assert not done("pick", world)
    assert progress("pick", world) == pytest.approx(0.6, abs=0.03)  # at the tool, gripped, on the table
    heights = []
    while air(world, 0) < 0.08:
        world.step(np.array([0, 0, 0.4, 1.0]))
        heights.append((air(world, 0), done("pick", world), progress("pick", world)))
    for height, picked, got in heights:
        assert picked == (height > 0.05)
        assert got == pytest.approx(0.6 + 0.4 * min(1.0, max(height, 0.0) / 0.06), abs=0.03)
    assert heights[-1][2] > 0.97
    world.step(REST)
    world.step(REST)
    assert not world.gripped(0)
    assert not done("pick", world)


def test_pick_refuses_what_only_flies() -> None:
    world = hand_laid_world()
    teleport(world, 0, (0.0, 0.0, 0.3))
    assert air(world, 0) > 0.05
    assert not done("pick", world)
    near = 1 - np.tanh(5 * np.linalg.norm(world.tool - world.positions[0]))
    assert progress("pick", world) == pytest.approx(0.4 * near, abs=1e-9)


# ---------------------------------------------------------------- place and stack


@pytest.mark.parametrize("task, make", [("place", at), ("stack", on_bar)])
def test_put(task: str, make: type) -> None:
    near, far = (0.044, 0.046) if task == "place" else (0.021, 0.023)
    for offset, fits in ((0.0, True), (near, True), (far, False)):
        for dx, dy in ((offset, 0.0), (0.0, -offset)):
            world = make(dx, dy)
            world.lifted[0] = 0.031
            assert done(task, world) is fits
    for dz, fits in ((0.011, True), (0.013, False)):
        world = make(0.0, 0.0, dz)
        world.lifted[0] = 0.031
        assert done(task, world) is fits


@pytest.mark.parametrize("task, make", [("place", at), ("stack", on_bar)])
def test_put_refuses_what_was_pushed_and_what_moves(task: str, make: type) -> None:
    world = make()
    world.lifted[0] = 0.029
    assert not done(task, world)
    assert progress(task, world) < 0.2
    world.lifted[0] = 0.031
    assert done(task, world)
    assert progress(task, world) == 1.0
    velocity = world.data.joint("object0").qvel
    for speed, still in ((0.029, True), (0.031, False)):
        velocity[0] = speed
        assert done(task, world) is still


def test_place_needs_letting_go() -> None:
    """Carried to the pad by hand: progress rises to 0.8, letting go gives the rest."""
    world = grasped()
    values = [progress("place", world)]
    assert values[0] == pytest.approx(0.3, abs=0.03)  # near the tool and gripped
    bring(world, above(world.tool, 0.07), grip=1.0, steps=8)
    values.append(progress("place", world))
    bring(world, np.array([0.0, 0.0, world.tool[2]]), grip=1.0, steps=10)
    values.append(progress("place", world))
    bring(world, np.array([0.0, 0.0, 0.0235]), grip=1.0, steps=12)
    assert air(world, 0) < 0.012
    assert any(world.touching(0))
    assert not done("place", world)
    values.append(progress("place", world))
    assert values == sorted(values)
    assert values[-1] == 0.8
    bring(world, world.tool.copy(), grip=-1.0, steps=3)
    assert done("place", world)
    assert progress("place", world) == 1.0


# ---------------------------------------------------------------- in the environment: holds, rewards


def beginning(task: str, **arguments: object) -> TableEnv:
    """An environment whose goal is about the cube, in a drawn scene whose other things do not matter."""
    env = TableEnv(observe=(), **arguments)  # type: ignore[arg-type]
    env.reset(seed=11, options={"goal": GOALS[task]})
    return env


def put_in_place(env: TableEnv) -> None:
    world, slots = env.world, env.slots
    teleport(world, slots.thing, destination(world, slots))
    world.lifted[slots.thing] = 0.1


@pytest.mark.parametrize("task", ["place", "stack"])
def test_half_a_second_in_place_is_success_and_no_less(task: str) -> None:
    env = beginning(task)
    put_in_place(env)
    outcomes = [env.step(REST) for _ in range(5)]
    assert [info["success"] for *_, info in outcomes] == [False] * 4 + [True]
    assert [terminated for _, _, terminated, _, _ in outcomes] == [False] * 4 + [True]
    assert [reward >= 1.0 for _, reward, *_ in outcomes] == [False] * 4 + [True]


@pytest.mark.parametrize("task", ["place", "stack"])
def test_an_interruption_begins_the_half_second_anew(task: str) -> None:
    env = beginning(task)
    put_in_place(env)
    for _ in range(4):
        env.step(REST)
    thing = env.slots.thing
    away = env.world.positions[thing].copy()
    teleport(env.world, thing, above(away, 0.08))
    assert not env.step(REST)[-1]["success"]
    put_in_place(env)
    assert [env.step(REST)[-1]["success"] for _ in range(5)] == [False] * 4 + [True]


def test_reach_and_push_are_done_at_once() -> None:
    env = beginning("push")
    teleport(env.world, env.slots.thing, destination(env.world, env.slots))
    assert env.step(REST)[-1]["success"]
    env = beginning("reach")
    point = top(env.world, env.slots.thing)
    bring(env.world, above(point, 0.1), steps=20)
    assert not env.step(REST)[-1]["success"]
    bring(env.world, point, steps=10)
    assert env.step(REST)[-1]["success"]


def test_a_pick_is_held_for_half_a_second() -> None:
    env = beginning("pick")
    world, thing = env.world, env.slots.thing
    centre = world.positions[thing].copy()
    bring(world, above(centre, 0.15), steps=20)
    bring(world, centre, steps=15)
    bring(world, centre, grip=1.0, steps=5)
    outcomes: list[bool] = []
    while not outcomes or not outcomes[-1]:
        *_, info = env.step(np.array([0, 0, 1.0 if air(world, thing) < 0.08 else 0.0, 1.0]))
        outcomes.append(bool(info["success"]))
        assert len(outcomes) < 20
        if not tasks.pick_done(world, env.slots):
            first = len(outcomes)
    assert len(outcomes) - first == 5


@pytest.mark.parametrize("task, seed", list(itertools.product(TASKS, (1, 2))))
def test_the_dense_reward_adds_up_to_the_progress_made(task: str, seed: int) -> None:
    """Its sum is the last progress less the first, plus 1 for each step of success, whatever happens between."""
    env = TableEnv(tasks=(task,), observe=(), end_on_success=False)
    env.reset(seed=seed)
    rule = TASK[task]
    first = rule.progress(env.world, env.slots)
    rng, total, successes = np.random.default_rng(seed), 0.0, 0
    for step in range(30):
        if step == 20 and task in ("push", "place", "stack"):
            put_in_place(env)
            env.world.lifted[env.slots.thing] = 0.0 if task == "push" else 0.1
        _, reward, terminated, _, info = env.step(rng.uniform(-1, 1, 4) if step < 20 else REST)
        total += reward
        successes += info["success"]
        assert 0.0 <= rule.progress(env.world, env.slots) <= 1.0
        assert not terminated
    last = rule.progress(env.world, env.slots)
    assert total == pytest.approx(last - first + successes, abs=1e-9)
    if task in ("push", "place", "stack"):
        assert successes >= 5


@pytest.mark.parametrize("task", TASKS)
def test_waiting_pays_nothing(task: str) -> None:
    env = TableEnv(tasks=(task,), observe=())
    env.reset(seed=5)
    for _ in range(10):
        env.step(REST)  # the arm settles
    assert abs(sum(env.step(REST)[1] for _ in range(20))) < 2e-3


def test_the_sparse_reward_is_success() -> None:
    env = beginning("place", reward="sparse", end_on_success=False)
    put_in_place(env)
    assert [env.step(REST)[1] for _ in range(8)] == [0.0] * 4 + [1.0] * 4


def test_thresholds_are_consistent() -> None:
    """What is pushed cannot be placed, what lies is not lifted, and a pick is higher than a carry."""
    assert tasks.ON_TABLE < tasks.PUSHED_AT_MOST < tasks.CARRIED < tasks.LIFTED
    assert CUBE != BAR
