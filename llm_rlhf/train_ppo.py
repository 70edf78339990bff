"""PPO on completions: values by a head or by a model of their own, the KL in the reward or in the loss."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from experiment.run import Run, RunConfig, RunResult
from llm_rlhf.models.generation import to_rollout
from llm_rlhf.models.precision import require_precision
from llm_rlhf.online.critic import CriticConfig, with_values
from llm_rlhf.online.experience import (
    policy_metrics,
    reference_log_probs,
    sample_metrics,
    settled_log_probs,
    with_behaviour,
    with_dense_rewards,
    with_kl_rewards,
)
from llm_rlhf.online.learner import (
    Learner,
    announce,
    build_learner,
    record,
    require_trained,
    steer_kl,
    stopping_on_nan,
)
from llm_rlhf.online.moved import set_rates
from llm_rlhf.online.process_term import ProcessTermConfig
from llm_rlhf.online.recording import announce_looks
from llm_rlhf.online.settings import AnswersConfig
from llm_rlhf.tasks.task import build_task
from policy_core.kl import KLConfig
from policy_core.ppo import PPOConfig, update
from policy_core.returns import explained_variance, gae

RECIPE = "llm/ppo"


def language_ppo() -> PPOConfig:
    """PPO's numbers for tokens: no discount, few epochs."""
    return PPOConfig(
        learning_rate=4e-4,
        epochs=2,
        minibatch_size=256,
        gamma=1.0,
        gae_lambda=0.95,
        value_coef=0.1,
        max_grad_norm=1.0,
        critic_warmup=3,
    )


@dataclass(frozen=True)
class SamplingConfig:
    """updates: rollouts in all; prompts, samples_per_prompt: of one rollout; max_seconds: stop after this
    much CPU time of training (a run that uses it cannot be repeated to the bit); logprob_gap_every: updates between
    comparisons of sampling's log-probs with training's (0 = never); with precision bf16 every update compares."""

    updates: int = 200
    prompts: int = 256
    samples_per_prompt: int = 1
    max_seconds: float | None = None
    logprob_gap_every: int = 50

    def __post_init__(self) -> None:
        if min(self.updates, self.prompts, self.samples_per_prompt) < 1:
            raise ValueError("sampling: updates, prompts and samples_per_prompt must be at least 1")
        if self.logprob_gap_every < 0:
            raise ValueError("sampling.logprob_gap_every must be at least 0")


@dataclass(frozen=True)
class TrainPPOConfig(AnswersConfig):
    """Everything a PPO run is made of.

    process     a model that pays every step of a completion
    critic      where values come from
    """

    run: RunConfig = field(default_factory=lambda: RunConfig(name="ppo", checkpoint_every=50))
    process: ProcessTermConfig = field(default_factory=ProcessTermConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    ppo: PPOConfig = field(default_factory=language_ppo)
    critic: CriticConfig = field(default_factory=CriticConfig)
    kl: KLConfig = field(default_factory=lambda: KLConfig(coef=0.01))

    def __post_init__(self) -> None:
        self.shaping.cut_of(self.generation)


def train(config: TrainPPOConfig, *, resume: Path | None = None) -> RunResult:
    """Improve a trained model on the task's prompts. Raises UserError if model.path names none."""
    require_trained(config.model)
    require_precision(config.precision, setting="precision")
    announce_looks(config.monitor, updates=config.sampling.updates, every=config.validation.every)
    task = build_task(config.task, rewards=config.rewards)
    with Run.start(config, recipe=RECIPE, resume=resume) as run:
        announce(task)
        learner = build_learner(
            run, task, config, prompts=config.sampling.prompts, critic=config.critic, process=config.process
        )
        start = 0 if run.checkpoint is None else run.checkpoint.step
        total = 1 if config.run.dry_run else config.sampling.updates
        warmup = config.ppo.critic_only(total)
        run.begin_loop(total)
        for step in range(start + 1, total + 1):
            began = time.process_time()
            rate = set_rates(
                learner,
                config.ppo,
                step=step,
                total=total,
                max_seconds=config.sampling.max_seconds,
                critic_rate=config.critic.learning_rate,
            )
            with stopping_on_nan(run, "ppo.learning_rate"):
                metrics = iterate(config, learner, step=step, train_policy=step > warmup)
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


def iterate(config: TrainPPOConfig, learner: Learner, *, step: int, train_policy: bool = True) -> dict[str, float]:
    """One rollout and the update on it (train_policy: not of the critic alone); metrics under TRL's names."""
    rows = learner.prompts.next().tolist()
    samples, scores = learner.sampler.draw(
        rows,
        samples_per_prompt=config.sampling.samples_per_prompt,
        drawn_before=learner.counters.samples,
        bootstrap=not learner.shaper.cut_is_end,
    )
    learner.latest = (samples, scores)
    judged = learner.shaper.judged(samples, scores)
    if learner.good_answers is not None:
        learner.good_answers.remember(torch.tensor(rows)[samples.prompt], samples, judged)
    compare = config.sampling.logprob_gap_every > 0 and step % config.sampling.logprob_gap_every == 0
    drawn = samples
    samples, gap = settled_log_probs(learner.policy, drawn, compare=compare)
    ref_log_probs = reference_log_probs(learner.reference, samples)
    learned, shaping_metrics = learner.shaper.scaled(judged)
    rollout = to_rollout(
        samples,
        learned.total,
        scored=learned.scored,
        ref_log_probs=ref_log_probs,
        cut_is_end=learner.shaper.cut_is_end,
        gamma=config.ppo.gamma,
    )
    rollout = with_behaviour(rollout, drawn)
    metrics = {**sample_metrics(samples, scores, ref_log_probs), **shaping_metrics, **gap}
    if learner.process is not None:
        dense, process_metrics = learner.process.pay(rows, samples, scores)
        rollout = with_dense_rewards(rollout, dense)
        metrics |= process_metrics
    if learner.critic is not None:
        rollout = with_values(rollout, learner.critic)
    rollout, kl_metrics = with_kl_rewards(rollout, config=config.kl, coef=learner.controller.coef)
    advantages, returns = gae(rollout, gae_lambda=config.ppo.gae_lambda)
    statistics = update(
        policy=learner.trained,
        optimizer=learner.optimizer,
        rollout=rollout,
        advantages=advantages,
        returns=returns,
        config=config.ppo,
        generator=learner.shuffling,
        kl=config.kl,
        kl_coef=learner.controller.coef,
        auxiliary=learner.auxiliary(),
        train_policy=train_policy,
    )
    metrics |= {**kl_metrics, **policy_metrics(statistics)}
    if rollout.values is not None:
        metrics["val/explained_variance"] = float(explained_variance(rollout.values, returns, rollout.mask))
    metrics["objective/kl_coef"] = learner.controller.coef
    if train_policy:
        steer_kl(learner.controller, samples, ref_log_probs)
    learner.counters.samples += len(scores.total)
    learner.counters.tokens += int(samples.mask.sum())
    return metrics
