"""The model: its numbers by hand, what is worn and what is hidden."""

from __future__ import annotations

import mujoco
import numpy as np
import pytest

from envs.table import camera, scene
from tests.envs.table.scenes import hand_laid_world


@pytest.fixture
def model() -> mujoco.MjModel:
    return scene.build_model()


def test_what_there_is(model: mujoco.MjModel) -> None:
    assert (model.nq, model.nv, model.nu, model.nmocap) == (7 + 2 + 4 * 7, 7 + 2 + 4 * 6, 9, 2)
    assert model.opt.timestep == 0.005
    assert (scene.TIMESTEP, scene.CONTROL_STEP) == (0.005, 0.1)
    assert [model.camera(i).name for i in range(model.ncam)] == ["front", "wrist"]


def test_joints_and_their_limits(model: mujoco.MjModel) -> None:
    degrees = [170, 120, 170, 155, 170, 155, 170]
    for index, limit in enumerate(degrees):
        joint = model.joint(f"joint{index + 1}")
        assert joint.limited[0]
        np.testing.assert_allclose(joint.range, np.deg2rad([-limit, limit]), rtol=1e-12)
        assert np.abs(scene.HOME[index]) < np.deg2rad(limit)
        assert model.actuator(f"joint{index + 1}").trnid[0] == joint.id
    for side in ("left_finger", "right_finger"):
        finger = model.joint(side)
        assert finger.type[0] == mujoco.mjtJoint.mjJNT_SLIDE
        assert finger.range.tolist() == [0.0, 0.035]
        assert model.actuator(side).ctrlrange.tolist() == [0.0, 0.035]


def test_a_hand_at_home_points_down(model: mujoco.MjModel) -> None:
    data = mujoco.MjData(model)
    data.qpos[:7] = scene.HOME
    mujoco.mj_forward(model, data)
    np.testing.assert_allclose(data.site("tool").xmat.reshape(3, 3), np.diag([-1, 1, -1]), atol=2e-3)
    assert scene.HOME[1] + scene.HOME[3] + scene.HOME[5] == pytest.approx(np.pi, abs=2e-3)


# m/3 (b^2 + c^2) with m = 60 g: 0.02 * (0.023^2 + 0.023^2) and so on
INERTIA = {
    "cube": (2.116e-5, 2.116e-5, 2.116e-5),
    "bar": (1.418e-5, 2.498e-5, 3.016e-5),
    "tower": (3.474e-5, 3.474e-5, 1.764e-5),
}


@pytest.mark.parametrize("shape", scene.HALF_EXTENTS)
def test_a_worn_shape_has_its_mass_and_inertia(shape: str, model: mujoco.MjModel) -> None:
    for before in ("tower", shape):  # what was worn before does not matter
        scene.wear(model, 2, before, "green")
    body = model.body("object2")
    assert body.mass[0] == 0.06
    np.testing.assert_allclose(body.inertia, INERTIA[shape], rtol=1e-9)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    # the moments are about the shape's own axes: the mass matrix' angular block is diagonal with just them
    matrix = np.zeros((model.nv, model.nv))
    mujoco.mj_fullM(model, data, matrix)
    first = model.joint("object2").dofadr[0]
    block = matrix[first : first + 6, first : first + 6]
    np.testing.assert_allclose(block, np.diag([0.06] * 3 + list(INERTIA[shape])), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", scene.HALF_EXTENTS)
def test_only_the_worn_shape_is_touched_and_seen(shape: str, model: mujoco.MjModel) -> None:
    scene.wear(model, 0, shape, "blue")
    for name in scene.HALF_EXTENTS:
        geom = model.geom(f"object0_{name}")
        worn = int(name == shape)
        assert (geom.contype[0], geom.conaffinity[0], geom.rgba[3]) == (worn, worn, worn)
        assert geom.group[0] == (1 if worn else 5)
    np.testing.assert_allclose(model.geom(f"object0_{shape}").rgba[:3], (0.10, 0.20, 0.85), rtol=1e-6)


@pytest.mark.parametrize("shape, height", [("cube", 0.023), ("bar", 0.015), ("tower", 0.036)])
def test_an_object_comes_to_rest_on_the_underside_of_what_it_wears(shape: str, height: float) -> None:
    model = scene.build_model()
    scene.wear(model, 0, shape, "red")
    data = mujoco.MjData(model)
    data.joint("object0").qpos[:3] = (0.1, 0.0, height + 0.01)
    mujoco.mj_step(model, data, 200)
    assert data.body("object0").xpos[2] == pytest.approx(height, abs=3e-4)
    touching = {model.geom(geom).name for geom in data.contact.geom.ravel()} - {"table"}
    assert f"object0_{shape}" in touching
    assert not {f"object0_{other}" for other in scene.HALF_EXTENTS if other != shape} & touching


def test_hidden_shapes_are_not_drawn() -> None:
    """A picture of worn towers stays the same when all that is hidden turns white."""
    world = hand_laid_world()
    before = camera.picture(world.model, world.data, "front", 64, 64)
    for index, thing in enumerate(world.things):
        for name in scene.HALF_EXTENTS:
            if name != thing.shape:
                world.model.geom(f"object{index}_{name}").rgba[:] = 1.0
    np.testing.assert_array_equal(camera.picture(world.model, world.data, "front", 64, 64), before)
    world.model.geom("object0_cube").rgba[:] = 1.0
    assert (camera.picture(world.model, world.data, "front", 64, 64) != before).any()


def test_pads_are_seen_and_never_touched(model: mujoco.MjModel) -> None:
    scene.paint_pad(model, 1, "cyan")
    pad = model.geom("pad1")
    np.testing.assert_allclose(pad.rgba, (0.20, 0.80, 0.85, 1.0), rtol=1e-6)
    assert (pad.contype[0], pad.conaffinity[0]) == (0, 0)
    assert pad.size.tolist() == [0.055, 0.055, 0.001]


def test_the_home_posture_is_held_without_warnings(model: mujoco.MjModel) -> None:
    """Gravity on the arm is compensated and the step is small enough: 10 s change nothing."""
    data = mujoco.MjData(model)
    data.qpos[:7] = data.ctrl[:7] = scene.HOME
    mujoco.mj_step(model, data, 2000)
    np.testing.assert_allclose(data.qpos[:7], scene.HOME, atol=1e-6)
    assert sum(warning.number for warning in data.warning) == 0
    assert data.time == pytest.approx(10.0, abs=1e-9)


def test_the_arm_does_what_it_does_with_a_finer_step() -> None:
    """The time step is small enough: half of it moves the arm to within a millimetre of the same places."""
    paths = []
    for timestep in (0.005, 0.0025):
        model = scene.build_model()
        model.opt.timestep = timestep
        data = mujoco.MjData(model)
        data.qpos[:7] = data.ctrl[:7] = scene.HOME
        path = []
        for target in np.random.default_rng(0).uniform(-0.15, 0.15, (20, 7)):
            data.ctrl[:7] = scene.HOME + target
            mujoco.mj_step(model, data, round(0.1 / timestep))
            mujoco.mj_kinematics(model, data)
            path.append(data.site("tool").xpos.copy())
        paths.append(path)
    assert np.abs(np.array(paths[0]) - np.array(paths[1])).max() < 5e-3
