"""Pictures: which cameras there are, and processes that draw, end, and fork."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from envs.table import camera
from envs.table.env import TableEnv


def test_an_unknown_camera_is_named() -> None:
    env = TableEnv(observe=())
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"^there is no camera 'side'; the scene has front, wrist$"):
        env.picture("side")


def test_tables_share_a_renderer_for_each_size() -> None:
    one, other = TableEnv(observe=()), TableEnv(observe=())
    one.reset(seed=0)
    other.reset(seed=1)
    alone = one.picture(size=24)
    before = dict(camera._renderers)
    assert (other.picture(size=24) != alone).any()
    assert (one.picture(size=24) == alone).all()
    assert camera._renderers == before


_DRAW = """
import multiprocessing, sys
from envs.table.env import TableEnv
env = TableEnv(observe=("image", "wrist_image"), image_size=32)
try:
    image = env.reset(seed=0)[0]["image"]
except ValueError as error:
    print("refused", error)
    sys.exit()
env.picture(size=64)
def child():
    try:
        env.observe(("image",))
    except ValueError as error:
        print(error, flush=True)
if "fork" in sys.argv:
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    print(process.exitcode)
print(image.shape, image.std() > 10)
"""


def drawn_in_a_process(*arguments: str, **surroundings: str) -> str:
    chosen = ("MUJOCO_GL", "PYOPENGL_PLATFORM", "DISPLAY", "WAYLAND_DISPLAY")
    kept = {name: value for name, value in os.environ.items() if name not in chosen}
    done = subprocess.run(
        [sys.executable, "-c", _DRAW, *arguments],
        env={**kept, "PYTHONPATH": str(Path(__file__).parents[3]), **surroundings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    if done.stdout.startswith("refused"):
        assert "libosmesa6" in done.stdout  # a machine without any graphics library
        pytest.skip(done.stdout)
    return done.stdout


def test_a_process_that_drew_ends_without_a_word() -> None:
    """Nothing was set: a library is chosen although mujoco, imported before, would have taken one with a screen."""
    assert drawn_in_a_process() == "(32, 32, 3) True\n"


def test_a_forked_child_is_told_to_be_spawned_instead_of_hanging() -> None:
    message, *rest = drawn_in_a_process("fork").splitlines()
    assert message.startswith("a process that was forked from one that draws cannot draw; start it with")
    assert rest == ["0", "(32, 32, 3) True"]
