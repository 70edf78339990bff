from collections.abc import Callable

import mujoco
import numpy as np
import pytest

from envs.capture import model_fields
from envs.randomization import Randomization, Randomizer
from envs.randomization.physics import PHYSICS

Simulate = Callable[[mujoco.MjModel], np.ndarray]

RNG = np.random.default_rng(0)  # where nothing depends on the draws

SPECS = {
    "mass": Randomization("mass", "scale", (0.5, 2.0), names=("lower", "box")),
    "friction": Randomization("friction", "scale", (0.2, 0.8), names=("box", "floor"), together=True),
    "damping": Randomization("damping", "add", (0.5, 2.0), names=("shoulder", "box")),
    "armature": Randomization("armature", "set", (0.1, 0.4), names=("shoulder", "elbow")),
    "kp": Randomization("kp", "scale", (0.4, 0.8), names=("shoulder", "elbow")),
    "kv": Randomization("kv", "scale", (0.3, 3.0), "log_uniform"),
    "gain": Randomization("gain", "scale", (0.5, 0.8)),
    "gravity": Randomization("gravity", "scale", (0.5, 0.9)),
}

READ: dict[str, Callable[[mujoco.MjModel], np.ndarray]] = {
    "mass": lambda model: model.body_mass[[2, 4]],
    "friction": lambda model: model.geom_friction[[model.geom("box").id, model.geom("floor").id], 0],
    "damping": lambda model: model.dof_damping[[0, 3, 4, 5, 6, 7, 8]],
    "armature": lambda model: model.dof_armature[:2],
    "kp": lambda model: model.actuator_gainprm[:2, 0],
    "kv": lambda model: -model.actuator_biasprm[:3, 2],
    "gain": lambda model: model.actuator_gainprm[[3], 0],
    "gravity": lambda model: -model.opt.gravity[[2]],
}


def differing(model: mujoco.MjModel, before: dict[str, np.ndarray]) -> set[str]:
    after = model_fields(model)
    return {name for name in before if not np.array_equal(before[name], after[name])}


def statistics(model: mujoco.MjModel) -> list[float]:
    return [model.stat.meaninertia, model.stat.meanmass, model.stat.meansize, model.stat.extent, *model.stat.center]


def test_every_physical_field_is_tested() -> None:
    assert set(SPECS) == set(PHYSICS) == set(READ)


@pytest.mark.parametrize("field", SPECS)
def test_the_motion_changes_and_the_nominal_model_comes_back(
    field: str, model: mujoco.MjModel, trajectory: Simulate
) -> None:
    before, nominal, stats = model_fields(model), trajectory(model), statistics(model)
    randomizer = Randomizer(model, [SPECS[field]], np.random.default_rng(0))
    assert differing(model, before) == set()
    randomizer.reset()
    assert np.abs(trajectory(model) - nominal).max() > 1e-3
    randomizer.restore()
    assert differing(model, before) == set()
    assert statistics(model) == stats
    assert np.array_equal(trajectory(model), nominal)


@pytest.mark.parametrize("field", SPECS)
def test_values_stay_in_range_and_never_accumulate(field: str, model: mujoco.MjModel) -> None:
    spec, read = SPECS[field], READ[field]
    nominal = read(model).copy()
    randomizer = Randomizer(model, [spec], np.random.default_rng(1))
    drawn = []
    for _ in range(200):
        randomizer.reset()
        present = read(model)
        match spec.operation:
            case "set":
                drawn.append(present.copy())
            case "add":
                drawn.append(present - nominal)
            case "scale":
                drawn.append(present / nominal)
    low, high = spec.range
    assert np.min(drawn) >= low - 1e-12
    assert np.max(drawn) <= high + 1e-12
    # all of the range is used, however often it is drawn
    assert np.min(drawn) < low + 0.1 * (high - low)
    assert np.max(drawn) > high - 0.1 * (high - low)


@pytest.mark.parametrize("field", SPECS)
def test_nothing_else_is_touched(field: str, model: mujoco.MjModel) -> None:
    before, stats = model_fields(model), statistics(model)
    Randomizer(model, [SPECS[field]], np.random.default_rng(0)).reset()
    derived = {"body_subtreemass", "body_invweight0", "dof_invweight0", "dof_M0", "actuator_acc0"}
    allowed = {
        "mass": {"body_mass", "body_inertia", "cam_poscom0", "light_poscom0", *derived},
        "friction": {"geom_friction"},
        "damping": {"dof_damping"},
        "armature": {"dof_armature", *derived},
        "kp": {"actuator_gainprm", "actuator_biasprm"},
        "kv": {"actuator_gainprm", "actuator_biasprm"},
        "gain": {"actuator_gainprm"},
        "gravity": {"opt.gravity"},
    }[field]
    changed = differing(model, before)
    assert set(PHYSICS[field].arrays) <= changed <= allowed
    assert statistics(model) == stats


def test_mass_takes_inertia_and_derived_constants_along(model: mujoco.MjModel) -> None:
    before = model_fields(model)
    Randomizer(model, [Randomization("mass", "scale", (2, 2), names=("box",))], RNG).reset()
    box, lower = model.body("box").id, model.body("lower").id
    assert model.body_mass[box] == 0.4
    assert np.array_equal(model.body_inertia[box], 2 * before["body_inertia"][box])
    assert model.body_mass[lower] == 0.5
    assert model.body_subtreemass[0] == pytest.approx(before["body_subtreemass"][0] + 0.2, rel=1e-12)
    assert np.allclose(model.body_invweight0[box], before["body_invweight0"][box] / 2, rtol=1e-12)
    dofs = model.joint("box").dofadr[0] + np.arange(6)
    assert np.allclose(model.dof_invweight0[dofs], before["dof_invweight0"][dofs] / 2, rtol=1e-12)


def test_mass_matches_a_model_compiled_with_it(model: mujoco.MjModel, mjcf: str, trajectory: Simulate) -> None:
    """Not only different: the motion is that of a box that weighs twice as much, to rounding."""
    spec = mujoco.MjSpec.from_string(mjcf)
    spec.geom("box").mass = 0.4
    heavy = spec.compile()
    Randomizer(model, [Randomization("mass", "scale", (2, 2), names=("box",))], RNG).reset()
    model.stat.meaninertia = heavy.stat.meaninertia  # the solver's tolerance is kept nominal
    assert np.allclose(trajectory(model), trajectory(heavy), atol=1e-9)


def test_a_position_servo_keeps_its_form(model: mujoco.MjModel) -> None:
    """Gain and bias together: with the gain alone the arm would aim elsewhere, not be softer."""
    specs = [Randomization("kp", "scale", (0.5, 0.5)), Randomization("kv", "set", (7, 7), names=("elbow",))]
    Randomizer(model, specs, RNG).reset()
    assert model.actuator_gainprm[:2, 0].tolist() == [15, 10]
    assert model.actuator_biasprm[:2, :3].tolist() == [[0, -15, -3], [0, -10, -7]]
    assert model.actuator_gainprm[2, 0] == 5  # a velocity servo has no stiffness
    assert model.actuator_gainprm[3, 0] == 1


def test_a_velocity_servo_keeps_its_form(model: mujoco.MjModel) -> None:
    Randomizer(model, [Randomization("kv", "set", (8, 8), names=("rail_speed",))], RNG).reset()
    assert model.actuator_gainprm[2, 0] == 8
    assert model.actuator_biasprm[2, :3].tolist() == [0, 0, -8]


def test_fields_offer_only_what_has_them(model: mujoco.MjModel) -> None:
    def offered(field: str) -> set[str]:
        return set(PHYSICS[field].candidates(model))

    assert offered("mass") == {"upper", "lower", "cart", "box"}  # neither the world nor a mocap body
    assert offered("kp") == {"shoulder", "elbow"}
    assert offered("kv") == {"shoulder", "elbow", "rail_speed"}
    assert offered("gain") == {"rail"}
    with pytest.raises(ValueError, match="no actuator is named 'rail'; there are: shoulder, elbow"):
        Randomizer(model, [Randomization("kp", "scale", (1, 2), names=("rail",))], RNG)


def test_gravity_keeps_its_direction(model: mujoco.MjModel) -> None:
    model.opt.gravity[:] = (3, 0, -4)
    Randomizer(model, [Randomization("gravity", "set", (10, 10))], RNG).reset()
    assert np.allclose(model.opt.gravity, (6, 0, -8), rtol=1e-15)
    model.opt.gravity[:] = 0
    with pytest.raises(ValueError, match="gravity: the model has none"):
        Randomizer(model, [Randomization("gravity", "set", (10, 10))], RNG)


def test_a_range_that_leads_out_of_bounds_is_refused_at_once(model: mujoco.MjModel) -> None:
    before = model_fields(model)
    message = r"randomization mass add \(-0.3, 0\) of box: mass would become -0.1; it lies between 1e-06 and inf"
    with pytest.raises(ValueError, match=message):
        Randomizer(model, [Randomization("mass", "add", (-0.3, 0), names=("box",))], RNG)
    assert differing(model, before) == set()


def test_one_draw_for_all_or_one_for_each(model: mujoco.MjModel) -> None:
    names = ("shoulder", "elbow")
    Randomizer(model, [Randomization("kp", "scale", (0.5, 2), names=names, together=True)], RNG).reset()
    assert model.actuator_gainprm[0, 0] / 30 == pytest.approx(model.actuator_gainprm[1, 0] / 20, rel=1e-12)
    other = Randomizer(model, [Randomization("damping", "scale", (0.5, 2), names=names)], RNG)
    other.reset()
    assert model.dof_damping[0] / 0.5 != model.dof_damping[1] / 0.2
