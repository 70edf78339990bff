"""`tandem frontier` reads real runs, draws best-of-n of what they began with, and says where gold turns."""

from pathlib import Path

import pytest

from experiment.config import build_from_dict
from llm_rlhf import train_ppo, train_sft
from tandem.cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PPO run of six updates that looked at its validation prompts after each."""
    folder = tmp_path_factory.mktemp("frontier")
    common = {
        "task": {"name": "random_walks", "random_walks": {"walks": 60}},
        "model": {"layers": 1, "width": 16, "heads": 2, "context": 16},
    }
    off = {"wandb": "disabled", "seed": 1}
    sft = {**common, "run": {**off, "folder": str(folder / "sft")}, "sft": {"steps": 30, "batch_size": 8}}
    start = train_sft.train(build_from_dict({**sft, "validation": {"every": 0}}, train_sft.TrainSFTConfig)).folder
    ppo = {
        "task": common["task"],
        "model": {"path": str(start)},
        "run": {**off, "folder": str(folder / "ppo")},
        "sampling": {"updates": 6, "prompts": 16},
        "ppo": {"critic_warmup": 0},
        "validation": {"every": 1, "prompts": 4, "samples": 2},
    }
    return train_ppo.train(build_from_dict(ppo, train_ppo.TrainPPOConfig)).folder


def test_a_run_and_best_of_n(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "kl.png"
    assert main(["frontier", str(run), "--best-of", "6", "--prompts", "3", "--save", str(picture)]) == 0
    said = capsys.readouterr().out
    assert said.count("best of n") == 5  # of 1, 2, 4, 6, and what was fitted to them
    assert "1.79" not in said  # log 6 alone; choosing one of six costs log 6 - 5/6
    assert "0.958" in said
    assert "ppo: d (alpha - beta log d)" in said
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert not (run / "eval.json").exists()


def test_runs_without_a_frontier(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["frontier", str(run.parent / "sft")]) == 2
    assert "no step has both objective/kl and eval/sampled" in capsys.readouterr().err
    assert main(["frontier", str(run), "--best-of", "-1"]) == 2
    assert "--best-of must be at least 0" in capsys.readouterr().err
    for name in ("kl.foo", "kl", ""):
        assert main(["frontier", str(run), "--save", name]) == 2
        assert f"--save: {name!r} is no name of a picture; give one that ends in .png" in capsys.readouterr().err
