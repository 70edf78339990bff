"""Fields of the dynamics: how each is read from and written to a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mujoco
import numpy as np

from envs.randomization.spec import Operation, Randomization, combine, sample, within_bounds

Names = dict[str, int]
Apply = Callable[[mujoco.MjModel, np.ndarray, Operation, np.ndarray], None]


def draw_numbers(spec: Randomization, rows: int, numbers: int, rng: np.random.Generator) -> np.ndarray:
    """[rows, numbers] of the spec's distribution."""
    return sample(spec, (rows, numbers), rng)


@dataclass(frozen=True)
class Writer:
    """How a field of the model is randomized.

    arrays: the model's arrays that `apply` writes.
    candidates: name -> index of everything in the model that has the field.
    apply: changes the model's present values by `drawn` [n, numbers], one row for each index.
    draw: (spec, rows, numbers, rng) -> [rows, numbers].
    constants: whether quantities that MuJoCo derives from the model once depend on it.
    seen: whether positions of cameras and lights depend on it.
    """

    arrays: tuple[str, ...]
    candidates: Callable[[mujoco.MjModel], Names]
    apply: Apply
    numbers: int = 1
    draw: Callable[[Randomization, int, int, np.random.Generator], np.ndarray] = draw_numbers
    constants: bool = False
    seen: bool = False


def named(model: mujoco.MjModel, kind: str, count: int) -> Names:
    """name -> index of every body, geom, ... that has a name; `kind` as the model's accessors are called."""
    accessor = getattr(model, kind)
    return {name: index for index in range(count) if (name := accessor(index).name)}


# ---------------------------------------------------------------- bodies and geoms


def _bodies(model: mujoco.MjModel) -> Names:
    """Those whose mass matters: not the world, what is fixed to it, and mocap bodies."""
    return {
        name: index
        for name, index in named(model, "body", model.nbody).items()
        if model.body_mass[index] > 0 and model.body_weldid[index] != 0 and model.body_mocapid[index] < 0
    }


def _mass(model: mujoco.MjModel, ids: np.ndarray, operation: Operation, drawn: np.ndarray) -> None:
    before = model.body_mass[ids]
    after = within_bounds("mass", combine(before, operation, drawn[:, 0]))
    model.body_mass[ids] = after
    model.body_inertia[ids] *= (after / before)[:, None]


def _geoms(model: mujoco.MjModel) -> Names:
    return named(model, "geom", model.ngeom)


def _friction(model: mujoco.MjModel, ids: np.ndarray, operation: Operation, drawn: np.ndarray) -> None:
    model.geom_friction[ids, 0] = within_bounds(
        "friction", combine(model.geom_friction[ids, 0], operation, drawn[:, 0])
    )


# ---------------------------------------------------------------- joints

_DOFS = {
    int(mujoco.mjtJoint.mjJNT_FREE): 6,
    int(mujoco.mjtJoint.mjJNT_BALL): 3,
    int(mujoco.mjtJoint.mjJNT_SLIDE): 1,
    int(mujoco.mjtJoint.mjJNT_HINGE): 1,
}


def _joints(model: mujoco.MjModel) -> Names:
    return named(model, "joint", model.njnt)


def _of_joint(field: str, array: str) -> Apply:
    """Writes `array`, which has an entry for each degree of freedom, from one number for each joint."""

    def apply(model: mujoco.MjModel, ids: np.ndarray, operation: Operation, drawn: np.ndarray) -> None:
        widths = [_DOFS[int(model.jnt_type[joint])] for joint in ids]
        dofs = np.concatenate(
            [model.jnt_dofadr[joint] + np.arange(width) for joint, width in zip(ids, widths, strict=True)]
        )
        values = getattr(model, array)
        values[dofs] = within_bounds(field, combine(values[dofs], operation, np.repeat(drawn[:, 0], widths)))

    return apply


# ---------------------------------------------------------------- actuators

_FIXED = int(mujoco.mjtGain.mjGAIN_FIXED)
_AFFINE = int(mujoco.mjtBias.mjBIAS_AFFINE)
_NO_BIAS = int(mujoco.mjtBias.mjBIAS_NONE)


def _is_position(model: mujoco.MjModel, index: int) -> bool:
    """force = kp * (control - length) - kv * velocity"""
    gain, bias = model.actuator_gainprm[index], model.actuator_biasprm[index]
    fitting = model.actuator_gaintype[index] == _FIXED and model.actuator_biastype[index] == _AFFINE
    return bool(fitting and gain[0] != 0 and bias[1] == -gain[0])


def _is_velocity(model: mujoco.MjModel, index: int) -> bool:
    """force = kv * (control - velocity)"""
    gain, bias = model.actuator_gainprm[index], model.actuator_biasprm[index]
    fitting = model.actuator_gaintype[index] == _FIXED and model.actuator_biastype[index] == _AFFINE
    return bool(fitting and gain[0] != 0 and bias[1] == 0 and bias[2] == -gain[0])


def _actuators(model: mujoco.MjModel) -> Names:
    return named(model, "actuator", model.nu)


def _with_kp(model: mujoco.MjModel) -> Names:
    return {name: index for name, index in _actuators(model).items() if _is_position(model, index)}


def _with_kv(model: mujoco.MjModel) -> Names:
    return {
        name: index
        for name, index in _actuators(model).items()
        if _is_position(model, index) or _is_velocity(model, index)
    }


def _motors(model: mujoco.MjModel) -> Names:
    return {
        name: index
        for name, index in _actuators(model).items()
        if model.actuator_gaintype[index] == _FIXED and model.actuator_biastype[index] == _NO_BIAS
    }


def _kp(model: mujoco.MjModel, ids: np.ndarray, operation: Operation, drawn: np.ndarray) -> None:
    kp = within_bounds("kp", combine(model.actuator_gainprm[ids, 0], operation, drawn[:, 0]))
    model.actuator_gainprm[ids, 0] = kp
    model.actuator_biasprm[ids, 1] = -kp


def _kv(model: mujoco.MjModel, ids: np.ndarray, operation: Operation, drawn: np.ndarray) -> None:
    velocity = model.actuator_biasprm[ids, 1] == 0  # a position servo has its stiffness there
    kv = within_bounds("kv", combine(-model.actuator_biasprm[ids, 2], operation, drawn[:, 0]))
    model.actuator_biasprm[ids, 2] = -kv
    model.actuator_gainprm[ids[velocity], 0] = kv[velocity]


def _gain(model: mujoco.MjModel, ids: np.ndarray, operation: Operation, drawn: np.ndarray) -> None:
    model.actuator_gainprm[ids, 0] = within_bounds(
        "gain", combine(model.actuator_gainprm[ids, 0], operation, drawn[:, 0])
    )


# ---------------------------------------------------------------- the world


def _world(model: mujoco.MjModel) -> Names:
    if not model.opt.gravity.any():
        raise ValueError("randomization of gravity: the model has none, so it has no direction")
    return {"gravity": 0}


def _gravity(model: mujoco.MjModel, ids: np.ndarray, operation: Operation, drawn: np.ndarray) -> None:
    before = np.array([np.linalg.norm(model.opt.gravity)])
    after = within_bounds("gravity", combine(before, operation, drawn[:, 0]))
    model.opt.gravity[:] *= after / before


PHYSICS: dict[str, Writer] = {
    "mass": Writer(("body_mass", "body_inertia"), _bodies, _mass, constants=True),
    "friction": Writer(("geom_friction",), _geoms, _friction),
    "damping": Writer(("dof_damping",), _joints, _of_joint("damping", "dof_damping")),
    "armature": Writer(("dof_armature",), _joints, _of_joint("armature", "dof_armature"), constants=True),
    "kp": Writer(("actuator_gainprm", "actuator_biasprm"), _with_kp, _kp),
    "kv": Writer(("actuator_gainprm", "actuator_biasprm"), _with_kv, _kv),
    "gain": Writer(("actuator_gainprm",), _motors, _gain),
    "gravity": Writer(("opt.gravity",), _world, _gravity),
}
