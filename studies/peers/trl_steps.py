"""TRL's trainers, a few steps at a time: a process that `studies.language_speed` starts and lets go in turns.

    PYTHON trl_steps.py TRAINER MODEL STEPS [--bf16]

PYTHON is that of an environment with TRL: 1.16.0 for grpo, sft and dpo, 1.12.0 for ppo (trl.experimental.ppo; later
releases have none). MODEL is a transformers folder with its tokenizer. It trains for STEPS steps, prints how many
seconds they took, waits for a line, and so on; an end of input ends it. The first STEPS warm up.

Prompts and answers have 32 tokens each, a batch has 16 rows (GRPO: four prompts, four answers each; DPO: 16 pairs).
Nothing is logged or saved, and gradients are not checkpointed.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
import warnings
from typing import Any

warnings.filterwarnings("ignore")
os.environ.update(
    TRANSFORMERS_VERBOSITY="error", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", TRL_EXPERIMENTAL_SILENCE="1"
)
REPORTS = os.fdopen(os.dup(1), "w")
"""What the study reads; what others print (TRL's PPO does at every step, some at their import) goes nowhere."""
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)

BATCH, LENGTH, GROUP, EPOCHS, ROWS = 16, 32, 4, 4, 4096
TURNS = 8
"""Turns of the study: one warms up, seven are timed. DPO computes its reference's log-probs of so many turns' pairs
before the first; if it is let go oftener, it begins with them again."""


class Turns(TrainerCallback):
    """Lets a trainer go for `steps` steps at a time."""

    def __init__(self, steps: int) -> None:
        self.steps, self.done, self.started = steps, 0, time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Report and wait after every `steps` steps."""
        self.done += 1
        if self.done % self.steps:
            return
        print(time.perf_counter() - self.started, file=REPORTS, flush=True)
        if not sys.stdin.readline():
            os._exit(0)  # the study has ended: nothing is to be written
        self.started = time.perf_counter()


def words(rows: int, length: int, *, seed: int) -> list[str]:
    """Texts of exactly `length` tokens."""
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(3, 2048)}" for _ in range(length)) for _ in range(rows)]


def even_words(completions: list[str], **columns: Any) -> list[float]:
    """How many words have even numbers."""
    return [
        float(sum(int(word[1:]) % 2 == 0 for word in text.split() if word[1:].isdigit())) for text in completions
    ]


def trainer(kind: str, model: str, callback: Turns, shared: dict[str, Any]) -> Any:
    """A trainer of a kind, on words."""
    import trl

    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    both: dict[str, Any] = {"processing_class": tokenizer, "callbacks": [callback]}
    prompts = words(BATCH * TURNS * callback.steps if kind == "dpo" else ROWS, LENGTH, seed=1)
    if kind == "sft":
        data = Dataset.from_dict({"input_ids": tokenizer(words(ROWS, 2 * LENGTH, seed=1))["input_ids"]})
        return trl.SFTTrainer(policy, trl.SFTConfig(max_length=2 * LENGTH, **shared), train_dataset=data, **both)
    if kind == "dpo":
        answers = {
            name: [f" {text}" for text in words(len(prompts), LENGTH, seed=seed)]
            for name, seed in (("chosen", 2), ("rejected", 3))
        }
        config = trl.DPOConfig(max_length=2 * LENGTH + 2, precompute_ref_log_probs=True, **shared)
        return trl.DPOTrainer(
            policy, None, config, train_dataset=Dataset.from_dict({"prompt": prompts, **answers}), **both
        )
    if kind == "grpo":
        config = trl.GRPOConfig(
            num_generations=GROUP,
            max_completion_length=LENGTH,
            generation_kwargs={"min_new_tokens": LENGTH},
            beta=0.04,
            temperature=1.0,
            **shared,
        )
        return trl.GRPOTrainer(
            policy, even_words, config, train_dataset=Dataset.from_dict({"prompt": prompts}), **both
        )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    data = Dataset.from_dict({"input_ids": tokenizer(prompts)["input_ids"]})
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    config = PPOConfig(
        num_mini_batches=1,
        num_ppo_epochs=EPOCHS,
        total_episodes=ROWS,
        response_length=LENGTH,
        temperature=1.0,
        num_sample_generations=0,
        stop_token_id=None,
        **{name: value for name, value in shared.items() if name != "max_steps"},
    )

    def scorer() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype="float32")

    reference = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    return PPOTrainer(
        args=config,
        model=policy,
        ref_model=reference,
        reward_model=scorer(),
        value_model=scorer(),
        train_dataset=data,
        eval_dataset=data.select(range(BATCH)),
        **both,
    )


def main() -> None:
    """Train until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("trainer", choices=("sft", "dpo", "grpo", "ppo"))
    parser.add_argument("model")
    parser.add_argument("steps", type=int)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        shared = {
            "output_dir": folder,
            "per_device_train_batch_size": BATCH,
            "max_steps": ROWS // BATCH,
            "report_to": [],
            "save_strategy": "no",
            "logging_strategy": "no",
            "use_cpu": True,
            "bf16": options.bf16,
            "gradient_checkpointing": False,
            "learning_rate": 1e-6,
            "disable_tqdm": True,
            "seed": 0,
        }
        trainer(options.trainer, options.model, Turns(options.steps), shared).train()


if __name__ == "__main__":
    main()
