"""The physics of one table: place a scene, move the tool, look. Knows no task and no words.

world = TableWorld()
world.place(layout, rng)
world.step(action)          # 0.1 s
world.tool, world.positions, world.gripped(0)
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import mujoco
import numpy as np
from numpy.typing import NDArray

from envs.table import scene
from envs.table.language import Thing

Array = NDArray[np.float64]

STEP_LENGTH = 0.03
"""Metres that the tool moves in a control step for an action of 1."""
LOWEST, HIGHEST = np.array([-0.22, -0.28, 0.02]), np.array([0.22, 0.28, 0.30])
"""Where the tool may be sent."""
OUT_OF_REACH = np.array([0.26, 0.32])
"""An object farther than this from the centre cannot be manipulated any more."""

_SUBSTEPS = round(scene.CONTROL_STEP / scene.TIMESTEP)
_DAMPING = 1e-4
_POSTURE = 0.1
_DOWN = np.array([-1.0, 1.0, -1.0])  # the diagonal of the rotation of a hand that points down


@dataclass(frozen=True)
class Layout:
    """What lies where at the start: things [4] at xy [4, 2] with yaw [4] (radians), pads [2] at pads_xy [2, 2]."""

    things: tuple[Thing, ...]
    xy: Array
    yaw: Array
    pads: tuple[str, ...]
    pads_xy: Array


@functools.cache
def _compiled() -> mujoco.MjModel:
    return scene.build_model()


class TableWorld:
    """A model and data of its own, so that its physics may be randomized without touching another's.

    things, pads    what the layout named
    tool            [3] the point between the fingertips
    positions       [4, 3] the objects' centres
    half_heights    [4] from an object's centre to its underside when it stands upright
    lifted          [4] each object's greatest height above where it stands, so far
    opening         metres between the fingers
    """

    def __init__(self) -> None:
        model = copy.copy(_compiled())
        model.opt.enableflags |= mujoco.mjtEnableBit.mjENBL_SLEEP  # what lies still costs nothing
        self.model, self.data = model, mujoco.MjData(model)
        self.things: tuple[Thing, ...] = ()
        self.pads: tuple[str, ...] = ()
        self.half_heights = np.zeros(scene.OBJECTS)
        self.lifted = np.zeros(scene.OBJECTS)
        self.tool_velocity = np.zeros(3)
        self.grip_command = -1.0
        self._tool = model.site("tool").id
        self._first = model.body("object0").id  # the objects' bodies follow each other
        self._fingers = np.array([model.geom(f"{side}_finger").id for side in ("left", "right")])
        self._body_of_geom = model.geom_bodyid.copy()
        self._finger_qpos = [int(model.joint(f"{side}_finger").qposadr[0]) for side in ("left", "right")]
        self._object_qpos = np.array([model.joint(f"object{i}").qposadr[0] for i in range(scene.OBJECTS)])
        self._object_dofs = np.array([model.joint(f"object{i}").dofadr[0] for i in range(scene.OBJECTS)])
        self._jacobian = np.zeros((6, model.nv))

    def place(self, layout: Layout, rng: np.random.Generator) -> None:
        """Begin anew from a layout, with the arm near its home posture and the gripper open."""
        model, data = self.model, self.data
        mujoco.mj_resetData(model, data)
        self.things, self.pads = layout.things, layout.pads
        self.half_heights = np.array([scene.HALF_EXTENTS[thing.shape][2] for thing in layout.things])
        joints = np.array(scene.HOME) + rng.uniform(-0.06, 0.06, scene.JOINTS)
        data.qpos[: scene.JOINTS] = data.ctrl[: scene.JOINTS] = joints
        data.qpos[self._finger_qpos] = data.ctrl[scene.JOINTS :] = scene.OPEN
        for index, thing in enumerate(layout.things):
            scene.wear(model, index, thing.shape, thing.colour)
            start, height = self._object_qpos[index], scene.HALF_EXTENTS[thing.shape][2]
            data.qpos[start : start + 3] = (*layout.xy[index], height)
            half = layout.yaw[index] / 2
            data.qpos[start + 3 : start + 7] = (np.cos(half), 0.0, 0.0, np.sin(half))
        for index, colour in enumerate(layout.pads):
            scene.paint_pad(model, index, colour)
            data.mocap_pos[index] = (*layout.pads_xy[index], 0.0005)
        self.lifted[:] = 0.0
        self.tool_velocity[:] = 0.0
        self.grip_command = -1.0
        mujoco.mj_forward(model, data)

    def step(self, action: NDArray[np.floating]) -> None:
        """One control step. action: [4] in [-1, 1], the tool's way in x, y and z, and the gripper (> 0 closes)."""
        before = self.tool.copy()
        target = np.minimum(np.maximum(before + STEP_LENGTH * action[:3], LOWEST), HIGHEST)
        data = self.data
        data.ctrl[: scene.JOINTS] = self._joints_for(target)
        self.grip_command = 1.0 if action[3] > 0 else -1.0
        data.ctrl[scene.JOINTS :] = scene.CLOSED if action[3] > 0 else scene.OPEN
        mujoco.mj_step(self.model, data, _SUBSTEPS)
        self.tool_velocity = (self.tool - before) / scene.CONTROL_STEP
        np.maximum(self.lifted, self.positions[:, 2] - self.half_heights, out=self.lifted)

    def _joints_for(self, target: Array) -> Array:
        """Joint angles that bring the tool to `target` with the hand pointing down: one damped least-squares step
        from the present ones (Wampler 1986), the free seventh degree pulled to the home posture."""
        data, joints = self.data, scene.JOINTS
        mujoco.mj_jacSite(self.model, data, self._jacobian[:3], self._jacobian[3:], self._tool)
        jacobian = self._jacobian[:, :joints]
        rotation = data.site_xmat[self._tool].reshape(3, 3)
        error = np.empty(6)
        error[:3] = target - data.site_xpos[self._tool]
        # half the axis of the rotation that is left, R_down R^T
        error[3] = 0.5 * (_DOWN[2] * rotation[1, 2] - _DOWN[1] * rotation[2, 1])
        error[4] = 0.5 * (_DOWN[0] * rotation[2, 0] - _DOWN[2] * rotation[0, 2])
        error[5] = 0.5 * (_DOWN[1] * rotation[0, 1] - _DOWN[0] * rotation[1, 0])
        present = data.qpos[:joints]
        posture = _POSTURE * (_HOME - present)
        square = jacobian @ jacobian.T
        square.flat[::7] += _DAMPING
        change: Array = posture + jacobian.T @ np.linalg.solve(square, error - jacobian @ posture)
        return present + change

    @property
    def tool(self) -> Array:
        """[3], a view."""
        position: Array = self.data.site_xpos[self._tool]
        return position

    @property
    def positions(self) -> Array:
        """[4, 3], a view."""
        positions: Array = self.data.xpos[self._first : self._first + scene.OBJECTS]
        return positions

    @property
    def pad_positions(self) -> Array:
        """[2, 3]."""
        return self.data.mocap_pos

    @property
    def opening(self) -> float:
        """Metres between the fingers' inner faces."""
        left, right = self._finger_qpos
        return float(self.data.qpos[left] + self.data.qpos[right] + 2 * scene.FINGER_GAP)

    def yaw(self, index: int) -> float:
        """Yaw of an object, in radians."""
        matrix = self.data.xmat[self._first + index]
        return float(np.arctan2(matrix[3], matrix[0]))

    def upright(self, index: int) -> float:
        """1 for an object that stands as at the start, 0 for one on its side."""
        return float(self.data.xmat[self._first + index, 8])

    def speed(self, index: int) -> float:
        """Speed of an object's centre, in m/s."""
        start = self._object_dofs[index]
        return float(np.linalg.norm(self.data.qvel[start : start + 3]))

    def velocity(self, index: int) -> Array:
        """[3] velocity of an object's centre, in m/s."""
        start = self._object_dofs[index]
        return self.data.qvel[start : start + 3]

    def touching(self, index: int) -> tuple[bool, bool]:
        """Whether the left and the right finger touch an object."""
        pairs = self.data.contact.geom
        if not len(pairs):
            return False, False
        bodies = self._body_of_geom[pairs]
        of_object = (bodies == self._first + index)[:, ::-1]  # the other geom of each pair
        left, right = ((pairs == finger) & of_object for finger in self._fingers)
        return bool(left.any()), bool(right.any())

    def gripped(self, index: int) -> bool:
        """Whether both fingers touch an object."""
        return all(self.touching(index))

    def out_of_reach(self, index: int) -> bool:
        """Whether an object has left the useful part of the table, or the table."""
        x, y, z = self.positions[index].tolist()
        return bool(abs(x) > OUT_OF_REACH[0] or abs(y) > OUT_OF_REACH[1] or z < 0.0)


_HOME = np.array(scene.HOME)
