"""GRPO and its family on completions: a group of samples per prompt is the baseline, PPO's clip the update.

GRPO, RLOO, Dr.GRPO, REINFORCE++    `grpo.advantage`; Dr.GRPO's other half is ppo.aggregation "constant"
DAPO (2503.14476)                   ppo.clip_range_high above ppo.clip_range, ppo.aggregation "decision",
                                    sampling.dynamic_rounds above 1, `overlong`, kl.coef 0
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from experiment.run import Run, RunConfig, RunResult
from llm_rlhf.models.generation import Samples, to_rollout
from llm_rlhf.models.precision import require_precision
from llm_rlhf.models.tokenizer import pad_id
from llm_rlhf.online.experience import (
    joined,
    joined_scores,
    policy_metrics,
    reference_log_probs,
    sample_metrics,
    settled_log_probs,
    with_behaviour,
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
from llm_rlhf.online.recording import announce_looks
from llm_rlhf.online.settings import AnswersConfig
from llm_rlhf.rewards.functions import Scores
from llm_rlhf.tasks.task import build_task
from policy_core.grpo import GRPOConfig, group_advantages, is_flat, with_signal
from policy_core.kl import KLConfig
from policy_core.ppo import PPOConfig, update

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
    """How much is drawn.

    updates             rollouts in all
    prompts             of one rollout, each with grpo.group_size samples
    skip_flat_groups    leave groups of one and the same reward out of the update: faster, and without their part of
                        a KL in the loss, so the same reward costs more nats
    dynamic_rounds      above 1: draw as many prompts again, at most so often an update, until `prompts` groups have
                        different rewards, and learn from those (DAPO 2503.14476, section 3.2); metrics are of
                        everything that was drawn
    max_seconds         stop after this much CPU time of training (a run that uses it cannot be repeated to the bit)
    logprob_gap_every   updates between comparisons of sampling's log-probs with training's (0 = never); with
                        precision bf16 every update compares
    """

    updates: int = 400
    prompts: int = 64
    skip_flat_groups: bool = False
    dynamic_rounds: int = 1
    max_seconds: float | None = None
    logprob_gap_every: int = 50

    def __post_init__(self) -> None:
        if min(self.updates, self.prompts, self.dynamic_rounds) < 1:
            raise ValueError("sampling: updates, prompts and dynamic_rounds must be at least 1")
        if self.logprob_gap_every < 0:
            raise ValueError("sampling.logprob_gap_every must be at least 0")


@dataclass(frozen=True)
class TrainGRPOConfig(AnswersConfig):
    """Everything a GRPO run is made of. grpo: how answers to one prompt are compared."""

    run: RunConfig = field(default_factory=lambda: RunConfig(name="grpo", checkpoint_every=100))
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    ppo: PPOConfig = field(default_factory=group_ppo)
    kl: KLConfig = field(default_factory=lambda: KLConfig(coef=0.01, placement="loss", estimator="k2"))

    def __post_init__(self) -> None:
        self.shaping.require_no_bootstrap(self.generation)
        if self.sampling.dynamic_rounds > 1 and self.grpo.group_size == 1:
            raise ValueError("sampling.dynamic_rounds needs groups: set grpo.group_size to at least 2")


def train(config: TrainGRPOConfig, *, resume: Path | None = None) -> RunResult:
    """Improve a trained model on the task's prompts. Raises UserError if model.path names none."""
    require_trained(config.model)
    require_precision(config.precision, setting="precision")
    announce_looks(config.monitor, updates=config.sampling.updates, every=config.validation.every)
    task = build_task(config.task, rewards=config.rewards)
    with Run.start(config, recipe=RECIPE, resume=resume) as run:
        announce(task)
        learner = build_learner(run, task, config, prompts=config.sampling.prompts)
        start = 0 if run.checkpoint is None else run.checkpoint.step
        total = 1 if config.run.dry_run else config.sampling.updates
        run.begin_loop(total)
        for step in range(start + 1, total + 1):
            began = time.process_time()
            rate = set_rates(learner, config.ppo, step=step, total=total, max_seconds=config.sampling.max_seconds)
            with stopping_on_nan(run, "ppo.learning_rate"):
                metrics = iterate(config, learner, step=step)
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


def iterate(config: TrainGRPOConfig, learner: Learner, *, step: int) -> dict[str, float]:
    """One rollout and the update on it; returns metrics under TRL's names."""
    drawn, scores, draw_metrics = draw(config, learner)
    compare = config.sampling.logprob_gap_every > 0 and step % config.sampling.logprob_gap_every == 0
    samples, gap = settled_log_probs(learner.policy, drawn, compare=compare)
    ref_log_probs = reference_log_probs(learner.reference, samples)
    judged = learner.shaper.judged(samples, scores)
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
    if config.sampling.dynamic_rounds > 1:
        rollout = rollout.select(chosen_rows(judged, samples.prompt, prompts=config.sampling.prompts))
    scores_alone = rollout.rewards
    rollout, kl_metrics = with_kl_rewards(rollout, config=config.kl, coef=learner.controller.coef)
    advantages, group_metrics = group_advantages(rollout, config=config.grpo, scores=scores_alone)
    metrics = {f"objective/{name}": float(value) for name, value in group_metrics.items()}
    metrics |= {**draw_metrics, **shaping_metrics, **gap}
    trained = rollout
    if config.sampling.skip_flat_groups:
        trained, advantages = with_signal(rollout, advantages)
    statistics = update(
        policy=learner.trained,
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
    steer_kl(learner.controller, samples, ref_log_probs)
    return metrics


def draw(config: TrainGRPOConfig, learner: Learner) -> tuple[Samples, Scores, dict[str, float]]:
    """A rollout's completions and scores, of as many rounds as it takes (see SamplingConfig), and what it took."""
    parts: list[tuple[Samples, Scores]] = []
    drawn = useful = 0
    while len(parts) < config.sampling.dynamic_rounds and (not parts or useful < config.sampling.prompts):
        rows = learner.prompts.next().tolist()
        samples, scores = learner.sampler.draw(
            rows, samples_per_prompt=config.grpo.group_size, drawn_before=learner.counters.samples
        )
        learner.latest = (samples, scores)
        judged = learner.shaper.judged(samples, scores)
        if learner.good_answers is not None:
            learner.good_answers.remember(torch.tensor(rows)[samples.prompt], samples, judged)
        learner.counters.samples += len(scores.total)
        learner.counters.tokens += int(samples.mask.sum())
        parts.append((samples, scores))
        drawn += len(rows)
        useful += int(groups_with_signal(judged, samples.prompt).sum())
    everything = joined([samples for samples, _ in parts], pad=pad_id(learner.sampler.tokenizer))
    metrics: dict[str, float] = {}
    if config.sampling.dynamic_rounds > 1:
        metrics = {
            "sampling/rounds": float(len(parts)),
            "sampling/groups_drawn": float(drawn),
            "sampling/groups_with_signal": float(useful),
            "sampling/groups_trained": float(min(useful, config.sampling.prompts)),
        }
    return everything, joined_scores([scores for _, scores in parts]), metrics


def groups_with_signal(scores: Scores, prompt: Tensor) -> Tensor:
    """Whether the scored completions of each prompt are no flat group (`grpo.is_flat`). prompt [B] -> [G] bool."""
    group = prompt[scores.scored]
    signal = torch.zeros(int(prompt.max()) + 1, dtype=torch.bool)
    signal[group[~is_flat(scores.total[scores.scored], group)]] = True
    return signal


def chosen_rows(scores: Scores, prompt: Tensor, *, prompts: int) -> Tensor:
    """Rows [N] of the first `prompts` groups that have a signal; of the first ones drawn where none has."""
    signal = groups_with_signal(scores, prompt)
    groups = signal.nonzero().squeeze(1)[:prompts] if signal.any() else torch.arange(min(prompts, len(signal)))
    return torch.isin(prompt, groups.to(prompt)).nonzero().squeeze(1)
