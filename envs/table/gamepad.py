"""A gamepad by Linux's joystick interface, without further packages.

The kernel writes an event of 8 bytes for every change, and the state of every axis and button when the device is
opened (https://docs.kernel.org/input/joydev/joystick-api.html). The numbers of axes and buttons are those of pads
with Xbox's layout (driver xpad) and of those of PlayStation 4 and 5 (driver hid-playstation).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from envs.table.steering import Command, Steering

DEVICE = "/dev/input/js0"
DEAD_ZONE = 0.15
"""Share of a stick's way in the middle that counts as none: worn sticks do not return to 0."""
PAD_HELP: tuple[tuple[str, str], ...] = (
    ("left stick", "move over the table"),
    ("right stick", "up / down"),
    ("A or cross", "close or open the gripper"),
    ("left shoulder", "slow or fast"),
    ("Y or square", "save the episode"),
    ("B or circle", "forget it, same scene again"),
    ("N, on the keyboard", "forget it, another scene"),
    ("Esc, on the keyboard", "end"),
)

_EVENT = struct.Struct("=IhBB")  # milliseconds, value, type, number
_BUTTON, _AXIS, _INITIAL = 0x01, 0x02, 0x80
_STICKS = {0: (0, 1.0), 1: (1, -1.0), 4: (2, -1.0)}  # sticks report down as positive


@dataclass(frozen=True)
class PadEvent:
    """value: in [-1, 1] of an axis, 0 or 1 of a button. initial: the state at opening, not a change."""

    kind: str
    number: int
    value: float
    initial: bool


def parse_events(raw: bytes) -> Iterator[PadEvent]:
    """The events in whole records of 8 bytes; kinds other than axis and button are left out."""
    for _, value, kind, number in _EVENT.iter_unpack(raw):
        initial, kind = bool(kind & _INITIAL), kind & ~_INITIAL
        if kind == _AXIS:
            yield PadEvent("axis", number, max(-1.0, value / 32767), initial)
        elif kind == _BUTTON:
            yield PadEvent("button", number, float(value), initial)


class Gamepad:
    """An open device. Raises ValueError where there is none or it may not be read."""

    def __init__(self, path: str | Path = DEVICE) -> None:
        self.path, self._rest = path, b""
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError as error:
            raise ValueError(
                f"there is no gamepad at {path}: plug one in (on Linux it appears there; elsewhere Tandem reads "
                "none; pads of Xbox's layout and of PlayStation 4 and 5 are known), or steer by --device keyboard"
            ) from error
        except OSError as error:
            raise ValueError(f"cannot read the gamepad {path}: {error.strerror}; may your user read it?") from error

    def close(self) -> None:
        """Let the device go."""
        os.close(self._descriptor)

    def poll(self, steering: Steering) -> None:
        """Pass on what happened since the last call. Raises ValueError when the device was unplugged."""
        for event in parse_events(self._read()):
            if event.kind == "axis" and event.number in _STICKS:
                axis, sign = _STICKS[event.number]
                steering.lean(axis, sign * beyond_dead_zone(event.value))
            elif event.kind == "button" and event.value and not event.initial:
                _push(event.number, steering)

    def _read(self) -> bytes:
        raw = self._rest
        while True:
            try:
                more = os.read(self._descriptor, 64 * _EVENT.size)
            except BlockingIOError:
                break
            except OSError as error:
                raise ValueError(f"the gamepad {self.path} was unplugged") from error
            if not more:
                break
            raw += more
        whole = len(raw) - len(raw) % _EVENT.size
        self._rest = raw[whole:]
        return raw[:whole]


def beyond_dead_zone(value: float) -> float:
    """0 in the dead zone, from there on evenly to -1 and 1."""
    beyond = max(0.0, abs(value) - DEAD_ZONE) / (1.0 - DEAD_ZONE)
    return beyond if value > 0 else -beyond


def _push(button: int, steering: Steering) -> None:
    match button:
        case 0:
            steering.grip()
        case 1:
            steering.ask(Command.AGAIN)
        case 3:
            steering.ask(Command.SAVE)
        case 4:
            steering.change_pace()
