"""The physics of the table: the tool's tracking, the gripper, what is touched and what is lost."""

from __future__ import annotations

import itertools

import mujoco
import numpy as np
import pytest

from envs.table import scene
from envs.table.world import HIGHEST, LOWEST, STEP_LENGTH, TableWorld
from tests.envs.table.scenes import (
    PADS_XY,
    PLACES,
    REST,
    above,
    bring,
    by_hand,
    grasped,
    hand_laid_world,
    teleport,
)

DOWN = np.diag([-1.0, 1.0, -1.0])


def tilt(world: TableWorld) -> float:
    """Degrees between the hand's orientation and pointing straight down, square to the table."""
    rotation = world.data.site("tool").xmat.reshape(3, 3) @ DOWN.T
    return float(np.rad2deg(np.arccos(np.clip((np.trace(rotation) - 1) / 2, -1, 1))))


def test_a_layout_is_placed_as_it_says() -> None:
    layout = by_hand()
    layout.yaw[:] = (0.1, -0.2, 0.0, 0.2)
    world = TableWorld()
    world.place(layout, np.random.default_rng(0))
    np.testing.assert_allclose(world.positions[:, :2], PLACES, atol=1e-12)
    assert world.positions[:, 2].tolist() == [0.023, 0.015, 0.036, 0.023]
    np.testing.assert_allclose([world.yaw(index) for index in range(4)], layout.yaw, atol=1e-12)
    np.testing.assert_allclose(world.pad_positions[:, :2], PADS_XY, atol=1e-12)
    assert [world.upright(index) for index in range(4)] == pytest.approx([1] * 4)
    assert world.opening == pytest.approx(0.10, abs=1e-12)
    for _ in range(10):
        world.step(REST)
    np.testing.assert_allclose(world.positions[:, :2], PLACES, atol=1e-3)
    assert world.lifted.max() < 1e-3


def test_placing_anew_forgets_everything() -> None:
    first, again = hand_laid_world(), grasped()
    bring(again, np.array([0.1, 0.1, 0.2]), grip=1.0, steps=10)
    assert again.lifted[0] > 0.05
    again.place(by_hand(), np.random.default_rng(0))
    assert again.lifted.tolist() == [0.0] * 4
    assert again.grip_command == -1.0
    for world in (first, again):
        for _ in range(5):
            world.step(np.array([0.5, -0.5, -0.2, 1.0]))
    np.testing.assert_array_equal(first.data.qpos, again.data.qpos)
    np.testing.assert_array_equal(first.data.qvel, again.data.qvel)


@pytest.mark.parametrize("axis, sign", list(itertools.product(range(3), (1, -1))))
def test_the_tool_follows_its_command(axis: int, sign: int) -> None:
    """Four fifths of the way within the step, in one step and in each of four, and little else."""
    world = hand_laid_world()
    bring(world, np.array([0.0, 0.0, 0.17]), steps=10)
    start, action = world.tool.copy(), REST.copy()
    action[axis] = sign
    for steps, aside in ((1, 0.0015), (4, 0.007)):
        while world.data.time < 1.0 + 0.1 * steps - 1e-6:
            world.step(action)
        moved = world.tool - start
        assert 0.80 < sign * moved[axis] / (STEP_LENGTH * steps) < 0.87
        assert np.abs(np.delete(moved, axis)).max() < aside


def test_a_smaller_action_moves_in_proportion() -> None:
    moved = []
    for size in (0.25, 0.5, 1.0):
        world = hand_laid_world()
        start = world.tool.copy()
        world.step(np.array([0.0, size, 0.0, -1.0]))
        moved.append((world.tool - start)[1] / size)
    assert moved == pytest.approx([moved[-1]] * 3, rel=0.05)
    assert world.tool_velocity[1] == pytest.approx(moved[-1] / 0.1)


@pytest.mark.parametrize("corner", list(itertools.product(*zip(LOWEST.tolist(), HIGHEST.tolist(), strict=True))))
def test_every_corner_is_reached_with_the_hand_down(corner: tuple[float, ...]) -> None:
    world = hand_laid_world()
    worst = 0.0
    for point in ([0, 0, 0.2], [*corner[:2], 0.2], corner):
        for _ in range(4):
            bring(world, np.array(point), steps=4)
            worst = max(worst, tilt(world))
    np.testing.assert_allclose(world.tool, corner, atol=1e-3)
    assert tilt(world) < 0.2
    assert worst < 3.0


def test_the_tool_is_not_sent_beyond_its_box() -> None:
    world = hand_laid_world()
    for sign, bound in ((1.0, HIGHEST), (-1.0, LOWEST)):
        for _ in range(40):
            world.step(np.array([sign, sign, sign, -1.0]))
        np.testing.assert_allclose(world.tool, bound, atol=1e-3)


def test_waiting_stays() -> None:
    world = hand_laid_world()
    start = world.tool.copy()
    for _ in range(64):
        world.step(REST)
    assert np.abs(world.tool - start).max() < 2e-3
    assert world.data.time == pytest.approx(6.4, abs=1e-9)


def test_the_gripper_closes_to_three_centimetres_and_opens_to_ten() -> None:
    world = hand_laid_world()
    for command, opening in ((1.0, 0.03), (-1.0, 0.10)):
        for _ in range(6):
            world.step(np.array([0.0, 0.0, 0.0, command]))
        assert world.opening == pytest.approx(opening, abs=2e-4)
        assert world.grip_command == command
    world.step(np.array([0.0, 0.0, 0.0, 0.0]))
    assert world.grip_command == -1.0  # 0 opens


def test_the_opening_is_the_air_between_the_fingers() -> None:
    """Against the geometry: the fingers' centres less half a finger's thickness each."""
    world = hand_laid_world()
    for command in (1.0, -1.0):
        world.step(np.array([0.0, 0.0, 0.0, command]))
        mujoco.mj_kinematics(world.model, world.data)
        left, right = (world.data.geom(f"{side}_finger").xpos for side in ("left", "right"))
        assert np.linalg.norm(left - right) - 2 * 0.005 == pytest.approx(world.opening, abs=1e-9)


@pytest.mark.parametrize("index", range(4))
def test_every_shape_can_be_gripped_and_lifted(index: int) -> None:
    world = grasped(index)
    assert world.touching(index) == (True, True)
    assert world.gripped(index)
    width = 2 * scene.HALF_EXTENTS[world.things[index].shape][1]
    assert world.opening == pytest.approx(width, abs=2e-3)
    assert not any(any(world.touching(other)) for other in range(4) if other != index)
    bring(world, above(world.tool, 0.12), grip=1.0, steps=12)
    assert world.gripped(index)
    assert world.lifted[index] > 0.08
    assert world.lifted[index] == pytest.approx(world.positions[index, 2] - world.half_heights[index], abs=5e-3)
    bring(world, world.tool.copy(), grip=-1.0, steps=8)
    assert world.touching(index) == (False, False)
    assert world.positions[index, 2] < 0.05  # it fell
    assert world.lifted[index] > 0.08  # which is not forgotten


def test_one_finger_is_no_grip() -> None:
    """The open hand comes down beside a cube and moves sideways: one finger pushes."""
    world = hand_laid_world()
    centre = world.positions[0].copy()
    bring(world, above(centre, 0.15), steps=15)
    bring(world, above(centre, 0.005), steps=15)
    assert world.touching(0) == (False, False)
    felt = set()
    for _ in range(15):
        world.step(np.array([0.0, 0.2, 0.0, -1.0]))  # slowly, so that the cube does not fly ahead
        felt.add(world.touching(0))
        assert not world.gripped(0)
    # the hand's y axis is the table's, so moving to +y the right finger, at -y, meets the cube
    assert felt == {(False, False), (False, True)}
    assert world.positions[0, 1] > centre[1] + 0.01


def test_velocities() -> None:
    world = hand_laid_world()
    world.data.joint("object2").qvel[:3] = (0.3, -0.4, 0.0)
    assert world.velocity(2).tolist() == [0.3, -0.4, 0.0]
    assert world.speed(2) == pytest.approx(0.5)
    assert world.speed(1) == 0.0


@pytest.mark.parametrize(
    "position, lost",
    [
        ((0.255, 0.0, 0.023), False),
        ((0.265, 0.0, 0.023), True),
        ((-0.265, 0.0, 0.023), True),
        ((0.0, 0.315, 0.023), False),
        ((0.0, -0.325, 0.023), True),
        ((0.0, 0.0, -0.01), True),
    ],
)
def test_out_of_reach(position: tuple[float, float, float], lost: bool) -> None:
    world = hand_laid_world()
    teleport(world, 3, position)
    assert world.out_of_reach(3) is lost
    assert not world.out_of_reach(0)


def test_what_sleeps_wakes_when_it_is_touched() -> None:
    world = hand_laid_world()
    for _ in range(30):
        world.step(REST)
    tree = int(world.model.body_treeid[world.model.body("object0").id])
    assert world.data.tree_asleep[tree] >= 0
    start = world.positions[0].copy()
    bring(world, np.array([start[0] - 0.08, start[1], 0.1]), grip=1.0, steps=15)
    bring(world, np.array([start[0] - 0.08, start[1], 0.025]), grip=1.0, steps=8)
    np.testing.assert_allclose(world.positions[0], start, atol=1e-3)
    for _ in range(5):
        world.step(np.array([1.0, 0.0, 0.0, 1.0]))
    assert world.positions[0, 0] > start[0] + 0.03


def test_physics_of_one_table_is_its_own() -> None:
    first, second = TableWorld(), TableWorld()
    first.model.body_mass[:] *= 2.0
    np.testing.assert_array_equal(second.model.body_mass * 2.0, first.model.body_mass)


def test_long_random_play_gives_no_warnings() -> None:
    world, rng = hand_laid_world(), np.random.default_rng(0)
    for _ in range(400):
        world.step(rng.uniform(-1, 1, 4) - np.array([0, 0, 0.3, 0]))
    assert sum(warning.number for warning in world.data.warning) == 0
    assert np.isfinite(world.data.qpos).all()
    assert np.abs(world.data.qvel).max() < 30.0
    low, high = LOWEST - 0.03, HIGHEST + 0.03
    assert ((world.tool > low) & (world.tool < high)).all()
