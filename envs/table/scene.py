"""The scene in MJCF, from primitives: a 7-joint arm with a parallel gripper, a table, four objects, two pads.

Every scene of every task is this one model. An object is a body with three geoms, one a shape; `wear` shows one of
them and hides the others. A pad is a mocap body without collisions. Lengths in metres, the table's top at z = 0,
the workspace's centre at the origin, the robot's base behind it on the negative x axis, the front camera opposite.
"""

from __future__ import annotations

from collections.abc import Mapping

import mujoco
import numpy as np

OBJECTS = 4
PADS = 2
JOINTS = 7

WORKSPACE = (0.15, 0.20)
"""Half extents in x and y of the area in which objects and pads lie at reset."""

HALF_EXTENTS: Mapping[str, tuple[float, float, float]] = {
    "cube": (0.023, 0.023, 0.023),
    "bar": (0.032, 0.022, 0.015),
    "tower": (0.021, 0.021, 0.036),
}
MASS = 0.06
"""Mass of every object, in kg."""
PAD_HALF = 0.055

RGB: Mapping[str, tuple[float, float, float]] = {
    "red": (0.85, 0.10, 0.10),
    "green": (0.10, 0.65, 0.15),
    "blue": (0.10, 0.20, 0.85),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.55, 0.15, 0.65),
    "white": (0.95, 0.95, 0.95),
    "black": (0.05, 0.05, 0.05),
    "orange": (0.95, 0.50, 0.10),
    "cyan": (0.20, 0.80, 0.85),
}

HOME = (0.0, 0.32, 0.0, 1.85, 0.0, 0.97, 0.0)
"""Joint angles (radians) with the hand pointing down above the workspace; 2, 4 and 6 add up to pi."""
OPEN, CLOSED = 0.035, 0.0
"""Finger travel (metres): 10 cm between the fingers, and 3 cm: closed, they are a paddle 5 cm wide."""
FINGER_GAP = 0.015
"""Between a closed finger's inner face and the middle of the hand."""
TIP = 0.015
"""The tool point is this far above the fingertips."""

LARGEST_PICTURE = 640
"""Pixels of a picture's side, at the most."""

TIMESTEP = 0.005
CONTROL_STEP = 0.1

_LINKS = (
    # name, position in the parent, joint axis, range (degrees), capsule: its ends, radius, mass
    ("link1", "0 0 0.12", "0 0 1", 170, "0 0 0 0 0 0.18", 0.055, 3.0),
    ("link2", "0 0 0.18", "0 1 0", 120, "0 0 0 0 0 0.17", 0.050, 2.5),
    ("link3", "0 0 0.18", "0 0 1", 170, "0 0 0 0 0 0.19", 0.045, 2.0),
    ("link4", "0 0 0.20", "0 1 0", 155, "0 0 0 0 0 0.17", 0.045, 2.0),
    ("link5", "0 0 0.18", "0 0 1", 170, "0 0 0 0 0 0.18", 0.040, 1.5),
    ("link6", "0 0 0.20", "0 1 0", 155, "0 0 0 0 0 0.05", 0.040, 1.0),
    ("link7", "0 0 0.06", "0 0 1", 170, "0 0 0 0 0 0.03", 0.035, 0.5),
)


def build_model() -> mujoco.MjModel:
    """Compile the scene."""
    return mujoco.MjModel.from_xml_string(scene_xml())


def scene_xml() -> str:
    """The scene's MJCF."""
    return f"""
<mujoco model="tandem table">
  <compiler angle="degree"/>
  <option timestep="{TIMESTEP}" integrator="implicitfast" cone="elliptic" impratio="10"/>
  <visual>
    <global fovy="35" offwidth="{LARGEST_PICTURE}" offheight="{LARGEST_PICTURE}"/>
    <quality shadowsize="1024" offsamples="0" numslices="12" numstacks="6" numquads="1"/>
    <headlight ambient="0.35 0.35 0.35" diffuse="0.25 0.25 0.25" specular="0 0 0"/>
    <map znear="0.05" zfar="10"/>
  </visual>
  <asset>
    <texture name="table" type="2d" builtin="flat" rgb1="0.62 0.55 0.47" width="64" height="64"/>
    <material name="table" texture="table" texrepeat="1 1" specular="0" reflectance="0"/>
    <material name="metal" rgba="0.75 0.76 0.78 1" specular="0"/>
    <material name="rubber" rgba="0.25 0.27 0.30 1" specular="0"/>
  </asset>
  <default>
    <geom condim="4" friction="0.4 0.01 0.001" solref="0.01 1"/>
    <default class="arm">
      <geom type="capsule" contype="0" conaffinity="0" material="metal"/>
      <joint armature="0.1" damping="1"/>
    </default>
    <default class="finger">
      <geom type="box" size="0.02 0.005 0.035" priority="1" friction="1.5 0.02 0.001" material="rubber"/>
      <joint type="slide" range="{CLOSED} {OPEN}" armature="0.05" damping="2"/>
    </default>
    <default class="object">
      <geom type="box" group="1"/>
    </default>
    <default class="pad">
      <geom type="box" contype="0" conaffinity="0" size="{PAD_HALF} {PAD_HALF} 0.001"/>
    </default>
  </default>
  <worldbody>
    <light name="top" pos="0.3 0.2 1.6" dir="-0.15 -0.1 -1" directional="true" diffuse="0.6 0.6 0.6"
           specular="0 0 0" castshadow="false"/>
    <camera name="front" pos="0.60 0 0.72" xyaxes="0 1 0 -0.770 0 0.638" fovy="32"/>
    <geom name="table" type="box" pos="0 0 -0.025" size="0.75 0.6 0.025" material="table"/>
    <geom name="base" type="cylinder" pos="-0.45 0 0.06" size="0.08 0.06" contype="0" conaffinity="0"
          material="rubber"/>
    <body name="arm" pos="-0.45 0 0">
{_arm()}
    </body>
{_objects()}
{_pads()}
  </worldbody>
  <contact>
    <exclude body1="left_finger" body2="right_finger"/>
  </contact>
  <actuator>
{_actuators()}
  </actuator>
</mujoco>
"""


def _arm() -> str:
    """The chain of links, closed by the hand with its fingers, its camera and the tool point."""
    lines, closing = [], ""
    for name, position, axis, limit, points, radius, mass in _LINKS:
        joint = name.replace("link", "joint")
        lines.append(
            f'<body name="{name}" pos="{position}" gravcomp="1" childclass="arm">'
            f'<joint name="{joint}" axis="{axis}" range="-{limit} {limit}"/>'
            f'<geom name="{name}" fromto="{points}" size="{radius}" mass="{mass}"/>'
        )
        closing += "</body>"
    fingers = "".join(
        f'<body name="{side}_finger" pos="0 {sign * (FINGER_GAP + 0.005)} 0.075" gravcomp="1" childclass="finger">'
        f'<joint name="{side}_finger" axis="0 {sign} 0"/><geom name="{side}_finger" mass="0.1"/></body>'
        for side, sign in (("left", 1), ("right", -1))
    )
    lines.append(
        '<body name="hand" pos="0 0 0.04" gravcomp="1"><geom name="hand" type="box" size="0.025 0.06 0.02"'
        ' pos="0 0 0.015" contype="0" conaffinity="0" material="metal" mass="0.6"/>'
        '<camera name="wrist" pos="0.07 0 0" xyaxes="0 -1 0 -0.95 0 -0.3" fovy="70"/>'
        f'<site name="tool" pos="0 0 {0.11 - TIP}" size="0.004" group="4"/>{fingers}</body>'
    )
    return "\n".join(lines) + closing


def _objects() -> str:
    bodies = []
    for index in range(OBJECTS):
        geoms = "".join(
            f'<geom name="object{index}_{shape}" size="{x} {y} {z}" mass="{MASS / len(HALF_EXTENTS)}"/>'
            for shape, (x, y, z) in HALF_EXTENTS.items()
        )
        bodies.append(
            f'<body name="object{index}" pos="{0.1 * index} 0.4 0.05" childclass="object">'
            f'<freejoint name="object{index}"/>{geoms}</body>'
        )
    return "\n".join(bodies)


def _pads() -> str:
    return "\n".join(
        f'<body name="pad{index}" mocap="true" pos="0 {-0.4 - 0.2 * index} 0.0005" childclass="pad">'
        f'<geom name="pad{index}"/></body>'
        for index in range(PADS)
    )


def _actuators() -> str:
    """Position servos: stiff enough to track a 3 cm step within a control step."""
    lines = []
    for joint in range(1, JOINTS + 1):
        kp, kv, force = (2000, 120, 200) if joint < 5 else (800, 50, 60)
        lines.append(
            f'<position name="joint{joint}" joint="joint{joint}" kp="{kp}" kv="{kv}"'
            f' forcerange="-{force} {force}"/>'
        )
    lines += [
        f'<position name="{side}_finger" joint="{side}_finger" kp="400" kv="30" forcerange="-8 8"'
        f' ctrlrange="{CLOSED} {OPEN}"/>'
        for side in ("left", "right")
    ]
    return "\n".join(lines)


def wear(model: mujoco.MjModel, index: int, shape: str, colour: str) -> None:
    """Give object `index` a shape and a colour: its other shapes are neither seen nor touched."""
    for name, extents in HALF_EXTENTS.items():
        geom = model.geom(f"object{index}_{name}").id
        worn = name == shape
        model.geom_contype[geom] = model.geom_conaffinity[geom] = int(worn)
        model.geom_rgba[geom] = (*RGB[colour], float(worn))
        model.geom_group[geom] = 1 if worn else 5
        if worn:
            body = model.geom_bodyid[geom]
            squared = np.square(extents)
            # a full box of half extents a, b, c: m/3 * (b^2 + c^2, ...)
            model.body_mass[body] = MASS
            model.body_inertia[body] = MASS / 3 * (squared.sum() - squared)
            # the compiler sorted the axes of the three shapes together; these are the body's own
            model.body_iquat[body] = (1.0, 0.0, 0.0, 0.0)
            model.body_sameframe[body] = mujoco.mjtSameFrame.mjSAMEFRAME_BODY


def paint_pad(model: mujoco.MjModel, index: int, colour: str) -> None:
    """Give pad `index` a colour."""
    model.geom_rgba[model.geom(f"pad{index}").id] = (*RGB[colour], 1.0)
