"""From keys and sticks to the table's actions: which key does what, how fast, for how long.

Knows no window, no device and no data; whoever has events calls `press`, `release` and `lean`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

# Key codes are GLFW's: a letter is its capital's ASCII code.
SPACE, ESCAPE, ENTER, BACKSPACE = 32, 256, 257, 259
RIGHT, LEFT, DOWN, UP, PAGE_UP, PAGE_DOWN = 262, 263, 264, 265, 266, 267
KEYPAD_ENTER = 335


class Command(Enum):
    """What a key asks for besides motion."""

    SAVE = "save"
    AGAIN = "the same scene again"
    NEXT = "another scene"
    QUIT = "quit"


# To the right of the picture, into the picture, up.
_WAYS: dict[int, tuple[int, int, int]] = {
    **dict.fromkeys((RIGHT, ord("D")), (1, 0, 0)),
    **dict.fromkeys((LEFT, ord("A")), (-1, 0, 0)),
    **dict.fromkeys((UP, ord("W")), (0, 1, 0)),
    **dict.fromkeys((DOWN, ord("S")), (0, -1, 0)),
    **dict.fromkeys((PAGE_UP, ord("R")), (0, 0, 1)),
    **dict.fromkeys((PAGE_DOWN, ord("F")), (0, 0, -1)),
}
_COMMANDS: dict[int, Command] = {
    **dict.fromkeys((ENTER, KEYPAD_ENTER), Command.SAVE),
    BACKSPACE: Command.AGAIN,
    ord("N"): Command.NEXT,
    ESCAPE: Command.QUIT,
}
_GRIPPER, _SLOW = SPACE, ord("Q")

KEYBOARD_HELP: tuple[tuple[str, str], ...] = (
    ("arrows or W A S D", "move over the table"),
    ("R / F or PgUp / PgDn", "up / down"),
    ("Space", "close or open the gripper"),
    ("Q", "slow or fast"),
    ("Enter", "save the episode"),
    ("Backspace", "forget it, same scene again"),
    ("N", "forget it, another scene"),
    ("Esc", "end"),
)


@dataclass(frozen=True)
class Pace:
    """Shares of the largest action (30 cm/s), and seconds for which a press moves where releases are not told."""

    normal: float = 0.5
    slow: float = 0.15
    pulse: float = 0.25


class Steering:
    """What the user asks for now.

    A key moves the arm from its press to its release, and for one control step at least, so that the shortest tap
    counts. Where a window does not report releases, a press moves for `Pace.pulse` and repeats extend it. Opposite
    keys cancel. Sticks add to keys.
    """

    def __init__(self, pace: Pace | None = None) -> None:
        self.pace = pace or Pace()
        self.slow = self.closed = False
        self._held: set[int] = set()
        self._until: dict[int, float] = {}
        self._owed: set[int] = set()
        self._lean = [0.0, 0.0, 0.0]
        self._commands: list[Command] = []

    def press(self, key: int, now: float, *, released_later: bool = True) -> None:
        """A key went down at `now` (seconds). Keys without a meaning are ignored."""
        if key in _COMMANDS:
            self.ask(_COMMANDS[key])
        elif key == _GRIPPER:
            self.grip()
        elif key == _SLOW:
            self.change_pace()
        elif key in _WAYS:
            self._owed.add(key)
            if released_later:
                self._held.add(key)
            else:
                self._until[key] = now + self.pace.pulse

    def release(self, key: int) -> None:
        """A key went up."""
        self._held.discard(key)

    def lean(self, axis: int, value: float) -> None:
        """A stick is at `value` in [-1, 1]; axis 0 is right, 1 into the picture, 2 up."""
        self._lean[axis] = value

    def grip(self) -> None:
        """Close the gripper, or open it."""
        self.closed = not self.closed

    def change_pace(self) -> None:
        """Slow, or fast again."""
        self.slow = not self.slow

    def ask(self, command: Command) -> None:
        """Remember a command until it is taken."""
        self._commands.append(command)

    def take(self) -> Command | None:
        """The oldest command that was not taken yet."""
        return self._commands.pop(0) if self._commands else None

    def begin(self) -> None:
        """A new episode: the gripper is open, and keys still down from the last one count when pressed anew."""
        self.closed = False
        self._held.clear()
        self._until.clear()
        self._owed.clear()
        self._commands.clear()

    @property
    def idle(self) -> bool:
        """Whether nothing was asked of the arm since `begin`."""
        return not (self._owed or self._held or self._until or any(self._lean) or self.closed)

    def action(self, now: float, azimuth: float = 180.0) -> NDArray[np.float32]:
        """[4] in [-1, 1]: the tool's way in x, y, z, and the gripper (1 closed, -1 open).

        azimuth: degrees, the direction in which the user looks at the table; "right" is right in the picture, to
        the nearest of the table's axes.
        """
        pressed = self._owed | self._held | {key for key, end in self._until.items() if end > now}
        self._owed.clear()
        asked = np.array(self._lean) + sum((np.array(_WAYS[key]) for key in pressed), np.zeros(3))
        right, into, up = np.clip(asked, -1.0, 1.0) * (self.pace.slow if self.slow else self.pace.normal)
        turn = np.deg2rad(90.0 * round(azimuth / 90.0))
        cos, sin = round(np.cos(turn)), round(np.sin(turn))
        way = (into * cos + right * sin, into * sin - right * cos, up)
        return np.array((*way, 1.0 if self.closed else -1.0), np.float32)
