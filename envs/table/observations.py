"""Numbers that describe a table: what the robot feels of itself, and the privileged state.

Lengths are in units of 10 cm from the workspace's centre, speeds in 30 cm/s, so that all numbers are about 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from envs.table import scene, tasks
from envs.table.language import TASKS
from envs.table.world import Array, TableWorld

PROPRIO = scene.JOINTS + 10
PERCEPT = 17
"""Numbers of the state that the words and a look tell; they come first."""
STATE = 52
OWN_TASKS = 3
"""Places for a user's own tasks."""
LENGTH, SPEED = 0.1, 0.3
_HEIGHT = 0.12
"""Metres above the table that count as 0: the middle of the tool's range."""
_ORIGIN = (0.0, 0.0, _HEIGHT)
_ONE_HOT = np.eye(len(TASKS) + OWN_TASKS).tolist()


def proprio(world: TableWorld) -> NDArray[np.float32]:
    """[17]: joint angles 7 (radians from the home posture), tool position 3 and velocity 3, finger opening, gripper
    command, and whether the left and the right fingertip feel something."""
    pressed = [any(side) for side in zip(*(world.touching(i) for i in range(scene.OBJECTS)), strict=True)]
    return np.concatenate(
        (
            world.data.qpos[: scene.JOINTS] - scene.HOME,
            (world.tool - _ORIGIN) / LENGTH,
            world.tool_velocity / SPEED,
            (world.opening / LENGTH, world.grip_command),
            pressed,
        ),
        dtype=np.float32,
    )


def state(
    world: TableWorld,
    task: str,
    slots: tasks.Slots,
    held: float,
    elapsed: float,
    destination: Array | None = None,
    own_place: int = 0,
) -> NDArray[np.float32]:
    """[52] privileged: all that matters for a goal, seen from it. destination: [3], where the task has its own;
    own_place: its place among a user's own tasks, see `OwnTask`.

    0:3   the named object's position          3:6   its destination (itself, where it has none)
    6:9   the object's half extents            9:17  the task, one-hot: the five, then a user's own
    17:20 the tool's position                  20:23 from the tool to the object
    23:26 from the object to its destination   26:29 tool velocity         29:32 object velocity
    32    finger opening  33 gripper command   34:36 left, right finger on the object
    36    greatest height so far               37    held: share of the time for which the goal must hold
    38    elapsed share of the time limit      39    uprightness
    40:49 the other objects, from the tool     49:51 the other pad, or the first, from the tool
    51    yaw of the object
    """
    thing, tool, positions = slots.thing, world.tool.tolist(), world.positions.tolist()
    goal = (tasks.destination(world, slots) if destination is None else destination).tolist()
    centre, others = positions[thing], positions[:thing] + positions[thing + 1 :]
    pad = world.pad_positions[0 if slots.pad is None else 1 - slots.pad].tolist()
    asked = TASKS.index(task) if task in TASKS else len(TASKS) + own_place
    # plain numbers: this runs once a control step, and on three of them NumPy is several times slower
    numbers = [
        *_from(_ORIGIN, centre),
        *_from(_ORIGIN, goal),
        *(length / LENGTH for length in scene.HALF_EXTENTS[world.things[thing].shape]),
        *_ONE_HOT[asked],
        *_from(_ORIGIN, tool),
        *_from(tool, centre),
        *_from(centre, goal),
        *(speed / SPEED for speed in world.tool_velocity.tolist()),
        *(speed / SPEED for speed in world.velocity(thing).tolist()),
        world.opening / LENGTH,
        world.grip_command,
        *world.touching(thing),
        world.lifted[thing] / LENGTH,
        held,
        elapsed,
        world.upright(thing),
        *(number for other in others for number in _from(tool, other)),
        *_from(tool, pad)[:2],
        world.yaw(thing),
    ]
    return np.array(numbers, np.float32)


def _from(origin: Sequence[float], place: Sequence[float]) -> list[float]:
    """[3] the way from one place to another."""
    return [(there - here) / LENGTH for here, there in zip(origin, place, strict=True)]
