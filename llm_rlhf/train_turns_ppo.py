"""PPO on episodes of several turns: the policy writes, a tool or an environment answers, the policy goes on.

What was answered is an observation: masked columns of the rollout, over which advantages pass and which no loss
sees.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from experiment.run import Run, RunConfig, RunResult
from llm_rlhf.models.precision import require_precision
from llm_rlhf.online.critic import CriticConfig, with_values
from llm_rlhf.online.experience import policy_metrics, with_kl_rewards
from llm_rlhf.online.learner import announce, require_trained, stopping_on_nan
from llm_rlhf.online.moved import set_rates
from llm_rlhf.online.recording import announce_looks
from llm_rlhf.online.settings import OnlineConfig
from llm_rlhf.tasks.task import TaskConfig, build_task
from llm_rlhf.train_ppo import language_ppo
from llm_rlhf.turns.episodes import TurnsConfig
from llm_rlhf.turns.learner import Learner, build_learner, count, experience, record
from llm_rlhf.turns.playing import Played, judging
from policy_core.kl import KLConfig
from policy_core.ppo import PPOConfig, update
from policy_core.returns import explained_variance, gae

RECIPE = "llm/turns_ppo"


@dataclass(frozen=True)
class PlayingConfig:
    """updates: rollouts in all; prompts, samples_per_prompt: of one rollout; max_seconds: stop after this
    much CPU time of training (a run that uses it cannot be repeated to the bit)."""

    updates: int = 200
    prompts: int = 128
    samples_per_prompt: int = 1
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        if min(self.updates, self.prompts, self.samples_per_prompt) < 1:
            raise ValueError("sampling: updates, prompts and samples_per_prompt must be at least 1")


@dataclass(frozen=True)
class TrainTurnsPPOConfig(OnlineConfig):
    """Everything a run is made of.

    turns       who answers, and when a turn ends
    generation  max_new_tokens counts the answers, too; cut_is_end: what an episode is that nobody ended
    rewards     name (or file.py:function) -> weight; `environment` is what the environment gives by turn; empty =
                the environment's own or, with tools, the task's
    safety      shown what the policy wrote, without the answers
    shaping     `cut` and `missing_eos_penalty` are of episodes that nobody ended
    """

    run: RunConfig = field(default_factory=lambda: RunConfig(name="turns-ppo", checkpoint_every=50))
    task: TaskConfig = field(default_factory=lambda: TaskConfig(name="tool_calculator"))
    turns: TurnsConfig = field(default_factory=TurnsConfig)
    sampling: PlayingConfig = field(default_factory=PlayingConfig)
    ppo: PPOConfig = field(default_factory=language_ppo)
    critic: CriticConfig = field(default_factory=CriticConfig)
    kl: KLConfig = field(default_factory=lambda: KLConfig(coef=0.01))

    def __post_init__(self) -> None:
        if self.shaping.cut_of(self.generation) == "bootstrap" and self.critic.model == "separate":
            raise ValueError(
                "critic.model separate: a value model of its own has not read the answer behind the last turn, so "
                "cut episodes cannot bootstrap; take shaping.cut penalise or drop, or the shared critic"
            )


def train(config: TrainTurnsPPOConfig, *, resume: Path | None = None) -> RunResult:
    """Improve a trained model on the task's rows. Raises UserError if model.path names none, or nobody answers."""
    require_trained(config.model)
    require_precision(config.precision, setting="precision")
    announce_looks(config.monitor, updates=config.sampling.updates, every=config.validation.every)
    task = build_task(config.task, rewards=judging(config.rewards, config.turns))
    with Run.start(config, recipe=RECIPE, resume=resume) as run:
        announce(task)
        learner = build_learner(
            run, task, config, turns=config.turns, prompts=config.sampling.prompts, critic=config.critic
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
                metrics, played = iterate(config, learner, train_policy=step > warmup)
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


def iterate(
    config: TrainTurnsPPOConfig, learner: Learner, *, train_policy: bool
) -> tuple[dict[str, float], Played]:
    """One rollout and the update on it (train_policy: not of the critic alone); returns metrics under TRL's names,
    and what was played."""
    lived = experience(learner, samples_per_prompt=config.sampling.samples_per_prompt, gamma=config.ppo.gamma)
    rollout = lived.rollout if learner.critic is None else with_values(lived.rollout, learner.critic)
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
    metrics = {**lived.metrics, **kl_metrics, **policy_metrics(statistics)}
    if rollout.values is not None:
        metrics["val/explained_variance"] = float(explained_variance(rollout.values, returns, rollout.mask))
    count(learner, lived, steer=train_policy)
    return metrics, lived.played
