"""Pictures of a table, one renderer a process and picture size, however many tables there are.

A renderer holds a GL context, which costs memory and must be used by the thread that made it. It draws any table's
data with that table's own model: colours, lights and cameras are read from the model at each picture, only meshes
and textures live in the context.
"""

from __future__ import annotations

import atexit
import importlib
import os
import sys

import mujoco
import numpy as np
from numpy.typing import NDArray

from envs.graphics import cannot_draw, choose_backend
from envs.randomization import upload_textures

Image = NDArray[np.uint8]

_renderers: dict[tuple[int, int, int], mujoco.Renderer] = {}


def renderer(model: mujoco.MjModel, height: int, width: int) -> mujoco.Renderer:
    """The process's renderer for pictures of this size. Raises ValueError when the machine cannot draw."""
    key = (os.getpid(), height, width)
    if key not in _renderers:
        if any(pid != os.getpid() for pid, _, _ in _renderers):  # graphics libraries hang here
            raise ValueError(
                "a process that was forked from one that draws cannot draw; start it with multiprocessing's 'spawn'"
            )
        choose_backend()
        try:
            if not _renderers:  # mujoco chose its graphics library when it was imported, before that choice
                importlib.reload(sys.modules[mujoco.Renderer.__module__].gl_context)
            made = mujoco.Renderer(model, height, width)
        except Exception as error:  # each graphics library fails in its own way
            raise ValueError(cannot_draw(error)) from error
        if not _renderers:  # only now: what registers later runs earlier, and mujoco's own must run after this
            atexit.register(close_renderers)
        made.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
        made.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        _renderers[key] = made
    return _renderers[key]


def close_renderers() -> None:
    """Free the GL contexts while there is still an interpreter to do it in."""
    for (pid, _, _), made in _renderers.items():
        if pid == os.getpid():
            made.close()
    _renderers.clear()


def picture(model: mujoco.MjModel, data: mujoco.MjData, camera: str, height: int, width: int) -> Image:
    """[H, W, 3] uint8. Raises ValueError for a camera that the model has not, or where nothing can be drawn."""
    index = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, camera)
    if index < 0:
        names = ", ".join(model.camera(i).name for i in range(model.ncam))
        raise ValueError(f"there is no camera {camera!r}; the scene has {names}")
    drawer = renderer(model, height, width)
    upload_textures(drawer, model)
    mujoco.mjv_updateScene(model, data, _OPTION, None, _fixed(index), mujoco.mjtCatBit.mjCAT_ALL, drawer.scene)
    image: Image = drawer.render()
    return image


_OPTION = mujoco.MjvOption()
_OPTION.geomgroup[4:] = 0  # markers and unworn shapes


def _fixed(index: int) -> mujoco.MjvCamera:
    camera = mujoco.MjvCamera()
    camera.type, camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, index
    return camera
