"""What the tests of data sets share: frames that no two are alike, and a small data set."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embodied.datasets.lerobot_layout import Feature, camera_feature, demonstration_features, outcome
from embodied.datasets.lerobot_writer import LeRobotWriter

FPS = 10


def picture(size: tuple[int, int], episode: int, step: int) -> np.ndarray:
    """[H, W, 3]: smooth enough for a video codec, different in every frame."""
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    shown = np.stack([x * 100 // size[1] + 10 * step, y * 100 // size[0] + 20 * episode, 0 * x + 50], axis=2)
    return shown.astype(np.uint8)


def frame(episode: int, step: int, length: int, size: tuple[int, int] = (8, 12)) -> dict[str, Any]:
    """Step `step` of `length`; the last one succeeds, except that of episode 1, which is cut off."""
    last = step == length - 1
    done = last and episode != 1
    return {
        "observation.images.front": picture(size, episode, step),
        "observation.state": np.array([episode, step, 0.5 * step]),
        "observation.environment_state": np.array([-episode, step / 8]),
        "action": np.array([0.1 * step, -0.25 * episode]),
        "expert_action": np.array([0.2 * step, 0.125]),
        **outcome(reward=step / 4, terminated=done, truncated=last and not done, success=done),
    }


def features(size: tuple[int, int] = (8, 12)) -> dict[str, Feature]:
    """Of `frame`."""
    return demonstration_features(cameras={"front": size}, fps=FPS, proprio=3, action=2, state=2, expert=True)


def fill(folder: Path, episodes: range = range(3), size: tuple[int, int] = (8, 12), *, video: bool = False) -> Path:
    """Episodes 0, 1, 2, ... of 4, 5, 6, ... frames, told "even" and "odd"."""
    wanted = features(size)
    if video:
        name = "observation.images.front"
        wanted[name] = Feature("video", wanted[name].shape, info=camera_feature(200, 200, FPS).info)
    with LeRobotWriter(folder, fps=FPS, features=wanted, robot_type="test") as writer:
        for number in episodes:
            with writer.episode(["even", "odd"][number % 2]) as episode:
                for step in range(4 + number):
                    episode.add(frame(number, step, 4 + number, size))
                assert episode.save() == number
    return folder


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killing a process does not lose what it wrote, only a power cut would: waiting for the disk shows nothing."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """Three episodes with PNG pictures."""
    return fill(tmp_path / "set")


@pytest.fixture
def filler() -> Callable[..., Path]:
    """`fill`."""
    return fill


@pytest.fixture
def framer() -> Callable[..., dict[str, Any]]:
    """`frame`."""
    return frame
