"""The card beside a checkpoint's model: the hub reads its head, people and transformers the rest."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from experiment.config import build_from_dict
from llm_rlhf import train_process_reward, train_reward, train_sft
from llm_rlhf.models.card import CARD, base_model, front_matter

MODEL = {"layers": 1, "width": 16, "heads": 2, "context": 24}


def settings(folder: Path, **sections: Any) -> dict[str, Any]:
    run = {"folder": str(folder), "wandb": "disabled", "checkpoint_every": 2}
    return {"run": run, "model": MODEL, **sections}


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sft(folder: Path, **sections: Any) -> train_sft.TrainSFTConfig:
    rows = [{"prompt": f"{i}+", "completion": "ab"} for i in range(40)]
    own = {
        "task": {
            "name": "rows",
            "data": written(folder.parent / "sums.jsonl", rows),
            "rows": {"max_new_tokens": 4},
        },
        "sft": {"steps": 4, "batch_size": 4},
        "validation": {"every": 2, "samples": 2, "prompts": 2},
        **sections,
    }
    return build_from_dict(settings(folder, **own), train_sft.TrainSFTConfig)


def model_of(run: Path) -> Path:
    return run / "checkpoints" / "last" / "policy"


def configuration(card: str) -> dict[str, Any]:
    values = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert isinstance(values, dict)
    return values


def test_a_policys_card_names_recipe_data_evaluation_and_configuration(tmp_path: Path) -> None:
    folder = train_sft.train(sft(tmp_path / "run")).folder
    card = (model_of(folder) / CARD).read_text()
    assert front_matter(model_of(folder) / CARD) == {
        "library_name": "transformers",
        "tags": ["tandem", "sft"],
        "pipeline_tag": "text-generation",
    }
    assert "`llm/sft`" in card
    assert "`sums.jsonl`" in card
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert f"## Evaluation at step {logged[-1]['global_step']}\n" in card
    assert f"| greedy | {logged[-1]['eval/greedy']:.6g} |" in card
    values = configuration(card)
    assert values.pop("recipe") == "llm/sft"
    assert build_from_dict(values, train_sft.TrainSFTConfig) == sft(tmp_path / "run")
    assert AutoModelForCausalLM.from_pretrained(str(model_of(folder))).config.n_layer == 1


def test_a_resumed_run_has_the_same_weights_and_card(tmp_path: Path) -> None:
    config = sft(tmp_path / "run")
    whole = train_sft.train(config).folder
    expected = load_file(model_of(whole) / "model.safetensors"), (model_of(whole) / CARD).read_text()
    shutil.rmtree(whole)
    first = train_sft.train(replace(config, sft=replace(config.sft, steps=2))).folder
    assert "## Evaluation at step 2\n" in (model_of(first) / CARD).read_text()
    train_sft.train(config, resume=first)
    weights = load_file(model_of(first) / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected[0].items())
    assert (model_of(first) / CARD).read_text() == expected[1]


def test_an_adapters_card_and_its_merged_models(tmp_path: Path) -> None:
    base = train_sft.train(sft(tmp_path / "base")).folder
    lora = {"path": str(base), "lora": {"rank": 2, "merged": True}}
    folder = train_sft.train(sft(tmp_path / "lora", model=lora, validation={"every": 0})).folder
    adapter, merged = ((folder / "checkpoints" / "last" / name / CARD).read_text() for name in ("policy", "merged"))
    assert "A low-rank adapter (peft) of a causal language model" in adapter
    assert "A causal language model" in merged
    assert f"from `{base}`" in merged
    assert "Evaluation" not in merged


def test_the_base_model_is_a_hub_name_however_far_back(tmp_path: Path) -> None:
    assert base_model("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert base_model(None) is None
    assert base_model(str(tmp_path / "gone")) is None
    folder = tmp_path / "run" / "checkpoints" / "last" / "policy"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert base_model(str(tmp_path / "run")) is None
    for text, expected in (
        ("---\nbase_model: Qwen/Qwen3-0.6B\n---\n", "Qwen/Qwen3-0.6B"),
        ("---\nbase_model: [one, two]\n---\n", None),
        ("# no head\n", None),
        ("---\n: [\n---\n", None),
    ):
        (folder / CARD).write_text(text)
        assert base_model(str(tmp_path / "run")) == expected


def shown(card: str, found: dict[str, Any], *, folder: Path) -> dict[str, Any]:
    """What the card's example leaves behind."""
    example = card.split("```python\n")[1].split("```")[0]
    exec(example.replace("THIS_FOLDER", str(folder)), found)
    return found


def test_a_reward_models_card_says_how_it_scores(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}", "chosen": "ab", "rejected": "b"} for i in range(40)]
    sections = {
        "pairs": {"path": written(tmp_path / "pairs.jsonl", rows)},
        "learning": {"steps": 2, "batch_size": 4},
    }
    config = build_from_dict(settings(tmp_path / "run", **sections), train_reward.TrainRewardConfig)
    folder = train_reward.train(config).folder / "checkpoints" / "last" / "reward_model"
    card = (folder / CARD).read_text()
    assert front_matter(folder / CARD) == {"library_name": "transformers", "tags": ["tandem", "reward"]}
    assert "`pairs.jsonl`" in card
    assert "| accuracy |" in card
    assert shown(card, {}, folder=folder)["scores"].shape == (1, 1, 1)


def test_a_process_reward_models_card_says_how_it_scores(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}", "steps": ["a", "b"], "labels": [1.0, 0.0]} for i in range(40)]
    sections = {
        "steps": {"path": written(tmp_path / "steps.jsonl", rows), "separator": "```"},
        "learning": {"steps": 2, "batch_size": 4},
    }
    config = build_from_dict(settings(tmp_path / "run", **sections), train_process_reward.TrainProcessRewardConfig)
    folder = train_process_reward.train(config).folder / "checkpoints" / "last" / "process_reward_model"
    card = (folder / CARD).read_text()
    assert front_matter(folder / CARD)["tags"] == ["tandem", "process_reward"]
    assert "`steps.jsonl`" in card
    assert "| loss |" in card
    assert "\n````yaml\nrecipe: llm/process_reward\n" in card  # a longer fence than what it holds
    assert len(shown(card, {}, folder=folder)["logits"]) == 1
