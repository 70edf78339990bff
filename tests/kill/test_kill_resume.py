"""Training processes are SIGKILLed again and again and resumed; what comes out is what an undisturbed run gives.

Each life of a run is a process of its own. Most lives are ended from outside when metrics.jsonl has grown to some
length and a random moment more has passed; one ends itself inside the writing of a checkpoint (driver.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiment.config import build_from_dict

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(1200)  # a process start is mostly imports, and slow where others work
DRIVER = Path(__file__).with_name("driver.py")
PATIENCE = 300.0


def command(verb: str, argument: Path, *, die_in_checkpoint: int = 0) -> list[str]:
    return [sys.executable, str(DRIVER), str(die_in_checkpoint), verb, str(argument)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}


@contextlib.contextmanager
def life(arguments: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (
        log.open("ab") as output,
        subprocess.Popen(arguments, env=environment(), stdout=output, stderr=output) as p,
    ):
        try:
            yield p
        finally:
            p.kill()


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def checkpoints_in(folder: Path) -> list[int]:
    if not (folder / "checkpoints").is_dir():
        return []
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


@dataclass
class Story:
    """What happened to a run. kills: (newest checkpoint's step or -1, lines of metrics, unfinished checkpoint)."""

    folder: Path
    log: Path
    kills: list[tuple[int, int, bool]] = field(default_factory=list)

    def killed(self) -> None:
        self.kills.append(
            (
                max(checkpoints_in(self.folder), default=-1),
                lines_in(self.folder / "metrics.jsonl"),
                any((self.folder / "checkpoints").glob(".tmp-0*")),
            )
        )

    def text(self) -> str:
        return self.log.read_text(errors="replace")[-3000:] if self.log.exists() else ""


def kill_when(story: Story, arguments: list[str], ready: Callable[[], bool], delay: float) -> None:
    """Start a process, wait until it is `ready` and `delay` seconds more, and SIGKILL it."""
    deadline = time.monotonic() + PATIENCE
    with life(arguments, story.log) as process:
        while not ready():
            assert process.poll() is None, f"it ended by itself ({process.returncode}): {story.text()}"
            assert time.monotonic() < deadline, story.text()
            time.sleep(0.001)
        time.sleep(delay)
        assert process.poll() is None, f"it ended by itself ({process.returncode}): {story.text()}"
        process.send_signal(signal.SIGKILL)
        process.wait()
    story.killed()


def die_inside_a_checkpoint(story: Story, arguments: list[str]) -> None:
    with life(arguments, story.log) as process:
        assert process.wait(PATIENCE) == -signal.SIGKILL, story.text()
    story.killed()
    assert story.kills[-1][2], "no unfinished checkpoint was left"


def live(arguments: list[str], log: Path) -> None:
    with life(arguments, log) as process:
        assert process.wait(PATIENCE) == 0, log.read_text(errors="replace")[-3000:]


def torment(config: dict[str, Any], folder: Path, *, kills: int, updates: int, seed: int) -> Story:
    """Train with `kills` interruptions: the first before there is a checkpoint, the third inside one."""
    chance, story = random.Random(seed), Story(folder, folder.with_suffix(".log"))
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    metrics = folder / "metrics.jsonl"
    train, resume = command("train", file), command("resume", folder)
    kill_when(story, train, (folder / "config.yaml").exists, chance.uniform(0.0, 0.2))
    for number in range(1, kills):
        if number == 2:
            die_inside_a_checkpoint(story, command("resume", folder, die_in_checkpoint=chance.randint(2, 4)))
            continue
        span = 0.7 * updates / kills  # so that no life comes to its end, however slowly we look
        wanted = 5 + int(chance.uniform(number * span, (number + 0.9) * span))

        def grown(wanted: int = wanted) -> bool:
            return lines_in(metrics) >= wanted

        kill_when(story, resume, grown, chance.uniform(0.0, 0.1))
    live(resume, story.log)
    return story


def check(story: Story, whole: Path, *, kills: int, updates: int, checkpoint_every: int) -> None:
    assert len(story.kills) == kills
    assert sum(newest >= 2 * checkpoint_every for newest, _, _ in story.kills) >= min(3, kills - 1)
    assert sum(unfinished for _, _, unfinished in story.kills) >= 1
    assert "Traceback" not in story.text()
    for name in ("policy", ""):
        expected, found = (folder / "checkpoints" / "last" / name for folder in (whole, story.folder))
        tensors = sorted(path.name for path in expected.glob("*.safetensors"))
        assert tensors
        for tensor in tensors:
            assert (found / tensor).read_bytes() == (expected / tensor).read_bytes(), f"{name}/{tensor}"
    rows = [rows_of(folder) for folder in (whole, story.folder)]
    assert [row["global_step"] for row in rows[0]] == list(range(1, updates + 1))
    assert rows[1] == rows[0]
    assert not list((story.folder / "checkpoints").glob(".*"))
    for folder in (whole, story.folder):
        assert (folder / "checkpoints" / "last").resolve().name == f"{updates:09d}"
        assert checkpoints_in(folder) == checkpoints_in(whole)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]


# ------------------------------------------------------------------ the robot


ROBOT_UPDATES, ROBOT_CHECKPOINTS = 160, 4


def robot(folder: Path) -> dict[str, Any]:
    """HalfCheetah in two workers: MuJoCo states, noise and normalisers of three processes must come back."""
    return {
        "recipe": "embodied/ppo",
        "run": {"folder": str(folder), "checkpoint_every": ROBOT_CHECKPOINTS, "wandb": "disabled", "seed": 3},
        "environment": {"id": "HalfCheetah-v5", "max_episode_steps": 50, "count": 2, "workers": 2},
        "policy": {"hidden": [16, 16]},
        "ppo": {"epochs": 2, "minibatch_size": 16, "schedule": "linear"},
        "evaluation": {"every": 40, "episodes": 2},
        "horizon": 16,
        "total_steps": ROBOT_UPDATES * 32,
    }


@pytest.fixture(scope="module")
def whole_robot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("robot") / "whole"
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(robot(folder)))
    live(command("train", file), folder.with_suffix(".log"))
    return folder


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_a_robot_learner_survives_kills_to_the_bit(kills: int, whole_robot: Path, tmp_path: Path) -> None:
    story = torment(robot(tmp_path / "run"), tmp_path / "run", kills=kills, updates=ROBOT_UPDATES, seed=kills)
    check(story, whole_robot, kills=kills, updates=ROBOT_UPDATES, checkpoint_every=ROBOT_CHECKPOINTS)


# ------------------------------------------------------------------ language


LANGUAGE_UPDATES, LANGUAGE_CHECKPOINTS = 100, 4
TASK = {"name": "random_walks", "random_walks": {"walks": 60}}


def language(folder: Path, base: Path) -> dict[str, Any]:
    """PPO on random walks, with an adaptive KL and self-imitation: all that a language run remembers."""
    return {
        "recipe": "llm/ppo",
        "run": {"folder": str(folder), "checkpoint_every": LANGUAGE_CHECKPOINTS, "wandb": "disabled", "seed": 3},
        "task": TASK,
        "model": {"path": str(base)},
        "sampling": {"updates": LANGUAGE_UPDATES, "prompts": 4, "samples_per_prompt": 2},
        "ppo": {"minibatch_size": 4, "critic_warmup": 2, "schedule": "linear"},
        "kl": {"coef": 0.05, "target": 1.0, "horizon": 100.0},
        "self_imitation": {"coef": 0.1},
        "validation": {"every": 25, "samples": 2, "prompts": 4},
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has seen a few walks."""
    from llm_rlhf import train_sft

    config = {
        "run": {"folder": str(tmp_path_factory.mktemp("base") / "run"), "wandb": "disabled"},
        "task": TASK,
        "model": {"layers": 1, "width": 16, "heads": 2, "context": 16},
        "sft": {"steps": 40, "batch_size": 16},
        "validation": {"every": 0},
    }
    return train_sft.train(build_from_dict(config, train_sft.TrainSFTConfig)).folder


@pytest.fixture(scope="module")
def whole_language(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("language") / "whole"
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(language(folder, base)))
    live(command("train", file), folder.with_suffix(".log"))
    return folder


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_a_language_learner_survives_kills_to_the_bit(
    kills: int, base: Path, whole_language: Path, tmp_path: Path
) -> None:
    config = language(tmp_path / "run", base)
    story = torment(config, tmp_path / "run", kills=kills, updates=LANGUAGE_UPDATES, seed=kills)
    check(story, whole_language, kills=kills, updates=LANGUAGE_UPDATES, checkpoint_every=LANGUAGE_CHECKPOINTS)
