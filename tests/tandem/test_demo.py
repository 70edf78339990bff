"""The demo's last screen, and the whole of it with one update everywhere."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tandem import demo
from tandem.demo import TASKS, Measure, Outcome
from tandem.demo_robot import RobotOutcome


def result(value: float) -> dict[str, dict[str, object]]:
    numbers = dict.fromkeys(("sampled", "greedy_solved"), value)
    intervals = {f"{name}_interval": [value - 0.05, value + 0.05] for name in numbers}
    return {"prompted": {**numbers, **intervals}, "test": {**numbers, **intervals}}


def test_a_cell_shows_value_and_interval() -> None:
    assert demo.cell(result(0.5), Measure("test", "sampled", "")) == "0.50 [0.45, 0.55]"


def outcomes(root: Path) -> dict[str, Outcome]:
    values = {"before": 0.25, "after": 0.75, "control": 0.3}
    return {
        task.name: Outcome(
            {name: root / f"{task.name}-{name}" for name in values},
            {name: result(value) for name, value in values.items()},
            root / f"{task.name}.png",
        )
        for task in TASKS
    }


def test_the_last_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    root = Path("runs/demo x")
    (root / "slip-after" / "wandb" / "offline-run-1").mkdir(parents=True)
    demo.show(outcomes(root), root)
    out = capsys.readouterr().out
    assert out.count("0.25 [0.20, 0.30]   0.75 [0.70, 0.80]   0.30 [0.25, 0.35]") == 4
    for expected in ("walks.png", "slip.png", "runs/demo x/*/wandb, offline"):
        assert expected in out
    command = (
        "  tandem compare 'runs/demo x/slip-after' 'runs/demo x/slip-control' --metric 'eval/*' --over samples"
    )
    assert command in out.splitlines()


def test_the_robots_part_of_the_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def suite(value: float) -> dict[str, object]:
        counts: dict[str, object] = {"success_once": value, "success_once_interval": [value - 0.1, value + 0.1]}
        return {**counts, "tasks": dict.fromkeys(("reach", "push", "pick"), counts)}

    robot = RobotOutcome(
        tmp_path / "clone", tmp_path / "ppo", suite(0.25), suite(0.75), tmp_path / "a.png", tmp_path / "b.png"
    )
    demo.show(outcomes(tmp_path), tmp_path, robot)
    out = capsys.readouterr().out
    assert out.count("0.25 [0.15, 0.35]   0.75 [0.65, 0.85]") == 4
    assert f"  tandem watch {tmp_path / 'ppo'} --say 'push the red cube to the white pad'" in out.splitlines()


def test_wandb_is_not_mentioned_where_it_was_off(tmp_path: Path) -> None:
    assert demo.wandb_lines(tmp_path) == []


def test_the_last_step_is_read_from_the_metrics(tmp_path: Path) -> None:
    rows = [{"global_step": 1, "time/elapsed": 1.5}, {"global_step": 7, "time/elapsed": 9.25}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert demo.last_step(tmp_path) == (7, 9.25)


@pytest.mark.slow
def test_the_whole_demo_with_one_update_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "demo"
    assert demo.run_demo(folder=root, dry_run=True) == 0
    runs = {f"{task.name}-{kind}" for task in TASKS for kind in ("sft", "ppo", "more-sft")}
    robots = {"robot-demonstrations", "robot-clone", "robot-ppo"}
    assert {path.name for path in root.iterdir() if path.is_dir()} == runs | robots
    assert (root / "robot-ppo" / "videos" / "eval.png").is_file()
    for name in runs:
        splits = json.loads((root / name / "eval.json").read_text())["splits"]
        assert all(math.isfinite(numbers["sampled"]) for numbers in splits.values())
    assert {path.name for path in root.glob("*.png")} == {"walks.png", "slip.png", "robot.png"}
    out = capsys.readouterr().out
    assert "before and after PPO" in out
    assert "success, all three tasks" in out
