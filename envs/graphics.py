"""Which graphics library draws, and what to say where none does. Nothing heavy is imported."""

from __future__ import annotations

import ctypes.util
import os
import sys


def choose_backend() -> None:
    """Set MUJOCO_GL to what draws without a screen, on Linux, if it is unset and there is no screen.

    To osmesa where only its library is found, else to egl: MuJoCo would take glfw, which needs a screen. Call it
    before MuJoCo is imported, or before the first renderer of the process is made.
    """
    if sys.platform != "linux":
        return
    if os.environ.get("MUJOCO_GL") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        return
    only_osmesa = not ctypes.util.find_library("EGL") and ctypes.util.find_library("OSMesa")
    os.environ["MUJOCO_GL"] = "osmesa" if only_osmesa else "egl"


def cannot_draw(error: Exception, what: str = "") -> str:
    """One line: what cannot be drawn, why, and what to install. Each graphics library fails in its own way."""
    return (
        f"cannot draw{what and f' {what}'} with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')!r} "
        f"({' '.join(str(error).split()) or type(error).__name__}); without a screen, set MUJOCO_GL=egl "
        "(Debian: libegl1 libgl1-mesa-dri) or MUJOCO_GL=osmesa (Debian: libosmesa6)"
    )
