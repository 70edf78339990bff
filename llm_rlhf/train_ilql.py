"""Implicit language Q-learning: learn from logged texts with rewards which token was worth what, and write by it.

A checkpoint's `policy` folder is a plain transformers model; the value heads lie in it as `ilql_heads.safetensors`,
with the strength `beta` at which they steer. `tandem eval` steers; other recipes start from the model alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from experiment.run import Run, RunConfig, RunResult
from llm_rlhf.data.texts import Batches
from llm_rlhf.logged.texts import LoggedTexts, logged_texts, tokenize_logged
from llm_rlhf.logged.value_heads import AdvantageSteering, ValueHeads, heads_for, loss_of
from llm_rlhf.models.causal import LanguagePolicy, build_policy
from llm_rlhf.models.loading import ModelConfig, model_folder
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
from llm_rlhf.tasks.room import require_room
from llm_rlhf.tasks.task import TaskConfig, build_task
from policy_core.critics import polyak_
from policy_core.ilql import ILQLConfig
from policy_core.optimizer import clipped_step
from policy_core.schedules import Schedule, scheduled

RECIPE = "llm/ilql"


@dataclass(frozen=True)
class LearningConfig:
    """steps, batch_size    updates and texts per update
    micro_batch_size    texts per backward pass; None = all at once
    learning_rate       of the value heads
    model_learning_rate of the language model under them; 0 freezes it
    gamma               discount per chosen token
    scale_rewards       divide rewards by the standard deviation of the texts' sums, so that beta means the same
    max_seconds         stop after this much CPU time of training (a run that uses it cannot be repeated to the bit)
    """

    steps: int = 2000
    batch_size: int = 64
    micro_batch_size: int | None = None
    learning_rate: float = 2e-3
    model_learning_rate: float = 1e-3
    schedule: Schedule = "constant"
    warmup: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gamma: float = 0.99
    scale_rewards: bool = True
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.micro_batch_size or 1) < 1:
            raise ValueError("learning: steps, batch_size and micro_batch_size must be at least 1")
        if self.learning_rate <= 0 or self.model_learning_rate < 0:
            raise ValueError("learning: learning_rate must be positive, model_learning_rate must not be negative")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be in [0, 1), got {self.warmup}")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"learning.gamma must be in (0, 1], got {self.gamma}")


@dataclass(frozen=True)
class DecodingConfig:
    """beta: how strongly advantages move the logits, 0 is the language model; top_k: tokens that stay possible."""

    beta: float = 4.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"decoding.top_k must be at least 1, got {self.top_k}")


@dataclass(frozen=True)
class TrainILQLConfig:
    """Everything an ILQL run is made of. rewards: name (or file.py:function) -> weight, which score the task's
    demonstrations; empty = the task's own (a file of scored texts brings its rewards)."""

    run: RunConfig = field(default_factory=lambda: RunConfig(name="ilql", checkpoint_every=500))
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    rewards: dict[str, float] = field(default_factory=dict)
    learning: LearningConfig = field(default_factory=LearningConfig)
    ilql: ILQLConfig = field(default_factory=ILQLConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    validation: ValidationConfig = field(default_factory=lambda: ValidationConfig(every=500))
    log_every: int = 50


def train(config: TrainILQLConfig, *, resume: Path | None = None) -> RunResult:
    """Learn from the task's logged texts; the run's `policy` folder is a plain transformers model with heads."""
    task = build_task(config.task)
    texts = logged_texts(task, config.rewards)
    with Run.start(config, recipe=RECIPE, resume=resume) as run:
        announce(task)
        policy, tokenizer = build_policy(checkpoint_policy(run, config.model), alphabet=task.alphabet)
        data = tokenize_logged(
            texts, tokenizer, context=policy.context, pad=pad_id(tokenizer), gamma=config.learning.gamma
        )
        require_room(
            validation_prompts(task, config.validation),
            tokenizer,
            context=policy.context,
            max_new_tokens=task.max_new_tokens,
            limited_by=task.limited_by,
            new_model=config.model.path is None,
        )
        learner = build_learner(run, policy, config, texts=len(data))
        if config.learning.scale_rewards:
            data = data.scaled()
        start = 0 if run.checkpoint is None else run.checkpoint.step
        total = 1 if config.run.dry_run else config.learning.steps
        run.begin_loop(total)
        for step in range(start + 1, total + 1):
            began = time.process_time()
            with stopping_on_nan(run, "learning.learning_rate"):
                losses = update(learner, data, config, step=step)
            learner.counters.seconds += time.process_time() - began
            limit = config.learning.max_seconds
            last = step == total or (limit is not None and learner.counters.seconds >= limit)
            due = last or step % max(config.validation.every, 1) == 0
            looked = validate(policy, tokenizer, task, config.validation, due=due)
            log_and_save(
                run,
                learner,
                losses,
                looked,
                global_step=step,
                last=last,
                log_every=config.log_every,
                folders=folders_of(learner, tokenizer),
                epoch=learner.batches.epoch,
            )
            if last:
                break
        return run.finish()


@dataclass
class Learner:
    """What an ILQL run moves; `state_dict` is everything but the weights, which have a folder of their own."""

    policy: LanguagePolicy
    steering: AdvantageSteering
    optimizer: torch.optim.Optimizer
    batches: Batches
    counters: Counters

    @property
    def heads(self) -> ValueHeads:
        """Critics, their slow copy and the value."""
        return self.steering.heads

    def state_dict(self) -> dict[str, Any]:
        """Optimizer, position in the data, counters."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.state_dict(),
            "counters": self.counters.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        for name in ("optimizer", "batches", "counters"):
            getattr(self, name).load_state_dict(state[name])


def build_learner(run: Run, policy: LanguagePolicy, config: TrainILQLConfig, *, texts: int) -> Learner:
    """A learner at the run's start, with the heads of model.path if it has any, or as the checkpoint left it."""
    path = checkpoint_policy(run, config.model).path
    known = None if path is None else AdvantageSteering.load(Path(model_folder(path)), policy)
    heads = heads_for(policy) if known is None else known.heads
    steering = AdvantageSteering(heads, beta=config.decoding.beta, top_k=config.decoding.top_k)
    policy.steering = steering
    settings = config.learning
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in heads.parameters() if parameter.requires_grad]}
    ]
    if settings.model_learning_rate > 0:
        groups.append({"params": list(policy.model.parameters())})
    else:
        policy.model.requires_grad_(False)
    learner = Learner(
        policy=policy,
        steering=steering,
        optimizer=torch.optim.AdamW(
            groups, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        ),
        batches=Batches(texts, settings.batch_size, seed=config.run.seed),
        counters=Counters(),
    )
    if run.checkpoint is not None:
        learner.load_state_dict(run.checkpoint.state)
    return learner


def folders_of(learner: Learner, tokenizer: PreTrainedTokenizerBase) -> dict[str, Callable[[Path], None]]:
    """The checkpoint's `policy` folder: a plain transformers model, its tokenizer, the heads."""
    write_model = writer(learner.policy, tokenizer)["policy"]

    def write(folder: Path) -> None:
        write_model(folder)
        learner.steering.save(folder)

    return {"policy": write}


def update(learner: Learner, data: LoggedTexts, config: TrainILQLConfig, *, step: int) -> dict[str, float]:
    """One step on the next batch of texts, then the slow critics'; returns metrics.

    Raises NonFiniteLoss before a step that would spoil the weights.
    """
    settings, optimizer, counters = config.learning, learner.optimizer, learner.counters
    progress = progress_of(step, settings.steps, counters, settings.max_seconds)
    factor = scheduled(1.0, schedule=settings.schedule, progress=progress, warmup=settings.warmup)
    rates = (settings.learning_rate * factor, settings.model_learning_rate * factor)
    for group, rate in zip(optimizer.param_groups, rates, strict=False):
        group["lr"] = rate
    rows = learner.batches.next()
    chosen = int(data.mask[rows].sum())
    optimizer.zero_grad(set_to_none=True)
    totals: dict[str, float] = {"loss/total": 0.0}
    for part in rows.split(settings.micro_batch_size or len(rows)):
        loss, metrics = loss_of(
            learner.policy, learner.heads, data.select(part), config.ilql, denominator=float(chosen)
        )
        loss.backward()
        totals["loss/total"] += loss.item()
        for name, value in metrics.items():
            totals[NAMES[name]] = totals.get(NAMES[name], 0.0) + float(value)
    grad_norm = clipped_step(optimizer, max_grad_norm=settings.max_grad_norm, losses=totals)
    polyak_(learner.heads.slow, learner.heads.critics, rate=config.ilql.iql.target_rate)
    counters.samples += len(rows)
    counters.tokens += chosen
    return {**totals, "policy/grad_norm": float(grad_norm), "lr": rates[0]}


NAMES = {
    "value_loss": "loss/value",
    "critic_loss": "loss/critic",
    "conservative_gap": "loss/conservative",
    "policy_loss": "loss/policy",
    "values": "val/values",
    "q_values": "val/q_values",
    "advantage_weight": "policy/advantage_weight",
}
"""The loss's metrics under the names they are logged by."""
