import errno
import os
import struct
from pathlib import Path

import pytest

from envs.table.gamepad import PAD_HELP, Gamepad, PadEvent, beyond_dead_zone, parse_events
from envs.table.steering import KEYBOARD_HELP, Command, Pace, Steering

BUTTON, AXIS, INITIAL = 1, 2, 0x80


def event(kind: int, number: int, value: int, milliseconds: int = 7) -> bytes:
    return struct.pack("=IhBB", milliseconds, value, kind, number)


def test_events_of_bytes() -> None:
    raw = bytes.fromhex("10270000" + "ff7f" + "02" + "00")  # 10 s, 32767, axis 0
    raw += bytes.fromhex("00000000" + "0180" + "82" + "04")  # -32767 of axis 4 at opening
    raw += bytes.fromhex("00000000" + "0100" + "01" + "03")  # button 3 goes down
    raw += bytes.fromhex("00000000" + "0100" + "04" + "03")  # no such kind
    raw += event(AXIS, 1, -32768)
    assert list(parse_events(raw)) == [
        PadEvent("axis", 0, 1.0, False),
        PadEvent("axis", 4, -1.0, True),
        PadEvent("button", 3, 1.0, False),
        PadEvent("axis", 1, -1.0, False),
    ]


def test_dead_zone() -> None:
    assert [beyond_dead_zone(value) for value in (-0.1, 0.15, 0.0)] == [0.0, 0.0, 0.0]
    # (0.575 - 0.15) / 0.85
    assert beyond_dead_zone(0.575) == pytest.approx(0.5, abs=1e-12)
    assert [beyond_dead_zone(value) for value in (-1.0, 1.0)] == [-1.0, 1.0]


def test_a_file_of_events_steers(tmp_path: Path) -> None:
    file = tmp_path / "js0"
    raw = event(AXIS | INITIAL, 3, 0) + event(BUTTON | INITIAL, 0, 1)  # an unused stick; held at opening
    raw += event(AXIS, 0, 32767) + event(AXIS, 1, -32767) + event(AXIS, 4, 32767)  # right, forward, down
    raw += event(BUTTON, 0, 1) + event(BUTTON, 0, 0) + event(BUTTON, 3, 1) + event(BUTTON, 1, 1)
    file.write_bytes(raw + event(BUTTON, 4, 1)[:5])  # the last one is not complete yet
    steering, pad = Steering(Pace(normal=0.5, slow=0.125)), Gamepad(file)
    pad.poll(steering)
    assert steering.action(0.0).tolist() == [-0.5, 0.5, -0.5, 1.0]
    assert [steering.take() for _ in range(3)] == [Command.SAVE, Command.AGAIN, None]
    assert not steering.slow
    with file.open("ab") as more:
        more.write(event(BUTTON, 4, 1)[5:] + event(AXIS, 0, 3000))  # slow; back in the dead zone
    pad.poll(steering)
    assert steering.action(0.0).tolist() == [-0.125, 0.0, -0.125, 1.0]
    pad.close()


def test_waiting_for_events_does_not_block(tmp_path: Path) -> None:
    fifo = tmp_path / "js0"
    os.mkfifo(fifo)
    pad, steering = Gamepad(fifo), Steering()
    writer = os.open(fifo, os.O_WRONLY)
    pad.poll(steering)
    assert steering.idle
    os.write(writer, event(AXIS, 0, -32767))
    pad.poll(steering)
    assert not steering.idle
    os.close(writer)
    pad.close()


def test_the_help_names_all_that_can_be_asked_for() -> None:
    assert [meaning for _, meaning in PAD_HELP] == [meaning for _, meaning in KEYBOARD_HELP]


def test_no_gamepad(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no gamepad at .*js0: plug one in .* --device keyboard"):
        Gamepad(tmp_path / "js0")


def test_an_unplugged_gamepad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(descriptor: int, size: int) -> bytes:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    (tmp_path / "js0").touch()
    pad = Gamepad(tmp_path / "js0")
    monkeypatch.setattr(os, "read", gone)
    with pytest.raises(ValueError, match="js0 was unplugged"):
        pad.poll(Steering())
    pad.close()
