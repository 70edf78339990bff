"""Fields of the scene as a camera sees it: cameras, lights, colours. Textures are in `textures`."""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import mujoco
import numpy as np

from envs.randomization.physics import Apply, Names, Writer, named
from envs.randomization.spec import Operation, Randomization, combine, sample, within_bounds
from envs.randomization.textures import TEXTURE

_NO_COLOUR = np.array([0.5, 0.5, 0.5, 1.0], np.float32)  # a geom's rgba if none is given: its material's is seen


def _draw_rotation(spec: Randomization, rows: int, numbers: int, rng: np.random.Generator) -> np.ndarray:
    """[rows, 4]: an angle in degrees of the spec's distribution, and an axis, uniform over directions."""
    angles = sample(spec, (rows, 1), rng)
    axes = rng.normal(size=(rows, 3))
    return np.concatenate([angles, axes / np.linalg.norm(axes, axis=1, keepdims=True)], axis=1)


def _turn(row: np.ndarray) -> np.ndarray:
    """The quaternion of an angle in degrees and an axis."""
    quaternion = np.empty(4)
    mujoco.mju_axisAngle2Quat(quaternion, row[1:], np.deg2rad(row[0]))
    return quaternion


# ---------------------------------------------------------------- cameras


def _cameras(model: mujoco.MjModel) -> Names:
    return named(model, "camera", model.ncam)


def _with_angle(model: mujoco.MjModel) -> Names:
    """Cameras whose view is given by an angle, not by a sensor's size."""
    return {name: index for name, index in _cameras(model).items() if not model.cam_sensorsize[index].any()}


def _camera_position(model: mujoco.MjModel, ids: np.ndarray, operation: Operation, drawn: np.ndarray) -> None:
    model.cam_pos[ids] = combine(model.cam_pos[ids], operation, drawn)


def _camera_rotation(model: mujoco.MjModel, ids: np.ndarray, operation: Operation, drawn: np.ndarray) -> None:
    for index, row in zip(ids, drawn, strict=True):
        turned = np.empty(4)
        mujoco.mju_mulQuat(turned, model.cam_quat[index], _turn(row))
        model.cam_quat[index] = turned


def _camera_fov(model: mujoco.MjModel, ids: np.ndarray, operation: Operation, drawn: np.ndarray) -> None:
    model.cam_fovy[ids] = within_bounds("camera_fov", combine(model.cam_fovy[ids], operation, drawn[:, 0]))


# ---------------------------------------------------------------- lights


def _lights(model: mujoco.MjModel) -> Names:
    return named(model, "light", model.nlight)


def _light_position(model: mujoco.MjModel, ids: np.ndarray, operation: Operation, drawn: np.ndarray) -> None:
    model.light_pos[ids] = combine(model.light_pos[ids], operation, drawn)


def _light_direction(model: mujoco.MjModel, ids: np.ndarray, operation: Operation, drawn: np.ndarray) -> None:
    for index, row in zip(ids, drawn, strict=True):
        turned = np.empty(3)
        mujoco.mju_rotVecQuat(turned, model.light_dir[index], _turn(row))
        model.light_dir[index] = turned / np.linalg.norm(turned)


def _light_diffuse(model: mujoco.MjModel, ids: np.ndarray, operation: Operation, drawn: np.ndarray) -> None:
    model.light_diffuse[ids] = within_bounds(
        "light_diffuse", np.asarray(combine(model.light_diffuse[ids].astype(np.float64), operation, drawn))
    )


# ---------------------------------------------------------------- colours


def _geoms(model: mujoco.MjModel) -> Names:
    return named(model, "geom", model.ngeom)


def _seen_colours(model: mujoco.MjModel, ids: np.ndarray) -> np.ndarray:
    """rgb [n, 3] float64: the geom's own, or its material's where it has none of its own."""
    own = model.geom_rgba[ids]
    material = model.geom_matid[ids]
    borrowed = (material >= 0) & (own == _NO_COLOUR).all(axis=1)
    if borrowed.any():
        own = own.copy()
        own[borrowed] = model.mat_rgba[material[borrowed]]
    return own[:, :3].astype(np.float64)


def _recolour(change: Callable[[np.ndarray, Operation, np.ndarray], np.ndarray]) -> Apply:
    """Writes the geoms' rgb [n, 3] that `change` gives; alpha stays."""

    def apply(model: mujoco.MjModel, ids: np.ndarray, operation: Operation, drawn: np.ndarray) -> None:
        model.geom_rgba[ids, :3] = np.clip(change(_seen_colours(model, ids), operation, drawn), 0, 1)

    return apply


def _hsv(part: int, unit: float) -> Apply:
    """Changes one part of the colours' hue (turns), saturation or value; drawn numbers are parts of `unit`."""

    def change(rgb: np.ndarray, operation: Operation, drawn: np.ndarray) -> np.ndarray:
        parts = np.array([colorsys.rgb_to_hsv(*row) for row in rgb])
        value = combine(parts[:, part], operation, drawn[:, 0] / unit)
        parts[:, part] = value % 1.0 if part == 0 else np.clip(value, 0, 1)
        return np.array([colorsys.hsv_to_rgb(*row) for row in parts])

    return _recolour(change)


VISION: dict[str, Writer] = {
    "camera_position": Writer(("cam_pos",), _cameras, _camera_position, numbers=3, constants=True, seen=True),
    "camera_rotation": Writer(
        ("cam_quat",), _cameras, _camera_rotation, numbers=4, draw=_draw_rotation, constants=True, seen=True
    ),
    "camera_fov": Writer(("cam_fovy",), _with_angle, _camera_fov),
    "light_position": Writer(("light_pos",), _lights, _light_position, numbers=3, constants=True, seen=True),
    "light_direction": Writer(
        ("light_dir",), _lights, _light_direction, numbers=4, draw=_draw_rotation, constants=True, seen=True
    ),
    "light_diffuse": Writer(("light_diffuse",), _lights, _light_diffuse),
    "rgb": Writer(("geom_rgba",), _geoms, _recolour(combine), numbers=3),
    "hue": Writer(("geom_rgba",), _geoms, _hsv(0, 360.0)),
    "saturation": Writer(("geom_rgba",), _geoms, _hsv(1, 1.0)),
    "brightness": Writer(("geom_rgba",), _geoms, _hsv(2, 1.0)),
    "texture": TEXTURE,
}
