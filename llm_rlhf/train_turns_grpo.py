"""GRPO and its family on episodes of several turns: a group of episodes on one row is the baseline, no value model.

What was answered is an observation, as in `llm/turns_ppo`; an episode's advantage is that of all that it earned, by
turn and at its end, over its group's.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from experiment.run import Run, RunConfig, RunResult
from llm_rlhf.models.precision import require_precision
from llm_rlhf.online.experience import policy_metrics, with_kl_rewards
from llm_rlhf.online.learner import announce, require_trained, stopping_on_nan
from llm_rlhf.online.moved import set_rates
from llm_rlhf.online.recording import announce_looks
from llm_rlhf.online.settings import OnlineConfig
from llm_rlhf.tasks.task import TaskConfig, build_task
from llm_rlhf.train_grpo import group_ppo
from llm_rlhf.turns.episodes import TurnsConfig
from llm_rlhf.turns.learner import Learner, build_learner, count, experience, record
from llm_rlhf.turns.playing import Played, judging
from policy_core.grpo import GRPOConfig, group_advantages, with_signal
from policy_core.kl import KLConfig
from policy_core.ppo import PPOConfig, update

RECIPE = "llm/turns_grpo"


@dataclass(frozen=True)
class PlayingConfig:
    """updates: rollouts in all; prompts: of one rollout, each with grpo.group_size episodes; skip_flat_groups:
    leave groups of one and the same reward out of the update, and so of a KL in the loss; max_seconds: stop after
    this much CPU time of training (a run that uses it cannot be repeated to the bit)."""

    updates: int = 200
    prompts: int = 32
    skip_flat_groups: bool = False
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        if min(self.updates, self.prompts) < 1:
            raise ValueError("sampling: updates and prompts must be at least 1")


@dataclass(frozen=True)
class TrainTurnsGRPOConfig(OnlineConfig):
    """Everything a run is made of.

    turns       who answers, and when a turn ends
    generation  max_new_tokens counts the answers, too
    rewards     name (or file.py:function) -> weight; `environment` is what the environment gives by turn; empty =
                the environment's own or, with tools, the task's
    safety      shown what the policy wrote, without the answers
    shaping     `cut` and `missing_eos_penalty` are of episodes that nobody ended
    """

    run: RunConfig = field(default_factory=lambda: RunConfig(name="turns-grpo", checkpoint_every=50))
    task: TaskConfig = field(default_factory=lambda: TaskConfig(name="tool_calculator"))
    turns: TurnsConfig = field(default_factory=TurnsConfig)
    sampling: PlayingConfig = field(default_factory=PlayingConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    ppo: PPOConfig = field(default_factory=group_ppo)
    kl: KLConfig = field(default_factory=lambda: KLConfig(coef=0.01, placement="loss", estimator="k2"))

    def __post_init__(self) -> None:
        self.shaping.require_no_bootstrap(self.generation)


def train(config: TrainTurnsGRPOConfig, *, resume: Path | None = None) -> RunResult:
    """Improve a trained model on the task's rows. Raises UserError if model.path names none, or nobody answers."""
    require_trained(config.model)
    require_precision(config.precision, setting="precision")
    announce_looks(config.monitor, updates=config.sampling.updates, every=config.validation.every)
    task = build_task(config.task, rewards=judging(config.rewards, config.turns))
    with Run.start(config, recipe=RECIPE, resume=resume) as run:
        announce(task)
        learner = build_learner(run, task, config, turns=config.turns, prompts=config.sampling.prompts)
        start = 0 if run.checkpoint is None else run.checkpoint.step
        total = 1 if config.run.dry_run else config.sampling.updates
        run.begin_loop(total)
        for step in range(start + 1, total + 1):
            began = time.process_time()
            rate = set_rates(
                learner,
                config.ppo,
                step=step,
                total=total,
                max_seconds=config.sampling.max_seconds,
            )
            with stopping_on_nan(run, "ppo.learning_rate"):
                metrics, played = iterate(config, learner)
            learner.counters.seconds += time.process_time() - began
            limit = config.sampling.max_seconds
            last = step == total or (limit is not None and learner.counters.seconds >= limit)
            record(
                run,
                learner,
                played,
                {**metrics, "lr": rate},
                validation=config.validation,
                global_step=step,
                last=last,
                log_every=config.log_every,
            )
            if last:
                break
        return run.finish()


def iterate(config: TrainTurnsGRPOConfig, learner: Learner) -> tuple[dict[str, float], Played]:
    """One rollout and the update on it; returns metrics under TRL's names, and what was played."""
    lived = experience(learner, samples_per_prompt=config.grpo.group_size, gamma=config.ppo.gamma)
    rollout, kl_metrics = with_kl_rewards(lived.rollout, config=config.kl, coef=learner.controller.coef)
    advantages, group_metrics = group_advantages(rollout, config=config.grpo, scores=lived.rollout.rewards)
    if config.sampling.skip_flat_groups:
        rollout, advantages = with_signal(rollout, advantages)
    statistics = update(
        policy=learner.trained,
        optimizer=learner.optimizer,
        rollout=rollout,
        advantages=advantages,
        returns=None,
        config=config.ppo,
        generator=learner.shuffling,
        kl=config.kl,
        kl_coef=learner.controller.coef,
        auxiliary=learner.auxiliary(),
    )
    metrics = {f"objective/{name}": float(value) for name, value in group_metrics.items()}
    metrics |= {**lived.metrics, **kl_metrics, **policy_metrics(statistics)}
    count(learner, lived)
    return metrics, lived.played
