"""Runs side by side."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from experiment.compare import Summary, compare, config_differences, lower_is_better
from experiment.errors import UserError


def write_run(folder: Path, config: str, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def two_runs(tmp_path: Path) -> list[Path]:
    first = write_run(
        tmp_path / "a",
        "recipe: toy\nalgo: {lr: 0.1, clip: 0.2}\nrun: {name: a, folder: x, seed: 1}\ntags: [a, b]\n",
        [
            {"global_step": 1, "train/loss": 3.0, "env_steps": 10, "time/elapsed": 1},
            {"global_step": 2, "train/loss": 1.0, "env_steps": 20, "time/elapsed": 2},
            {"global_step": 2, "eval/success_rate": 0.7},
            {"global_step": 3, "train/loss": "NaN", "env_steps": 30, "time/elapsed": 3},
            {"global_step": 3, "eval/success_rate": 0.6},
        ],
    )
    second = write_run(
        tmp_path / "b",
        "recipe: toy\nalgo: {lr: 0.2, clip: 0.2}\nrun: {name: b, folder: y, seed: 1}\ntags: [a, '[red]']\n",
        [{"global_step": 1, "train/loss": 2.0, "env_steps": 10, "rewards/margins": 4.0}],
    )
    return [first, second]


def test_differences_summaries_and_text(two_runs: list[Path], tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(file=out, width=120)
    result = compare(two_runs, figure=tmp_path / "new" / "curves.png", console=console)
    assert result.names == ["a", "b"]
    assert result.differences == {"algo.lr": [0.1, 0.2], "tags": [["a", "b"], ["a", "[red]"]]}
    assert set(result.summaries) == {"train/loss", "eval/success_rate", "rewards/margins"}
    final, best = result.summaries["train/loss"][0], result.summaries["train/loss"][1]
    assert final is not None
    assert np.isnan(final.final)
    assert (final.best, final.best_step) == (1.0, 2)
    assert final.mean == 2.0
    assert best == Summary(2.0, 2.0, 1, 2.0)
    assert result.summaries["eval/success_rate"] == [Summary(0.6, 0.7, 2, (0.6 + 0.7) / 2), None]
    text = out.getvalue()
    for expected in (
        "algo.lr",
        "0.6 (0.7 @ 2, 0.65)",
        "nan (1 @ 2, 2)",
        "[red]",
        "highest",
        "lowest",
        "curves.png",
    ):
        assert expected in text
    assert "time/elapsed" not in text


def test_the_picture_shows_a_curve_of_each_run(two_runs: list[Path], tmp_path: Path) -> None:
    from matplotlib.image import imread

    drawn = compare(
        two_runs, metrics=["train/*"], over="env_steps", figure=tmp_path / "c.png", console=Console(quiet=True)
    )
    assert drawn.figure == tmp_path / "c.png"
    assert list(drawn.summaries) == ["train/loss"]
    pixels = imread(tmp_path / "c.png")[..., :3]
    for colour in ((31, 119, 180), (255, 127, 14)):  # the first two of matplotlib's cycle
        assert (np.abs(pixels - np.array(colour) / 255).max(axis=-1) < 0.02).sum() > 20
    assert not list(tmp_path.glob(".tmp*"))


def test_an_evaluation_is_drawn_over_the_counters_of_earlier_rows(two_runs: list[Path], tmp_path: Path) -> None:
    drawn = compare(
        two_runs[:1], metrics=["eval/*"], over="env_steps", figure=tmp_path / "c.png", console=Console(quiet=True)
    )
    assert drawn.figure is not None


def test_one_run_without_a_picture(two_runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = compare(two_runs[:1], figure=None, console=Console(quiet=True))
    assert result.figure is None
    assert result.differences == {}
    assert not list(tmp_path.glob("*.png"))


def test_equal_names_become_paths(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / d / "r", "a: 1", [{"global_step": 1, "x": 1.0}]) for d in "pq"]
    assert compare(runs, figure=None, console=Console(quiet=True)).names == [str(run) for run in runs]


def test_mistakes(two_runs: list[Path], tmp_path: Path) -> None:
    quiet = Console(quiet=True)
    with pytest.raises(UserError, match="name at least one run"):
        compare([], console=quiet)
    with pytest.raises(UserError, match="nowhere: not a run folder"):
        compare([tmp_path / "nowhere"], console=quiet)
    with pytest.raises(UserError, match=r"no metric matches eva/\*; there are eval/success_rate, rewards"):
        compare(two_runs, metrics=["eva/*"], console=quiet)
    with pytest.raises(UserError, match=r"--save: '.*pairs\.jsonl' is no name of a picture"):
        compare(two_runs, figure=tmp_path / "pairs.jsonl", console=quiet)
    with pytest.raises(UserError, match="cannot draw over steps; choose one of global_step"):
        compare(two_runs, over="steps", console=quiet)
    with pytest.raises(UserError, match="none of these runs counts tokens"):
        compare(two_runs, over="tokens", figure=tmp_path / "c.png", console=quiet)


def test_missing_and_nested_keys_differ() -> None:
    configs: list[dict[str, Any]] = [{"a": {"b": 1, "c": {}}, "d": None}, {"a": {"b": 1}, "e": 2}]
    assert config_differences(configs) == {"a.c": [{}, None], "e": [None, 2]}


@pytest.mark.parametrize(
    "metric, lower",
    [("loss/value", True), ("objective/kl", True), ("approx_kl", True), ("eval/success", False), ("klaxon", False),
     ("rewards/unscored", True), ("sampling/logprob_gap", True)],
)  # fmt: skip
def test_direction(metric: str, lower: bool) -> None:
    assert lower_is_better(metric) is lower
