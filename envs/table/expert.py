"""Scripted experts: at every instant the action that the geometry asks for.

They keep no memory, so they recover from noise, slips and bumps (an object that was dropped is simply to be grasped
again), and what they do can be learnt from what there is to be seen.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from envs.own import call_own
from envs.table import scene, tasks
from envs.table.env import TableEnv
from envs.table.tasks import OwnTask
from envs.table.world import HIGHEST, LOWEST, STEP_LENGTH, Array

TRAVEL = 0.115
"""Height (metres) of the tool above the table at which it passes over everything that lies there."""
OVER = 0.012
"""Metres in x and y within which the tool goes down."""
_OPEN, _CLOSE = -1.0, 1.0
_TOUCHING = -0.012
"""Metres of air between a paddle and what it touches, at the least."""


_LACKS = (
    "task {!r} has no scripted expert: give its OwnTask an `act`, or record by hand (tandem data record --teleop)"
)


def require_experts(env: TableEnv) -> None:
    """Raises ValueError where a task that the environment draws from has no scripted expert."""
    for task in env.own_tasks:
        if task.act is None:
            raise ValueError(_LACKS.format(task.name))


class Expert:
    """Acts in an environment that it can look into."""

    def __init__(self, env: TableEnv) -> None:
        self.env = env

    def act(self) -> NDArray[np.float32]:
        """[4] in [-1, 1]: the action for the present state.

        Raises ValueError for a user's own task without an expert, with one that fails, or with one whose answer is
        no action of 4 finite numbers; those beyond -1 and 1 are cut off there.
        """
        env = self.env
        if env.own_task is not None:
            return self._own(env.own_task)
        match env.goal.task:
            case "reach":
                return self.reach()
            case "push":
                return self.push()
            case "pick":
                return self.pick()
            case _:
                return self.put()

    def _own(self, task: OwnTask) -> NDArray[np.float32]:
        if task.act is None:
            raise ValueError(_LACKS.format(task.name))
        answer = call_own(f"task {task.name!r}: its `act`", task.act, self)
        try:
            action = np.asarray(answer, np.float32)
        except (TypeError, ValueError):
            action = np.full(1, np.nan)  # no numbers at all
        if action.shape != (4,) or not np.isfinite(action).all():
            told = " ".join(str(answer).split())
            raise ValueError(f"task {task.name!r}: its `act` must return an action of 4 finite numbers, got {told}")
        return np.clip(action, -1.0, 1.0)

    def go(self, target: Array, grip: float) -> NDArray[np.float32]:
        """Straight towards a point, slowing down within the last step."""
        offset = (np.clip(target, LOWEST, HIGHEST) - self.env.world.tool) / STEP_LENGTH
        longest = np.abs(offset).max()
        return np.array([*(offset / max(1.0, longest)), grip], np.float32)

    def approach(self, point: Array, grip: float, over: float = OVER) -> NDArray[np.float32]:
        """To a point from above: over it at travelling height, then down."""
        tool = self.env.world.tool
        away = float(np.abs(point[:2] - tool[:2]).max())
        if away < over:
            return self.go(point, grip)
        # what is near may be passed lower, what is far not at all
        height = max(point[2], min(TRAVEL, point[2] + 3.0 * (away - over)))
        if tool[2] < height - 0.02 and away > 0.03:  # up first
            return self.go(np.array([tool[0], tool[1], TRAVEL]), grip)
        return self.go(np.array([point[0], point[1], height]), grip)

    def reach(self) -> NDArray[np.float32]:
        """To the top of the named object."""
        return self.approach(tasks.top(self.env.world, self.env.slots.thing), _OPEN, over=0.02)

    def grasp(self) -> NDArray[np.float32]:
        """Towards holding the named object, and closing the fingers there."""
        world, thing = self.env.world, self.env.slots.thing
        point = self._hold_point()
        offset = world.tool - point
        if np.abs(offset[:2]).max() < OVER and abs(offset[2]) < 0.01:
            return self.go(point, _CLOSE)
        falling = world.opening < 0.08 and not any(world.touching(thing))
        return self.approach(point if not falling else point + np.array([0, 0, 0.08]), _OPEN)

    def _hold_point(self) -> Array:
        """Where fingers hold an object: at its middle, or as high as their length asks for."""
        world, thing = self.env.world, self.env.slots.thing
        centre = world.positions[thing]
        return np.array([centre[0], centre[1], max(centre[2], LOWEST[2])])

    def pick(self) -> NDArray[np.float32]:
        """Grasp the named object and lift it."""
        world, thing = self.env.world, self.env.slots.thing
        if not world.gripped(thing):
            return self.grasp()
        x, y, _ = world.tool
        return self.go(np.array([x, y, tasks.LIFTED + 0.02 + self._hold_height()]), _CLOSE)

    def _hold_height(self) -> float:
        """Height of the tool over the underside of what it holds."""
        world, thing = self.env.world, self.env.slots.thing
        return float(world.tool[2] - tasks.air(world, thing))

    def put(self) -> NDArray[np.float32]:
        """Carry the named object to its destination and let go."""
        env, world, slots = self.env, self.env.world, self.env.slots
        thing = slots.thing
        target = env.destination
        offset = target - world.positions[thing]
        tight = 0.02 if slots.base is None else 0.008
        landed = abs(offset[2]) < 0.008
        if landed and np.abs(offset[:2]).max() < 0.02 and world.lifted[thing] > tasks.CARRIED:
            tool = world.tool
            if any(world.touching(thing)) or world.opening < 0.09:
                return self.go(tool, _OPEN)
            return self.go(np.array([tool[0], tool[1], TRAVEL + target[2]]), _OPEN)
        if not world.gripped(thing):
            return self.grasp()
        x, y, z = world.tool
        carry = target[2] - world.half_heights[thing] + 0.025 + self._hold_height()
        carry = max(carry, 0.075 + self._hold_height()) if np.abs(offset[:2]).max() > 0.06 else carry
        if world.lifted[thing] <= tasks.CARRIED:
            carry = max(carry, tasks.CARRIED + 0.02 + self._hold_height())
            return self.go(np.array([x, y, carry]), _CLOSE)
        if np.abs(offset[:2]).max() > tight:
            if z < carry - 0.02:
                return self.go(np.array([x, y, carry]), _CLOSE)
            return self.go(np.array([x + offset[0], y + offset[1], carry]), _CLOSE)
        return self.go(np.array([x + offset[0], y + offset[1], z + offset[2] - 0.002]), _CLOSE)

    def push(self) -> NDArray[np.float32]:
        """Push the named object to its destination."""
        env, world, slots = self.env, self.env.world, self.env.slots
        centre = world.positions[slots.thing]
        way = (env.destination - centre)[:2]
        axis = self._side(way)
        behind, aside = self._beside(way, axis)
        sign = np.sign(way[axis]) or 1.0
        tool = world.tool
        start = tasks.push_start(world, slots, way, axis)
        if not (self._low() and _TOUCHING < behind < 0.08 and abs(aside) < 0.06):
            return self.approach(start, _CLOSE, over=0.02)
        if abs(aside) > 0.02:  # on the right side, not in line yet
            return self.go(start, _CLOSE)
        step = way / max(np.abs(way).max(), 1e-6) * min(0.8 * STEP_LENGTH, np.abs(way).max() + 0.01)
        move = np.array([step[0], step[1], tasks.PUSH_HEIGHT - tool[2]])
        if behind > 0.004:  # close up first, squarely
            move[axis] = sign * min(STEP_LENGTH, behind + 0.005)
            move[1 - axis] = -aside
        return np.array([*np.clip(move / STEP_LENGTH, -1, 1), _CLOSE], np.float32)

    def _low(self) -> bool:
        """Whether the tool is where it pushes."""
        return bool(self.env.world.tool[2] < tasks.PUSH_HEIGHT + 0.02)

    def _beside(self, way: Array, axis: int) -> tuple[float, float]:
        """Metres of air between the paddle and the object to be pushed along an axis, and how far the tool is off
        that line."""
        world, thing = self.env.world, self.env.slots.thing
        gap = tasks.PADDLE[axis] + scene.HALF_EXTENTS[world.things[thing].shape][axis]
        offset = world.positions[thing] - world.tool
        return float((np.sign(way[axis]) or 1.0) * offset[axis] - gap), float(-offset[1 - axis])

    def _side(self, way: Array) -> int:
        """The axis along which to push: the one along which the tool pushes already, as long as it helps, or that
        of the longer way."""
        for axis in (0, 1):
            behind, aside = self._beside(way, axis)
            if self._low() and _TOUCHING < behind < 0.03 and abs(aside) < 0.02 and abs(way[axis]) > 0.02:
                return axis
        return int(np.abs(way[1]) > np.abs(way[0]))
