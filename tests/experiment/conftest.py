"""A tiny recipe with every kind of state, and ways to kill it."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from experiment.checkpoint import load_checkpoint
from experiment.metrics import read_metrics, without_time
from experiment.run import Run, RunConfig, RunResult


@dataclass(frozen=True)
class ToyConfig:
    run: RunConfig = field(default_factory=RunConfig)
    steps: int = 12


def toy_train(
    config: ToyConfig, *, resume: Path | None = None, each_step: Callable[[int], None] = lambda step: None
) -> RunResult:
    """Linear regression on noise from four generators: python, numpy, torch and one of its own."""
    with Run.start(config, recipe="toy", resume=resume) as run:
        model = torch.nn.Linear(3, 1)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        generator = np.random.default_rng(7)
        first = 1
        if run.checkpoint is not None:
            state = run.checkpoint.state
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            generator.bit_generator.state = state["generator"]
            first = run.checkpoint.step + 1
        run.begin_loop(config.steps)
        for step in range(first, config.steps + 1):
            noise = random.random() + np.random.rand() + float(generator.normal())
            loss = model(torch.randn(8, 3) + noise).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log({"train/loss": loss, "env_steps": 8 * step}, global_step=step)
            each_step(step)
            if run.should_save(step):
                run.save(
                    {
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "generator": generator.bit_generator.state,
                    },
                    global_step=step,
                    folders={"policy": write_weights},
                    metric=-loss.item(),
                )
        return run.finish()


def write_weights(folder: Path) -> None:
    (folder / "weights.txt").write_text("weights")


def toy_config(folder: Path, **run: Any) -> ToyConfig:
    return ToyConfig(run=RunConfig(**{"folder": str(folder), "checkpoint_every": 4, "wandb": "disabled", **run}))


def outcome(folder: Path) -> tuple[list[dict[str, float]], Any, dict[str, Any]]:
    """What must be equal for two runs to be the same: metrics without time, final state, random generators."""
    newest = load_checkpoint(folder / "checkpoints" / "last")
    rows = [without_time(row) for row in read_metrics(folder / "metrics.jsonl")]
    return rows, newest.state, newest.rng


def in_child(action: Callable[[], Any]) -> int:
    """Run in a forked process and return its wait status; forking keeps the patches that a test has made."""
    child = os.fork()
    if child == 0:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (the process ends below, whatever happens)
        try:
            action()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def kill_self(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def assert_same(left: Any, right: Any, path: str = "state") -> None:
    """Equal to the last bit, with the same types all the way down."""
    assert type(left) is type(right), path
    if isinstance(left, dict):
        assert list(left) == list(right), path
        for key in left:
            assert_same(left[key], right[key], f"{path}/{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), path
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{path}/{index}")
    elif isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, path
        assert left.shape == right.shape, path
        assert left.contiguous().view(-1).view(torch.uint8).equal(right.contiguous().view(-1).view(torch.uint8)), (
            path
        )
    elif isinstance(left, np.ndarray | np.generic):
        assert left.dtype.str == right.dtype.str, path
        assert left.shape == right.shape, path
        assert left.tobytes() == right.tobytes(), path
    elif isinstance(left, float) and left != left:
        assert right != right, path
    else:
        assert left == right, path
        assert repr(left) == repr(right), path  # tells -0.0 from 0.0


@pytest.fixture
def toy() -> SimpleNamespace:
    """The helpers above; test modules cannot import one another."""
    return SimpleNamespace(
        train=toy_train,
        config=toy_config,
        Config=ToyConfig,
        outcome=outcome,
        in_child=in_child,
        kill_self=kill_self,
    )


@pytest.fixture
def same() -> Callable[..., None]:
    return assert_same


@pytest.fixture(autouse=True)
def _no_wandb_account(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test may reach a server with the key of whoever runs it."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for the wandb module that records calls and fails where `fail` says so."""
    calls: list[tuple[str, Any]] = []
    fail: set[str] = set()

    def record(name: str, value: Any = None) -> None:
        calls.append((name, value))
        if name in fail:
            raise RuntimeError(f"no {name} today")

    run = SimpleNamespace(
        define_metric=lambda name, **options: record("define_metric", (name, options)),
        log=lambda row: record("log", row),
        finish=lambda exit_code: record("finish", exit_code),
    )

    def init(**arguments: Any) -> SimpleNamespace:
        record("init", arguments)
        return run

    module = SimpleNamespace(
        init=init,
        Settings=dict,
        Table=dict,
        Image=lambda path: path,
        Video=lambda path, format: path,
        calls=calls,
        fail=fail,
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module
