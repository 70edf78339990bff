"""Iterative (online) preference optimization: sample, score, pair the best with the worst, learn, and again.

A round draws completions of training prompts from the present policy, scores them by `rewards`, and makes a pair
of every prompt's best and worst. Preference steps on those pairs follow, anchored to the policy as it was when the
round began (Llama 3, 2407.21783 section 4.1; Xiong 2024, 2312.11456) or when the run began, with the chosen
completions' likelihood beside the loss (2404.19733; Llama 3 weighs it 0.2).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from experiment.errors import UserError
from experiment.run import Run, RunConfig, RunResult
from llm_rlhf.data.pairs import TokenizedPairs
from llm_rlhf.data.texts import Batches, TokenizedTexts, concatenate
from llm_rlhf.evaluate import START
from llm_rlhf.models.causal import LanguagePolicy, build_policy
from llm_rlhf.models.generation import Samples, at_temperature
from llm_rlhf.models.precision import require_precision
from llm_rlhf.online.experience import (
    OverlongConfig,
    Sampler,
    Shaper,
    build_sampler,
    joined_scores,
    kl_spent,
    reference_log_probs,
)
from llm_rlhf.online.learner import (
    ValidationConfig,
    announce,
    checkpoint_policy,
    kept_start,
    require_room_to_sample,
    require_trained,
    stopping_on_nan,
    validate,
    with_room_to_sample,
)
from llm_rlhf.online.monitor import Monitor, Shown
from llm_rlhf.online.moved import Counters, progress_of
from llm_rlhf.online.recording import announce_looks, conclude, log_completions, texts_of, writer
from llm_rlhf.online.settings import SampledConfig
from llm_rlhf.preferences.learning import (
    LearningConfig,
    ReferencedPairs,
    all_log_probs,
    make_optimizer,
    pair_step,
)
from llm_rlhf.rewards.functions import Scores
from llm_rlhf.tasks.task import build_task
from policy_core.preference import NEEDS_REFERENCE, PreferenceConfig
from policy_core.schedules import scheduled

RECIPE = "llm/iterative_dpo"


@dataclass(frozen=True)
class IterativeConfig:
    """prompts: training prompts of a round; samples_per_prompt: drawn of each; at_once: prompts drawn for at once;
    steps_per_round: updates between draws; margin: a prompt makes a pair where its best reward exceeds its worst by
    more than this; reference: what the loss is anchored to, the policy at the "round"'s or at the run's "start"."""

    prompts: int = 256
    samples_per_prompt: int = 8
    at_once: int = 64
    steps_per_round: int = 20
    margin: float = 0.0
    reference: Literal["round", "start"] = "round"

    def __post_init__(self) -> None:
        if min(self.prompts, self.at_once, self.steps_per_round) < 1:
            raise ValueError("iterative: prompts, at_once and steps_per_round must be at least 1")
        if self.samples_per_prompt < 2:
            raise ValueError(f"iterative.samples_per_prompt must be at least 2, got {self.samples_per_prompt}")
        if self.margin < 0:
            raise ValueError(f"iterative.margin must not be negative, got {self.margin}")


@dataclass(frozen=True)
class TrainIterativeDPOConfig(SampledConfig):
    """Everything an iterative run is made of.

    shaping             what answers are worth that were cut: "penalise" them or "drop" them
    skip_long_prompts   leave out, and count, the prompts that leave no room for an answer
    nll_coef            weight of the chosen completions' negative log-likelihood (nats per token) beside the loss
    """

    run: RunConfig = field(default_factory=lambda: RunConfig(name="iterative-dpo", checkpoint_every=100))
    skip_long_prompts: bool = False
    overlong: OverlongConfig | None = None
    iterative: IterativeConfig = field(default_factory=IterativeConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    nll_coef: float = 0.2
    learning: LearningConfig = field(default_factory=LearningConfig)
    validation: ValidationConfig = field(default_factory=lambda: ValidationConfig(every=100))

    def __post_init__(self) -> None:
        if self.nll_coef < 0:
            raise ValueError(f"nll_coef must not be negative, got {self.nll_coef}")
        self.shaping.require_selection(self.generation)
        if self.preference.loss not in NEEDS_REFERENCE and self.iterative.reference == "start":
            raise ValueError(f"iterative.reference: preference.loss {self.preference.loss!r} has no reference")


@dataclass
class Round:
    """The pairs that training goes through now; None where every prompt's answers earned the same."""

    pairs: ReferencedPairs | None
    batches: Batches | None

    @classmethod
    def of(cls, pairs: ReferencedPairs | None, *, batch_size: int, seed: int) -> Round:
        """A new round; a batch is never larger than the round."""
        if pairs is None:
            return cls(None, None)
        return cls(pairs, Batches(len(pairs), min(batch_size, len(pairs)), seed=seed))

    def state_dict(self) -> dict[str, Any]:
        """Tokens, the reference's log-probs and the position."""
        return {
            "pairs": None if self.pairs is None else self.pairs.state_dict(),
            "batches": None if self.batches is None else self.batches.state_dict(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], *, batch_size: int) -> Round:
        """Continue from `state_dict()`."""
        if state["pairs"] is None:
            return cls(None, None)
        found = cls.of(ReferencedPairs.from_state(state["pairs"]), batch_size=batch_size, seed=0)
        assert found.batches is not None
        found.batches.load_state_dict(state["batches"])
        return found


@dataclass
class Learner:
    """What an iterative run moves, and what it must remember to go on after a break.

    reference   folder of the policy as it was when the run began
    shown       of the round, what the monitor sees; None before the first one
    """

    policy: LanguagePolicy
    tokenizer: PreTrainedTokenizerBase
    optimizer: torch.optim.Optimizer
    sampler: Sampler
    prompts: Batches
    counters: Counters
    reference: Path
    round: Round
    shaper: Shaper
    monitor: Monitor
    shown: Shown | None = None

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights, which have a folder of their own."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "prompts": self.prompts.state_dict(),
            "counters": self.counters.state_dict(),
            "sampling": self.sampler.generator.get_state(),
            "round": self.round.state_dict(),
            "monitor": self.monitor.state_dict(),
            "shown": None if self.shown is None else self.shown.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, batch_size: int) -> None:
        """Continue from `state_dict()`."""
        for name in ("optimizer", "prompts", "counters"):
            getattr(self, name).load_state_dict(state[name])
        self.sampler.generator.set_state(state["sampling"])
        self.round = Round.from_state(state["round"], batch_size=batch_size)
        if state.get("monitor") is not None:
            self.monitor.load_state_dict(state["monitor"])
        if state.get("shown") is not None:
            self.shown = Shown(**state["shown"])


def train(config: TrainIterativeDPOConfig, *, resume: Path | None = None) -> RunResult:
    """Improve a trained model on the task's prompts.

    Raises UserError if model.path names none, or if in the first round no prompt makes a pair.
    """
    require_trained(config.model)
    require_precision(config.learning.precision, setting="learning.precision")
    announce_looks(config.monitor, updates=config.learning.steps, every=config.validation.every)
    with Run.start(config, recipe=RECIPE, resume=resume) as run:
        learner = build_learner(run, config)
        start = 0 if run.checkpoint is None else run.checkpoint.step
        total = 1 if config.run.dry_run else config.learning.steps
        run.begin_loop(total)
        for step in range(start + 1, total + 1):
            began = time.process_time()
            metrics: dict[str, float] = {}
            if (step - 1) % config.iterative.steps_per_round == 0:
                metrics = new_round(run, learner, config, step=step)
            with stopping_on_nan(run, "learning.learning_rate"):
                losses = update(learner, config, step=step)
            learner.counters.seconds += time.process_time() - began
            limit = config.learning.max_seconds
            last = step == total or (limit is not None and learner.counters.seconds >= limit)
            looked = validate(
                learner.policy,
                learner.tokenizer,
                learner.sampler.task,
                config.validation,
                due=last or step % max(config.validation.every, 1) == 0,
                max_new_tokens=learner.sampler.max_new_tokens,
                rewards_timeout=config.rewards_timeout,
                reference=learner.reference,
            )
            conclude(
                run,
                learner,
                losses,
                {**metrics, **looked},
                shown=learner.shown if looked else None,
                global_step=step,
                last=last,
                log_every=config.log_every,
                folders=writer(learner.policy, learner.tokenizer),
            )
            if last:
                break
        return run.finish()


def build_learner(run: Run, config: TrainIterativeDPOConfig) -> Learner:
    """A learner at the run's start or, when resuming, exactly where its checkpoint left it.

    The policy as it is at the start is kept in RUN/reference, for the KL of every round and of the evaluation; it
    is read when it is needed and does not stay in memory.
    """
    task = build_task(config.task, rewards=config.rewards)
    announce(task)
    policy, tokenizer = build_policy(
        checkpoint_policy(run, config.model), alphabet=task.alphabet, temperature=config.generation.temperature
    )
    if config.skip_long_prompts:
        task = with_room_to_sample(task, tokenizer, policy, config.generation)
    seed = config.run.seed
    sampler = build_sampler(
        policy,
        tokenizer,
        task,
        rewards=config.rewards,
        generation=config.generation,
        seed=seed,
        rewards_timeout=config.rewards_timeout,
        overlong=config.overlong,
        safety=config.safety,
    )
    require_room_to_sample(sampler, model=config.model, validation=config.validation)
    learner = Learner(
        policy=policy,
        tokenizer=tokenizer,
        optimizer=make_optimizer(policy, config.learning),
        sampler=sampler,
        prompts=Batches(len(task.train), min(config.iterative.prompts, len(task.train)), seed=seed),
        counters=Counters(),
        reference=run.folder / START,
        round=Round(None, None),
        shaper=Shaper(config.shaping, config.shaping.cut_of(config.generation)),
        monitor=Monitor(config.monitor),
    )
    if run.checkpoint is None:
        policy.save_pretrained(learner.reference)
    else:
        learner.load_state_dict(run.checkpoint.state, batch_size=config.learning.batch_size)
    return learner


def update(learner: Learner, config: TrainIterativeDPOConfig, *, step: int) -> dict[str, float]:
    """One step on the round's next batch of pairs, none where the round has no pairs; returns metrics."""
    pairs, batches, settings = learner.round.pairs, learner.round.batches, config.learning
    if pairs is None or batches is None:
        return {}
    progress = progress_of(step, settings.steps, learner.counters, settings.max_seconds)
    rate = scheduled(settings.learning_rate, schedule=settings.schedule, progress=progress, warmup=settings.warmup)
    with at_temperature(learner.policy, 1.0):  # as in llm/dpo, whatever answers are drawn at
        return pair_step(
            learner.policy,
            learner.optimizer,
            pairs,
            batches.next(),
            preference=config.preference,
            nll_coef=config.nll_coef,
            learning=settings,
            rate=rate,
        )


# ---------------------------------------------------------------- a round


@dataclass(frozen=True)
class Drawn:
    """A round's completions, block by block of prompts, as they were drawn and scored; judged: by what they are
    paired."""

    rows: list[list[int]]
    samples: list[Samples]
    scores: list[Scores]
    judged: list[Scores]


def new_round(run: Run, learner: Learner, config: TrainIterativeDPOConfig, *, step: int) -> dict[str, float]:
    """Draw, score and pair; the learner's round is a new one then. Returns metrics of what was drawn.

    Raises UserError if there is no pair although nothing was learned yet.
    """
    settings = config.iterative
    drawn = draw(learner, config)
    pairs = best_against_worst(drawn, settings)
    if pairs is None and step == 1:
        raise UserError(
            f"iterative.margin: of no prompt do the {settings.samples_per_prompt} answers differ in reward by more "
            f"than {settings.margin}; draw more samples_per_prompt, lower it, or start from a better model"
        )
    begun = kept_start(learner.reference, learner.policy)
    metrics = metrics_of(drawn, begun)
    texts = texts_of(drawn.samples[0], learner.tokenizer)
    known = {name: value for name, value in metrics.items() if math.isfinite(value)}
    learner.shown = Shown(*texts, known, step)
    referenced: ReferencedPairs | None = None
    if pairs is not None:
        reference: Tensor | None = None
        if config.preference.loss in NEEDS_REFERENCE:
            held = learner.policy if settings.reference == "round" else begun
            with at_temperature(held, 1.0):
                reference = all_log_probs(
                    held,
                    (pairs.chosen, pairs.rejected),
                    rows=config.learning.rows,
                    precision=config.learning.precision,
                )
        referenced = ReferencedPairs(pairs, reference)
        metrics["iterative/margin"] = float(pairs.margin.mean())
    metrics["iterative/pairs"] = 0.0 if pairs is None else float(len(pairs))
    learner.round = Round.of(referenced, batch_size=config.learning.batch_size, seed=config.run.seed + step)
    log_completions(run, learner.sampler, drawn.samples[0], drawn.scores[0], global_step=step)
    return metrics


def draw(learner: Learner, config: TrainIterativeDPOConfig) -> Drawn:
    """Completions of the next prompts, scored."""
    settings = config.iterative
    drawn = Drawn([], [], [], [])
    for block in learner.prompts.next().split(settings.at_once):
        rows = block.tolist()
        samples, scores = learner.sampler.draw(
            rows, samples_per_prompt=settings.samples_per_prompt, drawn_before=learner.counters.samples
        )
        learner.counters.samples += len(scores.total)
        learner.counters.tokens += int(samples.mask.sum())
        drawn.rows.append(rows)
        drawn.samples.append(samples)
        drawn.scores.append(scores)
        drawn.judged.append(learner.shaper.judged(samples, scores))
    return drawn


def best_against_worst(drawn: Drawn, config: IterativeConfig) -> TokenizedPairs | None:
    """A pair of every prompt whose best and worst answers differ in reward by more than `config.margin`.

    margin of the pairs is that difference, prompt the task's row. None where there is no pair.
    """
    chosen: list[TokenizedTexts] = []
    rejected: list[TokenizedTexts] = []
    margins: list[Tensor] = []
    prompts: list[Tensor] = []
    for rows, samples, scores in zip(drawn.rows, drawn.samples, drawn.judged, strict=True):
        rewards, scored = (part.view(len(rows), -1) for part in (scores.total, scores.scored))
        best = torch.where(scored, rewards, -torch.inf).argmax(1)
        worst = torch.where(scored, rewards, torch.inf).argmin(1)
        margin = (rewards.gather(1, best.unsqueeze(1)) - rewards.gather(1, worst.unsqueeze(1))).squeeze(1)
        first = torch.arange(len(rows)) * rewards.shape[1]
        apart = (samples.input_ids[first + best] != samples.input_ids[first + worst]).any(1)
        pick = ((margin > config.margin) & apart & scored.any(1)).nonzero().squeeze(1)
        if len(pick):
            for side, which in ((chosen, best), (rejected, worst)):
                index = (first + which)[pick]
                side.append(
                    TokenizedTexts(samples.input_ids[index], samples.attention_mask[index], samples.mask[index])
                )
            margins.append(margin[pick])
            prompts.append(torch.tensor(rows)[pick])
    if not chosen:
        return None
    margin = torch.cat(margins)
    tied = torch.zeros(len(margin), dtype=torch.bool)
    return TokenizedPairs(concatenate(chosen), concatenate(rejected), margin, tied, torch.cat(prompts))


def metrics_of(drawn: Drawn, reference: LanguagePolicy) -> dict[str, float]:
    """TRL's names: what was drawn, what it earned, and its KL to the run's start (nats a completion)."""
    masks = [samples.mask for samples in drawn.samples]
    lengths = torch.cat([mask.sum(1) for mask in masks]).float()
    entropy = torch.cat([samples.entropy.sum(1) for samples in drawn.samples])
    kl = [kl_spent(samples, reference_log_probs(reference, samples)) for samples in drawn.samples]
    return {
        **joined_scores(drawn.scores).metrics(),
        "completions/mean_length": float(lengths.mean()),
        "completions/finished": float(torch.cat([part.finished for part in drawn.samples]).float().mean()),
        "objective/entropy": float(entropy.mean()),
        "policy/entropy_avg": float(entropy.sum() / lengths.sum().clamp(min=1)),
        "objective/kl": float(torch.cat(kl).mean()),
    }
