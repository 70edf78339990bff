"""Runs that begin with another run's adapter: what they start from, keep as their reference and save."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from experiment.config import build_from_dict
from llm_rlhf import train_dpo, train_grpo, train_ppo, train_sft
from llm_rlhf.models.causal import LanguagePolicy
from llm_rlhf.preferences.reference_cache import CACHE

IDS = torch.arange(5, 15)[None]
WALKS = {"name": "random_walks", "random_walks": {"walks": 60}}


def settings(folder: Path, **sections: Any) -> dict[str, Any]:
    run = {"folder": str(folder), "wandb": "disabled", "checkpoint_every": 1}
    return {"run": run, "validation": {"every": 0}, **sections}


def sft(folder: Path, *, model: dict[str, Any], steps: int, learning_rate: float = 2e-2) -> dict[str, Any]:
    learning = {"steps": steps, "batch_size": 8, "learning_rate": learning_rate}
    return settings(folder, task=WALKS, model=model, sft=learning)


def plain_logits(folder: Path) -> Tensor:
    """As transformers alone reads the folder."""
    with torch.no_grad():
        logits: Tensor = AutoModelForCausalLM.from_pretrained(str(folder))(IDS).logits
    return logits


def logits(path: Path) -> Tensor:
    with torch.no_grad():
        found: Tensor = LanguagePolicy.from_pretrained(path).model(IDS).logits
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "run"
    model = {"layers": 1, "width": 16, "heads": 2, "context": 24}
    return train_sft.train(build_from_dict(sft(folder, model=model, steps=5), train_sft.TrainSFTConfig)).folder


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    """A run that learned an adapter, which says something else than its base."""
    config = sft(base.parent / "lora", model={"path": str(base), "lora": {"rank": 4, "alpha": 8.0}}, steps=20)
    folder = train_sft.train(build_from_dict(config, train_sft.TrainSFTConfig)).folder
    assert (logits(folder) - logits(base)).abs().max() > 0.1
    return folder


def test_ppo_of_all_weights_starts_from_base_and_adapter(adapter: Path, tmp_path: Path) -> None:
    sections = {
        "task": WALKS,
        "model": {"path": str(adapter)},
        "sampling": {"updates": 1, "prompts": 8},
        "ppo": {"learning_rate": 0.0},
    }
    config = build_from_dict(settings(tmp_path / "ppo", **sections), train_ppo.TrainPPOConfig)
    folder = train_ppo.train(config).folder
    expected = logits(adapter)
    for saved in (folder / "reference", folder / "checkpoints" / "last" / "policy"):
        torch.testing.assert_close(plain_logits(saved), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(logits(saved), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("module", [train_ppo, train_grpo])
@pytest.mark.parametrize("start", ["base", "adapter"])
def test_an_adapter_learns_by_reinforcement_and_its_reference_is_its_start(
    base: Path, adapter: Path, tmp_path: Path, module: Any, start: str
) -> None:
    """New or one that goes on; and a resumed run keeps the reference that it began with."""
    begun = base if start == "base" else adapter
    recipe = module.TrainPPOConfig if module is train_ppo else module.TrainGRPOConfig

    def trained(folder: Path, updates: int, resume: Path | None = None) -> list[dict[str, Any]]:
        tree = settings(
            folder,
            task=WALKS,
            model={"path": str(begun), "lora": {"rank": 4, "alpha": 8.0}},
            generation={"max_new_tokens": 4},
            sampling={"updates": updates, "prompts": 8},
            ppo={"learning_rate": 0.02, "minibatch_size": 64, "schedule": "constant", "critic_warmup": 0},
            kl={"coef": 0.1},
        )
        found = module.train(build_from_dict(tree, recipe), resume=resume).folder
        return [json.loads(line) for line in (found / "metrics.jsonl").read_text().splitlines()]

    rows = trained(tmp_path / "whole", 3)
    assert rows[0]["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert abs(rows[2]["objective/kl"]) > 1e-3
    trained(tmp_path / "parts", 2)
    resumed = trained(tmp_path / "parts", 3, resume=tmp_path / "parts")
    for name in ("objective/kl", "objective/scores", "policy/grad_norm"):
        assert resumed[2][name] == rows[2][name], name
    learned = load_file(tmp_path / "whole" / "checkpoints" / "last" / "policy" / "adapter_model.safetensors")
    assert all("lora_" in name or "value_head" in name for name in learned)
    assert (logits(tmp_path / "whole") - logits(begun)).abs().max() > 1e-3


def test_dpo_of_all_weights_starts_from_base_and_adapter(adapter: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    letters = "abcdefgh"
    rows = [{"prompt": letters[i % 8] + letters[i // 8], "chosen": "abab", "rejected": "ba"} for i in range(64)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = {
        "pairs": {"path": str(pairs)},
        "model": {"path": str(adapter)},
        "learning": {"steps": 1, "batch_size": 8, "learning_rate": 0.0},
    }
    config = build_from_dict(settings(tmp_path / "dpo", **sections), train_dpo.TrainDPOConfig)
    folder = train_dpo.train(config).folder
    found = plain_logits(folder / "checkpoints" / "last" / "policy")
    torch.testing.assert_close(found, logits(adapter), atol=1e-5, rtol=0)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_an_adapter_that_goes_on_begins_at_its_reference(adapter: Path, tmp_path: Path, precision: str) -> None:
    """To the bit in bfloat16, too, where an adapter merged into the weights computes something else. A run that has
    lost its file of log-probs finds the reference again when it resumes."""
    pairs = tmp_path / "pairs.jsonl"
    letters = "abcdefgh"
    rows = [{"prompt": letters[i % 8] + letters[i // 8], "chosen": "abab", "rejected": "ba"} for i in range(64)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = {
        "pairs": {"path": str(pairs)},
        "model": {"path": str(adapter), "lora": {"rank": 4, "alpha": 8.0}},
        "learning": {
            "steps": 1,
            "batch_size": 8,
            "learning_rate": 0.01,
            "warmup": 0.0,
            "schedule": "constant",
            "precision": precision,
        },
    }
    config = build_from_dict(settings(tmp_path / "dpo", **sections), train_dpo.TrainDPOConfig)
    result = train_dpo.train(config)
    assert result.metrics["loss/preference"] == pytest.approx(math.log(2), abs=1e-6)
    (result.folder / CACHE).unlink()
    more = replace(config, learning=replace(config.learning, steps=2))
    assert train_dpo.train(more, resume=result.folder).metrics["loss/preference"] < 0.69


def test_a_resumed_run_writes_its_merged_model_whole(base: Path, tmp_path: Path) -> None:
    model = {"path": str(base), "lora": {"rank": 4, "alpha": 8.0, "merged": True}}

    def config(steps: int) -> train_sft.TrainSFTConfig:
        return build_from_dict(sft(tmp_path / "run", model=model, steps=steps), train_sft.TrainSFTConfig)

    folder = train_sft.train(config(2)).folder
    train_sft.train(config(4), resume=folder)
    last = folder / "checkpoints" / "last"
    assert last.resolve().name == "000000004"
    torch.testing.assert_close(plain_logits(last / "merged"), logits(last / "policy"), atol=1e-5, rtol=0)
