"""Capture and restore: what is read, what is refused, what is put back where."""

import collections
import enum
import random
from dataclasses import dataclass
from typing import Any

import gymnasium
import mujoco
import numpy as np
import pytest

from envs import capture
from envs.make import make_environment

_XML = """<mujoco><option timestep="0.01"/><worldbody>
<body name="ball" pos="0 0 1"><freejoint/><geom size="0.1" mass="1"/><site name="tip" pos="0 0 0.1"/></body>
<geom type="plane" size="5 5 1"/></worldbody></mujoco>"""


@dataclass(frozen=True)
class Task:
    """A helper object."""

    colour: str
    target: np.ndarray


class Scene(gymnasium.Env):
    """A ball, its model, and attributes of all kinds."""

    def __init__(self) -> None:
        self.model = mujoco.MjModel.from_xml_string(_XML)
        self.data = mujoco.MjData(self.model)
        self.height = self.data.qpos[2:3]  # a view
        self.task = Task("red", np.zeros(2))
        self.stages: list[Any] = [Task("blue", np.ones(1))]
        self.table = {"a": (1, 2.5), "b": {3: None}}
        self.scalar = np.float32(0.1)
        self.rng = np.random.default_rng(0)
        self.extra: Any = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.data)
        return np.zeros(1), {}


def _used() -> Scene:
    scene = Scene()
    scene.reset(seed=4)
    scene.np_random.normal(size=3)
    scene.model.body_mass[1] = 2.5
    scene.model.opt.gravity[2] = -3.0
    scene.model.opt.timestep = 0.02
    for _ in range(60):
        mujoco.mj_step(scene.model, scene.data)
    scene.task = Task("green", np.array([1.0, 2.0]))
    scene.stages[0].target[:] = 7.0
    scene.table = {"a": (9, 0.1), "b": {3: [True]}}
    scene.scalar = np.float32(0.7)
    scene.rng.normal()
    return scene


def test_everything_comes_back() -> None:
    used, nominal = _used(), capture.nominal_fields(Scene())
    state = capture.capture(used, nominal)
    assert sorted(state[0]["model"]["fields"]) == ["body_mass", "opt.gravity", "opt.timestep"]
    fresh = Scene()
    capture.restore(fresh, state, nominal)
    assert fresh.model.body_mass[1] == 2.5
    assert (fresh.model.opt.gravity[2], fresh.model.opt.timestep) == (-3.0, 0.02)
    assert (fresh.task.colour, fresh.task.target.tolist()) == ("green", [1.0, 2.0])
    assert fresh.stages[0].target.tolist() == [7.0]
    assert fresh.table == {"a": (9, 0.1), "b": {3: [True]}}
    assert type(fresh.scalar) is np.float32
    assert fresh.scalar == np.float32(0.7)
    assert fresh.rng.normal() == used.rng.normal()
    assert fresh.np_random.normal() == used.np_random.normal()
    np.testing.assert_array_equal(fresh.data.site_xpos, used.data.site_xpos)
    for scene in (fresh, used):
        mujoco.mj_step(scene.model, scene.data)
    np.testing.assert_array_equal(fresh.data.qpos, used.data.qpos)
    np.testing.assert_array_equal(fresh.data.qacc_warmstart, used.data.qacc_warmstart)
    assert fresh.height[0] == fresh.data.qpos[2]  # still a view


def test_positions_of_sites_are_kept_because_they_lag_behind() -> None:
    scene = _used()
    kept = scene.data.site_xpos.copy()
    mujoco.mj_forward(scene.model, scene.data)
    assert not np.array_equal(kept, scene.data.site_xpos)


class Room(gymnasium.Env):
    """Keeps its scene in a helper object, and shares a task with whoever made it."""

    def __init__(self, task: Task) -> None:
        self.scene = Scene()
        self.tasks = (task, task)
        self.next: Task | None = None


def test_a_model_of_a_helper_object_comes_back_before_its_data() -> None:
    room, nominal = Room(Task("red", np.zeros(2))), capture.nominal_fields(Room(Task("red", np.zeros(2))))
    assert list(nominal) == ["0.scene.model"]
    room.scene = _used()
    assert capture.obstacle(room, capture.nominal_fields(room)) is None
    state = capture.capture(room, nominal)
    assert sorted(state[0]["scene"]["items"]["model"]["fields"]) == ["body_mass", "opt.gravity", "opt.timestep"]
    fresh = Room(Task("red", np.zeros(2)))
    scene = fresh.scene
    capture.restore(fresh, state, nominal)
    assert fresh.scene is scene
    for ball in (fresh.scene, room.scene):
        mujoco.mj_step(ball.model, ball.data)
    np.testing.assert_array_equal(fresh.scene.data.qpos, room.scene.data.qpos)
    assert fresh.scene.model.opt.timestep == 0.02


def test_frozen_dataclasses_are_replaced_and_never_written_into() -> None:
    shared = Task("red", np.zeros(2))
    used, fresh = Room(Task("blue", np.ones(2))), Room(shared)
    used.next = Task("green", np.full(2, 3.0))
    capture.restore(fresh, capture.capture(used, capture.nominal_fields(used)), capture.nominal_fields(fresh))
    assert (shared.colour, shared.target.tolist()) == ("red", [0.0, 0.0])
    assert [task.colour for task in fresh.tasks] == ["blue", "blue"]
    assert fresh.next is not None  # where there was none, too
    assert (fresh.next.colour, fresh.next.target.tolist()) == ("green", [3.0, 3.0])
    assert type(fresh.next) is Task


def test_only_frozen_dataclasses_are_made_from_a_state() -> None:
    used = Room(Task("blue", np.ones(2)))
    nominal = capture.nominal_fields(used)
    state = capture.capture(used, nominal)
    for name in ("subprocess:Popen", f"{__name__}:Scene", "no_such_module:Task"):
        state[0]["tasks"]["items"][0]["class"] = name
        with pytest.raises(ValueError, match=f"the state holds a {name}, which is no frozen dataclass here"):
            capture.restore(used, state, nominal)


def test_a_changed_model_goes_back_to_the_nominal_one() -> None:
    untouched, changed = Scene(), _used()
    nominal = capture.nominal_fields(untouched)
    capture.restore(changed, capture.capture(untouched, nominal), nominal)
    assert changed.model.body_mass[1] == 1.0
    assert changed.model.opt.timestep == 0.01


def test_the_state_is_a_copy() -> None:
    scene = _used()
    nominal = capture.nominal_fields(Scene())
    state = capture.capture(scene, nominal)
    time = state[0]["data"]["integration"][0]
    mujoco.mj_step(scene.model, scene.data)
    scene.task.target[:] = -1.0
    assert state[0]["data"]["integration"][0] == time
    assert state[0]["task"]["items"]["target"].tolist() == [1.0, 2.0]


def test_state_of_wrappers_is_kept() -> None:
    def made() -> gymnasium.Env:
        return gymnasium.wrappers.TimeAwareObservation(make_environment("Pendulum-v1"))

    env = made()
    env.reset(seed=1)
    for _ in range(5):
        env.step(np.zeros(1, np.float32))
    assert capture.obstacle(env, capture.nominal_fields(env)) is None
    state, fresh = capture.capture(env, {}), made()
    fresh.reset(seed=2)
    capture.restore(fresh, state, {})
    left, right = (e.step(np.ones(1, np.float32)) for e in (env, fresh))
    np.testing.assert_array_equal(left[0], right[0])
    assert left[1] == right[1]


class _Stage(enum.Enum):
    REACH = 1


class _Slotted:
    __slots__ = ("x",)


class _List(list):
    pass


@pytest.mark.parametrize(
    "value, message",
    [
        (collections.deque([1]), "Scene.extra: collections.deque has no readable state"),
        (_Stage.REACH, "_Stage has no readable state"),
        (_Slotted(), "_Slotted has no readable state"),
        (_List(), "_List has no readable state"),
        (np.array([object()]), "numpy.ndarray has no readable state"),
        ({(1, 2): 3}, "neither strings nor integers"),
        ([{"x": {1, 2}}], r"Scene.extra[0]['x']: builtins.set has no readable state"),
        ([Scene()], "Scene.extra[0].model: a MuJoCo model in a list"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_read_is_named(value: Any, message: str) -> None:
    scene = Scene()
    assert capture.obstacle(scene, capture.nominal_fields(scene)) is None
    scene.extra = value
    assert message in str(capture.obstacle(scene, capture.nominal_fields(scene)))


class _Dice(random.Random):
    """Keeps its state where only pickle finds it."""


def test_pythons_own_generator_goes_on() -> None:
    scene, other = Scene(), Scene()
    scene.extra, other.extra = random.Random(3), random.Random(4)
    scene.extra.gauss(0, 1)
    nominal = capture.nominal_fields(scene)
    state = capture.capture(scene, nominal)
    expected = [scene.extra.random() for _ in range(5)]
    capture.restore(other, state, nominal)
    assert [other.extra.random() for _ in range(5)] == expected
    other.extra = None
    capture.restore(other, state, nominal)
    assert [other.extra.random() for _ in range(5)] == expected
    scene.extra = _Dice(3)
    assert "_Dice has no readable state" in str(capture.obstacle(scene, nominal))


def test_a_model_that_is_made_anew_with_other_parts_is_an_obstacle() -> None:
    scene = Scene()
    nominal = capture.nominal_fields(scene)
    scene.model = mujoco.MjModel.from_xml_string(_XML)
    assert capture.obstacle(scene, nominal) is None
    more = _XML.replace("</worldbody>", '<geom type="box" size="1 1 1"/></worldbody>')
    scene.model = mujoco.MjModel.from_xml_string(more)
    assert "Scene.model: a MuJoCo model that is made anew" in str(capture.obstacle(scene, nominal))


def test_an_object_within_itself_is_refused() -> None:
    scene = Scene()
    scene.extra = [scene.task]
    scene.extra.append(scene.extra)
    assert "within itself" in str(capture.obstacle(scene, capture.nominal_fields(scene)))


def test_a_state_of_another_environment_is_refused() -> None:
    cheetah, hopper = make_environment("HalfCheetah-v5"), make_environment("Hopper-v5")
    for env in (cheetah, hopper):
        env.reset(seed=0)
    nominal = capture.nominal_fields(cheetah)
    with pytest.raises(ValueError):
        capture.restore(hopper, capture.capture(cheetah, nominal), capture.nominal_fields(hopper))
    with pytest.raises(ValueError, match="layers"):
        capture.restore(cheetah.unwrapped, capture.capture(cheetah, nominal), nominal)
