from typing import Any

import mujoco
import numpy as np
import pytest

from envs.randomization import Randomization, Randomizer
from envs.table import scene
from envs.table.language import COLOURS, PAD_COLOURS
from envs.table.randomization import FULL, PRESETS, REALITY, specs_of

SHAPES = ("cube", "bar", "tower", "cube")


@pytest.fixture
def model() -> mujoco.MjModel:
    return scene.build_model()


def dress(model: mujoco.MjModel, colours: tuple[str, ...], pads: tuple[str, ...]) -> None:
    for index, (shape, colour) in enumerate(zip(SHAPES, colours, strict=True)):
        scene.wear(model, index, shape, colour)
    for index, colour in enumerate(pads):
        scene.paint_pad(model, index, colour)


def nearest_name(rgb: np.ndarray, names: tuple[str, ...]) -> str:
    return min(names, key=lambda name: float(np.linalg.norm(rgb - scene.RGB[name])))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_the_scene_and_colours_keep_their_names(name: str, model: mujoco.MjModel) -> None:
    randomizer = Randomizer(model, PRESETS[name], np.random.default_rng(0))
    for episode in range(25):
        randomizer.restore()
        colours = tuple(COLOURS[(episode + index) % 5] for index in range(4))
        pads = tuple(PAD_COLOURS[(episode + index) % 4] for index in range(2))
        dress(model, colours, pads)
        randomizer.rebase()
        randomizer.reset()
        for index, (shape, colour) in enumerate(zip(SHAPES, colours, strict=True)):
            rgba = model.geom(f"object{index}_{shape}").rgba
            assert nearest_name(rgba[:3], COLOURS) == colour
            assert rgba[3] == 1
        for index, colour in enumerate(pads):
            assert nearest_name(model.geom(f"pad{index}").rgba[:3], PAD_COLOURS) == colour
        masses = [model.body(f"object{index}").mass[0] / scene.MASS for index in range(4)]
        low, high = {"none": (1, 1), "mild": (0.8, 1.25), "full": (0.5, 2.0), "reality": (2.0, 2.3)}[name]
        assert min(masses) >= low - 1e-9
        assert max(masses) <= high + 1e-9


@pytest.mark.parametrize("name", PRESETS)
def test_physics_stays_finite_and_things_stay_on_the_table(name: str, model: mujoco.MjModel) -> None:
    for seed in range(3):
        randomizer = Randomizer(model, PRESETS[name], np.random.default_rng(seed))
        dress(model, ("red", "green", "blue", "yellow"), ("white", "black"))
        randomizer.rebase()
        data = mujoco.MjData(model)
        randomizer.reset(data)
        data.qpos[: scene.JOINTS] = data.ctrl[: scene.JOINTS] = scene.HOME
        for index in range(4):
            height = scene.HALF_EXTENTS[SHAPES[index]][2]
            data.joint(f"object{index}").qpos[:3] = (0.1 * index - 0.15, 0.1, height)
        for _ in range(100):
            mujoco.mj_step(model, data)
        assert np.abs(data.qpos[: scene.JOINTS] - scene.HOME).max() < 0.02
        for index in range(4):
            x, y, z = data.joint(f"object{index}").qpos[:3]
            assert (x, y) == pytest.approx((0.1 * index - 0.15, 0.1), abs=0.003)
            assert z == pytest.approx(scene.HALF_EXTENTS[SHAPES[index]][2], abs=0.002)
        randomizer.restore()


def test_reality_lies_outside_full_or_at_its_edge() -> None:
    full: dict[tuple[Any, ...], Randomization] = {(spec.field, spec.names): spec for spec in FULL}
    outside = set()
    for spec in REALITY:
        trained = full.get((spec.field, spec.names)) or next(s for s in FULL if s.field == spec.field)
        low, high = trained.range
        if spec.field == "action_latency":
            assert spec.range == (high, high + 1)
        else:
            assert spec.range[0] >= high or spec.range[1] <= low, spec
        outside.add(spec.field)
    assert {"friction", "kp", "kv", "action_latency", "camera_position", "light_diffuse", "hue"} <= outside


def test_presets_are_found_by_name() -> None:
    assert specs_of(None) == specs_of("none") == ()
    assert specs_of("full") is FULL
    own = [{"field": "mass", "operation": "scale", "range": [0.5, 2], "names": "object*"}]
    assert specs_of(own) == (Randomization("mass", "scale", (0.5, 2.0), names=("object*",)),)
    with pytest.raises(
        ValueError, match="no randomization 'ful': choose from none, mild, full, reality; did you mean 'full'"
    ):
        specs_of("ful")
