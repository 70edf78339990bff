"""TRL's GRPO and RLOO on prompts and rewards that a study gives: a process that `studies.language_methods` starts.

    PYTHON trl_methods.py SETTINGS

PYTHON is that of an environment with TRL 1.16.0. SETTINGS is a JSON file:

    trainer         grpo or rloo
    model           a transformers folder with its tokenizer
    prompts         a JSONL file with `prompt` and `row`, in the order in which they are to be drawn for
    output          where checkpoint-STEP folders go
    updates, prompts_per_update, group_size, max_new_tokens, temperature, learning_rate, schedule, max_grad_norm,
    clip_range, kl_coef, seed, save_every

What a rollout earned is the study's to say, by the function that its own recipes learn from: the completions go out
as one line, {"rows": [...], "completions": [...]}, the rewards come back as one, null where there is none. The last
line out is {"seconds": ..., ...}. Whatever TRL prints goes to the error stream.

TRL's RLOO loss sums the tokens of an answer where its GRPO averages a rollout's: the study's max_grad_norm for rloo
is larger by the mean length of an answer.

Where a setting above has no say, TRL's own defaults hold (for GRPO loss_type "dapo", scale_rewards "group" and
use_bias_correction_kl), but for what is about speed and precision only: float32, no gradient checkpointing, one
thread, nothing logged.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
TOLD = os.fdopen(os.dup(1), "w")
"""What the study reads."""
os.dup2(2, 1)  # prints, whoever's they are, are no messages; libraries print as soon as they are imported

import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

TRAINERS = {"grpo": (trl.GRPOTrainer, trl.GRPOConfig), "rloo": (trl.RLOOTrainer, trl.RLOOConfig)}


def tell(message: dict[str, Any]) -> None:
    """One line to the study."""
    TOLD.write(json.dumps(message) + "\n")
    TOLD.flush()


def study_reward(completions: list[str], row: list[int], **columns: Any) -> list[float | None]:
    """What the study says that they earned; one number a completion, None where it cannot judge."""
    tell({"rows": row, "completions": completions})
    answer = sys.stdin.readline()
    if not answer:
        raise SystemExit("the study has ended")
    rewards: list[float | None] = json.loads(answer)
    return rewards


def trainer_of(settings: dict[str, Any]) -> Any:
    """TRL's trainer, one optimizer step a rollout."""
    trainer, config = TRAINERS[settings["trainer"]]
    lines = Path(settings["prompts"]).read_text(encoding="utf-8").splitlines()
    arguments = config(
        output_dir=settings["output"],
        per_device_train_batch_size=settings["prompts_per_update"] * settings["group_size"],
        max_steps=settings["updates"],
        num_generations=settings["group_size"],
        max_completion_length=settings["max_new_tokens"],
        temperature=settings["temperature"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type=settings["schedule"],
        max_grad_norm=settings["max_grad_norm"],
        epsilon=settings["clip_range"],
        beta=settings["kl_coef"],
        seed=settings["seed"],
        shuffle_dataset=False,  # the order of the prompts is the study's
        disable_dropout=True,
        save_strategy="steps",
        save_steps=settings["save_every"],
        save_only_model=True,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    return trainer(
        AutoModelForCausalLM.from_pretrained(settings["model"], dtype="float32"),
        study_reward,
        arguments,
        train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
    )


def main() -> None:
    """Train, and say how long it took."""
    torch.set_num_threads(1)
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    training = trainer_of(settings)
    wall, cpu = time.perf_counter(), time.process_time()
    training.train()
    tell(
        {
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
            "updates": training.state.global_step,
            "versions": {
                "trl": trl.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
    )


if __name__ == "__main__":
    main()
