"""A process reward model from step labels: binary cross-entropy at the last token of each step.

A checkpoint's `process_reward_model` folder is a reward model's with the separator of steps beside it;
`process_reward.dense_rewards` pays a policy by it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from experiment.device import find_device
from experiment.run import Run, RunConfig, RunResult
from llm_rlhf.data.texts import Batches
from llm_rlhf.evaluate_process_reward import judge
from llm_rlhf.models.card import with_cards
from llm_rlhf.models.loading import ModelConfig
from llm_rlhf.online.learner import stopping_on_nan
from llm_rlhf.online.moved import Counters, progress_of
from llm_rlhf.rewards.process_reward import (
    FOLDER,
    StepData,
    StepsConfig,
    StepScorer,
    TokenizedSteps,
    read_solutions,
    require_causal,
    step_loss,
    token_scores,
    tokenize_steps,
)
from llm_rlhf.rewards.reward_model import Scorer, build_reward_model
from llm_rlhf.train_reward import RewardLearningConfig, RewardValidationConfig, refuse_adapter
from policy_core.optimizer import clipped_step
from policy_core.schedules import scheduled

RECIPE = "llm/process_reward"


@dataclass(frozen=True)
class TrainProcessRewardConfig:
    """Everything a process reward model's run is made of; learning.batch_size counts solutions."""

    run: RunConfig = field(default_factory=lambda: RunConfig(name="process-reward", checkpoint_every=500))
    steps: StepsConfig = field(default_factory=StepsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    learning: RewardLearningConfig = field(default_factory=RewardLearningConfig)
    validation: RewardValidationConfig = field(default_factory=RewardValidationConfig)
    log_every: int = 10

    def __post_init__(self) -> None:
        refuse_adapter(self.model)


def train(config: TrainProcessRewardConfig, *, resume: Path | None = None) -> RunResult:
    """Learn which steps are right; the best checkpoint has the lowest validation loss."""
    solutions = read_solutions(config.steps)
    with Run.start(config, recipe=RECIPE, resume=resume) as run:
        learner = build_learner(run, solutions, config)
        settings, counters = config.learning, learner.counters
        start = 0 if run.checkpoint is None else run.checkpoint.step
        steps = settings.steps or math.ceil(settings.epochs * len(learner.data) / settings.batch_size)
        total = 1 if config.run.dry_run else steps
        run.begin_loop(total)
        for step in range(start + 1, total + 1):
            began = time.process_time()
            with stopping_on_nan(run, "learning.learning_rate"):
                losses = update(learner, config, step=step, total=total)
            counters.seconds += time.process_time() - began
            last = step == total or (settings.max_seconds is not None and counters.seconds >= settings.max_seconds)
            looked: dict[str, float] = {}
            due = config.validation.every > 0 and (last or step % config.validation.every == 0)
            if due and learner.held_out is not None:
                looked = {f"eval/{name}": x for name, x in judge(learner.steps, learner.held_out).items()}
            if looked or last or step % config.log_every == 0:
                position = {"samples": counters.samples, "tokens": counters.tokens, "epoch": learner.batches.epoch}
                run.log({**losses, **position, **looked}, global_step=step)
            better = looked.get("eval/loss", math.inf) < learner.best
            if last or better or run.should_save(step):
                learner.best = min(learner.best, looked.get("eval/loss", math.inf))
                writers = with_cards(run, {FOLDER: learner.steps.save_pretrained})
                metric = -looked["eval/loss"] if looked else None
                run.save(learner.state_dict(), global_step=step, folders=writers, metric=metric)
            if last:
                break
        return run.finish()


@dataclass
class Learner:
    """What a run moves; `state_dict` is everything but the weights, which have a folder of their own."""

    steps: StepScorer
    data: TokenizedSteps
    held_out: TokenizedSteps | None
    optimizer: torch.optim.Optimizer
    batches: Batches
    counters: Counters
    best: float = math.inf

    def state_dict(self) -> dict[str, Any]:
        """Optimizer, position in the data, counters, the best loss."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.state_dict(),
            "counters": self.counters.state_dict(),
            "best": self.best,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        for name in ("optimizer", "batches", "counters"):
            getattr(self, name).load_state_dict(state[name])
        self.best = float(state["best"])


def build_learner(run: Run, solutions: StepData, config: TrainProcessRewardConfig) -> Learner:
    """A learner at the run's start, or as the checkpoint left it; says what the data is.

    Raises UserError for an encoder, or solutions that do not fit.
    """
    source = config.model
    if run.checkpoint is not None:
        source = ModelConfig(path=str(run.checkpoint.folder / FOLDER))
    model, tokenizer = build_reward_model(source, alphabet=solutions.alphabet, objectives=("step",), heads=1)
    require_causal(model)
    model.place(find_device(config.model.device, setting="model.device"))
    if config.model.gradient_checkpointing:
        model.checkpoint_gradients()
    model.tie_level.requires_grad_(False)
    steps = StepScorer(Scorer(model, tokenizer), config.steps.separator)
    data = tokenize_steps(solutions.train, steps.scorer, steps.separator)
    labelled = int((~data.labels.isnan()).sum())
    right = float(data.labels.nan_to_num().sum()) / labelled
    print(f"training: {len(data)} solutions, {labelled} labelled steps, {right:.0%} of them right", flush=True)
    learning, held_out = config.learning, solutions.validation
    groups: list[dict[str, Any]] = [
        {"params": list(model.heads.parameters())},
        {"params": list(model.trunk.parameters())},
    ]
    learner = Learner(
        steps=steps,
        data=data,
        held_out=tokenize_steps(held_out, steps.scorer, steps.separator) if held_out else None,
        optimizer=torch.optim.AdamW(
            groups, lr=learning.head_learning_rate, weight_decay=learning.weight_decay, fused=True
        ),
        batches=Batches(len(data), learning.batch_size, seed=config.run.seed),
        counters=Counters(),
    )
    if run.checkpoint is not None:
        learner.load_state_dict(run.checkpoint.state)
    return learner


def update(learner: Learner, config: TrainProcessRewardConfig, *, step: int, total: int) -> dict[str, float]:
    """One step on the next batch of solutions; every labelled step weighs the same.

    Raises NonFiniteLoss before a step that would spoil the weights.
    """
    settings, model, data = config.learning, learner.steps.scorer.model, learner.data
    progress = progress_of(step, total, learner.counters, settings.max_seconds)
    factor = scheduled(1.0, schedule=settings.schedule, progress=progress, warmup=settings.warmup)
    rates = (settings.head_learning_rate, settings.learning_rate)
    for group, rate in zip(learner.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * factor
    rows = learner.batches.next()
    labelled = max(int((~data.labels[rows].isnan()).sum()), 1)
    learner.optimizer.zero_grad(set_to_none=True)
    total_loss, right = 0.0, 0
    for part in rows.split(settings.micro_batch_size or len(rows)):
        labels = data.labels[part]
        logits = token_scores(model, data.input_ids[part], data.attention_mask[part])
        loss = step_loss(logits=logits, labels=labels, weights=torch.full_like(labels, 1.0 / labelled))
        loss.backward()
        total_loss += loss.item()
        right += int((~labels.isnan() & ((logits > 0) == (labels >= 0.5))).sum())
    losses = {"loss/steps": total_loss}
    grad_norm = clipped_step(learner.optimizer, max_grad_norm=settings.max_grad_norm, losses=losses)
    learner.counters.samples += len(rows)
    learner.counters.tokens += int(data.attention_mask[rows].sum())
    return {
        **losses,
        "rewards/accuracies": right / labelled,
        "policy/grad_norm": float(grad_norm),
        "lr": rates[1] * factor,
        "lr/heads": rates[0] * factor,
    }
