"""PPO's golden numbers, for write_trl_golden.py under TRL 1.12.0: a `PPOTrainer` trains, and is written down.

`PPOTrainer.train` is one function of 340 lines that computes its losses in passing. Here it runs as it is; only its
accelerator's `backward` is wrapped, and reads the variables of `train` before it goes on.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import numpy as np
import torch
from torch import Tensor

SEED, ORDER = 38, 42
"""Answers of 6, 3, 1 and 4 tokens, the first of which does not end; ratios are clipped on both sides. In the last
epoch the halves of the batch have 10 and 4 tokens."""


def tiny_ppo_trainer(folder: str, *, micro_batch: int, mini_batches: int) -> Any:
    """A real PPOTrainer with models of a thousand float64 weights, and four answers of up to 6 tokens an update."""
    import datasets
    import tokenizers
    import transformers
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    words = {word: number for number, word in enumerate(("<pad>", "<eos>", "a", "b", "c", "d"))}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
    )
    config = transformers.GPT2Config(
        vocab_size=6, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1, pad_token_id=0
    )
    scored = transformers.GPT2Config(**{**config.to_dict(), "num_labels": 1})
    torch.manual_seed(20)
    policy, reference = (transformers.GPT2LMHeadModel(config).double() for _ in range(2))
    reward, value = (transformers.GPT2ForSequenceClassification(scored).double() for _ in range(2))
    for model in (reward, value):
        model.score.weight.data.normal_(0.0, 0.5)
    arguments = PPOConfig(
        output_dir=folder,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=4 // micro_batch,
        num_mini_batches=mini_batches,
        num_ppo_epochs=3,
        total_episodes=4,
        response_length=6,
        stop_token="eos",
        learning_rate=0.02,
        cliprange=0.1,
        cliprange_value=0.05,
        vf_coef=0.3,
        gamma=0.9,
        lam=0.8,
        kl_coef=0.1,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        num_sample_generations=0,
        save_strategy="no",
        disable_tqdm=True,
    )
    return PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=datasets.Dataset.from_dict({"input_ids": [[2, 3], [4, 5], [3, 3], [5, 2]] * 3}),
    )


def listed(tensor: Tensor) -> Any:
    """Numbers that the next optimizer step does not change."""
    return tensor.detach().tolist()


def ppo_case(*, micro_batch: int, mini_batches: int) -> dict[str, dict[str, Any]]:
    """The last of three epochs over four answers, part by part, as `train` has it before it calls backward."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = tiny_ppo_trainer(folder, micro_batch=micro_batch, mini_batches=mini_batches)
        parts: list[dict[str, Any]] = []
        rollout: dict[str, Any] = {}
        backward = trainer.accelerator.backward

        def writing_down(loss: Tensor) -> None:
            frame = sys._getframe(1).f_locals  # the variables of PPOTrainer.train
            rows = torch.as_tensor(frame["micro_batch_inds"])
            leaves = (frame["new_logprobs"], frame["vpred"])
            gradients = torch.autograd.grad(loss, leaves, retain_graph=True)
            named = {"log_probs": "new_logprobs", "old_log_probs": "mb_logprobs", "advantages": "mb_advantage"}
            named |= {"values": "vpred", "old_values": "mb_values", "returns": "mb_return"}
            parts.append(
                {
                    **{name: listed(frame[theirs]) for name, theirs in named.items()},
                    "mask": listed(~frame["padding_mask"][rows]),
                    "value_mask": listed(~frame["padding_mask_p1"][rows]),
                    "policy_loss": listed(frame["pg_loss"]),
                    "value_loss": listed(frame["vf_loss"]),
                    "loss": listed(loss),
                    "log_prob_gradient": listed(gradients[0]),
                    "value_gradient": listed(gradients[1]),
                    "steps": bool(trainer.accelerator.sync_gradients),
                }
            )
            names = ("rewards", "values", "advantages", "returns", "scores", "logprobs", "ref_logprobs")
            rollout.update({name: listed(frame[name]) for name in names})
            rollout["tokens"] = listed(frame["responses"])
            rollout["mask"] = listed(~frame["padding_mask"])
            rollout["value_mask"] = listed(~frame["padding_mask_p1"])
            backward(loss)

        trainer.accelerator.backward = writing_down
        torch.manual_seed(SEED)
        np.random.seed(ORDER)  # of the rows in an epoch, which TRL leaves unseeded
        trainer.train()
    settings = {
        "clip_range": 0.1,
        "value_clip_range": 0.05,
        "value_coef": 0.3,
        "gamma": 0.9,
        "lambda": 0.8,
        "kl": 0.1,
    }
    last = parts[-4 // micro_batch :]
    return {"settings": settings, "inputs": rollout, "outputs": {"parts": last}}
