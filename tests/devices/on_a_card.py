"""Every recipe that can use a card in miniature, in the processor and on a pretended one; prints the metrics.

    python -m tests.devices.on_a_card FOLDER

A process of its own, because torch counts its devices when it takes the first gradient.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from embodied import train_vla_bc, train_vla_ppo
from embodied.recording.record import RecordConfig, record_expert
from experiment.config import build_from_dict
from experiment.run import RunResult
from llm_rlhf import (
    train_dpo,
    train_grpo,
    train_ilql,
    train_kto,
    train_ppo,
    train_rejection,
    train_reward,
    train_sft,
    train_turns_grpo,
    train_turns_ppo,
    train_turns_sft,
)
from llm_rlhf.evaluate import EvaluateConfig, evaluate_run
from llm_rlhf.models.causal import LanguagePolicy
from llm_rlhf.models.loading import ModelConfig, new_language_model
from llm_rlhf.models.tokenizer import character_tokenizer
from tests.devices.pretend_card import NAME, pretend_card

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 :>-"
WALKS = {"name": "random_walks", "random_walks": {"walks": 40}}
Train = Callable[[Path, Path, str], RunResult]


def prepare(folder: Path) -> None:
    """A new model, with pairs and thumbs beside it."""
    tokenizer = character_tokenizer(LETTERS)
    torch.manual_seed(0)
    model = new_language_model(ModelConfig(layers=1, width=16, heads=2, context=32), tokenizer)
    LanguagePolicy(model).save_pretrained(folder / "model")
    tokenizer.save_pretrained(str(folder / "model"))
    (folder / "score.py").write_text(
        "def letters(prompts, completions): return [float(sum(map(str.isalpha, text))) for text in completions]\n"
    )
    pairs = [{"prompt": f"q{i}: ", "chosen": "yes" if i % 2 else "yo", "rejected": "nope"} for i in range(16)]
    thumbs = [
        {"prompt": f"q{i}: ", "completion": "yes" if i % 2 else "no", "label": bool(i % 2)} for i in range(16)
    ]
    for name, rows in (("pairs", pairs), ("thumbs", thumbs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def configured(config: Any, folder: Path, base: Path, device: str, **sections: Any) -> Any:
    """A recipe's configuration with what all have in common."""
    model = {"path": str(base / "model"), "device": device}
    run = {"folder": str(folder), "wandb": "disabled", "seed": 3}
    return build_from_dict({"run": run, "model": model, **sections}, config)


def sft(folder: Path, base: Path, device: str) -> RunResult:
    sections = {"task": WALKS, "sft": {"steps": 2, "batch_size": 8}, "validation": {"every": 2, "samples": 2}}
    return train_sft.train(configured(train_sft.TrainSFTConfig, folder, base, device, **sections))


def ppo(folder: Path, base: Path, device: str, **critic: Any) -> RunResult:
    sections = {
        "task": WALKS,
        "rewards": {f"{base / 'score.py'}:letters": 1.0},
        "sampling": {"updates": 2, "prompts": 4, "samples_per_prompt": 2},
        "ppo": {"minibatch_size": 4, "epochs": 1, "learning_rate": 1e-2},
        "kl": {"coef": 0.05, "target": 1.0},
        "self_imitation": {"coef": 0.5, "threshold": 0.0, "batch_size": 2},
        "critic": critic,
    }
    return train_ppo.train(configured(train_ppo.TrainPPOConfig, folder, base, device, **sections))


def ppo_separate(folder: Path, base: Path, device: str) -> RunResult:
    return ppo(folder, base, device, model="separate")


def grpo(folder: Path, base: Path, device: str) -> RunResult:
    sections = {
        "task": WALKS,
        "rewards": {f"{base / 'score.py'}:letters": 1.0},
        "sampling": {"updates": 2, "prompts": 2, "skip_flat_groups": False},
        "grpo": {"group_size": 4},
    }
    return train_grpo.train(configured(train_grpo.TrainGRPOConfig, folder, base, device, **sections))


def rejection(folder: Path, base: Path, device: str) -> RunResult:
    sections = {
        "task": WALKS,
        "rewards": {f"{base / 'score.py'}:letters": 1.0},
        "rejection": {"prompts": 4, "samples_per_prompt": 2, "steps_per_round": 1},
        "sft": {"steps": 2, "batch_size": 4},
    }
    return train_rejection.train(configured(train_rejection.TrainRejectionConfig, folder, base, device, **sections))


def ilql(folder: Path, base: Path, device: str) -> RunResult:
    sections = {"task": WALKS, "learning": {"steps": 2, "batch_size": 4}}
    return train_ilql.train(configured(train_ilql.TrainILQLConfig, folder, base, device, **sections))


def dpo(folder: Path, base: Path, device: str) -> RunResult:
    pairs = {"path": str(base / "pairs.jsonl"), "validation": 0.2}
    sections = {"pairs": pairs, "learning": {"steps": 2, "batch_size": 4}, "validation": {"every": 1}}
    return train_dpo.train(configured(train_dpo.TrainDPOConfig, folder, base, device, **sections))


def kto(folder: Path, base: Path, device: str) -> RunResult:
    pairs = {"path": str(base / "thumbs.jsonl"), "validation": 0.2}
    sections = {"pairs": pairs, "learning": {"steps": 2, "batch_size": 4}, "validation": {"every": 1}}
    return train_kto.train(configured(train_kto.TrainKTOConfig, folder, base, device, **sections))


def reward(folder: Path, base: Path, device: str) -> RunResult:
    pairs = {"path": str(base / "pairs.jsonl"), "validation": 0.2}
    sections = {"pairs": pairs, "reward": {"heads": 2}, "learning": {"steps": 2, "batch_size": 4}}
    return train_reward.train(configured(train_reward.TrainRewardConfig, folder, base, device, **sections))


SUMS = {"problems": 120, "steps": 1, "by_heart": 0.5, "validation": 10, "test": 12}
TURNS = {
    "task": {"name": "tool_calculator", "tool_calculator": SUMS},
    "turns": {"tools": ["calculator"], "max_turns": 3},
    "validation": {"every": 2, "samples": 2, "prompts": 4},
}


def turns_sft(folder: Path, base: Path, device: str) -> RunResult:
    model = {"layers": 1, "width": 16, "heads": 2, "context": 112, "device": device}
    sections = {**TURNS, "model": model, "sft": {"steps": 2, "batch_size": 8}}
    return train_turns_sft.train(configured(train_turns_sft.TrainTurnsSFTConfig, folder, base, device, **sections))


def turns_ppo(folder: Path, base: Path, device: str) -> RunResult:
    sections = {
        **TURNS,
        "model": {"path": str(base / "turns_sft"), "device": device},
        "rewards": {f"{base / 'score.py'}:letters": 1.0},
        "generation": {"max_new_tokens": 16, "cut_is_end": False},
        "sampling": {"updates": 2, "prompts": 3, "samples_per_prompt": 2},
        "ppo": {"minibatch_size": 6, "epochs": 1, "critic_warmup": 0, "learning_rate": 1e-2},
    }
    return train_turns_ppo.train(configured(train_turns_ppo.TrainTurnsPPOConfig, folder, base, device, **sections))


def turns_grpo(folder: Path, base: Path, device: str) -> RunResult:
    sections = {
        **TURNS,
        "model": {"path": str(base / "turns_sft"), "device": device},
        "rewards": {f"{base / 'score.py'}:letters": 1.0},
        "generation": {"max_new_tokens": 16},
        "sampling": {"updates": 2, "prompts": 3, "skip_flat_groups": False},
        "grpo": {"group_size": 2},
        "ppo": {"minibatch_size": 6, "learning_rate": 1e-2},
    }
    return train_turns_grpo.train(
        configured(train_turns_grpo.TrainTurnsGRPOConfig, folder, base, device, **sections)
    )


def vla_bc(folder: Path, base: Path, device: str) -> RunResult:
    record_expert(base / "table", RecordConfig(episodes=2, tasks=("reach",), workers=0))
    settings = {
        "run": {"folder": str(folder), "wandb": "disabled", "seed": 3},
        "policy": {"precision": "float32", "channels": [4, 8], "blocks": 1},
        "data": {"path": str(base / "table")},
        "held_out": 0.5,
        "eyes": {"updates": 2, "batch_size": 4},
        "hand": {"updates": 1, "batch_size": 4},
        "grounding": {"scenes": 2, "batch_size": 4, "workers": 0},
        "device": device,
    }
    return train_vla_bc.train(build_from_dict(settings, train_vla_bc.TrainVLABCConfig))


def vla_ppo(folder: Path, base: Path, device: str) -> RunResult:
    settings = {
        "run": {"folder": str(folder), "wandb": "disabled", "seed": 3},
        "environment": {"tasks": ["reach"], "count": 2, "workers": 0},
        "init": str(base / "vla_bc" / "checkpoints" / "last" / "policy"),
        "perception": {"learning_rate": 1e-3, "pictures": 8, "minibatch_size": 4, "device": device},
        "horizon": 4,
        "total_steps": 64,
        "ppo": {"minibatch_size": 4, "epochs": 1, "critic_warmup": 0},
    }
    return train_vla_ppo.train(build_from_dict(settings, train_vla_ppo.TrainVLAPPOConfig))


RECIPES: list[Train] = [
    sft,
    ppo,
    ppo_separate,
    grpo,
    rejection,
    ilql,
    dpo,
    kto,
    reward,
    turns_sft,
    turns_ppo,
    turns_grpo,
    vla_bc,
    vla_ppo,
]


def measure(train: Train, folder: Path, base: Path, device: str) -> dict[str, float] | str:
    """What the recipe measured last, without what depends on the clock; where it failed, how."""
    try:
        metrics = train(folder, base, device).metrics
    except Exception:
        return traceback.format_exc()
    return {name: value for name, value in metrics.items() if "time" not in name and "second" not in name}


def judge(run: Path, device: str) -> dict[str, float] | str:
    """`evaluate_run` on the device."""
    try:
        judged = evaluate_run(run, EvaluateConfig(splits=("test",), samples=2, device=device))["test"]
    except Exception:
        return traceback.format_exc()
    return {name: value for name, value in judged.items() if isinstance(value, float)}


def main(folder: Path) -> None:
    """Everything twice; the last line printed is name -> [here, there, operations on the card]."""
    prepare(folder)
    results = {}
    for train in RECIPES:
        name = train.__name__
        here = measure(train, folder / name, folder, "cpu")
        with pretend_card() as card:
            results[name] = [here, measure(train, folder / f"{name}-there", folder, NAME), card.operations]
    here = judge(folder / "sft", "cpu")
    with pretend_card() as card:
        results["evaluate"] = [here, judge(folder / "sft", NAME), card.operations]
    print(json.dumps(results))


if __name__ == "__main__":
    with pretend_card():
        torch.ones(1, device=NAME)
    main(Path(sys.argv[1]))
