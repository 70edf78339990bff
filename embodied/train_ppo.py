"""PPO in any Gymnasium environment, from scratch or from a cloned policy.

    tandem train configs/embodied/half_cheetah_ppo.yaml

Environment step, reward scaling, GAE, update, statistics: the loop in `train` is the whole algorithm. From a cloned
policy (`init`) it starts with a critic warm-up, may be held near the clone by a KL term and kept in touch with the
demonstrations by a likelihood term (DAPG, Rajeswaran 2018, 1709.10087), so that it does not collapse at the switch.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from embodied.evaluate import VALIDATION_SEEDS, film, score, seeds, summarize
from embodied.learning import charge_kl, continue_environments, decisions_of, episode_metrics, stopping_on_nan
from embodied.logged.demonstrations import DemonstrationBatches, DemonstrationTerm
from embodied.policies.normalization import RewardScaler
from embodied.policies.numpy_actor import StatePolicyConfig
from embodied.policies.state_mlp import StatePolicy, ValueUnits
from embodied.rollouts.rollout import Collector, Experience, fresh_policy, judge, spaces_of
from embodied.rollouts.workers import EnvironmentConfig, environment_spec
from envs.make import EnvironmentSpec
from envs.stepper import EpisodeRecord
from experiment.errors import UserError
from experiment.run import Metric, Run, RunConfig, RunResult
from policy_core import ppo
from policy_core.kl import KLConfig, KLController
from policy_core.optimizer import FlatAdam
from policy_core.ppo import PPOConfig
from policy_core.returns import explained_variance, gae
from policy_core.schedules import scheduled, set_learning_rate
from policy_core.traced import TracedGradient


@dataclass(frozen=True)
class EvaluationConfig:
    """every: updates between evaluations (0 = none); episodes: of each, with the policy's mode; video: film one of
    each to RUN/videos and wandb."""

    every: int = 0
    episodes: int = 20
    video: bool = False

    def __post_init__(self) -> None:
        if self.every < 0 or self.episodes < 1:
            raise ValueError("evaluation: every must not be negative, episodes at least 1")


@dataclass(frozen=True)
class TrainPPOConfig:
    """A run of PPO.

    total_steps         environment steps over all environments
    horizon             steps of each environment per update
    normalize_rewards   divide rewards by the running deviation of the discounted return
    init                folder of a policy to start from (RUN/checkpoints/best/policy); it is the KL's reference
                        and brings its own `policy` and normaliser, which then stays as it is
    log_std             with init: start exploring at this log standard deviation instead of the clone's
    """

    run: RunConfig = field(default_factory=RunConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    policy: StatePolicyConfig = field(default_factory=StatePolicyConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    demonstrations: DemonstrationTerm = field(default_factory=DemonstrationTerm)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    total_steps: int = 500_000
    horizon: int = 256
    normalize_rewards: bool = True
    init: str | None = None
    log_std: float | None = None

    def __post_init__(self) -> None:
        if self.horizon < 1 or self.total_steps < 1:
            raise ValueError("horizon and total_steps must be at least 1")
        if self.policy.head == "values":
            raise ValueError("policy.head 'values' is no distribution that PPO could sample from; leave it out")
        if self.kl.coef > 0 and self.init is None:
            raise ValueError("kl.coef needs init: the KL is to the policy that training starts from")
        if self.ppo.aggregation != "decision":  # minibatches are of single decisions, from many episodes
            raise ValueError("ppo.aggregation must be 'decision' for a policy that judges steps one by one")


@dataclass(frozen=True)
class Inputs:
    """What the configuration names, read before the run has a folder: a mistake in it leaves nothing behind."""

    environment: EnvironmentSpec
    clone: StatePolicy | None
    demonstrations: DemonstrationBatches | None

    @classmethod
    def read(cls, config: TrainPPOConfig, resume: Path | None = None) -> Inputs:
        """UserError if something is missing, damaged or made for another environment.

        resume: the run that goes on; its checkpoints hold the clone where the KL asks for it.
        """
        if config.log_std is not None and config.init is None:
            raise UserError("log_std is for a policy to start from: give init=POLICY_FOLDER, or set policy.log_std")
        environment = environment_spec(config.environment)
        spaces = spaces_of(environment)
        source = config.init
        if resume is not None and (kept := resume / "checkpoints" / "last" / "policy").is_dir():
            kept = kept.with_name("clone")
            source = str(kept) if kept.is_dir() else config.init if config.kl.coef > 0 else None
        clone = None if source is None else StatePolicy.from_pretrained(source).requires_grad_(False)
        if clone is not None and clone.spaces != spaces:
            raise UserError(f"init: {config.init} is a policy for {clone.spaces}, the environment has {spaces}")
        if clone is not None and clone.config.head == "values":
            raise UserError(f"init: {config.init} says what choices are worth, not how often to take them")
        if clone is not None:
            require_same_policy(config.policy, clone.config)
        demonstrations = DemonstrationBatches.load(config.demonstrations, environment, config.run.seed)
        return cls(environment, clone, demonstrations)


def require_same_policy(asked: StatePolicyConfig, found: StatePolicyConfig) -> None:
    """UserError where a setting of `policy` was changed, which the policy to start from brings itself."""
    for one in fields(asked):
        wanted, own = getattr(asked, one.name), getattr(found, one.name)
        if wanted not in (own, getattr(StatePolicyConfig(), one.name)):
            hint = "; log_std sets where it begins to explore" if one.name == "log_std" else ""
            raise UserError(f"policy.{one.name}: the policy that init names brings its own, {own}{hint}")


@dataclass
class Learner:
    """Everything that learns or remembers in a run; its state is what a checkpoint keeps."""

    policy: StatePolicy
    reference: StatePolicy | None
    optimizer: FlatAdam
    scaler: RewardScaler
    controller: KLController
    generator: torch.Generator
    gradient: TracedGradient
    demonstrations: DemonstrationBatches | None
    recent: deque[EpisodeRecord] = field(default_factory=lambda: deque(maxlen=100))
    episodes: int = 0

    @classmethod
    def build(cls, config: TrainPPOConfig, inputs: Inputs, saved: Path | None) -> Learner:
        """From the configuration, with the policy of a checkpoint where there is one."""
        if saved is not None:
            policy = StatePolicy.from_pretrained(saved)
        elif config.init is not None:
            policy = StatePolicy.from_pretrained(config.init)
            if config.log_std is not None and policy.has_log_std:
                torch.nn.init.constant_(policy.log_std, config.log_std)
        else:
            policy = fresh_policy(inputs.environment, config.policy)
        return cls(
            policy=policy,
            reference=inputs.clone if config.kl.coef > 0 else None,
            optimizer=FlatAdam([policy.parameters()], learning_rate=config.ppo.learning_rate),
            scaler=RewardScaler(config.environment.count, gamma=config.ppo.gamma),
            controller=KLController(config.kl),
            generator=torch.Generator().manual_seed(config.run.seed),
            gradient=ppo.traced_gradient(policy),
            demonstrations=inputs.demonstrations,
        )

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; the policy has a folder of its own there."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "controller": self.controller.state_dict(),
            "generator": self.generator.get_state(),
            "demonstrations": None if self.demonstrations is None else self.demonstrations.state_dict(),
            "recent": [tuple(record) for record in self.recent],
            "episodes": self.episodes,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.controller.load_state_dict(state["controller"])
        self.generator.set_state(state["generator"])
        if self.demonstrations is not None:
            self.demonstrations.load_state_dict(state["demonstrations"])
        self.recent.extend(EpisodeRecord(*record) for record in state["recent"])
        self.episodes = state["episodes"]


def train(config: TrainPPOConfig, *, resume: Path | None = None) -> RunResult:
    """Train, or go on with the run folder `resume`. Returns the run folder and the last metrics."""
    steps_per_update = config.environment.count * config.horizon
    updates = 1 if config.run.dry_run else max(1, -(-config.total_steps // steps_per_update))
    warmup = config.ppo.critic_only(updates)
    inputs = Inputs.read(config, resume)
    with Run.start(config, recipe="embodied/ppo", resume=resume) as run:
        checkpoint = run.checkpoint
        learner = Learner.build(config, inputs, None if checkpoint is None else checkpoint.folder / "policy")
        policy = learner.policy
        with Collector(config.environment, policy, steps=config.horizon, seed=config.run.seed) as collector:
            first = 1
            if checkpoint is not None:
                first = checkpoint.step + 1
                learner.load_state_dict(checkpoint.state["learner"])
                continue_environments(collector.workers, checkpoint.state["environments"])
            run.begin_loop(updates)
            if checkpoint is None:
                save(run, learner, collector, global_step=0)
            for update in range(first, updates + 1):
                if update == warmup + 1 > 1:  # Adam's bias correction begins with the actor
                    learner.optimizer = FlatAdam([policy.parameters()], learning_rate=config.ppo.learning_rate)
                started = time.perf_counter()
                experience = collector.collect(policy)
                collected = time.perf_counter()
                metrics = improve(
                    learner, experience, config, update=update, warmup=warmup, progress=(update - 1) / updates
                )
                finished = time.perf_counter()
                metrics |= {
                    "env_steps": float(update * steps_per_update),
                    "time/rollout": collected - started,
                    "time/update": finished - collected,
                    "time/fps": steps_per_update / (finished - started),
                }
                metric = None
                if config.evaluation.every and update % config.evaluation.every == 0:
                    played = collector.evaluate(policy, seeds(VALIDATION_SEEDS, config.evaluation.episodes))
                    metrics |= summarize(played)
                    metric = score(metrics)
                run.log(metrics, global_step=update)
                if metric is not None and config.evaluation.video:
                    path = run.folder / "videos" / f"{update:09d}.mp4"
                    film(policy, config.environment, path, seed=VALIDATION_SEEDS)
                    run.log_video("eval/video", path, global_step=update)
                if metric is not None or run.should_save(update) or update == updates:
                    save(run, learner, collector, global_step=update, metric=metric)
        return run.finish()


def improve(
    learner: Learner, experience: Experience, config: TrainPPOConfig, *, update: int, warmup: int, progress: float
) -> dict[str, float]:
    """One update of everything that learns (the first `warmup`: the critic alone), on one experience; returns the
    metrics to log."""
    policy, kl = learner.policy, config.kl
    ended = experience.terminated | experience.truncated
    rewards = learner.scaler(experience.rewards, ended) if config.normalize_rewards else experience.rewards
    units = ValueUnits(learner.scaler.factor if config.normalize_rewards else 1.0)
    if update == 1:
        policy.set_value_units(units)  # an offline policy's values may be in others
    policy.value_units = units  # which move with the rewards' spread; the critic follows by learning
    rollout = judge(experience, policy, gamma=config.ppo.gamma, rewards=rewards, reference=learner.reference)
    if update == 1:
        rollout.validate()
    ended_lately = [*learner.recent, *experience.episodes]
    rollout, metrics = charge_kl(rollout, kl, learner.controller.coef, decisions=decisions_of(ended_lately))
    advantages, returns = gae(rollout, gae_lambda=config.ppo.gae_lambda)
    rate = scheduled(
        config.ppo.learning_rate, schedule=config.ppo.schedule, progress=progress, warmup=config.ppo.warmup
    )
    set_learning_rate(learner.optimizer, rate)
    demonstrations = learner.demonstrations
    auxiliary = None
    if demonstrations is not None:
        auxiliary = demonstrations.auxiliary_loss(policy, update - warmup)
    with stopping_on_nan(update):
        trained = ppo.update(
            policy=policy,
            optimizer=learner.optimizer,
            rollout=rollout.decisions(),
            advantages=advantages[rollout.mask].unsqueeze(1),
            returns=returns[rollout.mask].unsqueeze(1),
            config=config.ppo,
            generator=learner.generator,
            kl=kl,
            kl_coef=learner.controller.coef,
            train_policy=update > warmup,
            auxiliary=auxiliary,
            traced=learner.gradient,
        )
    if rollout.ref_log_probs is not None and update > warmup:
        learner.controller.update(metrics["objective/kl"], episodes=max(1, len(experience.episodes)))
    if learner.reference is None and config.init is None:
        policy.learn_normalization(experience.observations.flatten(0, 1))
    learner.recent.extend(experience.episodes)
    learner.episodes += len(experience.episodes)
    assert rollout.values is not None
    trained["explained_variance"] = float(explained_variance(rollout.values, returns, rollout.mask))
    trained["learning_rate"] = rate
    if policy.has_log_std:
        trained["std"] = float(policy.log_std.detach().exp().mean())
    metrics |= {f"train/{name}": value for name, value in trained.items()}
    return metrics | episode_metrics(learner.recent, learner.episodes)


def save(
    run: Run, learner: Learner, collector: Collector, *, global_step: int, metric: Metric | None = None
) -> None:
    """A checkpoint: the policy as a folder that loads by itself, the rest as state."""
    state = {"learner": learner.state_dict(), "environments": collector.workers.state()}
    folders = {"policy": learner.policy.save_pretrained}
    if learner.reference is not None:
        folders["clone"] = learner.reference.save_pretrained
    run.save(state, global_step=global_step, folders=folders, metric=metric)
