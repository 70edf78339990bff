"""The numbers of a table, entry by entry, in a hand-laid scene."""

from __future__ import annotations

import numpy as np
import pytest

from envs.table.language import TASKS
from envs.table.observations import OWN_TASKS, PERCEPT, PROPRIO, STATE, proprio, state
from envs.table.scene import HOME
from envs.table.tasks import Slots
from tests.envs.table.scenes import PADS_XY, bring, grasped, hand_laid_world, teleport

# positions in decimetres from a point 12 cm above the middle of the table
CUBE_AT, BAR_AT, TOWER_AT, OTHER_AT = (1.0, 1.0, -0.97), (-1.0, 1.0, -1.05), (-1.0, -1.0, -0.84), (1.0, -1.0, -0.97)


def test_proprioception_by_hand() -> None:
    world = hand_laid_world()
    world.step(np.array([1.0, 0.0, 0.0, 1.0]))
    felt = proprio(world)
    assert felt.shape == (PROPRIO,) == (17,)
    assert felt.dtype == np.float32
    np.testing.assert_allclose(felt[:7], world.data.qpos[:7] - HOME, atol=1e-7)
    np.testing.assert_allclose(felt[7:10], (world.tool - [0, 0, 0.12]) * 10, atol=1e-6)
    # some 24 mm in 0.1 s, in units of 30 cm/s
    assert felt[10] == pytest.approx(0.8, abs=0.05)
    np.testing.assert_allclose(felt[11:13], 0.0, atol=0.05)
    assert felt[13] == pytest.approx(world.opening * 10)
    assert felt[14:].tolist() == [1.0, 0.0, 0.0]


def test_fingertips_feel_whatever_they_touch() -> None:
    world = grasped(3)  # not the named object
    assert proprio(world)[14:].tolist() == [1.0, 1.0, 1.0]
    assert state(world, "pick", Slots(0), 0.0, 0.0)[34:36].tolist() == [0.0, 0.0]
    assert state(world, "pick", Slots(3), 0.0, 0.0)[34:36].tolist() == [1.0, 1.0]


def test_state_by_hand() -> None:
    world = hand_laid_world()
    teleport(world, 1, (-0.1, 0.1, 0.015))
    world.lifted[1] = 0.07
    world.data.joint("object1").qvel[:3] = (0.3, -0.15, 0.0)
    seen = state(world, "push", Slots(1, pad=0), 0.4, 0.25)
    assert seen.shape == (STATE,) == (52,)
    assert seen.dtype == np.float32
    tool = (world.tool - [0, 0, 0.12]) * 10
    goal = (0.0, 0.0, -1.05)
    expected = np.concatenate(
        (
            *(BAR_AT, goal, (0.32, 0.22, 0.15), (0, 1, 0, 0, 0, 0, 0, 0)),
            *(tool, BAR_AT - tool, np.subtract(goal, BAR_AT)),
            *((0, 0, 0), (1.0, -0.5, 0.0), (1.0, -1.0), (0, 0), (0.7, 0.4, 0.25, 1.0)),
            *(CUBE_AT - tool, TOWER_AT - tool, OTHER_AT - tool, PADS_XY[1] * 10 - tool[:2], (0.0,)),
        )
    )
    np.testing.assert_allclose(seen, expected, atol=1e-6)


@pytest.mark.parametrize("task, slots", [("reach", Slots(2)), ("pick", Slots(2)), ("stack", Slots(2, base=1))])
def test_state_of_the_other_tasks(task: str, slots: Slots) -> None:
    world = hand_laid_world()
    seen = state(world, task, slots, 0.0, 0.0)
    np.testing.assert_allclose(seen[:3], TOWER_AT, atol=1e-6)
    # on the bar, whose top is at 3 cm: 3.0 + 3.6 - 12 cm
    np.testing.assert_allclose(seen[3:6], (-1.0, 1.0, -0.54) if task == "stack" else TOWER_AT, atol=1e-6)
    names = ("reach", "push", "pick", "place", "stack", "own", "own", "own")
    assert seen[9:17].tolist() == [float(task == name) for name in names]
    np.testing.assert_allclose(seen[49:51], PADS_XY[0] * 10 - (world.tool * 10)[:2], atol=1e-6)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_task_of_ones_own_has_its_place_and_its_destination(place: int) -> None:
    world = hand_laid_world()
    seen = state(world, "mine", Slots(1), 0.0, 0.0, destination=np.array([0.05, -0.2, 0.02]), own_place=place)
    assert seen[9:17].tolist() == [0.0] * 5 + [float(place == other) for other in range(3)]
    np.testing.assert_allclose(seen[3:6], (0.5, -2.0, -1.0), atol=1e-6)


def test_the_words_and_a_look_tell_what_comes_first() -> None:
    """Two worlds that differ in nothing but the hand differ in nothing before PERCEPT."""
    world = hand_laid_world()
    before = state(world, "stack", Slots(0, base=1), 0.0, 0.0)
    bring(world, world.tool + np.array([0.03, 0.0, 0.05]), grip=1.0, steps=3)
    after = state(world, "stack", Slots(0, base=1), 0.6, 0.5)
    assert PERCEPT == 3 + 3 + 3 + len(TASKS) + OWN_TASKS == 17
    np.testing.assert_allclose(after[:PERCEPT], before[:PERCEPT], atol=1e-3)
    assert np.abs(after[PERCEPT : PERCEPT + 3] - before[PERCEPT : PERCEPT + 3]).max() > 0.1


def test_turned_and_toppled() -> None:
    world = hand_laid_world()
    half = np.deg2rad(10.0) / 2
    joint = world.data.joint("object0")
    joint.qpos[3:] = (np.cos(half), 0.0, 0.0, np.sin(half))
    bring(world, world.tool.copy(), steps=1)
    seen = state(world, "reach", Slots(0), 0.0, 0.0)
    assert seen[51] == pytest.approx(np.deg2rad(10.0), abs=1e-3)
    assert seen[39] == pytest.approx(1.0, abs=1e-4)
    joint.qpos[2:] = (0.023, np.sqrt(0.5), np.sqrt(0.5), 0.0, 0.0)  # a quarter turn about x
    bring(world, world.tool.copy(), steps=1)
    assert state(world, "reach", Slots(0), 0.0, 0.0)[39] == pytest.approx(0.0, abs=1e-3)


def test_numbers_stay_about_one_in_play() -> None:
    world, rng = hand_laid_world(), np.random.default_rng(0)
    for _ in range(100):
        world.step(rng.uniform(-1, 1, 4))
        numbers = np.concatenate((proprio(world), state(world, "place", Slots(0, pad=1), 0.0, 0.5)))
        assert np.isfinite(numbers).all()
        assert np.abs(numbers).max() < 8.0
