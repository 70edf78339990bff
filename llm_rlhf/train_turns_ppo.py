"""PPO on episodes of several turns: the policy writes, a tool or an environment answers, the policy goes on.

What was answered is an observation: masked columns of the rollout, over which advantages pass and which no loss
sees.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from experiment.run import Run, RunConfig, RunResult
from llm_rlhf.data.texts import Batches
from llm_rlhf.evaluate_turns import validate_player
from llm_rlhf.models.causal import LanguagePolicy, build_policy
from llm_rlhf.models.generation import GenerationConfig
from llm_rlhf.models.loading import ModelConfig
from llm_rlhf.models.precision import Precision, require_precision
from llm_rlhf.online.experience import (
    policy_metrics,
    reference_log_probs,
    sample_metrics,
    settled_log_probs,
    with_kl_rewards,
)
from llm_rlhf.online.learner import (
    Counters,
    ValidationConfig,
    announce,
    checkpoint_policy,
    frozen_reference,
    log_and_save,
    progress_of,
    require_trained,
    steer_kl,
    stopping_on_nan,
    validation_prompts,
    writer,
)
from llm_rlhf.tasks.room import require_room
from llm_rlhf.tasks.task import Task, TaskConfig, build_task
from llm_rlhf.train_ppo import language_ppo
from llm_rlhf.turns.episodes import TurnsConfig, turns_to_rollout
from llm_rlhf.turns.playing import Played, Player, build_player
from policy_core.kl import KLConfig, KLController
from policy_core.ppo import PPOConfig, update
from policy_core.returns import explained_variance, gae
from policy_core.schedules import scheduled, set_learning_rate

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
class TrainTurnsPPOConfig:
    """Everything a run is made of.

    turns       who answers, and when a turn ends
    generation  max_new_tokens counts the answers, too; cut_is_end: what an episode is that nobody ended
    rewards     name (or file.py:function) -> weight; `environment` is what the environment gives by turn; empty =
                the environment's own or, with tools, the task's
    rewards_timeout     seconds that one call of a reward function may take; null = any
    precision   "bf16": the model's matrix products in bfloat16 (autocast), in playing and in updates
    """

    run: RunConfig = field(default_factory=lambda: RunConfig(name="turns-ppo", checkpoint_every=50))
    task: TaskConfig = field(default_factory=lambda: TaskConfig(name="tool_calculator"))
    model: ModelConfig = field(default_factory=ModelConfig)
    turns: TurnsConfig = field(default_factory=TurnsConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    rewards: dict[str, float] = field(default_factory=dict)
    rewards_timeout: float | None = None
    sampling: PlayingConfig = field(default_factory=PlayingConfig)
    ppo: PPOConfig = field(default_factory=language_ppo)
    kl: KLConfig = field(default_factory=lambda: KLConfig(coef=0.01))
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    precision: Precision = "float32"
    log_every: int = 1


@dataclass
class Learner:
    """What a run moves, and what it must remember to go on after a break."""

    policy: LanguagePolicy
    reference: LanguagePolicy
    optimizer: torch.optim.Optimizer
    player: Player
    task: Task
    prompts: Batches
    sampling: torch.Generator
    shuffling: torch.Generator
    controller: KLController
    counters: Counters

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights, which have a folder of their own."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "prompts": self.prompts.state_dict(),
            "controller": self.controller.state_dict(),
            "counters": self.counters.state_dict(),
            "sampling": self.sampling.get_state(),
            "shuffling": self.shuffling.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        for name in ("optimizer", "prompts", "controller", "counters"):
            getattr(self, name).load_state_dict(state[name])
        self.sampling.set_state(state["sampling"])
        self.shuffling.set_state(state["shuffling"])


def train(config: TrainTurnsPPOConfig, *, resume: Path | None = None) -> RunResult:
    """Improve a trained model on the task's rows. Raises UserError if model.path names none, or nobody answers."""
    require_trained(config.model)
    require_precision(config.precision, setting="precision")
    task = build_task(config.task)
    with Run.start(config, recipe=RECIPE, resume=resume) as run:
        announce(task)
        learner = build_learner(run, task, config)
        start = 0 if run.checkpoint is None else run.checkpoint.step
        total = 1 if config.run.dry_run else config.sampling.updates
        warmup = config.ppo.critic_only(total)
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
                metrics, played = iterate(config, learner, train_policy=step > warmup)
            learner.counters.seconds += time.process_time() - began
            limit = config.sampling.max_seconds
            last = step == total or (limit is not None and learner.counters.seconds >= limit)
            due = last or step % max(config.validation.every, 1) == 0
            looked = validate_player(learner.player, task.splits["validation"], config.validation, due=due)
            if looked:
                log_episodes(run, played, global_step=step)
            log_and_save(
                run,
                learner,
                {**metrics, "lr": rate},
                looked,
                global_step=step,
                last=last,
                log_every=config.log_every,
                folders=writer(learner.policy, learner.player.tokenizer),
            )
            if last:
                break
        return run.finish()


def build_learner(run: Run, task: Task, config: TrainTurnsPPOConfig) -> Learner:
    """A learner at the run's start or, when resuming, exactly where its checkpoint left it."""
    policy, tokenizer = build_policy(
        checkpoint_policy(run, config.model),
        alphabet=task.alphabet,
        temperature=config.generation.temperature,
        value_head=True,
    )
    require_room(
        [*task.train, *validation_prompts(task, config.validation)],
        tokenizer,
        context=policy.context,
        max_new_tokens=1,  # the context is the end of a longer episode
        limited_by="",
        new_model=False,
    )
    policy.precision = config.precision
    seed = config.run.seed
    learner = Learner(
        policy=policy,
        reference=frozen_reference(run, policy),
        optimizer=torch.optim.AdamW(policy.parameters(), lr=config.ppo.learning_rate, weight_decay=0.0, fused=True),
        player=build_player(
            policy,
            tokenizer,
            task,
            config.turns,
            rewards=config.rewards,
            rewards_timeout=config.rewards_timeout,
            max_new_tokens=config.generation.max_new_tokens,
        ),
        task=task,
        prompts=Batches(len(task.train), config.sampling.prompts, seed=seed),
        sampling=torch.Generator().manual_seed(seed),
        shuffling=torch.Generator().manual_seed(seed + 1),
        controller=KLController(config.kl),
        counters=Counters(),
    )
    if run.checkpoint is not None:
        learner.load_state_dict(run.checkpoint.state)
    return learner


def iterate(
    config: TrainTurnsPPOConfig, learner: Learner, *, train_policy: bool
) -> tuple[dict[str, float], Played]:
    """One rollout and the update on it (train_policy: not of the critic alone); returns metrics under TRL's names,
    and what was played."""
    rows = learner.prompts.next().tolist()
    played = learner.player.play(
        [learner.task.train[row] for row in rows],
        samples_per_prompt=config.sampling.samples_per_prompt,
        generator=learner.sampling,
        first_index=learner.counters.samples,
        bootstrap=not config.generation.cut_is_end,
    )
    scores = played.scores
    samples, gap = settled_log_probs(learner.policy, played.episodes.samples)
    ref_log_probs = reference_log_probs(learner.reference, samples)
    rollout = turns_to_rollout(
        replace(played.episodes, samples=samples),
        played.final,
        scored=scores.scored,
        turn_weight=learner.player.judge.environment,
        ref_log_probs=ref_log_probs,
        cut_is_end=config.generation.cut_is_end,
        gamma=config.ppo.gamma,
    )
    rollout, kl_metrics = with_kl_rewards(rollout, config=config.kl, coef=learner.controller.coef)
    advantages, returns = gae(rollout, gae_lambda=config.ppo.gae_lambda)
    statistics = update(
        policy=learner.policy,
        optimizer=learner.optimizer,
        rollout=rollout,
        advantages=advantages,
        returns=returns,
        config=config.ppo,
        generator=learner.shuffling,
        kl=config.kl,
        kl_coef=learner.controller.coef,
        train_policy=train_policy,
    )
    metrics = {
        **sample_metrics(samples, scores, ref_log_probs),
        **played.episodes.metrics(),
        **gap,
        **kl_metrics,
        **policy_metrics(statistics),
        "objective/kl_coef": learner.controller.coef,
    }
    if rollout.values is not None:
        metrics["val/explained_variance"] = float(explained_variance(rollout.values, returns, rollout.mask))
    steer_kl(learner.controller, samples, ref_log_probs)
    learner.counters.samples += len(scores.total)
    learner.counters.tokens += int(samples.mask.sum())
    return metrics, played


def log_episodes(run: Run, played: Played, *, global_step: int, rows: int = 16) -> None:
    """A table of what was played and what that earned: the first `rows` episodes of a rollout."""
    named = {name: values[:rows].tolist() for name, values in played.scores.by_name.items()}
    texts = zip(played.examples[:rows], played.completions[:rows], strict=True)
    table = [
        [example.prompt, completion, *(column[i] for column in named.values())]
        for i, (example, completion) in enumerate(texts)
    ]
    run.log_table("completions", ["prompt", "completion", *named], table, global_step=global_step)
