"""GRPO, RLOO and Dr.GRPO on completions: a group of samples per prompt is the baseline, PPO's clip the update."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from experiment.run import Run, RunConfig, RunResult
from llm_rlhf.experience import (
    policy_metrics,
    reference_log_probs,
    sample_metrics,
    with_kl_rewards,
)
from llm_rlhf.generation import GenerationConfig, to_rollout
from llm_rlhf.learner import (
    Learner,
    ValidationConfig,
    announce,
    build_learner,
    progress_of,
    record,
    require_trained,
    stopping_on_nan,
)
from llm_rlhf.models import ModelConfig
from llm_rlhf.self_imitation import SelfImitationConfig
from llm_rlhf.tasks.task import TaskConfig, build_task
from policy_core.grpo import GRPOConfig, group_advantages, with_signal
from policy_core.kl import KLConfig, kl_in_unit
from policy_core.ppo import PPOConfig, update
from policy_core.schedules import scheduled, set_learning_rate

RECIPE = "llm/grpo"


def group_ppo() -> PPOConfig:
    """PPO's numbers for groups: one pass, so that the clip seldom binds; advantages come ready from the group."""
    return PPOConfig(
        learning_rate=4e-4,
        epochs=1,
        minibatch_size=512,
        gamma=1.0,
        max_grad_norm=1.0,
        normalize_advantages=False,
    )


@dataclass(frozen=True)
class SamplingConfig:
    """updates: rollouts in all; prompts: of one rollout, each with grpo.group_size samples; skip_flat_groups: leave
    groups of one and the same reward out of the update, its KL term included (as DAPO 2503.14476, but without
    drawing others); max_seconds: stop after this much CPU time of training (a run that uses it cannot be repeated
    to the bit)."""

    updates: int = 400
    prompts: int = 64
    skip_flat_groups: bool = True
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        if min(self.updates, self.prompts) < 1:
            raise ValueError("sampling: updates and prompts must be at least 1")


@dataclass(frozen=True)
class TrainGRPOConfig:
    """Everything a GRPO run is made of. rewards: name (or file.py:function) -> weight; empty = the task's own."""

    run: RunConfig = field(default_factory=lambda: RunConfig(name="grpo", checkpoint_every=100))
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    rewards: dict[str, float] = field(default_factory=dict)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    ppo: PPOConfig = field(default_factory=group_ppo)
    kl: KLConfig = field(default_factory=lambda: KLConfig(coef=0.01, placement="loss", estimator="k2"))
    self_imitation: SelfImitationConfig = field(default_factory=SelfImitationConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    log_every: int = 1


def train(config: TrainGRPOConfig, *, resume: Path | None = None) -> RunResult:
    """Improve a trained model on the task's prompts. Raises UserError if model.path names none."""
    require_trained(config.model)
    task = build_task(config.task)
    with Run.start(config, recipe=RECIPE, resume=resume) as run:
        announce(task)
        learner = build_learner(
            run,
            task,
            model=config.model,
            generation=config.generation,
            rewards=config.rewards,
            kl=config.kl,
            self_imitation=config.self_imitation,
            learning_rate=config.ppo.learning_rate,
            prompts=config.sampling.prompts,
            seed=config.run.seed,
            value_head=False,
        )
        start = 0 if run.checkpoint is None else run.checkpoint.step
        total = 1 if config.run.dry_run else config.sampling.updates
        run.begin_loop(total)
        for step in range(start + 1, total + 1):
            began = time.process_time()
            rate = scheduled(
                config.ppo.learning_rate,
                schedule=config.ppo.schedule,
                progress=progress_of(step, total, learner.counters, config.sampling.max_seconds),
                warmup=config.ppo.warmup,
            )
            set_learning_rate(learner.optimizer, rate)
            with stopping_on_nan(run, "ppo.learning_rate"):
                metrics = iterate(config, learner)
            learner.counters.seconds += time.process_time() - began
            limit = config.sampling.max_seconds
            last = step == total or (limit is not None and learner.counters.seconds >= limit)
            record(
                run,
                learner,
                {**metrics, "lr": rate},
                validation=config.validation,
                global_step=step,
                last=last,
                log_every=config.log_every,
            )
            if last:
                break
        return run.finish()


def iterate(config: TrainGRPOConfig, learner: Learner) -> dict[str, float]:
    """One rollout and the update on it; returns metrics under TRL's names."""
    rows = learner.prompts.next().tolist()
    samples, scores = learner.sampler.draw(
        rows, samples_per_prompt=config.grpo.group_size, drawn_before=learner.counters.samples
    )
    learner.latest = (samples, scores)
    if config.self_imitation.coef > 0:
        learner.good_answers.remember(torch.tensor(rows)[samples.prompt], samples, scores)
    ref_log_probs = reference_log_probs(learner.reference, samples)
    rollout = to_rollout(
        samples,
        scores.total,
        scored=scores.scored,
        ref_log_probs=ref_log_probs,
        cut_is_end=config.generation.cut_is_end,
        gamma=config.ppo.gamma,
    )
    rollout, kl_metrics = with_kl_rewards(rollout, config=config.kl, coef=learner.controller.coef)
    advantages, group_metrics = group_advantages(rollout, config=config.grpo)
    metrics = {f"objective/{name}": float(value) for name, value in group_metrics.items()}
    trained = rollout
    if config.sampling.skip_flat_groups:
        trained, advantages = with_signal(rollout, advantages)
    statistics = update(
        policy=learner.policy,
        optimizer=learner.optimizer,
        rollout=trained,
        advantages=advantages,
        returns=None,
        config=config.ppo,
        generator=learner.shuffling,
        kl=config.kl,
        kl_coef=learner.controller.coef,
        auxiliary=learner.auxiliary(),
    )
    metrics |= {**sample_metrics(samples, scores, ref_log_probs), **kl_metrics, **policy_metrics(statistics)}
    metrics["objective/kl_coef"] = learner.controller.coef
    spent = kl_in_unit(
        rollout.old_log_probs - ref_log_probs, mask=rollout.mask, episode=rollout.episode, unit=config.kl.unit
    )
    learner.controller.update(spent, episodes=len(scores.total))
    learner.counters.samples += len(scores.total)
    learner.counters.tokens += int(samples.mask.sum())
    return metrics
