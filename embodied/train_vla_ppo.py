"""PPO at the table, from a cloned vision-language-action policy: a decision is a chunk of control steps.

    tandem train configs/embodied/table_ppo.yaml init=CLONE/checkpoints/best/policy

Play, fold each chunk's rewards, GAE with a privileged critic, update: the loop in `train` is the whole algorithm.
It starts with a critic warm-up and may be held near the clone by a KL term, so that it does not collapse at the
switch. The eyes may go on learning where things are, from the simulator's state.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from embodied.learning import charge_kl, decisions_of, stopping_on_nan
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
from embodied.vla.step_credit import credit_steps, fit_critic
from experiment.run import Run, RunConfig, RunResult
from policy_core import ppo
from policy_core.kl import KLConfig
from policy_core.ppo import PPOConfig
from policy_core.returns import explained_variance, gae
from policy_core.rollout import Rollout
from policy_core.schedules import scheduled


def chunk_ppo() -> PPOConfig:
    """PPO's numbers for chunks; gamma is per control step."""
    return PPOConfig(
        learning_rate=1e-4,
        epochs=4,
        minibatch_size=256,
        gamma=0.99,
        gae_lambda=0.95,
        critic_warmup=4,
    )


@dataclass(frozen=True)
class TrainVLAPPOConfig:
    """A run of PPO from a clone.

    init                    folder of the policy to start from (RUN/checkpoints/best/policy); the KL's reference
    log_std                 start exploring at this log standard deviation instead of the clone's
    credit                  "step": each action of a chunk by the advantage of its own control step, judged by the
                            critic (see `step_credit`; ppo.ratio_level must be "factor"); "chunk": all by one.
                            ppo.gae_lambda is per control step in the first, per chunk in the second; the critic has
                            no ppo.value_coef, value_clip_range and max_grad_norm in the first
    perception              how the eyes go on learning, see `PerceptionConfig`
    learn_std               fit the deviation too; else it stays
    total_steps             control steps over all environments
    horizon                 chunks of each environment per update
    critic_epochs           passes of the critic over the control steps, where credit is by step
    critic_learning_rate    of the critic, which starts from nothing; ppo.learning_rate is the rest's
    recompute_log_probs     where a worker's forward pass gives other numbers than the update's
    update_threads          torch's during an update, when the workers are idle
    """

    run: RunConfig = field(default_factory=lambda: RunConfig(name="table-ppo"))
    environment: TableConfig = field(default_factory=TableConfig)
    ppo: PPOConfig = field(default_factory=chunk_ppo)
    kl: KLConfig = field(default_factory=lambda: KLConfig(coef=0.01))
    evaluation: TableEvaluationConfig = field(default_factory=TableEvaluationConfig)
    init: str | None = None
    log_std: float | None = -1.6
    credit: Literal["step", "chunk"] = "chunk"
    perception: PerceptionConfig = field(default_factory=PerceptionConfig)
    learn_std: bool = False
    total_steps: int = 500_000
    horizon: int = 16
    critic_epochs: int = 8
    critic_learning_rate: float = 1e-3
    recompute_log_probs: bool = False
    update_threads: int = 2

    def __post_init__(self) -> None:
        if self.ppo.aggregation != "decision":  # minibatches are of single decisions, from many episodes
            raise ValueError("ppo.aggregation must be 'decision' for a policy that judges chunks one by one")
        if self.credit == "step" and self.ppo.ratio_level != "factor":
            raise ValueError("credit 'step' needs ppo.ratio_level 'factor': a ratio for each control step")
        if self.credit == "step" and self.kl.coef > 0 and self.kl.placement == "reward":
            raise ValueError("credit 'step' needs kl.placement 'loss': the reward of a control step has no KL")
        if self.critic_epochs < 1:
            raise ValueError("critic_epochs must be at least 1")
        if self.horizon < 1 or self.update_threads < 1:
            raise ValueError("horizon and update_threads must be at least 1")


def train(config: TrainVLAPPOConfig, *, resume: Path | None = None) -> RunResult:
    """Train, or go on with the run folder `resume`. Returns the run folder and the last metrics."""
    clone = read_clone(config.init, config.environment, config.log_std, resume=resume)
    steps_per_update = config.environment.count * config.horizon * clone.config.chunk
    updates = 1 if config.run.dry_run else max(1, -(-config.total_steps // steps_per_update))
    with Run.start(config, recipe="embodied/vla_ppo", resume=resume) as run:
        learner = VLALearner.build(
            clone,
            run.checkpoint,
            log_std=config.log_std,
            learn_std=config.learn_std,
            critic=True,
            perception=config.perception,
            kl=config.kl,
            seed=config.run.seed,
            dry_run=config.run.dry_run,
        )
        with ChunkCollector(
            config.environment,
            learner.policy,
            chunks=config.horizon,
            seed=config.run.seed,
            step_states=config.credit == "step",
        ) as collector:
            first = begin(run, learner, collector, updates)
            for update in range(first, updates + 1):
                started = time.perf_counter()
                experience = collector.collect(learner.policy)
                collected = time.perf_counter()
                with torch_threads(config.update_threads):
                    metrics = improve(learner, experience, config, update=update, updates=updates)
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
    config: TrainVLAPPOConfig,
    *,
    update: int,
    updates: int,
) -> dict[str, float]:
    """One update of everything that learns, on one experience; returns the metrics to log."""
    policy = learner.policy
    metrics = learner.remember(experience)
    experience, gap = settle_log_probs(experience, policy, recompute=config.recompute_log_probs, check=update == 1)
    rollout = judge_chunks(experience, gamma=config.ppo.gamma, critic=policy, reference=learner.reference)
    if update == 1:
        rollout.validate()
    steps = experience.control_steps / int(rollout.mask.sum())
    decisions = decisions_of([episode.record for episode in learner.recent], steps_a_decision=steps)
    rollout, kl_metrics = charge_kl(rollout, config.kl, learner.controller.coef, decisions=decisions)
    *current, eyes = rates(config, update=update, updates=updates)
    for group, rate in zip(learner.optimizer.param_groups, current, strict=True):
        group["lr"] = rate
    with stopping_on_nan(update):
        train_policy = update > config.ppo.critic_only(updates)
        trained = learn(learner, experience, rollout, config, train_policy=train_policy)
        trained |= learner.look(experience, config.perception, rate=eyes)
    trained["learning_rate"] = current[0]
    metrics |= gap | learner.steer(kl_metrics, experience, train_policy=train_policy)
    return metrics | {f"train/{name}": v for name, v in trained.items()}


def learn(
    learner: VLALearner,
    experience: ChunkExperience,
    rollout: Rollout,
    config: TrainVLAPPOConfig,
    *,
    train_policy: bool,
) -> dict[str, float]:
    """Advantages, then PPO's update; with credit by control step the critic is fitted on its own, on every step."""
    policy, numbers = learner.policy, config.ppo
    trained: dict[str, float] = {}
    returns: Tensor | None = None
    if config.credit == "step":
        credit = credit_steps(experience, gamma=numbers.gamma, gae_lambda=numbers.gae_lambda, critic=policy)
        advantages, trained["explained_variance"] = credit.advantages, credit.explained
        trained["value_loss"] = fit_critic(
            policy,
            learner.optimizer,
            credit,
            epochs=config.critic_epochs,
            minibatch_size=numbers.minibatch_size,
            generator=learner.generator,
        )
        if not train_policy:
            return trained
    else:
        advantages, returns = gae(rollout, gae_lambda=numbers.gae_lambda)
        assert rollout.values is not None
        trained["explained_variance"] = float(explained_variance(rollout.values, returns, rollout.mask))
    return trained | ppo.update(
        policy=policy,
        optimizer=learner.optimizer,
        rollout=rollout.decisions(),
        advantages=advantages[rollout.mask].unsqueeze(1),
        returns=None if returns is None else returns[rollout.mask].unsqueeze(1),
        config=numbers,
        generator=learner.generator,
        kl=config.kl,
        kl_coef=learner.controller.coef,
        train_policy=train_policy,
    )


def rates(config: TrainVLAPPOConfig, *, update: int, updates: int) -> list[float]:
    """Learning rates of the actor, the critic and the eyes, all on ppo.schedule.

    The actor's schedule and warm-up begin when the critic's warm-up ends.
    Its Adam knows nothing of its gradients then: without ppo.warmup its first steps are its largest.
    """
    numbers = config.ppo

    def rate(initial: float, done: int, of: int) -> float:
        return scheduled(initial, schedule=numbers.schedule, progress=done / of, warmup=numbers.warmup)

    late = numbers.critic_only(updates)
    begun = max(0, update - 1 - late)
    return [
        rate(numbers.learning_rate, begun, updates - late),
        rate(config.critic_learning_rate, update - 1, updates),
        rate(config.perception.learning_rate, update - 1, updates),
    ]
