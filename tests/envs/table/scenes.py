"""What the tests of the table share: scenes laid by hand, and things put elsewhere by hand."""

from __future__ import annotations

from collections.abc import Sequence

import mujoco
import numpy as np
from numpy.typing import NDArray

from envs.table.language import Goal, Thing
from envs.table.world import STEP_LENGTH, Array, Layout, TableWorld

CUBE, BAR, TOWER, OTHER = (
    Thing("red", "cube"),
    Thing("blue", "bar"),
    Thing("green", "tower"),
    Thing("yellow", "cube"),
)
PLACES = np.array([[0.1, 0.1], [-0.1, 0.1], [-0.1, -0.1], [0.1, -0.1]])
PADS_XY = np.array([[0.0, 0.0], [0.0, 0.18]])
REST = np.array([0.0, 0.0, 0.0, -1.0])
"""The action that stays where it is, open."""


def by_hand() -> Layout:
    """A cube, a bar, a tower and another cube in the corners of a square of 20 cm, a white pad in its middle."""
    return Layout((CUBE, BAR, TOWER, OTHER), PLACES.copy(), np.zeros(4), ("white", "black"), PADS_XY.copy())


def hand_laid_world() -> TableWorld:
    world = TableWorld()
    world.place(by_hand(), np.random.default_rng(0))
    return world


def above(point: Array, height: float) -> Array:
    return point + np.array([0.0, 0.0, height])


def teleport(world: TableWorld, index: int, position: Sequence[float] | NDArray[np.floating]) -> None:
    """Put an object's centre there, upright and at rest, and everything that follows from it."""
    joint = world.data.joint(f"object{index}")
    joint.qpos[:] = (*position, 1.0, 0.0, 0.0, 0.0)
    joint.qvel[:] = 0.0
    mujoco.mj_forward(world.model, world.data)


def bring(world: TableWorld, point: Array, grip: float = -1.0, steps: int = 40) -> None:
    """Move the tool straight to a point, by actions."""
    for _ in range(steps):
        world.step(np.array([*np.clip((point - world.tool) / STEP_LENGTH, -1, 1), grip]))


def grasped(index: int = 0) -> TableWorld:
    """A hand-laid world whose object is held at its middle, still on the table."""
    world = hand_laid_world()
    centre = world.positions[index].copy()
    bring(world, above(centre, 0.15), steps=15)
    bring(world, centre, steps=15)
    bring(world, centre, grip=1.0, steps=5)
    return world


def asked(task: str, pad: str | None = None, base: Thing | None = None, thing: Thing = CUBE) -> Goal:
    return Goal(task, thing, pad=pad, base=base)
