"""GRPO, RLOO and Dr.GRPO at the table: attempts at one task from one seed are each other's baseline; no critic.

    tandem train configs/embodied/table_grpo.yaml init=CLONE/checkpoints/best/policy

Neighbouring environments play the same reset with different noise. Every update plays whole episodes, and each
chunk of an episode gets the episode's advantage over its group; the update is PPO's.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from embodied.learning import charge_kl, stopping_on_nan
from embodied.vla.chunk_rollout import ChunkCollector, ChunkExperience, judge_chunks
from embodied.vla.learner import (
    TableEvaluationConfig,
    VLALearner,
    begin,
    read_clone,
    record,
    settle_log_probs,
    timing,
    torch_threads,
)
from embodied.vla.perceiving import PerceptionConfig
from embodied.vla.seats import TableConfig
from envs.table.env import TIME_LIMIT
from experiment.run import Run, RunConfig, RunResult
from policy_core import ppo
from policy_core.grpo import GRPOConfig, group_advantages, with_signal
from policy_core.kl import KLConfig
from policy_core.ppo import PPOConfig
from policy_core.schedules import scheduled, set_learning_rate


def group_ppo() -> PPOConfig:
    """PPO's numbers for groups: one pass, no discount; advantages come ready from the group."""
    return PPOConfig(
        learning_rate=1e-4,
        epochs=1,
        minibatch_size=256,
        gamma=1.0,
        normalize_advantages=False,
    )


@dataclass(frozen=True)
class TrainVLAGRPOConfig:
    """A run of GRPO from a clone; environment.count must be a multiple of grpo.group_size.

    init                folder of the policy to start from (RUN/checkpoints/best/policy); the KL's reference
    log_std, learn_std  explore at this log standard deviation instead of the clone's; whether it is fitted too
    ppo                 an advantage is the whole episode's, so that gamma must be 1, and no critic warms up
    perception          how the eyes go on learning, see `PerceptionConfig`; their rate stays
    updates             rollouts in all
    episodes            of each environment in a rollout
    skip_flat_groups    leave groups whose episodes all earned the same out of the update, its KL term included,
                        unless all are
    recompute_log_probs where a worker's forward pass gives other numbers than the update's
    update_threads      torch's during an update, when the workers are idle
    """

    run: RunConfig = field(default_factory=lambda: RunConfig(name="table-grpo"))
    environment: TableConfig = field(default_factory=lambda: TableConfig(reward="sparse"))
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    ppo: PPOConfig = field(default_factory=group_ppo)
    kl: KLConfig = field(default_factory=lambda: KLConfig(coef=0.01, placement="loss", estimator="k2"))
    evaluation: TableEvaluationConfig = field(default_factory=TableEvaluationConfig)
    init: str | None = None
    log_std: float | None = -1.6
    perception: PerceptionConfig = field(default_factory=PerceptionConfig)
    learn_std: bool = False
    updates: int = 200
    episodes: int = 1
    skip_flat_groups: bool = True
    recompute_log_probs: bool = False
    update_threads: int = 2

    def __post_init__(self) -> None:
        if self.ppo.aggregation != "decision":  # minibatches are of single decisions, from many episodes
            raise ValueError("ppo.aggregation must be 'decision' for a policy that judges chunks one by one")
        if self.ppo.gamma != 1 or self.ppo.critic_warmup:
            raise ValueError("ppo.gamma must be 1 and ppo.critic_warmup 0: there are whole episodes and no critic")
        if min(self.updates, self.episodes, self.update_threads) < 1:
            raise ValueError("updates, episodes and update_threads must be at least 1")
        if self.environment.count % self.grpo.group_size:
            raise ValueError(
                f"environment.count must be a multiple of grpo.group_size, got {self.environment.count} and"
                f" {self.grpo.group_size}"
            )


def train(config: TrainVLAGRPOConfig, *, resume: Path | None = None) -> RunResult:
    """Train, or go on with the run folder `resume`. Returns the run folder and the last metrics."""
    clone = read_clone(config.init, config.environment, config.log_std, resume=resume)
    chunks = config.episodes * -(-TIME_LIMIT // clone.config.chunk)
    updates = 1 if config.run.dry_run else config.updates
    with Run.start(config, recipe="embodied/vla_grpo", resume=resume) as run:
        learner = VLALearner.build(
            clone,
            run.checkpoint,
            log_std=config.log_std,
            learn_std=config.learn_std,
            critic=False,
            perception=config.perception,
            kl=config.kl,
            seed=config.run.seed,
            dry_run=config.run.dry_run,
        )
        with ChunkCollector(
            config.environment,
            learner.policy,
            chunks=chunks,
            seed=config.run.seed,
            group_size=config.grpo.group_size,
        ) as collector:
            first = begin(run, learner, collector, updates)
            for update in range(first, updates + 1):
                started = time.perf_counter()
                experience = collector.collect(learner.policy, episodes=config.episodes)
                collected = time.perf_counter()
                with torch_threads(config.update_threads):
                    metrics = improve(learner, experience, config, update=update, progress=(update - 1) / updates)
                metrics |= timing(started, collected, time.perf_counter(), experience.control_steps)
                record(
                    run,
                    learner,
                    collector,
                    metrics,
                    tasks=config.environment.tasks,
                    evaluation=config.evaluation,
                    update=update,
                    last=update == updates,
                )
        return run.finish()


def improve(
    learner: VLALearner,
    experience: ChunkExperience,
    config: TrainVLAGRPOConfig,
    *,
    update: int,
    progress: float,
) -> dict[str, float]:
    """One update on one experience; returns the metrics to log."""
    policy = learner.policy
    metrics = learner.remember(experience)
    experience, gap = settle_log_probs(experience, policy, recompute=config.recompute_log_probs, check=update == 1)
    rollout = judge_chunks(
        experience,
        gamma=config.ppo.gamma,
        reference=learner.reference,
        group_size=config.grpo.group_size,
    )
    if update == 1:
        rollout.validate()
    rewards = rollout.rewards
    rollout, kl_metrics = charge_kl(rollout, config.kl, learner.controller.coef)
    advantages, group_metrics = group_advantages(rollout, config=config.grpo, scores=rewards)
    metrics |= {f"objective/{name}": float(value) for name, value in group_metrics.items()}
    decisions, advantages = rollout.decisions(), advantages[rollout.mask].unsqueeze(1)
    if config.skip_flat_groups:
        decisions, advantages = with_signal(decisions, advantages)
    rate = scheduled(
        config.ppo.learning_rate, schedule=config.ppo.schedule, progress=progress, warmup=config.ppo.warmup
    )
    set_learning_rate(learner.optimizer, rate)
    with stopping_on_nan(update):
        trained = ppo.update(
            policy=policy,
            optimizer=learner.optimizer,
            rollout=decisions,
            advantages=advantages,
            returns=None,
            config=config.ppo,
            generator=learner.generator,
            kl=config.kl,
            kl_coef=learner.controller.coef,
        )
        trained |= learner.look(experience, config.perception, rate=config.perception.learning_rate)
    trained["learning_rate"] = rate
    metrics |= gap | learner.steer(kl_metrics, experience)
    return metrics | {f"train/{name}": v for name, v in trained.items()}
