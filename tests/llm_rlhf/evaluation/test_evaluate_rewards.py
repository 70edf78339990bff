"""Evaluation reports what a run climbed beside the task's own reward, on the same completions."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiment.config import build_from_dict
from experiment.errors import UserError
from llm_rlhf import train_sft
from llm_rlhf.evaluate import EvaluateConfig, best_of, evaluate_run, numbers, scores
from llm_rlhf.evaluation.frontier import rows_of_best_of
from llm_rlhf.models.loading import ModelConfig, new_language_model
from llm_rlhf.models.tokenizer import character_tokenizer
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


def test_what_was_not_judged_is_left_out_by_hand() -> None:
    """Of four prompts the last one's answers were judged by nobody, the first one's samples in part."""
    nobody = math.nan
    greedy = torch.tensor([1.0, nobody, -0.5, nobody])
    drawn = torch.tensor([[1.0, nobody], [nobody, 0.0], [0.5, 1.0], [nobody, nobody]])
    found = scores(greedy, drawn)
    assert found["prompts"] == 4
    assert found["greedy"] == 0.25
    assert found["greedy_solved"] == 0.5
    assert found["sampled"] == pytest.approx((1.0 + 0.0 + 0.75) / 3)
    assert found["pass@2"] == pytest.approx(2 / 3)
    low, high = found["sampled_interval"]
    assert 0 <= low < found["sampled"] < high <= 1
    nothing = scores(greedy[1:2], drawn[3:])
    assert nothing == {"prompts": 1, "greedy": None, "sampled": None, "greedy_solved": None, "pass@2": None}
    assert math.isnan(numbers(nothing, prefix="eval")["eval/sampled"])


def test_unjudged_answers_are_counted_and_do_not_count(run: Path, tmp_path: Path) -> None:
    """A reward that does not judge every third answer: the others' mean, and a share of a third."""
    seen = tmp_path / "seen"
    (tmp_path / "own.py").write_text(
        "def some(prompts, completions):\n    lengths = [float(len(text)) for text in completions]\n"
        "    found = [length if i % 3 else None for i, length in enumerate(lengths)]\n"
        f"    print(*found, file=open({str(seen)!r}, 'a'))\n    return found\n\n\n"
        "def mute(prompts, completions):\n    return [None] * len(completions)\n"
    )
    own = evaluated(run, f"{{'{tmp_path}/own.py:some': 1.0}}")["rewards"]
    for name, line in zip(("greedy", "sampled"), seen.read_text().splitlines(), strict=True):
        words = line.split()
        judged = [float(word) for word in words if word != "None"]
        assert own[f"{name}_unscored"] == pytest.approx(words.count("None") / len(words))
        if name == "greedy":
            assert own[name] == pytest.approx(sum(judged) / len(judged))
    assert 0 < own["sampled_unscored"] < 1
    found = evaluated(run, f"{{'{tmp_path}/own.py:mute': 1.0}}")
    assert found["rewards"] == {"greedy": None, "sampled": None, "greedy_unscored": 1.0, "sampled_unscored": 1.0}
    assert json.loads((run / "eval.json").read_text())["splits"]["prompted"]["rewards"]["sampled"] is None
    assert (found["greedy_unscored"], found["sampled_unscored"]) == (0.0, 0.0)
    assert numbers(found, prefix="eval")["eval/sampled_unscored"] == 0.0


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


def test_against_itself_a_run_has_gone_nowhere(run: Path) -> None:
    evaluate_run(run, EvaluateConfig(splits=("prompted",), samples=2, reference=str(run)))
    figures = json.loads((run / "eval.json").read_text())["splits"]["prompted"]
    assert figures["kl"] == pytest.approx(0.0, abs=1e-3)
    low, high = figures["sampled_interval"]
    assert low <= figures["sampled"] <= high


def test_best_of_n_by_hand(run: Path, tmp_path: Path) -> None:
    """Of two prompts that both judges know; the third's second sample has no gold."""
    gold = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, math.nan]])
    climbed = torch.tensor([[2.0, 1.0], [5.0, 4.0], [0.0, 0.0]])
    found = best_of(gold, climbed, (1, 2))
    assert found["best_of_prompts"] == 2
    assert (found["best_of_1"], found["best_of_2"]) == (0.5, 0.5)  # the climbed reward picks a 0 and a 1
    assert best_of(gold, gold, (2,))["best_of_2"] == 1.0
    assert found["best_of_2_kl"] == pytest.approx(math.log(2) - 0.5)
    assert best_of(gold, climbed, ()) == {}
    assert best_of(gold[2:], climbed[2:], (1,)) == {"best_of_prompts": 0, "best_of_1": None, "best_of_1_kl": 0.0}
    (tmp_path / "own.py").write_text("def length(prompts, completions):\n    return [*map(len, completions)]\n")
    measured = evaluated(run, f"{{'{tmp_path}/own.py:length': 1.0}}", replace(QUICK, best_of=(1, 2)))
    own = measured["rewards"]
    assert own["best_of_1"] == pytest.approx(own["sampled"])
    assert own["best_of_2"] > own["sampled"]
    rows = rows_of_best_of(measured)
    assert [(row.step, row.proxy) for row in rows] == [(1, own["best_of_1"]), (2, own["best_of_2"])]
    assert [row.gold for row in rows] == [measured["best_of_1"], measured["best_of_2"]]
    with pytest.raises(ValueError, match=r"best_of: sizes are from 1 to samples \(2\)"):
        replace(QUICK, best_of=(4,))
    few = evaluate_run(run, replace(QUICK, prompts=3))["prompted"]
    assert few["prompts"] == 3


def test_the_start_and_the_reference(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="checkpoint=start: this run kept no policy of its start"):
        evaluate_run(run, replace(QUICK, checkpoint="start"))
    shutil.copytree(run / "checkpoints" / "last" / "policy", run / "reference")
    try:
        start, last = (
            evaluate_run(run, replace(QUICK, checkpoint=which))["prompted"] for which in ("start", "last")
        )
    finally:
        shutil.rmtree(run / "reference")
    assert start == last
    assert start["kl"] == pytest.approx(0.0, abs=1e-3)
    other = tmp_path / "other"
    model = new_language_model(ModelConfig(layers=1, width=16, heads=2), character_tokenizer("xyz"))
    model.save_pretrained(other)
    with pytest.raises(UserError, match=r"the tokenizer goes up to id \d+"):
        evaluate_run(run, replace(QUICK, reference=str(other)))
    shutil.copytree(run / "checkpoints" / "last" / "policy", tmp_path / "same")
    character_tokenizer("xyz").save_pretrained(tmp_path / "same")
    with pytest.raises(UserError, match="reads another tokenizer's tokens"):
        evaluate_run(run, replace(QUICK, reference=str(tmp_path / "same")))


def test_a_temperature_is_the_policys_and_the_references(run: Path) -> None:
    """The same model is no distance from itself at any temperature, and less random at a lower one."""
    found = {
        temperature: evaluate_run(run, replace(QUICK, samples=8, temperature=temperature, reference=str(run)))
        for temperature in (1.0, 0.4)
    }
    for figures in found.values():
        assert figures["prompted"]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert found[0.4]["prompted"]["entropy"] < found[1.0]["prompted"]["entropy"] - 0.01
