"""The recipe in miniature: it learns, resumes to the bit, steers where it is judged, and starts other recipes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiment.config import build_from_dict
from experiment.errors import UserError
from experiment.run import Run
from llm_rlhf import train_ilql, train_ppo
from llm_rlhf.evaluate import EvaluateConfig, evaluate_run
from llm_rlhf.logged.value_heads import HEADS
from llm_rlhf.models.causal import LanguagePolicy
from llm_rlhf.train_ilql import DecodingConfig, LearningConfig, TrainILQLConfig
from llm_rlhf.train_ppo import TrainPPOConfig

MODEL = {"layers": 1, "width": 16, "heads": 2, "context": 16}
WALKS = {"name": "random_walks", "random_walks": {"walks": 60}}


def small(folder: Path, *, steps: int = 6, **sections: Any) -> TrainILQLConfig:
    settings = {
        "run": {"folder": str(folder), "wandb": "disabled", "checkpoint_every": 3, "seed": 5},
        "task": WALKS,
        "model": MODEL,
        "learning": {"steps": steps, "batch_size": 16, "micro_batch_size": 6},
        "decoding": {"beta": 3.0, "top_k": 8},
        "validation": {"every": 2, "samples": 2},
        "log_every": 1,
        **sections,
    }
    return build_from_dict(settings, TrainILQLConfig)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_ilql.train(small(tmp_path_factory.mktemp("ilql") / "run")).folder


def policy_folder(run: Path, checkpoint: str = "last") -> Path:
    return run / "checkpoints" / checkpoint / "policy"


def weights(run: Path) -> dict[str, Tensor]:
    """Of the model and of the heads, slow copy included."""
    model = LanguagePolicy.from_pretrained(policy_folder(run)).state_dict()
    return {**model, **load_file(str(policy_folder(run) / HEADS))}


def rows(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def test_it_learns_and_says_so(trained: Path) -> None:
    logged = rows(trained)
    names = {"loss/total", "loss/value", "loss/critic", "loss/conservative", "loss/policy", "val/values"}
    assert names | {"eval/greedy", "lr", "tokens", "epoch", "policy/grad_norm"} <= logged[-1].keys()
    assert logged[-1]["loss/total"] < logged[0]["loss/total"] - 0.1
    assert logged[-1]["samples"] == 6 * 16
    assert (trained / "checkpoints" / "best").exists()


def test_it_resumes_to_the_bit(tmp_path: Path, trained: Path) -> None:
    """Interrupted after the checkpoint at three, as a kill would, against six steps at a stretch."""

    class InterruptError(Exception):
        pass

    original = Run.log

    def log(self: Any, metrics: Any, *, global_step: int) -> None:
        if global_step == 5:
            raise InterruptError
        original(self, metrics, global_step=global_step)

    config = small(tmp_path / "broken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", log)
        with pytest.raises(InterruptError):
            train_ilql.train(config)
    torch.manual_seed(12345)  # a new process would not have the old one's global generator
    train_ilql.train(config, resume=tmp_path / "broken")
    expected, found = weights(trained), weights(tmp_path / "broken")
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    assert rows(tmp_path / "broken") == rows(trained)


def test_the_folder_is_a_plain_model(trained: Path) -> None:
    folder = str(policy_folder(trained))
    plain = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder).encode("bcd")])
    ours = LanguagePolicy.from_pretrained(folder)
    assert ours.steering is None
    assert torch.equal(plain(input_ids=ids).logits, ours.model(input_ids=ids).logits)


def test_evaluation_steers_as_the_run_says(trained: Path) -> None:
    """With the run's own beta unless another is asked for."""
    splits = ("prompted",)
    own = evaluate_run(trained, EvaluateConfig(splits=splits, samples=4))
    assert own == evaluate_run(trained, EvaluateConfig(splits=splits, samples=4, beta=3.0))
    other = evaluate_run(trained, EvaluateConfig(splits=splits, samples=4, beta=1e6))
    assert other["prompted"]["entropy"] < own["prompted"]["entropy"] - 1.0
    (policy_folder(trained) / HEADS).rename(trained / HEADS)
    try:
        with pytest.raises(UserError, match=r"evaluation\.beta: .* has no value heads"):
            evaluate_run(trained, EvaluateConfig(splits=splits, beta=1.0))
    finally:
        (trained / HEADS).rename(policy_folder(trained) / HEADS)


def test_ppo_starts_from_its_model(tmp_path: Path, trained: Path) -> None:
    settings = {
        "run": {"folder": str(tmp_path / "ppo"), "wandb": "disabled"},
        "task": WALKS,
        "model": {"path": str(trained)},
        "sampling": {"updates": 1, "prompts": 4, "samples_per_prompt": 2},
        "validation": {"every": 0},
    }
    folder = train_ppo.train(build_from_dict(settings, TrainPPOConfig)).folder
    assert not (policy_folder(folder) / HEADS).exists()
    reference = LanguagePolicy.from_pretrained(folder / "reference").state_dict()
    for name, tensor in reference.items():
        assert torch.equal(tensor, weights(trained)[name]), name


def test_a_frozen_model_keeps_its_weights_and_heads_go_on(tmp_path: Path, trained: Path) -> None:
    learning = {"steps": 1, "batch_size": 8, "model_learning_rate": 0.0, "learning_rate": 1e-4}
    config = small(tmp_path / "run", model={"path": str(trained)}, learning=learning)
    before, after = weights(trained), weights(train_ilql.train(config).folder)
    for name, tensor in before.items():
        if name.startswith("model."):
            assert torch.equal(tensor, after[name]), name
        else:  # one step of a small rate away from where they were, not new
            assert 0 < (tensor - after[name]).abs().max() < 1e-3, name


def scored(path: Path) -> str:
    lines = [
        {"prompt": f"q{i % 9}: ", "completion": word, "reward": reward}
        for i in range(45)
        for word, reward in (("yes", 2.0), ("no", -1.0))
    ]
    lines[0] = {
        "messages": [{"role": "user", "content": "hm"}, {"role": "assistant", "content": "yes", "reward": 2}]
    }
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_scored_texts_from_a_file(tmp_path: Path) -> None:
    """Two answers equally often, one of them good: the model says both, steered it says the good one."""
    shares = {"test": 0.2, "validation": 0.1, "max_new_tokens": 5}
    config = small(
        tmp_path / "run",
        steps=60,
        task={"name": "scored", "data": scored(tmp_path / "rows.jsonl"), "scored": shares},
        model={**MODEL, "context": 32},
        learning={"batch_size": 32, "steps": 60, "learning_rate": 1e-2, "model_learning_rate": 1e-2},
        ilql={"iql": {"target_rate": 0.1}},
        decoding={"beta": 30.0},
        validation={"every": 0},
        log_every=60,
    )
    folder = train_ilql.train(config).folder
    steered = evaluate_run(folder, EvaluateConfig(splits=("test",), samples=20))["test"]
    alone = evaluate_run(folder, EvaluateConfig(splits=("test",), samples=20, beta=0.0))["test"]
    assert steered["sampled"] > 1.8
    assert alone["sampled"] < 1.2
    with pytest.raises(UserError, match="the file brings its own"):
        train_ilql.train(replace(config, rewards={"logged": 1.0}))


def test_dry_run_does_one_update(tmp_path: Path) -> None:
    config = small(tmp_path / "run")
    result = train_ilql.train(replace(config, run=replace(config.run, dry_run=True)))
    assert result.metrics["global_step"] == 1


def test_a_diverged_run_stops_with_one_line(tmp_path: Path) -> None:
    config = small(tmp_path / "run", learning={"steps": 4, "learning_rate": 1e30, "max_grad_norm": 1e30})
    with pytest.raises(UserError, match=r"lower (learning rate|learning\.learning_rate)"):
        train_ilql.train(config)


def test_bad_settings_are_refused() -> None:
    cases: list[dict[str, Any]] = [{"steps": 0}, {"micro_batch_size": -1}, {"gamma": 0.0}, {"learning_rate": 0.0}]
    for bad in cases:
        with pytest.raises(ValueError, match="learning"):
            LearningConfig(**bad)
    with pytest.raises(ValueError, match="top_k"):
        DecodingConfig(top_k=0)
