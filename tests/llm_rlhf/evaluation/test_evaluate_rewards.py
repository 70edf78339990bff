"""Evaluation reports what a run climbed beside the task's own reward, on the same completions."""

from pathlib import Path
from typing import Any

import pytest

from experiment.config import build_from_dict
from experiment.errors import UserError
from llm_rlhf import train_sft
from llm_rlhf.evaluate import EvaluateConfig, evaluate_run, numbers
from llm_rlhf.evaluation.frontier import row_of_evaluation
from llm_rlhf.train_sft import TrainSFTConfig

QUICK = EvaluateConfig(splits=("prompted",), samples=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder; its config.yaml gets a `rewards:` section in the tests, as a PPO run's has one."""
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    settings = {
        "run": {"folder": str(folder), "wandb": "disabled"},
        "task": {"name": "random_walks", "random_walks": {"walks": 60}},
        "model": {"layers": 1, "width": 16, "heads": 2, "context": 16},
        "sft": {"steps": 2, "batch_size": 8},
        "validation": {"every": 0},
    }
    return train_sft.train(build_from_dict(settings, TrainSFTConfig)).folder


def evaluated(run: Path, rewards: str, config: EvaluateConfig = QUICK) -> dict[str, Any]:
    original = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(f"{original}rewards: {rewards}\n")
    try:
        return evaluate_run(run, config)["prompted"]
    finally:
        (run / "config.yaml").write_text(original)


def test_both_rewards_are_reported(run: Path, tmp_path: Path) -> None:
    """The run's reward is the length of what is written; it notes down what it was shown."""
    seen = tmp_path / "seen"
    (tmp_path / "own.py").write_text(
        "def length(prompts, completions):\n    lengths = [float(len(text)) for text in completions]\n"
        f"    print(*lengths, file=open({str(seen)!r}, 'a'))\n    return lengths\n"
    )
    plain = evaluate_run(run, QUICK)["prompted"]
    found = evaluated(run, f"{{'{tmp_path}/own.py:length': 2.0}}")
    assert {name: value for name, value in found.items() if name != "rewards"} == plain
    own = found["rewards"]
    greedy, drawn = ([float(word) for word in line.split()] for line in seen.read_text().splitlines())
    assert len(drawn) == 2 * len(greedy) == 2 * found["prompts"]
    assert own["greedy"] == pytest.approx(2 * sum(greedy) / len(greedy))
    assert own["sampled"] == pytest.approx(2 * sum(drawn) / len(drawn))
    low, high = own["sampled_interval"]
    assert low < own["sampled"] < high
    low, high = own["greedy_interval"]
    assert low <= own["greedy"] <= high
    metrics = numbers(found, prefix="eval")
    assert "eval/rewards" not in metrics
    assert metrics["eval/sampled"] == found["sampled"]


def test_the_tasks_own_reward_is_not_said_twice(run: Path) -> None:
    assert "rewards" not in evaluated(run, "{optimality: 1.0}")
    assert "rewards" not in evaluated(run, "{}")
    assert evaluated(run, "{optimality: 0.5}")["rewards"]["greedy"] == pytest.approx(
        0.5 * evaluate_run(run, QUICK)["prompted"]["greedy"]
    )


def test_a_reward_that_is_gone(run: Path) -> None:
    with pytest.raises(UserError, match=r"rewards\.gone\.py:f: there is no file gone\.py"):
        evaluated(run, "{'gone.py:f': 1.0}")
    alone = evaluated(run, "{'gone.py:f': 1.0}", EvaluateConfig(splits=("prompted",), samples=2, own_rewards=False))
    assert "rewards" not in alone


def test_an_evaluation_is_a_point_of_the_frontier(run: Path) -> None:
    evaluate_run(run, EvaluateConfig(splits=("prompted",), samples=2, reference=str(run)))
    row = row_of_evaluation(run / "eval.json", "prompted")
    assert row.kl == pytest.approx(0.0, abs=1e-3)
    assert row.gold_interval is not None
    assert row.gold_interval[0] <= (row.gold or 0.0) <= row.gold_interval[1]
