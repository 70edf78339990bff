"""Supervised fine-tuning: learn the demonstrated completions, prompts and others' turns masked out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from experiment.run import Run, RunConfig, RunResult
from llm_rlhf.data.packing import PackedTexts, pack, require_apart
from llm_rlhf.data.texts import Batches, TokenizedTexts, encode_examples, lay_out
from llm_rlhf.models.causal import LanguagePolicy, build_policy
from llm_rlhf.models.loading import ModelConfig
from llm_rlhf.models.precision import Precision, autocast, require_precision
from llm_rlhf.models.tokenizer import pad_id
from llm_rlhf.online.learner import (
    ValidationConfig,
    announce,
    checkpoint_policy,
    stopping_on_nan,
    validate,
    validation_prompts,
)
from llm_rlhf.online.moved import Counters, progress_of
from llm_rlhf.online.recording import log_and_save, writer
from llm_rlhf.tasks.room import require_room, skipping_long
from llm_rlhf.tasks.task import Task, TaskConfig, build_task
from policy_core.bc import bc_loss
from policy_core.optimizer import clipped_step
from policy_core.schedules import Schedule, scheduled, set_learning_rate

RECIPE = "llm/sft"


@dataclass(frozen=True)
class SupervisedConfig:
    """steps, batch_size: updates and texts (of a packed run: rows) per update; micro_batch_size: of those per
    backward pass, None = all at once, which changes no number beyond rounding; learning_rate, schedule, warmup:
    AdamW's and its course; precision: with "bf16" the model's matrix products are (autocast to bfloat16), while
    log-softmax, loss, weights and optimizer stay float32; max_seconds: stop after this much CPU time of training (a
    run that uses it cannot be repeated to the bit)."""

    steps: int = 2000
    batch_size: int = 64
    micro_batch_size: int | None = None
    learning_rate: float = 2e-3
    schedule: Schedule = "constant"
    warmup: float = 0.0
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    precision: Precision = "float32"
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"steps and batch_size must be at least 1, got {self.steps} and {self.batch_size}")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be at least 1, got {self.micro_batch_size}")
        if self.learning_rate < 0 or self.weight_decay < 0 or self.max_grad_norm <= 0:
            raise ValueError("learning_rate and weight_decay must not be negative, max_grad_norm must be above 0")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be in [0, 1), got {self.warmup}")


@dataclass(frozen=True)
class TextsConfig:
    """How texts are laid out.

    packing         several in a row, which changes no text's numbers beyond rounding and saves the padding
    packed_length   tokens of such a row; None = 1024, or what the longest text needs, at most the model's context
    cut             cut texts that do not fit the context (prompts keep their end, completions their start) instead
                    of refusing them, and leave prompts out of validation that leave no room for an answer; how many
                    is said
    """

    packing: bool = False
    packed_length: int | None = None
    cut: bool = False

    def __post_init__(self) -> None:
        if self.packed_length is not None and self.packed_length < 2:
            raise ValueError(f"texts.packed_length must be at least 2, got {self.packed_length}")


@dataclass(frozen=True)
class TrainSFTConfig:
    """Everything an SFT run is made of."""

    run: RunConfig = field(default_factory=lambda: RunConfig(name="sft", checkpoint_every=500))
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    texts: TextsConfig = field(default_factory=TextsConfig)
    sft: SupervisedConfig = field(default_factory=SupervisedConfig)
    validation: ValidationConfig = field(default_factory=lambda: ValidationConfig(every=500))
    log_every: int = 50


def train(config: TrainSFTConfig, *, resume: Path | None = None) -> RunResult:
    """Train on the task's demonstrations; the run's `policy` folder is a plain transformers model."""
    require_precision(config.sft.precision, setting="sft.precision")
    task = build_task(config.task)
    with Run.start(config, recipe=RECIPE, resume=resume) as run:
        announce(task)
        policy, tokenizer = build_policy(checkpoint_policy(run, config.model), alphabet=task.alphabet)
        data = training_texts(task, tokenizer, policy, config.texts)
        task = with_room_to_answer(task, tokenizer, policy, config)
        held_out = held_out_texts(task, tokenizer, policy, config)
        learner = build_learner(run, policy, config.sft, texts=len(data), seed=config.run.seed)
        batches, counters = learner.batches, learner.counters
        start = 0 if run.checkpoint is None else run.checkpoint.step
        total = 1 if config.run.dry_run else config.sft.steps
        run.begin_loop(total)
        for step in range(start + 1, total + 1):
            began = time.process_time()
            with stopping_on_nan(run, "sft.learning_rate"):
                losses = supervised_step(
                    policy, learner.optimizer, data, batches, config.sft, step=step, counters=counters
                )
            counters.seconds += time.process_time() - began
            limit = config.sft.max_seconds
            last = step == total or (limit is not None and counters.seconds >= limit)
            due = last or step % max(config.validation.every, 1) == 0
            looked = validate(policy, tokenizer, task, config.validation, due=due)
            if looked and held_out is not None:
                looked["eval/loss"] = mean_loss(policy, held_out, config.sft)
            log_and_save(
                run,
                learner,
                losses,
                looked,
                global_step=step,
                last=last,
                log_every=config.log_every,
                folders=writer(policy, tokenizer),
                epoch=batches.epoch,
            )
            if last:
                break
        return run.finish()


@dataclass
class Learner:
    """What supervised training moves, and what it must remember to go on after a break."""

    optimizer: torch.optim.Optimizer
    batches: Batches
    counters: Counters

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights, which have a folder of their own."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.state_dict(),
            "counters": self.counters.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        for name in ("optimizer", "batches", "counters"):
            getattr(self, name).load_state_dict(state[name])


def build_learner(run: Run, policy: LanguagePolicy, config: SupervisedConfig, *, texts: int, seed: int) -> Learner:
    """A learner at the run's start or, when resuming, exactly where its checkpoint left it."""
    learner = Learner(make_optimizer(policy, config), Batches(texts, config.batch_size, seed=seed), Counters())
    if run.checkpoint is not None:
        learner.load_state_dict(run.checkpoint.state)
    return learner


def with_room_to_answer(
    task: Task, tokenizer: PreTrainedTokenizerBase, policy: LanguagePolicy, config: TrainSFTConfig
) -> Task:
    """The task without the validation prompts that leave no room for an answer, where texts may be cut; says how
    many those are. Raises UserError where they may not, or where none is left."""
    looked_at, limit = validation_prompts(task, config.validation), task.max_new_tokens
    if config.texts.cut:
        looked_at = skipping_long(
            looked_at, tokenizer, context=policy.context, max_new_tokens=limit, what="validation"
        )
    require_room(
        looked_at,
        tokenizer,
        context=policy.context,
        max_new_tokens=limit,
        limited_by=task.limited_by,
        new_model=config.model.path is None,
    )
    return replace(task, splits={**task.splits, "validation": looked_at})


def training_texts(
    task: Task, tokenizer: PreTrainedTokenizerBase, policy: LanguagePolicy, config: TextsConfig
) -> TokenizedTexts | PackedTexts:
    """The task's demonstrations as tokens, packed where that is asked for; says what was cut.

    Raises UserError if there is nothing, or a text does not fit the model's context and may not be cut.
    """
    texts, counts = encode_examples(task.demonstrations, tokenizer, context=policy.context, cut=config.cut)
    say_cuts(counts, texts=len(texts), context=policy.context)
    in_part = sum(text.in_part for text in texts)
    if in_part:
        print(
            f"{in_part} of {len(texts)} completions are shown in part by the chat template: what it leaves out, "
            "such as their thoughts, is not learned",
            flush=True,
        )
    silent = sum(not example.completion for example in task.demonstrations)
    if silent:
        print(f"{silent} of {len(texts)} completions are empty: there the model learns to say nothing", flush=True)
    if not config.packing:
        return lay_out(texts, pad=pad_id(tokenizer))
    packed = pack(texts, context=policy.context, pad=pad_id(tokenizer), width=config.packed_length)
    require_apart(policy, packed)
    filled = float(packed.attention_mask.float().mean())
    print(
        f"{len(texts)} texts in {len(packed)} rows of {packed.mask.shape[1]} tokens, {filled:.1%} filled",
        flush=True,
    )
    return packed


def held_out_texts(
    task: Task, tokenizer: PreTrainedTokenizerBase, policy: LanguagePolicy, config: TrainSFTConfig
) -> TokenizedTexts | PackedTexts | None:
    """The completions of the prompts that validation looks at, masked and laid out as training's are; None where
    there is none. What does not fit the context is cut, with or without `texts.cut`, and said."""
    shown = [example for example in validation_prompts(task, config.validation) if example.completion]
    if not shown:
        return None
    texts, counts = encode_examples(shown, tokenizer, context=policy.context, cut=True)
    say_cuts(counts, texts=len(texts), context=policy.context, of="validation ")
    if not config.texts.packing:
        return lay_out(texts, pad=pad_id(tokenizer))
    width = config.texts.packed_length
    if width is not None:  # which was chosen for the training texts
        width = max(width, *(len(text) for text in texts))
    return pack(texts, context=policy.context, pad=pad_id(tokenizer), width=width)


def say_cuts(counts: Mapping[str, int], *, texts: int, context: int, of: str = "") -> None:
    """Say how many of so many prompts and completions were cut, a line each."""
    for what, count in counts.items():
        if count:
            print(f"{count} of {texts} {of}{what.replace('_', ' ')} to the context of {context}", flush=True)


def make_optimizer(policy: LanguagePolicy, config: SupervisedConfig) -> torch.optim.AdamW:
    """AdamW over everything that learns, in its fused form."""
    learned = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(learned, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)


def supervised_step(
    policy: LanguagePolicy,
    optimizer: torch.optim.Optimizer,
    data: TokenizedTexts | PackedTexts,
    batches: Batches,
    config: SupervisedConfig,
    *,
    step: int,
    counters: Counters,
    progress: float | None = None,
) -> dict[str, float]:
    """One update on the next batch; returns loss/sft (nats a token), the gradient's norm and the learning rate.

    progress    how far the schedule is, 0..1; None = as far as the run is before update `step`

    Raises NonFiniteLoss before a step that would spoil the weights.
    """
    if progress is None:
        progress = progress_of(step, config.steps, counters, config.max_seconds)
    rate = scheduled(config.learning_rate, schedule=config.schedule, progress=progress, warmup=config.warmup)
    set_learning_rate(optimizer, rate)
    rows = batches.next()
    learned = float(data.mask[rows].sum().clamp(min=1))
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for part in rows.split(config.micro_batch_size or len(rows)):
        log_probs = token_log_probs(policy, data, part, config.precision)
        loss, _ = bc_loss(log_probs=log_probs, mask=data.mask[part], denominator=learned)
        loss.backward()
        total += loss.item()
    grad_norm = clipped_step(optimizer, max_grad_norm=config.max_grad_norm, losses={"loss/sft": total})
    counters.samples += len(rows)
    counters.tokens += int(data.attention_mask[rows].sum())
    return {"loss/sft": total, "policy/grad_norm": float(grad_norm), "lr": rate}


def token_log_probs(
    policy: LanguagePolicy, data: TokenizedTexts | PackedTexts, rows: Tensor, precision: Precision
) -> Tensor:
    """Log-probs [B, T] of the tokens of the rows [B] in nats; what `data.mask` leaves out has no meaning."""
    with autocast(policy, precision):
        if isinstance(data, PackedTexts):
            return data.log_probs(policy, rows)
        return policy.log_probs(data.observations(rows), data.input_ids[rows])


@torch.no_grad()
def mean_loss(policy: LanguagePolicy, data: TokenizedTexts | PackedTexts, config: SupervisedConfig) -> float:
    """Mean nats of all learned tokens, in passes of at most as many rows as training's. Draws no random numbers."""
    total = 0.0
    size = min(config.micro_batch_size or config.batch_size, config.batch_size)
    for rows in torch.arange(len(data)).split(size):
        log_probs = token_log_probs(policy, data, rows, config.precision)
        total -= float(log_probs[data.mask[rows]].double().sum())
    return total / max(int(data.mask.sum()), 1)
