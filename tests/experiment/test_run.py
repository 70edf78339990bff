"""A run from start to finish, and every way it can end early short of a kill."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from experiment import run as run_module
from experiment.checkpoint import load_checkpoint
from experiment.config import build, read_tree
from experiment.errors import NonFiniteMetric, UserError
from experiment.metrics import read_metrics
from experiment.run import Metric, Run, RunConfig


def start(toy: SimpleNamespace, folder: Path, **changes: Any) -> Run:
    return Run.start(toy.config(folder, **changes), recipe="toy")


def test_a_metric_of_a_higher_rank_beats_all_of_a_lower_one(toy: SimpleNamespace, tmp_path: Path) -> None:
    """And a resumed run knows which that was."""
    kept: list[str] = []

    def save(run: Run, step: int, metric: float | Metric) -> None:
        run.log({"train/loss": 1.0}, global_step=step)
        run.save({}, global_step=step, folders={}, metric=metric)
        kept.append(os.readlink(tmp_path / "r" / "checkpoints" / "best"))

    with start(toy, tmp_path / "r") as run:
        run.begin_loop(6)
        save(run, 1, 900.0)
        save(run, 2, Metric(0.1, rank=1))
        save(run, 3, 950.0)
    with Run.start(toy.config(tmp_path / "r"), recipe="toy", resume=tmp_path / "r") as run:
        run.begin_loop(6)
        save(run, 4, Metric(970.0))
        save(run, 5, Metric(float("nan"), rank=1))
        save(run, 6, Metric(0.2, rank=1))
        result = run.finish()
    assert kept == ["000000001", *["000000002"] * 4, "000000006"]
    assert (result.metrics["best/step"], result.metrics["best/metric"]) == (6, 0.2)
    assert not any("rank" in name for name in result.metrics)


def test_a_whole_run(toy: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = toy.config(tmp_path / "r")
    result = toy.train(config)
    folder = tmp_path / "r"
    assert result.folder == folder
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["global_step"] for row in rows] == list(range(1, 13))
    assert list(rows[0]) == ["global_step", "train/loss", "env_steps", "time/elapsed"]
    assert result.metrics["train/loss"] == rows[-1]["train/loss"]
    assert result.metrics["env_steps"] == 96
    saved = {row["global_step"]: -row["train/loss"] for row in rows if row["global_step"] % 4 == 0}
    best = max(saved, key=lambda step: saved[step])
    assert (result.metrics["best/step"], result.metrics["best/metric"]) == (best, saved[best])
    assert os.readlink(folder / "checkpoints" / "last") == "000000012"
    assert os.readlink(folder / "checkpoints" / "best") == f"{best:09d}"
    assert (folder / "checkpoints" / "best" / "policy" / "weights.txt").is_file()

    tree = read_tree(folder / "config.yaml")
    assert tree.pop("recipe") == "toy"
    assert build(tree, toy.Config) == config
    record = json.loads((folder / "run.json").read_text())
    assert record["torch"] == torch.__version__
    assert not (folder / "wandb").exists()
    error = capsys.readouterr().err.splitlines()
    assert error[0] == f"toy: run {folder}"
    assert error[-2].startswith("step 12/12  env_steps 96")
    assert re.fullmatch(rf"finished after \d+s: {re.escape(str(folder))}", error[-1])


def test_seeds_and_threads(toy: SimpleNamespace, tmp_path: Path) -> None:
    draws = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        with start(toy, tmp_path / name, seed=seed, threads=2):
            draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
            assert torch.get_num_threads() == 2
    assert draws[0] == draws[1]
    assert all(x != y for x, y in zip(draws[0], draws[2], strict=True))


def test_default_folder(toy: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = toy.Config(run=RunConfig(name="demo", wandb="disabled"))
    with Run.start(config, recipe="toy") as first, Run.start(config, recipe="toy") as second:
        assert first.folder.parent == second.folder.parent == Path("runs")
        assert first.folder.name.startswith("demo-2")
        assert first.folder != second.folder


def test_a_used_folder_is_refused(toy: SimpleNamespace, tmp_path: Path) -> None:
    start(toy, tmp_path / "r").finish()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"r: the run folder is not empty; continue it with `tandem resume .*/r`"):
        start(toy, tmp_path / "r")
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: the run folder is not empty"):
        start(toy, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".lock").write_text("")
    start(toy, tmp_path / "empty").finish()


def test_resume_needs_a_run_folder(toy: SimpleNamespace, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="not a run folder"):
            Run.start(toy.config(folder), recipe="toy", resume=folder)


def test_two_processes_cannot_share_a_run(toy: SimpleNamespace, tmp_path: Path) -> None:
    config = toy.config(tmp_path / "r")
    with Run.start(config, recipe="toy"):

        def second() -> None:
            try:
                Run.start(config, recipe="toy", resume=tmp_path / "r")
            except UserError as error:
                if "another process is using this run" in str(error):
                    toy.kill_self()

        assert os.WTERMSIG(toy.in_child(second)) == signal.SIGKILL
    toy.train(config, resume=tmp_path / "r")


@pytest.mark.parametrize(
    "value, text", [(float("nan"), "nan"), (float("-inf"), "-inf"), (torch.tensor(float("inf")), "inf")]
)
def test_a_loss_that_is_not_finite_stops_the_run(
    toy: SimpleNamespace, tmp_path: Path, value: Any, text: str
) -> None:
    with start(toy, tmp_path / "r") as run:
        with pytest.raises(
            NonFiniteMetric, match=f"train/value_loss is {text} at global_step 4; no checkpoint was kept"
        ):
            run.log({"train/value_loss": value}, global_step=4)
        run.save({}, global_step=5)
        with pytest.raises(UserError) as caught:
            run.log({"train/value_loss": value}, global_step=6)
        assert str(caught.value) == (
            f"run {tmp_path}/r: train/value_loss is {text} at global_step 6; the last kept checkpoint is "
            f"{tmp_path}/r/checkpoints/000000005; a lower learning rate may help"
        )
        run.log({"eval/success": float("nan")}, global_step=7)
    rows = read_metrics(tmp_path / "r" / "metrics.jsonl")
    assert [row["global_step"] for row in rows] == [4, 6, 7]


def test_best_is_the_highest_and_never_nan(toy: SimpleNamespace, tmp_path: Path) -> None:
    with start(toy, tmp_path / "r", keep=1) as run:
        for step, metric in enumerate([float("nan"), -5.0, None, -7.0, -5.0, float("nan")], start=1):
            run.save({}, global_step=step, metric=metric)
            if step == 1:
                assert not (run.folder / "checkpoints" / "best").is_symlink()
        result = run.finish()
    assert (result.metrics["best/step"], result.metrics["best/metric"]) == (2, -5.0)
    names = sorted(path.name for path in (tmp_path / "r" / "checkpoints").iterdir())
    assert names == ["000000002", "000000006", "best", "last"]


def test_saving_does_not_disturb_the_generators(toy: SimpleNamespace, tmp_path: Path) -> None:
    def greedy_writer(folder: Path) -> None:
        torch.rand(3), np.random.rand(3), random.random()

    draws = []
    for name, writer in (("a", greedy_writer), ("b", lambda folder: None)):
        with start(toy, tmp_path / name) as run:
            run.save({}, global_step=1, folders={"policy": writer})
            draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert draws[0] == draws[1]


def test_tables_lie_beside_the_metrics(toy: SimpleNamespace, tmp_path: Path) -> None:
    with start(toy, tmp_path / "r") as run:
        run.log_table(
            "samples/text", ["prompt", "reward"], [["ü", 1.5], ["b", None], ["c", float("nan")]], global_step=30
        )
        with pytest.raises(ValueError, match="zip"):
            run.log_table("samples/text", ["prompt", "reward"], [["a"]], global_step=31)
    path = tmp_path / "r" / "tables" / "samples_text" / "000000030.jsonl"
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [
        {"prompt": "ü", "reward": 1.5}, {"prompt": "b", "reward": None}, {"prompt": "c", "reward": "NaN"},
    ]  # fmt: skip


def test_media_reach_wandb_and_must_exist(
    toy: SimpleNamespace, tmp_path: Path, fake_wandb: SimpleNamespace
) -> None:
    video = tmp_path / "a.mp4"
    video.write_bytes(b"")
    with start(toy, tmp_path / "r", wandb="offline") as run:
        run.log_video("eval/video", video, global_step=3)
        with pytest.raises(FileNotFoundError, match="no such file to log"):
            run.log_image("eval/plot", tmp_path / "nowhere.png", global_step=3)
    assert ("log", {"global_step": 3, "eval/video": str(video)}) in fake_wandb.calls


def test_wandb_gets_the_run(toy: SimpleNamespace, tmp_path: Path, fake_wandb: SimpleNamespace) -> None:
    config = toy.config(tmp_path / "r", wandb="offline", wandb_group="g")
    toy.train(config)
    arguments = fake_wandb.calls[0][1]
    identity = json.loads((tmp_path / "r" / "run.json").read_text())["id"]
    assert (arguments["id"], arguments["name"], arguments["group"], arguments["resume"]) == (
        identity,
        "r",
        "g",
        None,
    )
    assert arguments["dir"] == str(tmp_path / "r")
    assert arguments["config"]["recipe"] == "toy"
    assert arguments["config"]["run"]["seed"] == 0
    assert sum(name == "log" for name, _ in fake_wandb.calls) == 12
    assert fake_wandb.calls[-1] == ("finish", 0)

    fake_wandb.calls.clear()
    toy.train(config, resume=tmp_path / "r")
    assert (fake_wandb.calls[0][1]["id"], fake_wandb.calls[0][1]["resume"]) == (identity, "allow")

    fake_wandb.calls.clear()
    toy.train(toy.config(tmp_path / "dry", wandb="offline", dry_run=True))
    assert fake_wandb.calls == []


@pytest.mark.parametrize("where", ["init", "define_metric", "log", "finish"])
def test_wandb_failures_never_stop_a_run(
    toy: SimpleNamespace,
    tmp_path: Path,
    fake_wandb: SimpleNamespace,
    where: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake_wandb.fail.add(where)
    toy.train(toy.config(tmp_path / "r", wandb="offline"))
    assert len(read_metrics(tmp_path / "r" / "metrics.jsonl")) == 12
    assert capsys.readouterr().err.count("the run goes on without it") == 1


@pytest.mark.parametrize("number, error", [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_signals_close_everything(
    toy: SimpleNamespace,
    tmp_path: Path,
    fake_wandb: SimpleNamespace,
    number: signal.Signals,
    error: type[BaseException],
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    config = toy.config(tmp_path / "r", wandb="offline")
    with pytest.raises(error):
        toy.train(config, each_step=lambda step: signal.raise_signal(number) if step == 6 else None)
    assert signal.getsignal(signal.SIGTERM) is before
    assert fake_wandb.calls[-1] == ("finish", 1)
    assert len(read_metrics(tmp_path / "r" / "metrics.jsonl")) == 6
    said = capsys.readouterr().err
    assert "stopped at step 6, resuming goes back to step 4 (the newest checkpoint); continue with: " in said
    assert f"continue with: tandem resume {tmp_path}/r" in said
    toy.train(config, resume=tmp_path / "r")
    assert [row["global_step"] for row in read_metrics(tmp_path / "r" / "metrics.jsonl")] == list(range(1, 13))


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        (
            3,
            "stopped at step 3, resuming begins again (no checkpoint yet); continue",
        ),
        (5, "stopped at step 5, resuming goes back to step 4 (the newest checkpoint); continue with"),
    ],
)
def test_a_stopped_run_says_where_it_will_go_on(
    stop: int, said: str, toy: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        toy.train(
            toy.config(tmp_path / "r"),
            each_step=lambda step: signal.raise_signal(signal.SIGINT) if step == stop else None,
        )
    assert said in capsys.readouterr().err


def test_a_run_stopped_at_a_checkpoint_repeats_nothing(
    toy: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        with start(toy, tmp_path / "r") as run:
            run.begin_loop(3)
            run.log({"a": 1.0}, global_step=1)
            run.save({}, global_step=1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert f"stopped at step 1; continue with: tandem resume {tmp_path}/r" in capsys.readouterr().err


def test_a_full_disk_ends_the_run_and_making_room_continues_it(
    toy: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    config = toy.config(tmp_path / "r")
    with monkeypatch.context() as patch:
        fill = lambda step: patch.setattr("experiment.checkpoint.save_state", full) if step == 7 else None  # noqa: E731
        with pytest.raises(UserError, match=r"checkpoints/000000008: cannot write \(no space left on device\)"):
            toy.train(config, each_step=fill)
    assert os.readlink(tmp_path / "r" / "checkpoints" / "last") == "000000004"
    assert not list((tmp_path / "r").rglob(".tmp*"))
    toy.train(config, resume=tmp_path / "r")
    assert load_checkpoint(tmp_path / "r" / "checkpoints" / "last").step == 12


def test_a_changed_configuration_is_kept_beside_the_old_one(
    toy: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = toy.config(tmp_path / "r")
    toy.train(config)
    old = (tmp_path / "r" / "config.yaml").read_text()
    toy.train(replace(config, steps=16), resume=tmp_path / "r")
    assert (tmp_path / "r" / "config-before-resume-1.yaml").read_text() == old
    assert "steps: 16" in (tmp_path / "r" / "config.yaml").read_text()
    assert "the configuration has changed" in capsys.readouterr().err
    assert len(read_metrics(tmp_path / "r" / "metrics.jsonl")) == 16


def test_a_failed_start_lets_go_of_the_folder(
    toy: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    opened = len(os.listdir("/proc/self/fd"))
    for name in ("seed_everything", "_write_records"):
        with monkeypatch.context() as patch:
            patch.setattr(run_module, name, lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                start(toy, tmp_path / name)
    assert len(os.listdir("/proc/self/fd")) == opened
    assert signal.getsignal(signal.SIGTERM) is before


def test_finish_twice_and_errors_inside(toy: SimpleNamespace, tmp_path: Path, fake_wandb: SimpleNamespace) -> None:
    with start(toy, tmp_path / "r", wandb="offline") as run:
        run.log({"a": 1}, global_step=1)
        assert run.finish().metrics["a"] == 1
        assert run.finish().metrics["a"] == 1
    with pytest.raises(RuntimeError, match="boom"), start(toy, tmp_path / "s", wandb="offline") as run:
        raise RuntimeError("boom")
    assert [value for name, value in fake_wandb.calls if name == "finish"] == [0, 1]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"threads": 0}, "threads must be at least 1"), ({"keep": 0}, "keep must be at least 1"),
        ({"threads": 100_000}, "threads must be at most 1024"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"), ({"seed": -1}, "seed must be between"),
        ({"seed": 2**32}, "seed must be between"), ({"name": ""}, "name must be letters"),
    ],
)  # fmt: skip
def test_run_config_checks(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig(**changes)


def test_a_mistake_found_before_the_loop_leaves_no_folder(
    toy: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="no model"), start(toy, tmp_path / "r"):
        raise UserError("no model here")
    assert not (tmp_path / "r").exists()
    captured = capsys.readouterr()
    assert "continue with" not in captured.out + captured.err


def test_what_somebody_else_keeps_in_the_folder_stays(toy: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "r" / ".git").mkdir(parents=True)
    (tmp_path / "r" / ".git" / "HEAD").write_text("ref")
    with pytest.raises(UserError, match="no model"), start(toy, tmp_path / "r"):
        raise UserError("no model here")
    assert [path.name for path in (tmp_path / "r").iterdir()] == [".git"]
    assert (tmp_path / "r" / ".git" / "HEAD").read_text() == "ref"


def test_a_mistake_found_in_the_loop_leaves_the_run(toy: SimpleNamespace, tmp_path: Path) -> None:
    def diverge() -> None:
        with start(toy, tmp_path / "r") as run:
            run.begin_loop(3)
            raise UserError("diverged")

    with pytest.raises(UserError, match="diverged"):
        diverge()
    assert (tmp_path / "r" / "config.yaml").is_file()
