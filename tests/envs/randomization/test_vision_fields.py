import colorsys
import copy
import math
from collections.abc import Callable, Iterator

import mujoco
import numpy as np
import pytest

from envs.capture import model_fields
from envs.graphics import choose_backend
from envs.randomization import Randomization, Randomizer, upload_textures
from envs.randomization.textures import pattern, texture_pixels
from envs.randomization.vision import VISION

FRONT = ("front",)
COLOURED = ("lower", "box", "upper")
SPECS = {
    "camera_position": Randomization("camera_position", "add", (-0.1, 0.1), names=FRONT),
    "camera_rotation": Randomization("camera_rotation", "add", (-8, 8), names=FRONT),
    "camera_fov": Randomization("camera_fov", "scale", (0.7, 0.9), names=FRONT),
    "light_position": Randomization("light_position", "add", (-0.5, 0.5)),
    "light_direction": Randomization("light_direction", "add", (5, 40)),
    "light_diffuse": Randomization("light_diffuse", "scale", (0.3, 0.7)),
    "rgb": Randomization("rgb", "add", (-0.09, 0.09), names=COLOURED),
    "hue": Randomization("hue", "add", (-20, 20), names=COLOURED),
    "saturation": Randomization("saturation", "scale", (0.3, 0.8), names=COLOURED),
    "brightness": Randomization("brightness", "scale", (0.4, 0.8), names=COLOURED),
    "texture": Randomization("texture", "set", (0.2, 0.8)),
}


def colours(model: mujoco.MjModel) -> np.ndarray:
    """rgb as they are seen; the upper arm's is its material's while it has none of its own."""
    rgb = np.array([model.geom_rgba[model.geom(name).id, :3] for name in COLOURED], np.float64)
    if (rgb[2] == 0.5).all():
        rgb[2] = (0.7, 0.6, 0.8)
    return rgb


def hsv(model: mujoco.MjModel, part: int) -> np.ndarray:
    return np.array([colorsys.rgb_to_hsv(*row)[part] for row in colours(model)])


READ: dict[str, Callable[[mujoco.MjModel], np.ndarray]] = {
    "camera_position": lambda model: model.cam_pos[0],
    "camera_fov": lambda model: model.cam_fovy[:1],
    "light_position": lambda model: model.light_pos[0],
    "light_diffuse": lambda model: model.light_diffuse[0],
    "rgb": colours,
    "hue": lambda model: 360 * hsv(model, 0),
    "saturation": lambda model: hsv(model, 1),
    "brightness": lambda model: hsv(model, 2),
    "texture": lambda model: texture_pixels(model, 0) / 255,
}

Draw = Callable[[Randomizer | None], np.ndarray]


@pytest.fixture
def draw(model: mujoco.MjModel) -> Iterator[Draw]:
    choose_backend()
    renderer = mujoco.Renderer(model, 48, 48)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)

    def render(randomizer: Randomizer | None) -> np.ndarray:
        if randomizer is not None:
            upload_textures(renderer, model)
        mujoco.mj_camlight(model, data)
        renderer.update_scene(data, "front")
        return renderer.render().astype(np.int32)

    yield render
    renderer.close()


def differing(model: mujoco.MjModel, before: dict[str, np.ndarray]) -> set[str]:
    after = model_fields(model)
    return {name for name in before if not np.array_equal(before[name], after[name])}


def test_every_field_of_the_scene_is_tested() -> None:
    assert set(SPECS) == set(VISION)
    assert set(READ) == set(SPECS) - {"camera_rotation", "light_direction"}


@pytest.mark.parametrize("field", SPECS)
def test_the_picture_changes_and_the_nominal_one_comes_back(field: str, model: mujoco.MjModel, draw: Draw) -> None:
    before = model_fields(model)
    nominal = draw(None)
    assert nominal.std() > 10  # something is seen
    randomizer = Randomizer(model, [SPECS[field]], np.random.default_rng(0))
    pictures = []
    for _ in range(3):
        randomizer.reset()
        pictures.append(draw(randomizer))
        assert np.abs(pictures[-1] - nominal).max() > 8
    assert np.abs(pictures[0] - pictures[1]).max() > 3
    randomizer.restore()
    assert differing(model, before) == set()
    assert np.array_equal(draw(randomizer), nominal)


@pytest.mark.parametrize("field", SPECS)
def test_the_motion_and_all_else_stay(
    field: str, model: mujoco.MjModel, trajectory: Callable[[mujoco.MjModel], np.ndarray]
) -> None:
    before, nominal = model_fields(model), trajectory(model)
    Randomizer(model, [SPECS[field]], np.random.default_rng(0)).reset()
    written = {"tex_data" if name == "texture" else name for name in VISION[field].arrays}
    reference = {"cam_pos0", "cam_poscom0", "cam_mat0", "light_pos0", "light_poscom0", "light_dir0"}
    assert written <= differing(model, before) <= written | (reference if VISION[field].constants else set())
    assert np.array_equal(trajectory(model), nominal)


@pytest.mark.parametrize("field", READ)
def test_scene_values_stay_in_range_and_never_accumulate(field: str, model: mujoco.MjModel) -> None:
    spec, read = SPECS[field], READ[field]
    nominal = np.array(read(model))
    randomizer = Randomizer(model, [spec], np.random.default_rng(1))
    drawn = []
    for _ in range(150):
        randomizer.reset()
        present = np.array(read(model))
        if field == "hue":
            drawn.append((present - nominal + 180) % 360 - 180)
        elif spec.operation == "set":
            drawn.append(present)
        else:
            drawn.append(present - nominal if spec.operation == "add" else present / nominal)
    (low, high), slack = spec.range, 1 / 510 if field == "texture" else 1e-5
    values = np.concatenate([row.ravel() for row in drawn])
    assert values.min() >= low - slack
    assert values.max() <= high + slack
    assert values.min() < low + 0.1 * (high - low)
    assert values.max() > high - 0.1 * (high - low)


def test_turns_have_the_drawn_angle_and_never_accumulate(model: mujoco.MjModel) -> None:
    quaternion, direction = model.cam_quat[0].copy(), model.light_dir[0].copy()
    specs = [SPECS["camera_rotation"], SPECS["light_direction"]]
    randomizer = Randomizer(model, specs, np.random.default_rng(1))
    angles, axes = [], []
    for _ in range(150):
        randomizer.reset()
        assert np.linalg.norm(model.cam_quat[0]) == pytest.approx(1, abs=1e-12)
        assert np.linalg.norm(model.light_dir[0]) == pytest.approx(1, abs=1e-12)
        angle = 2 * math.degrees(math.acos(min(1.0, abs(model.cam_quat[0] @ quaternion))))
        assert angle == pytest.approx(abs(randomizer.draws[0][0, 0]), abs=1e-4)
        angles.append(angle)
        axes.append(randomizer.draws[0][0, 1:])
        # a turn about any axis moves the direction by that angle at most
        assert math.degrees(math.acos(min(1.0, model.light_dir[0] @ direction))) <= randomizer.draws[1][0, 0] + 1e-6
    assert max(angles) <= 8
    assert max(angles) > 7.5
    assert np.abs(np.mean(axes, axis=0)).max() < 0.2  # no preferred direction


def test_a_positive_turn_about_the_line_of_sight_keeps_the_line_of_sight(model: mujoco.MjModel) -> None:
    """The turn is in the camera's own frame: a roll."""
    randomizer = Randomizer(model, [Randomization("camera_rotation", "add", (90, 90), names=FRONT)], RNG)
    randomizer.draws[0] = np.array([[90.0, 0.0, 0.0, 1.0]])
    randomizer._apply(None)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    right, up, back = data.cam_xmat[0].reshape(3, 3).T
    assert np.allclose(back, (0.8, 0, 0.6))
    assert np.allclose(right, (-0.6, 0, 0.8))
    assert np.allclose(up, (0, -1, 0))


def test_colours_keep_their_alpha_and_a_material_lends_its_colour(model: mujoco.MjModel) -> None:
    alpha = model.geom_rgba[:, 3].copy()
    Randomizer(model, [Randomization("brightness", "scale", (0.5, 0.5))], RNG).reset()
    assert np.array_equal(model.geom_rgba[:, 3], alpha)
    assert np.allclose(model.geom_rgba[model.geom("upper").id, :3], (0.35, 0.3, 0.4), atol=1e-6)
    assert np.allclose(model.geom_rgba[model.geom("lower").id, :3], (0.425, 0.05, 0.05), atol=1e-6)


def test_colours_are_cut_off_and_hues_go_round(model: mujoco.MjModel) -> None:
    specs = [Randomization("rgb", "add", (0.5, 0.5), names=("lower",))]
    Randomizer(model, specs, RNG).reset()
    assert np.allclose(model.geom_rgba[model.geom("lower").id, :3], (1.0, 0.6, 0.6), atol=1e-6)
    Randomizer(model, [Randomization("hue", "add", (-120, -120), names=("box",))], RNG).reset()
    # hue 232 degrees - 120 = 112: from (0.1, 0.2, 0.85) the channels move one on
    assert np.allclose(model.geom_rgba[model.geom("box").id, :3], (0.2, 0.85, 0.1), atol=1e-6)


def test_only_cameras_with_an_angle_have_one_to_change(model: mujoco.MjModel) -> None:
    assert set(VISION["camera_fov"].candidates(model)) == {"front"}
    assert set(VISION["camera_position"].candidates(model)) == {"front", "chip"}
    with pytest.raises(ValueError, match="camera_fov would become 180"):
        Randomizer(model, [Randomization("camera_fov", "scale", (1, 4), names=FRONT)], RNG)


# ---------------------------------------------------------------- textures


def test_only_changed_textures_are_sent(model: mujoco.MjModel) -> None:
    choose_backend()
    renderer = mujoco.Renderer(model, 8, 8)
    try:
        randomizer = Randomizer(model, [SPECS["texture"]], RNG)
        assert upload_textures(renderer, model) == (0,)  # not known what the card holds
        assert upload_textures(renderer, model) == ()
        randomizer.reset()
        assert upload_textures(renderer, model) == (0,)
        assert upload_textures(renderer, model) == ()
        randomizer.restore()
        assert upload_textures(renderer, model) == (0,)
        randomizer.reset()
        assert upload_textures(renderer, model, []) == ()  # none was named
    finally:
        renderer.close()
    with pytest.raises(ValueError, match="the renderer is closed"):
        upload_textures(renderer, model)


def test_models_that_share_a_renderer_keep_their_own_textures(model: mujoco.MjModel, draw: Draw) -> None:
    """One context for many tables: what one uploads must not be seen on the next."""
    nominal = draw(None)
    randomizer = Randomizer(model, [SPECS["texture"]], RNG)
    randomizer.reset()
    other = copy.copy(model)
    randomizer.restore()
    assert not np.array_equal(other.tex_data, model.tex_data)
    renderer, data = mujoco.Renderer(other, 48, 48), mujoco.MjData(model)
    try:
        mujoco.mj_forward(model, data)
        for drawn, same in ((other, False), (model, True), (other, False), (model, True)):
            assert upload_textures(renderer, drawn) == (0,)
            renderer.update_scene(data, "front")
            assert np.array_equal(renderer.render(), nominal) == same
    finally:
        renderer.close()


def test_textures_belong_to_materials(model: mujoco.MjModel) -> None:
    with pytest.raises(ValueError, match="no material is named 'steel'; there are: wood"):
        Randomizer(model, [Randomization("texture", "set", (0, 1), names=("steel",))], RNG)


def test_texture_operations(model: mujoco.MjModel) -> None:
    nominal = texture_pixels(model, 0).astype(int)
    randomizer = Randomizer(model, [Randomization("texture", "scale", (0.5, 0.5))], RNG)
    randomizer.reset()
    assert np.abs(texture_pixels(model, 0) - nominal / 2).max() <= 0.5
    randomizer.restore()
    randomizer = Randomizer(model, [Randomization("texture", "add", (-0.1, 0.1))], RNG)
    for _ in range(50):
        randomizer.reset()
        assert np.abs(texture_pixels(model, 0) - nominal).max() <= 26


@pytest.mark.parametrize("kind", range(5))
def test_patterns(kind: int) -> None:
    mixed = pattern((16, 32), kind, 3, 0.7, 5)
    assert mixed.shape == (16, 32)
    assert mixed.min() >= 0
    assert mixed.max() <= 1
    assert (np.ptp(mixed) > 0.3) == (kind > 0)
    assert np.array_equal(mixed, pattern((16, 32), kind, 3, 0.7, 5))
    if kind in (2, 3):
        assert set(np.unique(mixed)) == {0.0, 1.0}
        assert 0.3 < mixed.mean() < 0.7


def test_stripes_run_across_their_direction() -> None:
    # two periods over 8 columns: on and off for two columns each
    assert pattern((3, 8), 2, 2, 0.0, 0).tolist() == [[0, 0, 1, 1, 0, 0, 1, 1]] * 3


RNG = np.random.default_rng(0)  # where nothing depends on the draws
