"""What the verbs do, with a small recipe that uses the real run folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from experiment.errors import UserError
from experiment.run import Run, RunConfig, RunResult
from tandem import cli, verbs


@dataclass(frozen=True)
class ToyConfig:
    run: RunConfig = field(default_factory=lambda: RunConfig(name="toy", checkpoint_every=1))
    updates: int = 3
    rate: float = 0.5


@dataclass(frozen=True)
class ToyEvaluation:
    seed: int = 0


folders: list[Path] = []


def train(config: ToyConfig, *, resume: Path | None = None) -> RunResult:
    with Run.start(config, recipe="toy/sum", resume=resume) as run:
        folders.append(run.folder)
        first = 1 if run.checkpoint is None else run.checkpoint.step + 1
        last = 1 if config.run.dry_run else config.updates
        run.begin_loop(last)
        for step in range(first, last + 1):
            run.log({"train/loss": config.rate / step}, global_step=step)
            run.save({}, global_step=step)
        return run.finish()


def evaluate_run(run_folder: Path, config: ToyEvaluation) -> dict[str, object]:
    (run_folder / "eval.json").write_text("{}")
    return {"seed": config.seed, "test": {"solved": 0.25, "solved_interval": [0.2, 0.3]}}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration of the toy recipe, in an empty working folder."""
    toy = types.ModuleType("toy")
    toy.__dict__.update(train=train, ToyConfig=ToyConfig, EvaluateConfig=ToyEvaluation, evaluate_run=evaluate_run)
    monkeypatch.setitem(sys.modules, "toy", toy)
    monkeypatch.setattr("tandem.recipes.RECIPES", {"toy/sum": ("toy", "ToyConfig")})
    monkeypatch.setattr("tandem.recipes.EVALUATORS", {"toy": "toy"})
    monkeypatch.chdir(tmp_path)
    folders.clear()
    path = tmp_path / "toy.yaml"
    path.write_text("recipe: toy/sum\nupdates: 2\n")
    return path


def test_train_says_where_the_run_is_and_what_comes_next(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(config), "run.folder=runs/a b"]) == 0
    out = capsys.readouterr().out
    assert "run       runs/a b" in out
    assert "tandem eval 'runs/a b'" in out
    assert "tandem resume 'runs/a b'" in out
    assert len(Path("runs/a b/metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ruun.seed=1", "error: command line: ruun: unknown key; did you mean run?"),
        ("updates=two", "error: command line: updates: expected an integer, got 'two'"),
    ],
)
def test_wrong_overrides(config: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(config), override]) == 2
    assert capsys.readouterr().err.splitlines() == [message]
    assert not Path("runs").exists()


def test_a_mistake_in_the_file_names_the_line(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text("recipe: toy/sum\nupdate: 2\n")
    assert cli.main(["train", str(config)]) == 2
    assert capsys.readouterr().err == f"error: {config}:2: update: unknown key; did you mean updates?\n"


def test_dry_run_is_one_update_and_leaves_nothing(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(config), "--dry-run"]) == 0
    assert capsys.readouterr().out == "dry run passed\n"
    assert len(folders) == 1
    assert not folders[0].exists()
    assert not Path("runs").exists()


def test_resume_goes_on_where_the_run_stopped(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(config), "run.folder=runs/a"]) == 0
    saved = Path("runs/a/config.yaml")
    saved.write_text(saved.read_text().replace("updates: 2", "updates: 3"))
    assert cli.main(["resume", "a"]) == 0
    assert len(Path("runs/a/metrics.jsonl").read_text().splitlines()) == 3
    assert "tandem compare runs/a OTHER_RUN" in capsys.readouterr().out


def test_eval_prints_the_table(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["train", str(config), "run.folder=runs/a"])
    capsys.readouterr()
    assert cli.main(["eval", "runs/a", "seed=7"]) == 0
    out = capsys.readouterr().out
    cells = [line.split() for line in out.splitlines()]
    assert ["seed", "7"] in cells
    assert ["test/solved", "0.25", "0.2", "to", "0.3"] in cells
    assert "written to runs/a/eval.json" in out


def test_intervals_stand_beside_their_number() -> None:
    flat = {"episodes": 200, "success": 0.5, "success_low": 0.43, "success_high": 0.57, "note": "text", "x_low": 1}
    assert list(verbs.result_rows(flat)) == [
        ("episodes", "200", ""),
        ("success", "0.5", "0.43 to 0.57"),
        ("x_low", "1", ""),
    ]
    nested = {"test": {"solved": 0.125, "solved_interval": [0.1, 0.15]}}
    assert list(verbs.result_rows(nested)) == [("test/solved", "0.125", "0.1 to 0.15")]


def test_eval_refuses_an_unknown_setting(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["train", str(config), "run.folder=runs/a"])
    capsys.readouterr()
    assert cli.main(["eval", "runs/a", "sed=7"]) == 2
    assert capsys.readouterr().err == "error: command line: sed: unknown key; did you mean seed?\n"


def test_compare_prints_the_difference(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["train", str(config), "run.folder=runs/a"])
    cli.main(["train", str(config), "run.folder=runs/b", "rate=0.25"])
    capsys.readouterr()
    assert cli.main(["compare", "a", "runs/b", "--save", "c.png", "--metric", "train/*"]) == 0
    out = capsys.readouterr().out
    assert "rate" in out
    assert "updates" not in out
    assert Path("c.png").read_bytes().startswith(b"\x89PNG")


def test_config_show_is_a_valid_configuration(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "show", str(config), "rate=2"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("recipe: toy/sum\n")
    assert "rate: 2" in text
    assert "checkpoint_every: 1" in text
    config.write_text(text)
    assert cli.main(["config", "show", str(config)]) == 0
    assert capsys.readouterr().out == text


def test_find_run(config: Path) -> None:
    cli.main(["train", str(config), "run.folder=runs/walks"])
    assert verbs.find_run("walks") == Path("runs/walks")
    assert verbs.find_run("runs/walks") == Path("runs/walks")
    with pytest.raises(UserError, match=r"^runs/wlaks: no such run; did you mean walks\?$"):
        verbs.find_run("runs/wlaks")
    with pytest.raises(UserError, match="not a run folder"):
        verbs.find_run("runs")


def test_find_run_where_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there are no runs under runs/ here"):
        verbs.find_run("x")


INTERRUPTED = """
import signal, sys
import tests.tandem.test_verbs as toy
from experiment.run import Run
import tandem.recipes
from tandem.cli import main
sys.modules["toy"] = toy
tandem.recipes.RECIPES = {"toy/sum": ("toy", "ToyConfig")}
log = Run.log
def interrupt(self, metrics, *, global_step):
    log(self, metrics, global_step=global_step)
    if global_step == 2:
        signal.raise_signal(signal.SIGINT)
Run.log = interrupt
sys.exit(main(["train", "toy.yaml", "run.folder=runs/a", "updates=5"]))
"""


def test_control_c_says_how_to_go_on(config: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 128 + signal.SIGINT
    assert "continue with: tandem resume runs/a" in done.stderr
    assert "Traceback" not in done.stderr
