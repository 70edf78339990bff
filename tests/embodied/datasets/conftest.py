"""What the tests of data sets share: frames that no two are alike, and a small data set."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
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


# ---------------------------------------------------------------- the same three episodes in every format

LENGTHS = (4, 5, 1)
"""Episode 1 is truncated, the others are terminated."""


def observed(episode: int) -> np.ndarray:
    """[T + 1, 3] float32, what was seen after the last action included."""
    steps = np.arange(LENGTHS[episode] + 1)
    return np.stack([np.full(len(steps), 10 * episode), steps, -0.5 * steps], axis=1).astype(np.float32)


def acted(episode: int) -> np.ndarray:
    """[T, 2] float32."""
    steps = np.arange(LENGTHS[episode])
    return np.stack([steps / 8, np.full(len(steps), -0.25 * episode)], axis=1).astype(np.float32)


def rewarded(episode: int) -> np.ndarray:
    """[T] float32."""
    return (np.arange(LENGTHS[episode]) / 4 + episode).astype(np.float32)


def _last(episode: int) -> np.ndarray:
    return np.arange(LENGTHS[episode]) == LENGTHS[episode] - 1


def write_robomimic(path: Path) -> Path:
    """As robomimic's documentation says; cameras and next_obs included."""
    with h5py.File(path, "w") as file:
        file.create_group("data").attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": 15}})
        for number in range(3):
            demo, seen = file.create_group(f"data/demo_{number}"), observed(number)
            demo.attrs["num_samples"] = LENGTHS[number]
            demo["actions"], demo["rewards"], demo["dones"] = acted(number), rewarded(number), _last(number)
            demo["states"] = np.zeros((LENGTHS[number], 7))
            for group, rows in (("obs", seen[:-1]), ("next_obs", seen[1:])):
                demo[f"{group}/object"] = rows[:, 2:].astype(np.float64)
                demo[f"{group}/eef"] = rows[:, :2].astype(np.float64)
                shown = [picture((8, 12), number, step) for step in range(LENGTHS[number])]
                demo[f"{group}/front_image"] = np.stack(shown)
                demo[f"{group}/front_depth"] = np.zeros((LENGTHS[number], 8, 12, 1), np.float32)
        file["mask/train"] = np.array([b"demo_0", b"demo_2"])
    return path


def write_libero(path: Path) -> Path:
    """As LIBERO's documentation and its data creation say."""
    with h5py.File(path, "w") as file:
        told = {"problem_name": "libero_tabletop", "language_instruction": '"put the bowl on the plate"'}
        file.create_group("data").attrs["problem_info"] = json.dumps(told)
        for number in range(3):
            demo, seen, length = file.create_group(f"data/demo_{number}"), observed(number), LENGTHS[number]
            demo["actions"] = acted(number)
            demo["rewards"] = demo["dones"] = _last(number).astype(np.uint8) * (number != 1)
            demo["robot_states"], demo["states"] = np.full((length, 9), number + 0.5), np.full((length, 4), number)
            demo["obs/ee_states"], demo["obs/gripper_states"] = seen[:-1, :2], seen[:-1, 2:]
            demo["obs/joint_states"] = np.zeros((length, 7))
            shown = np.stack([picture((8, 8), number, step) for step in range(length)])
            demo["obs/agentview_rgb"], demo["obs/eye_in_hand_rgb"] = shown, 255 - shown
    return path


def write_d4rl(path: Path, *, timeouts: bool = True, ahead: bool = False) -> Path:
    """As D4RL's documentation says; the order of the episodes puts the truncated one in the middle."""
    with h5py.File(path, "w") as file:
        file["observations"] = np.concatenate([observed(number)[:-1] for number in range(3)])
        file["actions"] = np.concatenate([acted(number) for number in range(3)])
        file["rewards"] = np.concatenate([rewarded(number) for number in range(3)])
        file["terminals"] = np.concatenate([_last(number) & (number != 1) for number in range(3)])
        file["infos/qpos"] = np.zeros((10, 2))
        if timeouts:
            file["timeouts"] = np.concatenate([_last(number) & (number == 1) for number in range(3)])
        if ahead:
            file["next_observations"] = np.concatenate([observed(number)[1:] for number in range(3)])
    return path


def write_d3rlpy(path: Path) -> Path:
    """With d3rlpy itself."""
    from d3rlpy.dataset import Episode, InfiniteBuffer, ReplayBuffer

    episodes = [
        Episode(observed(number)[:-1], acted(number), rewarded(number)[:, None], terminated=number != 1)
        for number in range(3)
    ]
    with path.open("w+b") as file:
        ReplayBuffer(InfiniteBuffer(), episodes=episodes).dump(file)
    return path


def write_minari(path: Path, *, nested: bool = False, data_format: str = "hdf5") -> Path:
    """With Minari itself, at `path`, whose parent must be where MINARI_DATASETS_PATH points.

    nested: observations are a dictionary with a dictionary, a discrete leaf, a text and a picture in it.
    """
    import minari
    from gymnasium.spaces import Box, Dict, Discrete, Text
    from minari.data_collector import EpisodeBuffer

    box = Box(-100, 100, (3,), np.float32)
    inner = Dict({"b": Box(-1, 1, (2, 2), np.float64), "a": Discrete(3)})
    space = Dict({"goal": box, "arm": inner, "eye": Box(0, 255, (32, 33, 3), np.uint8), "note": Text(10)})
    buffers = []
    for number in range(3):
        seen, rows = observed(number), LENGTHS[number] + 1
        whole = {
            "goal": seen,
            "arm": {"b": np.full((rows, 2, 2), number / 4), "a": np.arange(rows) % 3},
            "eye": np.stack([picture((32, 33), number, step) for step in range(rows)]),
            "note": ["hello"] * rows,
        }
        ends = {"terminations": _last(number) & (number != 1), "truncations": _last(number) & (number == 1)}
        infos = {"success": [number != 1 and step == rows - 1 for step in range(rows)]}
        seen_as = whole if nested else seen
        buffers.append(
            EpisodeBuffer(
                number, number, None, seen_as, acted(number), rewarded(number).astype(float), **ends, infos=infos
            )
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about an author and other things that a published set has
        minari.create_dataset_from_buffers(
            path.name,
            buffers,
            observation_space=space if nested else box,
            action_space=Box(-1, 1, (2,), np.float32),
            data_format=data_format,
        )
    return path


WRITERS: dict[str, Callable[..., Path]] = {
    "robomimic": write_robomimic,
    "libero": write_libero,
    "d4rl": write_d4rl,
    "d3rlpy": write_d3rlpy,
    "minari": write_minari,
}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """make(KIND, ...) writes the three episodes in a format; LeRobot's are those of `filler`."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))

    def write(kind: str, **how: Any) -> Path:
        return fill(tmp_path / "lerobot") if kind == "lerobot" else WRITERS[kind](tmp_path / f"{kind}-v0", **how)

    return write


@pytest.fixture
def told() -> tuple[Callable[[int], np.ndarray], Callable[[int], np.ndarray], Callable[[int], np.ndarray]]:
    """What the three episodes hold: observations [T + 1, 3], actions [T, 2], rewards [T] by number."""
    return observed, acted, rewarded
