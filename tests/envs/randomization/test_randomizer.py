from typing import Any

import gymnasium
import mujoco
import numpy as np
import pytest

from envs.capture import capture, model_fields, nominal_fields, obstacle, restore
from envs.randomization import Randomization, Randomizer

RNG = np.random.default_rng(0)  # where nothing depends on the draws
MASS = Randomization("mass", "scale", (0.5, 2.0), names=("box",))


def box_mass(model: mujoco.MjModel) -> float:
    return float(model.body_mass[model.body("box").id])


def test_the_same_generator_gives_the_same_draws(model: mujoco.MjModel) -> None:
    def masses(seed: int) -> list[float]:
        randomizer = Randomizer(model, [MASS], np.random.default_rng(seed))
        drawn = []
        for _ in range(5):
            randomizer.reset()
            drawn.append(box_mass(model))
        randomizer.restore()
        return drawn

    assert masses(3) == masses(3)
    assert len({*masses(3), *masses(4)}) == 10


def test_seed_starts_the_draws_again(model: mujoco.MjModel) -> None:
    randomizer = Randomizer(model, [MASS], np.random.default_rng(0))
    drawn = []
    for seed in (5, 6, 5):
        randomizer.seed(np.random.default_rng(seed))
        randomizer.reset()
        drawn.append(box_mass(model))
    assert drawn[0] == drawn[2] != drawn[1]


def test_taking_pictures_does_not_change_the_next_episode(model: mujoco.MjModel) -> None:
    specs = [
        MASS,
        Randomization("image_noise", "set", (0.1, 0.1)),
        Randomization("proprio_noise", "set", (0.1, 0.1)),
    ]
    drawn = []
    for pictures in (0, 3):
        randomizer = Randomizer(model, specs, np.random.default_rng(0))
        randomizer.reset()
        for _ in range(pictures):
            randomizer.image(np.zeros((4, 4, 3), np.uint8))
            randomizer.noisy(np.zeros(3))
        randomizer.reset()
        drawn.append(box_mass(model))
        randomizer.restore()
    assert drawn[0] == drawn[1]


def test_what_is_drawn_at_the_start_stays(model: mujoco.MjModel) -> None:
    start = Randomization("mass", "scale", (0.5, 2.0), when="start", names=("box",))
    each = Randomization("kp", "scale", (0.5, 2.0), names=("elbow",))
    randomizer = Randomizer(model, [start, each], np.random.default_rng(0))
    assert box_mass(model) == 0.2
    randomizer.start()
    mass = box_mass(model)
    assert mass != 0.2
    assert model.actuator_gainprm[1, 0] == 20
    gains = []
    for _ in range(3):
        randomizer.restore()
        assert box_mass(model) == 0.2
        randomizer.reset()
        assert box_mass(model) == mass
        gains.append(model.actuator_gainprm[1, 0])
    assert len(set(gains)) == 3


def test_the_first_reset_starts(model: mujoco.MjModel) -> None:
    start = Randomization("mass", "scale", (0.5, 2.0), when="start", names=("box",))
    randomizer = Randomizer(model, [start], np.random.default_rng(0))
    randomizer.reset()
    mass = box_mass(model)
    assert mass != 0.2
    randomizer.reset()
    assert box_mass(model) == mass


def test_what_is_drawn_at_the_start_does_not_move_the_other_draws(model: mujoco.MjModel) -> None:
    start = Randomization("mass", "scale", (0.5, 2.0), when="start", names=("box",))
    each = Randomization("kp", "scale", (0.5, 2.0), names=("elbow",))
    gains = []
    for specs in ([start, each], [each]):
        randomizer = Randomizer(model, specs, np.random.default_rng(0))
        for seed in (5, 6, 5):
            randomizer.seed(np.random.default_rng(seed))
            randomizer.reset()
            gains.append(model.actuator_gainprm[1, 0])
        randomizer.restore()
    assert gains[0] == gains[2] != gains[1]
    assert gains[:3] == gains[3:]


def test_the_start_that_is_forgotten_is_drawn_again(model: mujoco.MjModel) -> None:
    start = Randomization("mass", "scale", (0.5, 2.0), when="start", names=("box",))
    randomizer = Randomizer(model, [start], np.random.default_rng(0))
    masses = []
    for seed, forgotten in ((5, False), (6, False), (6, True), (5, True)):
        if forgotten:
            randomizer.forget_start()
        randomizer.seed(np.random.default_rng(seed))
        randomizer.reset()
        masses.append(box_mass(model))
    assert masses[0] == masses[1] == masses[3] != masses[2]


def test_specs_of_one_field_apply_one_after_the_other(model: mujoco.MjModel) -> None:
    scale = Randomization("mass", "scale", (3, 3), names=("box",))
    add = Randomization("mass", "add", (1, 1), names=("b*",))
    for specs, expected in (([scale, add], 1.6), ([add, scale], 3.6)):
        randomizer = Randomizer(model, specs, RNG)
        for _ in range(2):
            randomizer.reset()
            assert box_mass(model) == pytest.approx(expected, rel=1e-12)
        randomizer.restore()


def test_intervals_are_drawn_at_the_reset_and_when_due(model: mujoco.MjModel) -> None:
    specs = [
        Randomization("mass", "scale", (0.5, 2.0), names=("box",), when="interval", period=0.5),
        Randomization("kp", "scale", (0.5, 2.0), names=("elbow",)),
    ]
    randomizer = Randomizer(model, specs, np.random.default_rng(0))
    randomizer.reset()
    assert box_mass(model) != 0.2
    gain = model.actuator_gainprm[1, 0]
    masses, drawn = [box_mass(model)], []
    for step in range(1, 16):
        drawn.append(randomizer.interval(None, step * 0.1))
        masses.append(box_mass(model))
    assert [step for step, new in enumerate(drawn, start=1) if new] == [5, 10, 15]
    assert [masses.index(mass) for mass in dict.fromkeys(masses)] == [0, 5, 10, 15]
    assert all(0.1 <= mass <= 0.4 for mass in masses)
    assert model.actuator_gainprm[1, 0] == gain
    assert randomizer.interval(None, 4.9)  # several at once are one
    assert not randomizer.interval(None, 4.9)
    randomizer.reset()
    assert not randomizer.interval(None, 0.4)
    assert randomizer.interval(None, 0.5)


def test_the_environment_may_change_what_is_nominal(model: mujoco.MjModel) -> None:
    """An object changes its shape and mass each episode; the draw scales the mass that it has then."""
    randomizer = Randomizer(model, [Randomization("mass", "scale", (2, 2), names=("box",))], RNG)
    for mass in (0.3, 0.7, 0.1):
        randomizer.restore()
        model.body_mass[model.body("box").id] = mass
        randomizer.rebase()
        randomizer.reset()
        assert box_mass(model) == 2 * mass


def test_a_draw_never_becomes_nominal(model: mujoco.MjModel) -> None:
    randomizer = Randomizer(model, [MASS], np.random.default_rng(0))
    randomizer.reset()
    with pytest.raises(ValueError, match="call restore"):
        randomizer.rebase()


def test_positions_and_data_are_left_alone(model: mujoco.MjModel) -> None:
    data = mujoco.MjData(model)
    data.ctrl[:] = 0.3
    for _ in range(20):
        mujoco.mj_step(model, data)
    before = [data.qpos.copy(), data.qvel.copy(), data.xpos.copy(), model.qpos0.copy(), data.time]
    camera = Randomization("camera_position", "add", (0.1, 0.1), names=("front",))
    randomizer = Randomizer(model, [MASS, camera], np.random.default_rng(0))
    seen = data.cam_xpos.copy()
    randomizer.reset(data)
    after = [data.qpos, data.qvel, data.xpos, model.qpos0, data.time]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert np.allclose(data.cam_xpos[0] - seen[0], 0.1, atol=1e-12)  # its body is the world
    assert np.array_equal(data.cam_xpos[1], seen[1])


def test_without_specs_nothing_happens(model: mujoco.MjModel) -> None:
    before = model_fields(model)
    randomizer = Randomizer(model, [], RNG)
    randomizer.start()
    randomizer.reset(mujoco.MjData(model))
    randomizer.rebase()
    assert not randomizer.interval(None, 10)
    after = model_fields(model)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    picture, vector = np.full((2, 2, 3), 7, np.uint8), np.ones(3)
    assert randomizer.image(picture) is picture
    assert randomizer.noisy(vector) is vector
    assert randomizer.actions.steps == randomizer.observations.steps == 0


def test_sensing_is_drawn_for_each_episode(model: mujoco.MjModel) -> None:
    specs = [
        Randomization("observation_latency", "set", (0, 2)),
        Randomization("action_latency", "set", (1, 3)),
        Randomization("proprio_noise", "set", (0.01, 0.02)),
        Randomization("image_brightness", "add", (-0.1, 0.1)),
        Randomization("image_contrast", "scale", (0.8, 1.2)),
        Randomization("image_noise", "set", (0.0, 0.05)),
    ]
    randomizer = Randomizer(model, specs, np.random.default_rng(0))
    episodes = []
    for _ in range(60):
        randomizer.reset()
        assert randomizer.observations.steps == randomizer.observation_latency
        assert randomizer.actions.steps == randomizer.action_latency
        episodes.append([randomizer.sensing[spec.field] for spec in specs])
    drawn = np.array(episodes)
    assert set(drawn[:, 0]) == {0, 1, 2}
    assert set(drawn[:, 1]) == {1, 2, 3}
    for column, spec in zip(drawn.T[2:], specs[2:], strict=True):
        low, high = spec.range
        assert low <= column.min() < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < column.max() <= high
    vector = np.zeros(2000)
    assert randomizer.noisy(vector).std() == pytest.approx(drawn[-1, 2], rel=0.1)
    grey = np.full((32, 32, 3), 100, np.uint8)
    expected = (100 - 127.5) * drawn[-1, 4] + 127.5 + 255 * drawn[-1, 3]
    assert randomizer.image(grey).mean() == pytest.approx(expected, abs=1.5)
    randomizer.restore()
    assert randomizer.image(grey) is grey


# ---------------------------------------------------------------- capture and resume


class Arm(gymnasium.Env):
    """As an environment is meant to use a randomizer: delays, noise, intervals, a scene that changes."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (11,))
    action_space = gymnasium.spaces.Box(-1, 1, (4,))

    def __init__(self, model: mujoco.MjModel, specs: list[Randomization]) -> None:
        self.model, self.data = model, mujoco.MjData(model)
        self.randomizer = Randomizer(model, specs, np.random.default_rng(0))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        if seed is not None:
            self.randomizer.seed(self.np_random)
        mujoco.mj_resetData(self.model, self.data)
        self.randomizer.restore()
        self.model.geom_rgba[self.model.geom("box").id, :3] = self.np_random.uniform(size=3)
        self.randomizer.rebase()
        self.randomizer.reset(self.data)
        self.randomizer.actions.reset(np.zeros(4))
        return self.randomizer.observations.reset(self.randomizer.noisy(self.data.qpos)), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.data.ctrl[:] = self.randomizer.actions.push(action)
        mujoco.mj_step(self.model, self.data, 10)
        self.randomizer.interval(self.data, self.data.time)
        seen = self.randomizer.observations.push(self.randomizer.noisy(self.data.qpos))
        return seen, 0.0, False, False, {}


EVERYTHING = [
    Randomization("mass", "scale", (0.5, 2.0)),
    Randomization("kp", "scale", (0.5, 2.0), when="start"),
    Randomization("friction", "scale", (0.5, 2.0), when="interval", period=0.2),
    Randomization("gravity", "scale", (0.9, 1.1)),
    Randomization("rgb", "add", (-0.1, 0.1), names=("box",)),
    Randomization("texture", "set", (0.2, 0.8)),
    Randomization("camera_position", "add", (-0.1, 0.1)),
    Randomization("proprio_noise", "set", (0.01, 0.02)),
    Randomization("image_noise", "set", (0.01, 0.02)),
    Randomization("observation_latency", "set", (1, 2)),
    Randomization("action_latency", "set", (1, 2)),
]


def play(env: Arm, steps: int, actions: np.random.Generator) -> list[np.ndarray]:
    seen = []
    for step in range(steps):
        if step == 12:
            seen.append(env.reset()[0].copy())
        seen.append(env.step(actions.uniform(-1, 1, 4))[0].copy())
        picture = env.randomizer.image(np.full((2, 2, 3), 99, np.uint8))
        seen.append(np.concatenate([env.model.body_mass, env.model.geom_rgba.ravel(), picture.ravel()]))
    return seen


def test_a_captured_environment_goes_on_bit_for_bit(model: mujoco.MjModel, mjcf: str) -> None:
    env = Arm(model, EVERYTHING)
    resumed = Arm(mujoco.MjModel.from_xml_string(mjcf), EVERYTHING)
    nominal = nominal_fields(env)
    assert obstacle(env, nominal_fields(env)) is None
    env.reset(seed=1)
    play(env, 7, np.random.default_rng(2))
    state = capture(env, nominal)
    expected = play(env, 30, np.random.default_rng(3))
    resumed.reset(seed=9)
    restore(resumed, state, nominal)
    again = play(resumed, 30, np.random.default_rng(3))
    assert all(np.array_equal(a, b) for a, b in zip(expected, again, strict=True))
    assert np.array_equal(env.model.tex_data, resumed.model.tex_data)
    env.randomizer.restore()
    resumed.randomizer.restore()
    assert np.array_equal(env.model.body_mass, resumed.model.body_mass)
