"""`tandem data record --teleop` as a user has it: a window on a virtual screen, keys that are really pressed."""

import ctypes.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from embodied.datasets.lerobot import LeRobotDataset
from tandem.cli import main

NEEDED = [tool for tool in ("Xvfb", "xdotool") if shutil.which(tool) is None]
if ctypes.util.find_library("GL") is None:
    NEEDED.append("libGL")

needs_a_screen = pytest.mark.skipif(
    bool(NEEDED), reason=f"needs {', '.join(NEEDED)} (Debian: xvfb xdotool libgl1 libgl1-mesa-dri)"
)

PATIENCE = 120.0
"""Seconds: only a test that fails waits so long."""


@pytest.fixture
def display() -> Iterator[str]:
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", "1", "-screen", "0", "640x480x24", "-nolisten", "tcp", "-noreset"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdout is not None
    number = server.stdout.readline().strip()  # which it chose, once it is ready
    assert number, "Xvfb did not start"
    yield f":{number}"
    server.terminate()
    server.wait()


class User:
    """Starts the verb, reads what it prints, presses keys."""

    def __init__(self, display: str, folder: Path, *options: str) -> None:
        self.environment = os.environ | {
            "DISPLAY": display,
            "LIBGL_ALWAYS_SOFTWARE": "1",
            "LP_NUM_THREADS": "1",  # the software renderer would take every core
            "MUJOCO_GL": "glfw",
            "OMP_NUM_THREADS": "1",
        }
        words = ["data", "record", "--teleop", "--out", str(folder), "--tasks", "reach", "--image-size", "32"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tandem", *words, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self.environment,
            text=True,
        )
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        self.until(lambda: bool(self._windows()), "a window")
        self.xdotool("windowfocus", self._windows()[0])  # there is no window manager to do it

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    def _windows(self) -> list[str]:
        return self.xdotool("search", "--onlyvisible", "--name", "MuJoCo").split()

    def xdotool(self, *words: str) -> str:
        return subprocess.run(["xdotool", *words], env=self.environment, capture_output=True, text=True).stdout

    def until(self, true: Callable[[], bool], what: str, again: Callable[[], object] = lambda: None) -> None:
        """Wait; `again` is done every now and then, should a key get lost before the window has the focus."""
        end, count = time.monotonic() + PATIENCE, 0
        while not true():
            assert self.process.poll() is None or what == "the end", self.lines
            assert time.monotonic() < end, f"waited for {what}: {self.lines}"
            if count % 20 == 0:
                again()
            count += 1
            time.sleep(0.05)

    def says(self, text: str, again: Callable[[], object] = lambda: None) -> None:
        self.until(lambda: any(text in line for line in list(self.lines)), text, again)

    def ended(self) -> int:
        self.until(lambda: self.process.poll() is not None, "the end")
        return int(self.process.returncode)


@pytest.fixture
def user(display: str, tmp_path: Path) -> Iterator[Callable[..., User]]:
    users: list[User] = []

    def start(*options: str) -> User:
        users.append(User(display, tmp_path / "set", *options))
        return users[-1]

    yield start
    for one in users:
        one.process.kill()
        one.process.wait()


@needs_a_screen
def test_steered_by_keys(user: Callable[..., User], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hand = user()
    hand.says("Backspace")  # the key map
    # Were Backspace, the first key, left to the viewer, it would take the arm out of its posture.
    hand.says("recording", again=lambda: hand.xdotool("key", "BackSpace", "Page_Up"))
    hand.xdotool("keydown", "Right")
    time.sleep(0.5)  # of motion; more or less of it will do
    hand.says("episode 0 saved (saved by hand", again=lambda: hand.xdotool("key", "Return"))
    hand.xdotool("keyup", "Right")
    # The second episode is lost to Ctrl-C, the first is not.
    hand.until(lambda: hand.lines.count("recording") == 2, "an episode", lambda: hand.xdotool("key", "w"))
    hand.process.send_signal(signal.SIGINT)
    assert hand.ended() == 130

    data = LeRobotDataset(tmp_path / "set")
    assert len(data) == 1
    episode = data.read(0)
    assert (episode.terminated, episode.truncated, episode.success) == (False, True, False)
    assert np.abs(episode.proprio[0, :7]).max() < 0.07  # radians from home, 0.06 of it drawn
    rightwards = np.flatnonzero(episode.actions[:, 1] == 0.5)
    assert len(rightwards) > 0
    tool = np.append(episode.proprio[:, 8] * 0.1, np.nan)  # metres, towards +y; row t is before action t
    moved = tool[rightwards + 1] - tool[rightwards]
    assert np.nanmax(np.append(moved, 0.0)) > 0.005
    assert episode.images["front"].shape[1:] == (32, 32, 3)
    assert episode.images["front"].std() > 10
    assert main(["data", "validate", str(tmp_path / "set")]) == 0
    assert "no problem" in capsys.readouterr().out


@needs_a_screen
def test_escape_ends(user: Callable[..., User], tmp_path: Path) -> None:
    hand = user("--device", "keyboard", "--episodes", "1")
    hand.says("recording", again=lambda: hand.xdotool("key", "w"))
    hand.until(lambda: hand.process.poll() is not None, "the end", lambda: hand.xdotool("key", "Escape"))
    assert hand.ended() == 0
    assert hand.lines[-1].startswith("0 episodes saved")
    assert len(LeRobotDataset(tmp_path / "set")) == 0


def test_without_a_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert main(["data", "record", "--teleop", "--out", str(tmp_path / "set")]) == 2
    assert capsys.readouterr().err.startswith("error: cannot open a window to steer in")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--expert", "--teleop"], "not allowed with argument"),
        (["--teleop", "--noise", "0"], "--noise is for --expert; leave it out with --teleop"),
        (["--teleop", "--workers", "2"], "--workers is for --expert"),
        (["--teleop", "--keep-failures"], "--keep-failures is for --expert"),
        (["--expert", "--time-limit", "9"], "--time-limit is for --teleop; leave it out with --expert"),
        (["--expert", "--device", "keyboard"], "--device is for --teleop"),
    ],
)
def test_options_of_the_other_way(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "record", *words, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
