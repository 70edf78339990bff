"""A run killed at any moment continues bit for bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiment import checkpoint as checkpoint_module
from experiment.checkpoint import Checkpoints
from experiment.metrics import MetricsFile, read_metrics
from experiment.run import Run

Patch = pytest.MonkeyPatch


def on_call(number: int, action: Callable[..., Any], real: Callable[..., Any]) -> Callable[..., Any]:
    """`real`, except that call `number` (from 1) runs `action` first."""
    count = 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            action(*arguments, **options)
        return real(*arguments, **options)

    return wrapped


def patch_call(patch: Patch, owner: Any, name: str, number: int, action: Callable[..., Any]) -> None:
    patch.setattr(owner, name, on_call(number, action, getattr(owner, name)))


def half_a_line(kill: Callable[..., None]) -> Callable[..., None]:
    def action(file: MetricsFile, row: Any) -> None:
        os.write(file._descriptor, b'{"global_step": 6, "train/lo')
        kill()

    return action


# What dies, and from which checkpoint the resumed run then continues. The toy run saves at 4, 8 and 12, keeps one
# and calls save_state twice per save.
MOMENTS: dict[str, tuple[Callable[[Patch, Any], None], int | None]] = {
    "before the first checkpoint": (lambda p, k: patch_call(p, MetricsFile, "write", 3, k), None),
    "inside the first metrics line": (lambda p, k: patch_call(p, MetricsFile, "write", 1, half_a_line(k)), None),
    "inside the first checkpoint": (lambda p, k: patch_call(p, checkpoint_module, "save_state", 2, k), None),
    "inside a metrics line": (lambda p, k: patch_call(p, MetricsFile, "write", 6, half_a_line(k)), 4),
    "inside a later checkpoint": (lambda p, k: patch_call(p, checkpoint_module, "save_state", 4, k), 4),
    "before the flush": (lambda p, k: patch_call(p, checkpoint_module, "_flush", 2, k), 4),
    "before the rename": (lambda p, k: patch_call(p, Checkpoints, "_publish", 2, k), 4),
    "between rename and links": (lambda p, k: patch_call(p, Checkpoints, "relink", 2, k), 8),
    "between the two links": (lambda p, k: patch_call(p, Path, "symlink_to", 4, k), 8),
    "between making and placing a link": (lambda p, k: patch_call(p, Path, "replace", 6, k), 8),
    "before the old one is dropped": (lambda p, k: patch_call(p, Checkpoints, "_prune", 2, k), 8),
    "while the old one is deleted": (lambda p, k: patch_call(p, shutil, "rmtree", 3, k), 8),
    "after the last checkpoint": (lambda p, k: patch_call(p, Checkpoints, "_prune", 3, k), 12),
}


@pytest.fixture
def reference(toy: SimpleNamespace, tmp_path: Path) -> Any:
    toy.train(toy.config(tmp_path / "reference", keep=1))
    return toy.outcome(tmp_path / "reference")


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed(
    toy: SimpleNamespace,
    tmp_path: Path,
    same: Callable[..., None],
    reference: Any,
    moment: str,
    monkeypatch: Patch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, folder = toy.config(tmp_path / "r", keep=1), tmp_path / "r"
    prepare, expected = MOMENTS[moment]
    with monkeypatch.context() as patch:
        prepare(patch, toy.kill_self)
        status = toy.in_child(lambda: toy.train(config))
    assert os.WIFSIGNALED(status), "the run was to be killed"
    assert os.WTERMSIG(status) == signal.SIGKILL
    toy.train(config, resume=folder)
    where = "from the beginning" if expected is None else f"from step {expected}"
    assert f"toy: resuming {folder} {where}\n" in capsys.readouterr().err
    same(toy.outcome(folder), reference)
    assert not list(folder.rglob(".tmp*"))
    assert not list(folder.rglob(".old*"))
    best = os.readlink(folder / "checkpoints" / "best")
    assert best == os.readlink(tmp_path / "reference" / "checkpoints" / "best")
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"000000012", best, "best", "last"}


def test_links_are_mended_before_anything_else(toy: SimpleNamespace, tmp_path: Path, monkeypatch: Patch) -> None:
    config, folder = toy.config(tmp_path / "r", keep=1), tmp_path / "r"
    with monkeypatch.context() as patch:
        patch_call(patch, Checkpoints, "relink", 2, toy.kill_self)
        toy.in_child(lambda: toy.train(config))
    assert os.readlink(folder / "checkpoints" / "last") == "000000004"
    with Run.start(config, recipe="toy", resume=folder) as run:
        assert run.checkpoint is not None
        assert run.checkpoint.step == 8
    assert os.readlink(folder / "checkpoints" / "last") == "000000008"


def test_a_chain_of_kills_at_random_moments(
    toy: SimpleNamespace, tmp_path: Path, same: Callable[..., None], reference: Any
) -> None:
    """Kills fall anywhere in the child's whole life, whatever the machine's speed; a run that ends is followed by
    another, until enough were killed."""
    pause = 0.01  # a step of the child, so that its life is mostly loop

    def life(folder: Path) -> None:
        resume = folder if (folder / "config.yaml").exists() else None
        toy.train(toy.config(folder, keep=1), resume=resume, each_step=lambda step: time.sleep(pause))

    started = time.monotonic()
    toy.in_child(lambda: life(tmp_path / "timed"))
    lifetime = time.monotonic() - started
    delays, kills, number = random.Random(0), 0, 0
    while kills < 12:
        folder = tmp_path / f"r{number}"
        child = os.fork()
        if child == 0:
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                life(folder)
            finally:
                os._exit(0)
        time.sleep(delays.uniform(0.05, 1.0) * lifetime)
        os.kill(child, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        kills += killed
        if not killed:
            same(toy.outcome(folder), reference)
            number += 1
    folder = tmp_path / f"r{number}"
    toy.train(toy.config(folder, keep=1), resume=folder if (folder / "config.yaml").exists() else None)
    same(toy.outcome(folder), reference)


def test_resuming_a_finished_run_changes_nothing(
    toy: SimpleNamespace, tmp_path: Path, same: Callable[..., None], reference: Any
) -> None:
    config = toy.config(tmp_path / "reference", keep=1)
    result = toy.train(config, resume=tmp_path / "reference")
    same(toy.outcome(tmp_path / "reference"), reference)
    assert result.metrics["global_step"] == 12
    assert result.metrics["train/loss"] == reference[0][-1]["train/loss"]
    assert "best/step" in result.metrics


def test_elapsed_time_counts_across_a_resume(toy: SimpleNamespace, tmp_path: Path) -> None:
    config = toy.config(tmp_path / "r")
    toy.train(config, each_step=lambda step: time.sleep(0.2) if step == 2 else None)
    with (tmp_path / "r" / "metrics.jsonl").open("a") as file:
        file.write('{"global_step": 99, "train/loss": 0, "time/elapsed": 5}\n')
    shutil.rmtree(tmp_path / "r" / "checkpoints" / "000000012")
    toy.train(config, resume=tmp_path / "r")
    rows = read_metrics(tmp_path / "r" / "metrics.jsonl")
    assert [row["global_step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["time/elapsed"] > 0.2
