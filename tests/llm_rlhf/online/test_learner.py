"""What watches and bounds a run of reinforcement learning: hard rules, paid steps, the monitor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from experiment.config import build_from_dict
from llm_rlhf import train_ppo
from llm_rlhf.models.generation import Samples
from llm_rlhf.models.loading import ModelConfig
from llm_rlhf.models.tokenizer import character_tokenizer
from llm_rlhf.online.learner import texts_of
from llm_rlhf.online.monitor import HackingSuspected
from llm_rlhf.rewards.process_reward import StepScorer
from llm_rlhf.rewards.reward_model import Scorer, build_reward_model
from llm_rlhf.tasks.task import TaskConfig, build_task
from llm_rlhf.train_ppo import TrainPPOConfig
from llm_rlhf.train_sft import TrainSFTConfig
from llm_rlhf.train_sft import train as train_sft

TASK = {"name": "random_walks", "random_walks": {"walks": 60}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has hardly learned."""
    sections = {
        "run": {"folder": str(tmp_path_factory.mktemp("base") / "run"), "wandb": "disabled"},
        "task": TASK,
        "model": {"layers": 1, "width": 16, "heads": 2, "context": 16},
        "sft": {"steps": 2, "batch_size": 16},
        "validation": {"every": 0},
    }
    return train_sft(build_from_dict(sections, TrainSFTConfig)).folder


def ppo(folder: Path, base: Path, **sections: Any) -> list[dict[str, Any]]:
    """Four updates; returns the rows of metrics.jsonl."""
    tree: dict[str, Any] = {
        "run": {"folder": str(folder), "wandb": "disabled", "checkpoint_every": 1, "keep": 10},
        "task": TASK,
        "model": {"path": str(base)},
        "sampling": {"updates": 4, "prompts": 8},
        "ppo": {"minibatch_size": 8, "critic_warmup": 0, "learning_rate": 0.01},
        "kl": {"coef": 0.0},
        "validation": {"every": 1, "samples": 2},
        **sections,
    }
    train_ppo.train(build_from_dict(tree, TrainPPOConfig))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_no_reward_buys_off_a_rule(tmp_path: Path, base: Path) -> None:
    (tmp_path / "rules.py").write_text("def never(text):\n    return False\n")
    rows = ppo(tmp_path / "run", base, safety={"rules": [f"{tmp_path}/rules.py:never"], "floor": -3.0})
    assert [row["objective/scores"] for row in rows] == [-3.0] * 4
    assert [row["rewards/rules/never/mean"] for row in rows] == [0.0] * 4


def test_every_step_is_paid(tmp_path: Path, base: Path) -> None:
    torch.manual_seed(0)
    model, tokenizer = build_reward_model(
        ModelConfig(layers=1, width=16, heads=2, context=32),
        alphabet=build_task(build_from_dict(TASK, TaskConfig)).alphabet,
        objectives=("reward",),
        heads=1,
    )
    StepScorer(Scorer(model, tokenizer), "a").save_pretrained(tmp_path / "steps")
    plain = ppo(tmp_path / "plain", base)
    for weight, same in ((0.0, True), (5.0, False)):
        process = {"model": str(tmp_path / "steps"), "weight": weight, "form": "log_odds"}
        paid = ppo(tmp_path / f"paid-{weight}", base, process=process)
        # the first rollout is the same, whatever is paid; what is learned from it is not
        assert paid[0]["objective/scores"] == plain[0]["objective/scores"]
        assert (paid[-1]["loss/value_avg"] == plain[-1]["loss/value_avg"]) is same


def test_the_monitor_stops_a_run_and_names_the_last_good_checkpoint(tmp_path: Path, base: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(HackingSuspected, match=r"stopped by monitor\.stop: .*kl.*(last good|no checkpoint)"):
        ppo(folder, base, monitor={"stop": True, "kl_limit": 1e-6})
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(logged) < 4
    assert logged[-1]["monitor/warnings"] >= 1.0


def test_a_run_without_the_monitor_has_no_metrics_of_it(tmp_path: Path, base: Path) -> None:
    rows = ppo(tmp_path / "run", base, monitor={"enabled": False})
    assert not any(name.startswith("monitor/") for row in rows for name in row)


def test_texts_of_a_rollout() -> None:
    tokenizer = character_tokenizer("abc")
    a, b, c = (tokenizer.encode(letter)[0] for letter in "abc")
    eos, pad = int(tokenizer.eos_token_id), int(tokenizer.pad_token_id)
    ids = torch.tensor([[pad, a, b, eos, pad], [a, b, c, c, a]])
    drawn = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]).bool()
    none = torch.zeros(2, 5)
    real = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    samples = Samples(ids, real, drawn, torch.tensor([True, False]), none, none, None, torch.tensor([0, 1]))
    assert texts_of(samples, tokenizer) == (["a", "ab"], ["b", "cca"])
