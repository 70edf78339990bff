"""metrics.jsonl, line by line."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from experiment.errors import UserError
from experiment.metrics import MetricsFile, WandbSink, read_metrics, resolve_mode, to_number, without_time


def test_lines_and_offset(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    file = MetricsFile(path)
    file.write({"global_step": 1, "a": 0.1})
    assert path.read_text() == '{"global_step": 1, "a": 0.1}\n'  # there at once, without a close
    offset = file.sync()
    assert offset == path.stat().st_size == 29
    file.write({"global_step": 2})
    file.close()
    file.close()
    again = MetricsFile(path, keep_bytes=offset)
    again.write({"global_step": 2, "a": 0.2})
    again.close()
    assert read_metrics(path) == [{"global_step": 1, "a": 0.1}, {"global_step": 2, "a": 0.2}]


def test_a_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"a": 1}\n{"a": 2')
    assert read_metrics(path) == [{"a": 1}]
    file = MetricsFile(path)
    file.write({"a": 3})
    file.close()
    assert path.read_text() == '{"a": 1}\n{"a": 3}\n'
    # An offset beyond the end (the machine lost power before the file was flushed) must not pad it with zeros.
    MetricsFile(path, keep_bytes=1000).close()
    assert path.read_text() == '{"a": 1}\n{"a": 3}\n'
    # An offset inside a line cuts that line.
    MetricsFile(path, keep_bytes=12).close()
    assert path.read_text() == '{"a": 1}\n'
    MetricsFile(path, keep_bytes=0).close()
    assert path.read_text() == ""


def test_non_finite_numbers_are_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    file = MetricsFile(path)
    file.write({"a": math.nan, "b": math.inf, "c": -math.inf})
    file.close()

    def refuse(text: str) -> None:
        raise AssertionError(text)

    assert json.loads(path.read_text(), parse_constant=refuse) == {"a": "NaN", "b": "Infinity", "c": "-Infinity"}
    (row,) = read_metrics(path)
    assert math.isnan(row["a"])
    assert (row["b"], row["c"]) == (math.inf, -math.inf)


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    for bad in ("nonsense", "[1]", '{"a": [1]}'):
        path.write_text(f'{{"a": 1}}\n{bad}\n{{"a": 3}}\n')
        with pytest.raises(UserError, match=r"m\.jsonl:2: damaged line"):
            read_metrics(path)
    with pytest.raises(UserError, match="cannot read the metrics"):
        read_metrics(tmp_path / "nowhere.jsonl")


def test_disk_full_keeps_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.jsonl"
    file = MetricsFile(path)
    file.write({"a": 1})
    real_write = os.write

    def half_then_full(descriptor: int, data: bytes) -> int:
        if len(data) < 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_write(descriptor, data[:5])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half_then_full)
        with pytest.raises(UserError, match=r"m\.jsonl: cannot write .no space left"):
            file.write({"a": 2})
    assert path.read_text() == '{"a": 1}\n'
    file.write({"a": 3})
    assert read_metrics(path) == [{"a": 1}, {"a": 3}]
    file.close()


@pytest.mark.parametrize(
    "value, number",
    [
        (1, 1), (0.5, 0.5), (True, 1), (torch.tensor(2.5), 2.5), (torch.tensor(3), 3), (np.float32(0.5), 0.5),
        (np.int64(4), 4), (np.array(1.5), 1.5), (np.bool_(True), 1),
    ],
)  # fmt: skip
def test_numbers(value: Any, number: float) -> None:
    found = to_number("a", value)
    assert found == number
    assert type(found) is type(number)


@pytest.mark.parametrize("value", ["1", None, [1.0], torch.ones(1), torch.ones(2), np.ones(1), 1j])
def test_what_is_not_a_number(value: Any) -> None:
    with pytest.raises(TypeError, match="metric a: expected a number"):
        to_number("a", value)


def test_without_time() -> None:
    assert without_time({"a": 1, "time/fps": 2, "timely": 3}) == {"a": 1, "timely": 3}


# ---------------------------------------------------------------- wandb, faked


def sink(warnings: list[str], **changes: Any) -> WandbSink:
    arguments: dict[str, Any] = {
        "mode": "auto", "folder": Path("somewhere"), "project": "p", "group": "g", "name": "n", "identity": "id1",
        "resumed": False, "config": {"a": 1}, "warn": warnings.append,
    }  # fmt: skip
    return WandbSink(**{**arguments, **changes})


def test_rows_carry_every_counter_and_never_a_step(fake_wandb: SimpleNamespace) -> None:
    warnings: list[str] = []
    wandb = sink(warnings)
    wandb.log({"global_step": 1, "env_steps": 8, "train/loss": 0.5})
    wandb.log({"global_step": 2, "tokens": 100})
    wandb.log({"global_step": 2, "eval/success": 0.9})
    wandb.log_image("plot", Path("plot.png"), 3)
    wandb.finish(0)
    arguments = fake_wandb.calls[0][1]
    assert (arguments["mode"], arguments["id"], arguments["resume"], arguments["config"]) == (
        "offline", "id1", None, {"a": 1},
    )  # fmt: skip
    defined = dict(value for name, value in fake_wandb.calls if name == "define_metric")
    assert set(defined) == {"global_step", "env_steps", "episodes", "tokens", "samples", "*"}
    assert defined["*"] == {"step_metric": "global_step"}
    assert [value for name, value in fake_wandb.calls if name == "log"] == [
        {"global_step": 1, "env_steps": 8, "train/loss": 0.5},
        {"global_step": 2, "env_steps": 8, "tokens": 100},
        {"global_step": 2, "env_steps": 8, "tokens": 100, "eval/success": 0.9},
        {"global_step": 3, "env_steps": 8, "tokens": 100, "plot": "plot.png"},
    ]
    assert fake_wandb.calls[-1] == ("finish", 0)
    assert warnings == []


@pytest.mark.parametrize("where", ["init", "define_metric", "log", "finish"])
def test_a_failure_warns_once_and_goes_silent(fake_wandb: SimpleNamespace, where: str) -> None:
    fake_wandb.fail.add(where)
    warnings: list[str] = []
    wandb = sink(warnings)
    for step in (1, 2):
        wandb.log({"global_step": step})
        wandb.log_table("t", ["a"], [[1]], step)
    wandb.finish(0)
    wandb.finish(0)
    assert not wandb.active
    what = "init" if where == "define_metric" else where
    assert warnings == [f"warning: wandb {what} failed, the run goes on without it: no {where} today"]
    assert sum(name == where for name, _ in fake_wandb.calls) == 1


def test_a_missing_wandb_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    warnings: list[str] = []
    wandb = sink(warnings)
    wandb.log({"global_step": 1})
    assert len(warnings) == 1


def test_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fake_wandb: SimpleNamespace) -> None:
    assert resolve_mode("auto") == "offline"
    assert resolve_mode("online") == "online"
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai\n  login user\n  password not-a-key\n")
    monkeypatch.setenv("NETRC", str(netrc))
    assert resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    assert resolve_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "not-a-key")
    assert resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_mode("auto") == "disabled"
    assert not sink([]).active
    assert fake_wandb.calls == []
    assert sink([], mode="offline", resumed=True).active
    assert fake_wandb.calls[0][1]["resume"] == "allow"
