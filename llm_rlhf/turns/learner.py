"""What PPO and GRPO on several turns share: who learns, an episode's way into a rollout, what is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from experiment.run import Run
from llm_rlhf.data.texts import Batches
from llm_rlhf.evaluate_turns import validate_player
from llm_rlhf.models.generation import Samples, to_rollout
from llm_rlhf.online.critic import CriticConfig
from llm_rlhf.online.experience import (
    Shaper,
    reference_log_probs,
    sample_metrics,
    settled_log_probs,
    with_behaviour,
)
from llm_rlhf.online.learner import (
    ValidationConfig,
    frozen_reference,
    online_policy,
    optimizer_of,
    pretraining_mix,
    separate_critic,
    steer_kl,
    validation_prompts,
)
from llm_rlhf.online.monitor import Monitor, Shown
from llm_rlhf.online.moved import Counters, Moved
from llm_rlhf.online.recording import conclude, folders_of
from llm_rlhf.online.settings import OnlineConfig
from llm_rlhf.tasks.room import require_room
from llm_rlhf.tasks.task import Task
from llm_rlhf.turns.episodes import TurnsConfig
from llm_rlhf.turns.playing import Judge, Played, Player, build_judge, build_player, written
from policy_core.kl import KLController
from policy_core.rollout import Rollout


@dataclass(kw_only=True)
class Learner(Moved):
    """What a run of several turns moves besides. gold: what judges in validation, whatever rewards are climbed."""

    player: Player
    gold: Judge
    task: Task


def build_learner(
    run: Run,
    task: Task,
    config: OnlineConfig,
    *,
    turns: TurnsConfig,
    prompts: int,
    critic: CriticConfig | None = None,
) -> Learner:
    """A learner at the run's start or, when resuming, exactly where its checkpoint left it.

    prompts     rows of one rollout
    critic      where values come from; None = there are none
    """
    seed, model = config.run.seed, str(config.model.path)
    policy, tokenizer = online_policy(run, config, task, critic)
    require_room(
        [*task.train, *validation_prompts(task, config.validation)],
        tokenizer,
        context=policy.context,
        max_new_tokens=1,  # the context is the end of a longer episode
        limited_by="",
        new_model=False,
    )
    values = separate_critic(run, critic, policy, tokenizer, longest=policy.context, model_path=model)
    learner = Learner(
        policy=policy,
        reference=frozen_reference(run, policy),
        optimizer=optimizer_of(policy, values, learning_rate=config.ppo.learning_rate),
        player=build_player(
            policy,
            tokenizer,
            task,
            turns,
            rewards=config.rewards,
            rewards_timeout=config.rewards_timeout,
            max_new_tokens=config.generation.max_new_tokens,
            safety=config.safety,
        ),
        gold=build_judge({}, task, turns, rewards_timeout=config.rewards_timeout),
        task=task,
        prompts=Batches(len(task.train), prompts, seed=seed),
        sampling=torch.Generator().manual_seed(seed),
        shuffling=torch.Generator().manual_seed(seed + 1),
        controller=KLController(config.kl),
        counters=Counters(),
        shaper=Shaper(config.shaping, config.shaping.cut_of(config.generation)),
        monitor=Monitor(config.monitor),
        critic=values,
        ptx=pretraining_mix(config.ptx, tokenizer, context=policy.context, seed=seed + 3),
    )
    if run.checkpoint is not None:
        learner.load_state_dict(run.checkpoint.state)
    return learner


@dataclass(frozen=True)
class Experience:
    """A rollout and where it comes from. samples: the episodes', with the log-probs that the update starts from;
    metrics: of what was played, under TRL's names."""

    played: Played
    samples: Samples
    ref_log_probs: Tensor
    rollout: Rollout
    metrics: dict[str, float]


def experience(learner: Learner, *, samples_per_prompt: int, gamma: float) -> Experience:
    """Play the next rows; the counters and the KL's controller take note after the update (`count`)."""
    rows = learner.prompts.next().tolist()
    played = learner.player.play(
        [learner.task.train[row] for row in rows],
        samples_per_prompt=samples_per_prompt,
        generator=learner.sampling,
        first_index=learner.counters.samples,
        bootstrap=not learner.shaper.cut_is_end,
    )
    samples, gap = settled_log_probs(learner.policy, played.episodes.samples)
    ref_log_probs = reference_log_probs(learner.reference, samples)
    weight = learner.player.judge.environment
    rollout, shaping = as_learned(played, samples, learner.shaper, turn_weight=weight, gamma=gamma)
    metrics = {
        **sample_metrics(samples, played.scores, ref_log_probs),
        **played.episodes.metrics(),
        **shaping,
        **gap,
        "objective/kl_coef": learner.controller.coef,
    }
    rollout = with_behaviour(replace(rollout, ref_log_probs=ref_log_probs), played.episodes.samples)
    return Experience(played, samples, ref_log_probs, rollout, metrics)


def count(learner: Learner, lived: Experience, *, steer: bool = True) -> None:
    """After the update: the counters take note of the rollout, and where the policy learned the KL's controller."""
    if steer:
        steer_kl(learner.controller, lived.samples, lived.ref_log_probs)
    learner.counters.samples += len(lived.played.scores.total)
    learner.counters.tokens += int(lived.samples.mask.sum())


def record(
    run: Run,
    learner: Learner,
    played: Played,
    metrics: Mapping[str, float],
    *,
    validation: ValidationConfig,
    global_step: int,
    last: bool,
    log_every: int,
) -> None:
    """Log an update, look at the validation rows when that is due, save when that is due; the last always."""
    due = last or global_step % max(validation.every, 1) == 0
    player = replace(learner.player, judge=learner.gold)
    rows = learner.task.splits["validation"]
    looked = validate_player(player, rows, validation, due=due, reference=learner.reference)
    if looked:
        log_episodes(run, played, global_step=global_step)
    conclude(
        run,
        learner,
        metrics,
        looked,
        shown=shown_of(played) if looked else None,
        global_step=global_step,
        last=last,
        log_every=log_every,
        folders=folders_of(learner, learner.player.tokenizer),
    )


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
    rollout = to_rollout(
        samples,
        final / divisor,
        scored=judged.scored,
        token_rewards=turn_weight / divisor * played.episodes.turn_rewards,
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
