"""MuJoCo's viewer as a window that shows a table and reports keys.

It looks at a copy of the physics' state, so nothing that a user does in it, and none of the viewer's own keys,
reaches the physics.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np

_JOINED_AFTER = 10.0
"""Seconds to wait for the viewer's thread at the end."""
_LOOK = {"azimuth": 180.0, "elevation": -38.0, "distance": 1.25}
_LOOK_AT = (-0.08, 0.0, 0.06)
"""From where the front camera stands, a little lower."""
_PLUMB_RADIUS, _PLUMB_RGBA = 0.0015, (1.0, 1.0, 1.0, 0.6)

Lines = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class KeyEvent:
    """A key went down or up. released_later: whether its release will be reported."""

    key: int
    down: bool
    released_later: bool


class Window:
    """An open viewer. Raises ValueError on macOS outside `mjpython`.

    MuJoCo tells a program of presses only, and answers many letters itself (W: wireframe). From the first press on,
    which comes that way, the window's keys are therefore taken over: releases are reported, and the viewer's own
    keys are off. So is the window's button that closes it: the viewer's thread must not end while it is spoken to.
    The mouse turns the view.

    Call `require_screen` first. Make the first picture of a camera before the window too: both may use GLFW, which
    wants its windows made in turn.
    """

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData) -> None:
        self._model, self._shown = model, mujoco.MjData(model)
        self._events: deque[KeyEvent] = deque()
        self._closing = False
        self._texts: list[tuple[int, int, str, str]] = []
        self._speed = np.zeros(model.nv)
        self._start = data.qpos.copy()
        self.show(data)
        from mujoco import viewer  # loads GLFW, which only a machine with a screen need have

        threads = set(threading.enumerate())
        try:
            self._handle = viewer.launch_passive(
                model, self._shown, key_callback=self._first_key, show_left_ui=False, show_right_ui=False
            )
        except RuntimeError as error:
            if sys.platform != "darwin":
                raise
            raise ValueError(_ON_MACOS) from error
        self._threads = set(threading.enumerate()) - threads
        with self._handle.lock():
            for name, value in _LOOK.items():
                setattr(self._handle.cam, name, value)
            self._handle.cam.lookat[:] = _LOOK_AT
        self._plain = self._handle.opt.flags.copy(), self._handle.user_scn.flags.copy()

    @property
    def open(self) -> bool:
        """False once the user has closed it."""
        return not self._closing and bool(self._handle.is_running())

    @property
    def azimuth(self) -> float:
        """Degrees: the direction in which the user looks."""
        return float(self._handle.cam.azimuth)

    def events(self) -> list[KeyEvent]:
        """What happened since the last call."""
        return [self._events.popleft() for _ in range(len(self._events))]

    def show(self, data: mujoco.MjData) -> None:
        """Take over a state at once."""
        mujoco.mj_copyData(self._shown, self._model, data)
        self._start[:] = data.qpos
        self._speed[:] = 0.0

    def glide_to(self, data: mujoco.MjData) -> None:
        """Show the way to a state: `draw` tells how far along."""
        start = self._start.copy()
        mujoco.mj_integratePos(self._model, start, self._speed, 1.0)
        mujoco.mj_copyData(self._shown, self._model, data)
        self._start[:] = start
        mujoco.mj_differentiatePos(self._model, self._speed, 1.0, start, data.qpos)

    def draw(self, share: float, headline: str, left: Lines, keys: Lines) -> None:
        """Show the table after a share in [0, 1] of the way, with texts.

        headline: large, at the top. left: what is going on, at the bottom. keys: the key map beside it, or nothing.
        """
        qpos = self._start.copy()
        mujoco.mj_integratePos(self._model, qpos, self._speed, share)
        self._shown.qpos[:] = qpos
        mujoco.mj_kinematics(self._model, self._shown)
        mujoco.mj_camlight(self._model, self._shown)
        grid, size = mujoco.mjtGridPos, mujoco.mjtFontScale
        texts = [(size.mjFONTSCALE_200, grid.mjGRID_TOPLEFT, headline, "")]
        for place, lines in ((grid.mjGRID_BOTTOMLEFT, left), (grid.mjGRID_BOTTOMRIGHT, keys)):
            if lines:
                names, values = ("\n".join(column) for column in zip(*lines, strict=True))
                texts.append((size.mjFONTSCALE_100, place, names, values))
        if not self.open:
            return
        if texts != self._texts:  # to set them waits for the viewer's next picture
            self._handle.set_texts(texts)
            self._texts = texts
        with self._handle.lock():
            # The first key reached the viewer too.
            self._handle.opt.flags[:], self._handle.user_scn.flags[:] = self._plain
            self._draw_plumb_line()
        self._handle.sync()

    def close(self) -> None:
        """Close it and wait until its thread has ended: GLFW must not be shut down before."""
        self._handle.close()
        for thread in self._threads:
            thread.join(_JOINED_AFTER)

    def _draw_plumb_line(self) -> None:
        """From the tool down to the table: a flat picture does not tell how far away the tool is."""
        scene, tool = self._handle.user_scn, self._shown.site("tool").xpos
        line, kind = scene.geoms[0], mujoco.mjtGeom.mjGEOM_CAPSULE
        mujoco.mjv_initGeom(line, kind, np.zeros(3), np.zeros(3), np.zeros(9), np.array(_PLUMB_RGBA, np.float32))
        mujoco.mjv_connector(line, kind, _PLUMB_RADIUS, tool, np.array([tool[0], tool[1], 0.0]))
        scene.ngeom = 1

    def _first_key(self, key: int) -> None:
        """MuJoCo's key callback, in the viewer's thread."""
        import glfw

        window = glfw.get_current_context()
        if window:
            glfw.set_key_callback(window, self._any_key)
            glfw.set_window_close_callback(window, self._close_asked)
        self._events.append(KeyEvent(key, down=True, released_later=bool(window)))

    def _any_key(self, window: object, key: int, code: int, action: int, modifiers: int) -> None:
        """GLFW's key callback, in the viewer's thread. Repeats say nothing new: the key is still down."""
        if action in (0, 1):
            self._events.append(KeyEvent(key, down=action == 1, released_later=True))

    def _close_asked(self, window: Any) -> None:
        """GLFW's callback for the window's close button, in the viewer's thread: `close` will follow."""
        import glfw

        glfw.set_window_should_close(window, False)
        self._closing = True


_ON_MACOS = "on macOS the viewer needs MuJoCo's own launcher: type `mjpython -m tandem` where you typed `tandem`"


def require_screen() -> None:
    """Raise ValueError unless a window can be made; the viewer itself would wait for ever."""
    if sys.platform == "darwin":  # windows belong to the main thread there, which is mjpython's
        return
    import glfw

    reason = "no screen"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if glfw.init():
            glfw.window_hint(glfw.VISIBLE, False)
            probe = glfw.create_window(64, 64, "tandem", None, None)
            glfw.default_window_hints()
            if probe:
                glfw.destroy_window(probe)
                return
            reason = "no OpenGL window"
    details = " ".join("; ".join([reason, *(str(one.message) for one in told)]).split())
    raise ValueError(
        f"cannot open a window to steer in ({details}): sit at a machine with a screen, and set DISPLAY to it"
    )
