"""What a run shows, on a terminal and elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from experiment.progress import Progress, format_seconds


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(*, terminal: bool) -> tuple[Progress, Clock, io.StringIO]:
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=terminal, width=100, color_system=None)
    return Progress("demo", console=console, interval=5, clock=clock), clock, out


def test_plain_lines_are_rare_and_the_last_one_is_always_there() -> None:
    progress, clock, out = make(terminal=False)
    progress.start(total=20, step=0)
    for step in range(1, 13):
        clock.now += 1
        metrics = {"train/loss": 1 / step, "env/success_once": 0.5, "env_steps": 1000 * step, "time/elapsed": 9.0}
        progress.update(step, metrics)
    progress.close()
    lines = out.getvalue().splitlines()
    assert lines == [
        "step 1/20  env_steps 1,000  1 steps/s  19s left  env/success_once 0.5  train/loss 1",
        "step 6/20  env_steps 6,000  1 steps/s  14s left  env/success_once 0.5  train/loss 0.1667",
        "step 11/20  env_steps 11,000  1 steps/s  9s left  env/success_once 0.5  train/loss 0.09091",
        "step 12/20  env_steps 12,000  1 steps/s  8s left  env/success_once 0.5  train/loss 0.08333",
    ]


def test_nothing_is_repeated_at_the_end() -> None:
    progress, _, out = make(terminal=False)
    progress.start(total=2, step=0)
    progress.update(1, {"a": 1.0})
    progress.close()
    assert len(out.getvalue().splitlines()) == 1


def test_rate_follows_the_last_fifty_steps_and_starts_where_a_resumed_run_starts() -> None:
    progress, clock, _ = make(terminal=False)
    progress.start(total=1000, step=500)
    assert progress.rate is None
    assert progress.time_left is None
    clock.now += 2
    progress.update(501, {})
    assert progress.rate == pytest.approx(0.5)
    assert progress.time_left == pytest.approx(499 / 0.5)
    progress.update(501, {"eval/success": 1.0})  # a second row for the same step is no progress
    for step in range(502, 602):
        clock.now += 0.1
        progress.update(step, {})
    assert progress.rate == pytest.approx(10)


def test_the_panel_on_a_terminal() -> None:
    progress, clock, out = make(terminal=True)
    progress.start(total=10, step=0)
    clock.now += 1
    progress.update(1, {f"train/m{i}": float(i) for i in range(20)} | {"eval/success_rate": 0.75, "tokens": 64})
    progress.message("saved [a checkpoint]")
    progress.close()
    length = len(out.getvalue())
    progress.close()
    text = out.getvalue()
    assert len(text) == length
    assert "demo" in text
    assert "step 1/10  tokens 64  1 steps/s  9s left" in text
    assert "saved [a checkpoint]" in text
    assert "and 7 more in metrics.jsonl" in text
    assert text.index("eval/success_rate") < text.index("train/m0")


@pytest.mark.parametrize(
    "seconds, text", [(9.4, "9s"), (59.6, "1m00s"), (127, "2m07s"), (3900, "1h05m"), (0, "0s")]
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
