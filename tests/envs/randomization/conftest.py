from collections.abc import Callable

import mujoco
import numpy as np
import pytest

ARM = """
<mujoco>
  <option timestep="0.005"/>
  <visual><global offwidth="64" offheight="64"/></visual>
  <asset>
    <texture name="wood" type="2d" builtin="checker" rgb1=".6 .5 .4" rgb2=".4 .3 .2" width="32" height="16"/>
    <material name="wood" texture="wood" texrepeat="2 2"/>
    <material name="steel" rgba="0.7 0.6 0.8 1"/>
  </asset>
  <worldbody>
    <light name="lamp" pos="0.2 0.3 1.5" dir="0 0 -1" diffuse="0.6 0.6 0.6"/>
    <camera name="front" pos="0.9 0 0.7" xyaxes="0 1 0 -0.6 0 0.8" fovy="45"/>
    <camera name="chip" pos="0.9 0 0.7" xyaxes="0 1 0 -0.6 0 0.8" sensorsize="0.01 0.01" focal="0.01 0.01"
            resolution="8 8"/>
    <geom name="floor" type="plane" size="1 1 0.1" material="wood"/>
    <body name="upper" pos="-0.3 0 0.3">
      <joint name="shoulder" axis="0 1 0" damping="0.5" armature="0.05"/>
      <geom name="upper" type="capsule" fromto="0 0 0 0.25 0 0" size="0.03" mass="1" material="steel"/>
      <body name="lower" pos="0.25 0 0">
        <joint name="elbow" axis="0 0 1" damping="0.2" armature="0.02"/>
        <geom name="lower" type="capsule" fromto="0 0 0 0.2 0 0" size="0.025" mass="0.5" rgba="0.85 0.1 0.1 1"/>
      </body>
    </body>
    <body name="cart" pos="0 -0.5 0.1">
      <joint name="rail" type="slide" axis="1 0 0"/>
      <geom name="cart" type="box" size="0.05 0.05 0.05" mass="1" contype="0" conaffinity="0"/>
    </body>
    <body name="box" pos="0.1 0.3 0.05">
      <freejoint name="box"/>
      <geom name="box" type="box" size="0.05 0.04 0.03" mass="0.2" rgba="0.1 0.2 0.85 1" friction="0.3"/>
    </body>
    <body name="marker" mocap="true" pos="0 0 1">
      <geom name="marker" type="sphere" size="0.01" contype="0" conaffinity="0" rgba="0 1 0 0"/>
    </body>
  </worldbody>
  <actuator>
    <position name="shoulder" joint="shoulder" kp="30" kv="3"/>
    <position name="elbow" joint="elbow" kp="20" kv="2"/>
    <velocity name="rail_speed" joint="rail" kv="5"/>
    <motor name="rail" joint="rail" gear="2"/>
  </actuator>
</mujoco>
"""


@pytest.fixture
def mjcf() -> str:
    return ARM


@pytest.fixture
def model() -> mujoco.MjModel:
    return mujoco.MjModel.from_xml_string(ARM)


@pytest.fixture
def trajectory() -> Callable[[mujoco.MjModel], np.ndarray]:
    def simulate(model: mujoco.MjModel) -> np.ndarray:
        """All positions during 0.25 s: the arm is driven, the cart is pushed, the box slides on the floor."""
        data = mujoco.MjData(model)
        data.ctrl[:] = (0.4, -0.5, 0.3, 0.6)
        data.joint("box").qpos[2] = 0.03
        data.joint("box").qvel[0] = 1.0
        positions = []
        for _ in range(50):
            mujoco.mj_step(model, data)
            positions.append(data.qpos.copy())
        return np.array(positions)

    return simulate
