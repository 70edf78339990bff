"""What the words ask for, measured in the world: success, and progress for the dense reward.

One small pair of functions a task. `done` is about this instant; the environment counts how long it has been true.
Progress is in [0, 1]; the dense reward is its change, so that it pays for getting on and never for waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from envs.table import scene
from envs.table.language import TASKS, Goal
from envs.table.world import LOWEST, Array, TableWorld

if TYPE_CHECKING:
    from envs.table.expert import Expert

REACHED = 0.025
"""Metres from the tool to the middle of the object's top."""
LIFTED = 0.05
"""Metres of air under an object that is picked up."""
CARRIED = 0.03
"""Metres of air that an object must have had under it to be placed, not pushed."""
ON_TABLE = 0.012
"""Metres of air under an object that still lies."""
PUSHED_AT_MOST = 0.02
"""Metres of air under an object, ever, that was pushed, not placed."""
ON_PAD = 0.045
"""Metres, in x and in y, from the object's centre to the pad's."""
ON_BASE = 0.022
"""Metres, in x and in y, from the object's centre to that of the one beneath."""
PADDLE = (0.02, 0.025)
"""Half extents, in x and y, of the closed fingers."""
PUSH_HEIGHT = LOWEST[2] + 0.005
"""Metres of the tool above the table while it pushes."""
STILL = 0.03
"""Metres a second below which an object is still."""


@dataclass(frozen=True)
class Slots:
    """A goal in terms of the scene: thing and base are objects 0..3, pad is 0..1."""

    thing: int
    pad: int | None = None
    base: int | None = None


@dataclass(frozen=True)
class Task:
    """done: whether it is so now. progress: in [0, 1]. hold: control steps for which it must stay so."""

    done: Callable[[TableWorld, Slots], bool]
    progress: Callable[[TableWorld, Slots], float]
    hold: int


@dataclass(frozen=True)
class OwnTask(Task):
    """A task of a user's own: its rule as in `Task`, and all that the five others have elsewhere.

    name            what goals, metrics and reports call it
    sentences       every way to ask for a goal, in lower-case letters and spaces, 16 words at most
    like            whose goals have the same parts: "reach" (a thing), "push" (and a pad), "stack" (and a base)
    destination     [3] metres, where the object's centre is to be; None: as the task that it is like
    act             its scripted expert, such as `Expert.push` (to the destination); None: there is none
    place           0, 1 or 2: which of the state's places for own tasks is this one's; give each of yours another

    Raises ValueError for a name that is no word or taken, an unknown `like` and another place.
    """

    name: str
    sentences: Callable[[Goal], Sequence[str]]
    like: str = "reach"
    destination: Callable[[TableWorld, Slots], Array] | None = None
    act: Callable[[Expert], NDArray[np.float32]] | None = None
    place: int = 0

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or self.name in TASKS:
            raise ValueError(
                f"a task of your own needs a word for a name that is none of {TASKS}, got {self.name!r}"
            )
        if self.like not in TASKS:
            raise ValueError(f"task {self.name!r} is like one of {', '.join(TASKS)}, got {self.like!r}")
        if self.place not in (0, 1, 2):
            raise ValueError(f"task {self.name!r}: its place is 0, 1 or 2, got {self.place!r}")


def locate(goal: Goal, world: TableWorld) -> Slots:
    """Where the goal's things are in the scene. Raises ValueError if one is not there."""

    def index(of: object, among: tuple[object, ...]) -> int:
        if of not in among:
            raise ValueError(f"the goal names {of}, the scene has {', '.join(map(str, among))}")
        return among.index(of)

    return Slots(
        thing=index(goal.thing, world.things),
        pad=None if goal.pad is None else index(goal.pad, world.pads),
        base=None if goal.base is None else index(goal.base, world.things),
    )


def destination(world: TableWorld, slots: Slots) -> Array:
    """[3] where the named object's centre is to be: on the pad, on the base, or where it is."""
    height = world.half_heights[slots.thing]
    if slots.pad is not None:
        x, y, _ = world.pad_positions[slots.pad].tolist()
        return np.array([x, y, height])
    if slots.base is not None:
        x, y, z = world.positions[slots.base].tolist()
        return np.array([x, y, z + world.half_heights[slots.base] + height])
    return world.positions[slots.thing].copy()


def top(world: TableWorld, index: int) -> Array:
    """[3] the middle of an object's upper face."""
    return world.positions[index] + np.array([0.0, 0.0, world.half_heights[index]])


def air(world: TableWorld, index: int) -> float:
    """Metres between an object and the table."""
    return float(world.positions[index][2] - world.half_heights[index])


def _near(distance: float) -> float:
    """1 at no distance, 0.5 at 11 cm, falling on."""
    return float(1.0 - np.tanh(5.0 * distance))


def _offset(world: TableWorld, slots: Slots) -> Array:
    return destination(world, slots) - world.positions[slots.thing]


def _flat(offset: Array) -> float:
    """The larger of a vector's x and y."""
    return float(np.abs(offset[:2]).max())


def reach_done(world: TableWorld, slots: Slots) -> bool:
    """The tool is at the object's top."""
    return bool(np.linalg.norm(world.tool - top(world, slots.thing)) < REACHED)


def reach_progress(world: TableWorld, slots: Slots) -> float:
    """Nearness of the tool."""
    return _near(float(np.linalg.norm(world.tool - top(world, slots.thing))))


def push_done(world: TableWorld, slots: Slots) -> bool:
    """The object lies on the pad and was never lifted."""
    return bool(
        _flat(_offset(world, slots)) < ON_PAD
        and air(world, slots.thing) < ON_TABLE
        and world.lifted[slots.thing] < PUSHED_AT_MOST
    )


def push_start(world: TableWorld, slots: Slots, way: Array | None = None, axis: int | None = None) -> Array:
    """[3] the tool's place to begin to push from: 2 cm beside the object, on the side away from its destination.

    way: [2 or 3] metres from the object to its destination; None = to the pad's. axis: 0 or 1, along which to push;
    None = the one along which the way is longer.
    """
    if way is None:
        way = _offset(world, slots)
    if axis is None:
        axis = int(abs(way[1]) > abs(way[0]))
    centre = world.positions[slots.thing]
    start = np.array([centre[0], centre[1], PUSH_HEIGHT])
    half = scene.HALF_EXTENTS[world.things[slots.thing].shape][axis]
    start[axis] -= (np.sign(way[axis]) or 1.0) * (half + PADDLE[axis] + 0.02)
    return start


def push_progress(world: TableWorld, slots: Slots) -> float:
    """Nearness of the tool to where it can push from, and of the object to the pad; 0 for what was lifted.

    Not to the object: from its wrong side the way to the right one leads away from it.
    """
    if world.lifted[slots.thing] >= PUSHED_AT_MOST:
        return 0.0
    near = _near(float(np.linalg.norm(world.tool - push_start(world, slots))))
    return 0.3 * near + 0.7 * _near(float(np.linalg.norm(_offset(world, slots)[:2])))


def pick_done(world: TableWorld, slots: Slots) -> bool:
    """The object is in the gripper, in the air."""
    return air(world, slots.thing) > LIFTED and world.gripped(slots.thing)


def pick_progress(world: TableWorld, slots: Slots) -> float:
    """Nearness of the tool, the grip, the height."""
    near = _near(float(np.linalg.norm(world.tool - world.positions[slots.thing])))
    if not world.gripped(slots.thing):
        return 0.4 * near
    return 0.4 * near + 0.2 + 0.4 * min(1.0, max(0.0, air(world, slots.thing)) / (LIFTED + 0.01))


def put_done(world: TableWorld, slots: Slots) -> bool:
    """The object was carried, lies at its destination, is let go and still."""
    offset = _offset(world, slots)
    return bool(
        world.lifted[slots.thing] > CARRIED
        and _flat(offset) < (ON_PAD if slots.base is None else ON_BASE)
        and abs(offset[2]) < ON_TABLE
        and world.speed(slots.thing) < STILL
        and not any(world.touching(slots.thing))
    )


def put_progress(world: TableWorld, slots: Slots) -> float:
    """Nearness of the tool, the grip, the height, the nearness to the destination; and letting go there."""
    thing, offset = slots.thing, _offset(world, slots)
    arrived = _flat(offset) < (ON_PAD if slots.base is None else ON_BASE) and abs(offset[2]) < ON_TABLE
    if arrived and world.lifted[thing] > CARRIED:
        return 0.8 if any(world.touching(thing)) else 1.0
    near = _near(float(np.linalg.norm(world.tool - world.positions[thing])))
    if not world.gripped(thing):
        return 0.2 * near
    height = min(1.0, max(0.0, air(world, thing)) / LIFTED)
    carried = _near(float(np.linalg.norm(offset))) if world.lifted[thing] > CARRIED else 0.0
    return 0.2 * near + 0.1 + 0.1 * max(height, float(world.lifted[thing] > CARRIED)) + 0.3 * carried


HALF_SECOND = round(0.5 / scene.CONTROL_STEP)
"""Five control steps in a row at whose ends a goal is met, so that it was met for 0.4 to 0.5 s."""

TASK: dict[str, Task] = {
    "reach": Task(reach_done, reach_progress, hold=1),
    "push": Task(push_done, push_progress, hold=1),
    "pick": Task(pick_done, pick_progress, hold=HALF_SECOND),
    "place": Task(put_done, put_progress, hold=HALF_SECOND),
    "stack": Task(put_done, put_progress, hold=HALF_SECOND),
}
