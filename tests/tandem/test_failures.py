"""Failures of the surroundings become one line with a remedy; bugs stay bugs."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable

import gymnasium
import pytest

from experiment.errors import UserError
from tandem.failures import explain


def caught(action: Callable[[], object]) -> BaseException:
    """The exception that `action` raises, with its traceback."""
    try:
        action()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def test_a_user_error_speaks_for_itself() -> None:
    assert explain(UserError("a.yaml:3: seed:\n expected an integer")) == "a.yaml:3: seed: expected an integer"


@pytest.mark.parametrize(
    "error", [ValueError("x"), OSError(errno.ENOENT, "no such file"), ZeroDivisionError(), KeyError(1)]
)
def test_bugs_are_not_explained(error: Exception) -> None:
    assert explain(error) is None


def test_a_full_disk_names_the_place() -> None:
    text = explain(OSError(errno.ENOSPC, "No space left on device", "/data/runs"))
    assert (
        text == "the disk under /data/runs is full: free some space, or set run.folder to a folder on another disk"
    )


def test_a_place_that_cannot_be_written_is_named() -> None:
    text = explain(PermissionError(errno.EACCES, "Permission denied", "/root/x"))
    assert text == "/root/x: permission denied; mend its permissions or choose another place"
    assert explain(PermissionError("a bug without a file")) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("HalfCheeta-v5", "Environment HalfCheeta doesn't exist; did you mean HalfCheetah-v5?"),
        (
            "HalfCheetah-v9",
            "Environment version v9 for environment HalfCheetah doesn't exist; did you mean HalfCheetah-v5?",
        ),
        ("ALE/Pong-v5", "Namespace ALE not found; install its package (pip install ale-py)"),
        (
            "AdroitHandSaw-v1",
            "Environment AdroitHandSaw doesn't exist; install its package (pip install gymnasium-robotics)",
        ),
        ("Nowhere/Thing-v0", "Namespace Nowhere not found; install its package, and check the spelling"),
    ],
)
def test_an_unknown_environment_gets_the_nearest_name_or_its_package(name: str, expected: str) -> None:
    text = explain(caught(lambda: gymnasium.make(name)))
    assert text is not None
    assert text.startswith(expected)
    assert "\n" not in text


def test_a_missing_extra_of_gymnasium_keeps_its_own_remedy() -> None:
    text = explain(gymnasium.error.DependencyNotInstalled("Box2D is missing, type `pip install\nbox2d`"))
    assert text == "Box2D is missing, type `pip install box2d`"


def test_a_missing_package_is_named_but_a_missing_module_of_ours_is_a_bug() -> None:
    missing = ModuleNotFoundError("No module named 'minari.x'", name="minari.x")
    assert explain(missing) == (
        "the package minari is not installed: type `pip install -e .`, or `make setup` in a checkout"
    )
    assert explain(ModuleNotFoundError("No module named 'embodied.x'", name="embodied.x")) is None


GL_SCRIPT = """
import sys
from tandem.failures import explain
try:
    import mujoco
    model = mujoco.MjModel.from_xml_string("<mujoco/>")
    mujoco.Renderer(model, 8, 8)
except Exception as error:
    print(explain(error))
"""
# PyOpenGL with one library that cannot be found, as on a machine where it is not installed.
WITHOUT_LIBRARY = """
import OpenGL.platform.ctypesloader as loader
original = loader.loadLibrary
def without(kind, name, *rest, **more):
    if name in ("OSMesa", "EGL"):
        raise ImportError("Unable to load OpenGL library", name)
    return original(kind, name, *rest, **more)
loader.loadLibrary = without
"""


@pytest.mark.parametrize(
    ("backend", "before"), [("glfw", ""), ("osmesa", WITHOUT_LIBRARY), ("egl", WITHOUT_LIBRARY), ("nonsense", "")]
)
def test_missing_graphics_say_what_to_install(backend: str, before: str) -> None:
    environment = {
        k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "PYOPENGL_PLATFORM")
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", before + GL_SCRIPT],
        env={**environment, "MUJOCO_GL": backend},
        capture_output=True,
        text=True,
        timeout=60,
    )
    line = done.stdout.strip()
    assert line.startswith("MuJoCo cannot draw on this machine"), done.stdout + done.stderr
    assert "sudo apt-get install libegl1" in line
    assert "MUJOCO_GL=osmesa" in line


def test_other_fatal_errors_of_mujoco_are_bugs() -> None:
    import mujoco

    assert explain(mujoco.FatalError("mj_step: stack overflow")) is None


def test_memory_of_the_accelerator() -> None:
    import torch

    text = explain(torch.OutOfMemoryError("CUDA out of memory"))
    assert text is not None
    assert text.startswith("the accelerator is out of memory")
