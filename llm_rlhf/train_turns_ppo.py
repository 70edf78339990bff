"""PPO on episodes of several turns: the policy writes, a tool or an environment answers, the policy goes on.

What was answered is an observation: masked columns of the rollout, over which advantages pass and which no loss
sees.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from experiment.run import Run, RunConfig, RunResult
from llm_rlhf.data.texts import Batches
from llm_rlhf.evaluate_turns import validate_player
from llm_rlhf.models.causal import build_policy
from llm_rlhf.models.generation import GenerationConfig, Samples
from llm_rlhf.models.loading import ModelConfig
from llm_rlhf.models.precision import Precision, require_precision
from llm_rlhf.online.critic import CriticConfig, with_values
from llm_rlhf.online.experience import (
    Shaper,
    ShapingConfig,
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
    conclude,
    folders_of,
    frozen_reference,
    optimizer_of,
    pretraining_mix,
    require_trained,
    separate_critic,
    steer_kl,
    stopping_on_nan,
    validation_prompts,
)
from llm_rlhf.online.monitor import Monitor, MonitorConfig, Shown
from llm_rlhf.online.moved import Moved
from llm_rlhf.online.pretraining_mix import PretrainingMixConfig
from llm_rlhf.rewards.safety import SafetyConfig
from llm_rlhf.tasks.room import require_room
from llm_rlhf.tasks.task import Task, TaskConfig, build_task
from llm_rlhf.train_ppo import language_ppo, set_rates
from llm_rlhf.turns.episodes import TurnsConfig, turns_to_rollout
from llm_rlhf.turns.playing import Played, Player, build_player, written
from policy_core.kl import KLConfig, KLController
from policy_core.ppo import PPOConfig, update
from policy_core.returns import explained_variance, gae
from policy_core.rollout import Rollout

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
    safety      rules that no reward buys off; they are shown what the policy wrote, without the answers
    shaping     `cut` and `missing_eos_penalty` are of episodes that nobody ended
    precision   "bf16": the model's matrix products in bfloat16 (autocast), in playing and in updates
    """

    run: RunConfig = field(default_factory=lambda: RunConfig(name="turns-ppo", checkpoint_every=50))
    task: TaskConfig = field(default_factory=lambda: TaskConfig(name="tool_calculator"))
    model: ModelConfig = field(default_factory=ModelConfig)
    turns: TurnsConfig = field(default_factory=TurnsConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    rewards: dict[str, float] = field(default_factory=dict)
    rewards_timeout: float | None = None
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    shaping: ShapingConfig = field(default_factory=ShapingConfig)
    sampling: PlayingConfig = field(default_factory=PlayingConfig)
    ppo: PPOConfig = field(default_factory=language_ppo)
    critic: CriticConfig = field(default_factory=CriticConfig)
    kl: KLConfig = field(default_factory=lambda: KLConfig(coef=0.01))
    ptx: PretrainingMixConfig = field(default_factory=PretrainingMixConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    precision: Precision = "float32"
    log_every: int = 1

    def __post_init__(self) -> None:
        if self.shaping.cut_of(self.generation) == "bootstrap" and self.critic.model == "separate":
            raise ValueError(
                "critic.model separate: a value model of its own has not read the answer behind the last turn, so "
                "cut episodes cannot bootstrap; take shaping.cut penalise or drop, or the shared critic"
            )


@dataclass(kw_only=True)
class Learner(Moved):
    """What a run of several turns moves besides."""

    player: Player
    task: Task


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
            rate = set_rates(
                config.ppo,
                config.critic,
                learner,
                step=step,
                total=total,
                max_seconds=config.sampling.max_seconds,
            )
            with stopping_on_nan(run, "ppo.learning_rate"):
                metrics, played = iterate(config, learner, train_policy=step > warmup)
            learner.counters.seconds += time.process_time() - began
            limit = config.sampling.max_seconds
            last = step == total or (limit is not None and learner.counters.seconds >= limit)
            due = last or step % max(config.validation.every, 1) == 0
            looked = validate_player(learner.player, task.splits["validation"], config.validation, due=due)
            if looked:
                log_episodes(run, played, global_step=step)
            conclude(
                run,
                learner,
                {**metrics, "lr": rate},
                looked,
                shown=shown_of(played) if looked else None,
                global_step=step,
                last=last,
                log_every=config.log_every,
                folders=folders_of(learner, learner.player.tokenizer),
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
        value_head=config.critic.model == "shared",
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
    critic = separate_critic(
        run, config.critic, policy, tokenizer, longest=policy.context, model_path=str(config.model.path)
    )
    learner = Learner(
        policy=policy,
        reference=frozen_reference(run, policy),
        optimizer=optimizer_of(policy, critic, learning_rate=config.ppo.learning_rate),
        player=build_player(
            policy,
            tokenizer,
            task,
            config.turns,
            rewards=config.rewards,
            rewards_timeout=config.rewards_timeout,
            max_new_tokens=config.generation.max_new_tokens,
            safety=config.safety,
        ),
        task=task,
        prompts=Batches(len(task.train), config.sampling.prompts, seed=seed),
        sampling=torch.Generator().manual_seed(seed),
        shuffling=torch.Generator().manual_seed(seed + 1),
        controller=KLController(config.kl),
        counters=Counters(),
        shaper=Shaper(config.shaping, config.shaping.cut_of(config.generation)),
        monitor=Monitor(config.monitor),
        critic=critic,
        ptx=pretraining_mix(config.ptx, tokenizer, context=policy.context, seed=seed + 3),
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
        bootstrap=not learner.shaper.cut_is_end,
    )
    scores = played.scores
    samples, gap = settled_log_probs(learner.policy, played.episodes.samples)
    ref_log_probs = reference_log_probs(learner.reference, samples)
    rollout, shaping_metrics = as_learned(
        played,
        samples,
        learner.shaper,
        turn_weight=learner.player.judge.environment,
        gamma=config.ppo.gamma,
    )
    rollout = replace(rollout, ref_log_probs=ref_log_probs)
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
    metrics = {
        **sample_metrics(samples, scores, ref_log_probs),
        **played.episodes.metrics(),
        **shaping_metrics,
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


def as_learned(
    played: Played, samples: Samples, shaper: Shaper, *, turn_weight: float, gamma: float
) -> tuple[Rollout, dict[str, float]]:
    """Episodes as decisions with their shaped rewards, and what shaping did.

    samples     the episodes', with the log-probs that the update starts from
    turn_weight of the environment's rewards

    What an episode loses that nobody ended, it loses at its end; what scores are divided by, the environment's
    rewards by turn are, too.
    """
    judged = shaper.judged(samples, played.scores)
    final = torch.where(judged.scored, played.final + judged.total - played.scores.total, 0.0)
    divisor, metrics = shaper.divisor(judged)
    rollout = turns_to_rollout(
        replace(played.episodes, samples=samples),
        final / divisor,
        scored=judged.scored,
        turn_weight=turn_weight / divisor,
        cut_is_end=shaper.cut_is_end,
        gamma=gamma,
    )
    return rollout, metrics


def shown_of(played: Played) -> Shown:
    """What the monitor sees: prompts, and what the policy wrote."""
    return Shown([str(example.prompt) for example in played.examples], written(played.episodes))


def log_episodes(run: Run, played: Played, *, global_step: int, rows: int = 16) -> None:
    """A table of what was played and what that earned: the first `rows` episodes of a rollout."""
    named = {name: values[:rows].tolist() for name, values in played.scores.by_name.items()}
    texts = zip(played.examples[:rows], played.completions[:rows], strict=True)
    table = [
        [example.prompt, completion, *(column[i] for column in named.values())]
        for i, (example, completion) in enumerate(texts)
    ]
    run.log_table("completions", ["prompt", "completion", *named], table, global_step=global_step)
