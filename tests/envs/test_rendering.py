"""Frames of episodes: what they show, when they are refused, and that renderers are closed."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from envs.graphics import choose_backend
from envs.rendering import draw, render_episode_frames
from envs.stepper import Stepper


class Painter(gymnasium.Env):
    """Draws its step number into every pixel; succeeds at step 2; lasts 5 steps."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012
    observation_space = gymnasium.spaces.Box(-1.0, 9.0, (1,))
    action_space = gymnasium.spaces.Discrete(2, start=3)
    made: list["Painter"] = []  # noqa: RUF012

    def __init__(self, render_mode: str | None = None, failure: str = "") -> None:
        self.failure, self.closed, self.actions = failure, False, list[int]()
        Painter.made.append(self)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        self.count = 0
        return np.zeros(1), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.actions.append(action)
        self.count += 1
        return np.full(1, self.count), 2.0, self.count == 5, False, {"success": self.count == 2}

    def render(self) -> Any:
        if self.failure:
            raise AttributeError(self.failure)
        return np.full((4, 6, 3), self.count, np.uint8)

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def _registered() -> Any:
    gymnasium.register("Painter-v0", lambda **options: Painter(**options))
    yield
    gymnasium.registry.pop("Painter-v0")
    Painter.made.clear()


def test_an_episode_is_drawn() -> None:
    seen: list[float] = []

    def act(observation: np.ndarray) -> np.ndarray:
        assert observation.dtype == np.float32
        seen.append(float(observation[0]))
        return np.array(1)

    episode = render_episode_frames("Painter-v0", act, seed=0)
    assert [frame[0, 0, 0] for frame in episode.frames] == [0, 1, 2, 3, 4, 5]
    assert (episode.fps, episode.episode_return, episode.length, episode.success_once) == (20.0, 10.0, 5, True)
    assert seen == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert Painter.made[0].actions == [4] * 5
    assert Painter.made[0].closed


def test_every_second_step_and_the_last() -> None:
    episode = render_episode_frames("Painter-v0", lambda _: np.array(0), seed=0, every=2)
    assert [frame[0, 0, 0] for frame in episode.frames] == [0, 2, 4, 5]
    assert episode.fps == 10.0
    with pytest.raises(ValueError, match="every must be at least 1"):
        render_episode_frames("Painter-v0", lambda _: np.array(0), seed=0, every=0)


def test_a_machine_that_cannot_draw() -> None:
    with pytest.raises(ValueError) as error:
        render_episode_frames("Painter-v0", lambda _: np.array(0), seed=0, options={"failure": "no\neglQuery"})
    for part in ("cannot draw Painter-v0", "no eglQuery", "libegl1 libgl1-mesa-dri", "libosmesa6"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert Painter.made[0].closed


def test_an_environment_without_pictures() -> None:
    class Blind(Painter):
        def render(self) -> Any:
            return None

    with pytest.raises(ValueError, match="Blind draws NoneType"):
        draw(Blind())


def test_a_backend_is_chosen_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries: dict[str, str] = {}
    monkeypatch.setattr("ctypes.util.find_library", libraries.get)
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.setenv(name, "")
    choose_backend()
    assert os.environ["MUJOCO_GL"] == "egl"  # found or not, it is the one that may work, and is told of if not
    libraries["OSMesa"] = "libOSMesa.so.8"
    monkeypatch.setenv("MUJOCO_GL", "")
    choose_backend()
    assert os.environ["MUJOCO_GL"] == "osmesa"
    libraries["EGL"] = "libEGL.so.1"
    monkeypatch.setenv("MUJOCO_GL", "")
    choose_backend()
    assert os.environ["MUJOCO_GL"] == "egl"
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    choose_backend()
    assert os.environ["MUJOCO_GL"] == "glfw"
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.setenv("DISPLAY", ":0")
    choose_backend()
    assert os.environ["MUJOCO_GL"] == ""
    monkeypatch.setenv("DISPLAY", "")
    monkeypatch.setattr(sys, "platform", "darwin")  # draws by CGL, which needs no such variable
    choose_backend()
    assert os.environ["MUJOCO_GL"] == ""


_REAL = """
import numpy as np
from envs.rendering import render_episode_frames
try:
    episode = render_episode_frames("Hopper-v5", lambda _: np.zeros(3), seed=5, max_episode_steps=4, every=4)
except ValueError as error:
    print("refused", error)
else:
    first, last = episode.frames
    print("drawn", first.shape, first.dtype, first.std() > 10, (first != last).any(), episode.fps,
          episode.episode_return)
"""


def _in_a_process(**surroundings: str) -> str:
    """Graphics libraries choose once a process, so each trial needs its own."""
    chosen = ("MUJOCO_GL", "PYOPENGL_PLATFORM", "DISPLAY", "WAYLAND_DISPLAY")
    kept = {name: value for name, value in os.environ.items() if name not in chosen}
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", _REAL],
        env={**kept, "PYTHONPATH": root, **surroundings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.strip()


def test_mujoco_is_drawn_without_a_screen() -> None:
    said = _in_a_process()
    if said.startswith("refused"):
        assert "libosmesa6" in said  # a machine without any graphics library
        pytest.skip(said)
    stepper = Stepper("Hopper-v5", [5], max_episode_steps=4)
    stepper.reset()
    record = [stepper.step(np.zeros((1, 3))) for _ in range(4)][-1].episodes[0]
    fps = 125 / 4
    assert said == f"drawn (480, 480, 3) uint8 True True {fps} {record.episode_return}"


def test_mujoco_with_a_backend_that_does_not_work() -> None:
    said = _in_a_process(MUJOCO_GL="glfw")
    assert said.startswith("refused cannot draw Hopper-v5 with MUJOCO_GL='glfw'")
    assert "libegl1" in said
