"""Rejection-sampling fine-tuning: keep the completions that a reward approves of, and imitate them.

With source "samples" every round draws k completions of every training prompt (best-of-n fine-tuning, RAFT
2304.06767, the RFT of 2308.01825); with "demonstrations" the given texts are filtered once, before training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from experiment.errors import UserError
from experiment.run import Run, RunConfig, RunResult
from llm_rlhf.data.texts import Batches, TokenizedTexts, concatenate, demonstrated_columns, tokenize
from llm_rlhf.evaluate import START
from llm_rlhf.models.causal import build_policy
from llm_rlhf.models.generation import at_temperature
from llm_rlhf.models.precision import require_precision
from llm_rlhf.models.tokenizer import pad_id
from llm_rlhf.online.experience import (
    Sampler,
    Shaper,
    build_sampler,
    kl_spent,
    reference_log_probs,
)
from llm_rlhf.online.learner import (
    ValidationConfig,
    announce,
    announce_line,
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
from llm_rlhf.online.recording import announce_looks, conclude, texts_of, writer
from llm_rlhf.online.settings import SampledConfig
from llm_rlhf.rewards.functions import Scores
from llm_rlhf.tasks.examples import Example
from llm_rlhf.tasks.task import Task, build_task
from llm_rlhf.train_sft import SupervisedConfig, make_optimizer, supervised_step

RECIPE = "llm/rejection"


@dataclass(frozen=True)
class RejectionConfig:
    """source: what is filtered; samples_per_prompt: drawn each round; threshold: reward that a text must reach,
    None = none, so that whatever was scored may be kept; keep: most texts kept per prompt and round, the best
    first; steps_per_round: updates between draws; accumulate: train on all rounds' texts, each once, not the last
    round's only; restart: every round's texts are imitated by the model that the run began with, not by the one
    that wrote them, with the whole of sft.schedule and sft.warmup (STaR, 2203.14465 section 3.1); prompts: drawn
    for at once."""

    source: Literal["samples", "demonstrations"] = "samples"
    samples_per_prompt: int = 8
    threshold: float | None = 1.0
    keep: int = 1
    steps_per_round: int = 1000
    accumulate: bool = True
    restart: bool = False
    prompts: int = 256

    def __post_init__(self) -> None:
        if min(self.samples_per_prompt, self.keep, self.steps_per_round, self.prompts) < 1:
            raise ValueError("rejection: samples_per_prompt, keep, steps_per_round and prompts must be at least 1")
        if self.restart and self.source != "samples":
            raise ValueError("rejection.restart is of rounds, and demonstrations are filtered once: leave it out")

    @property
    def floor(self) -> float:
        """The threshold as a number."""
        return -math.inf if self.threshold is None else self.threshold


@dataclass(frozen=True)
class TrainRejectionConfig(SampledConfig):
    """Everything a rejection-sampling run is made of.

    shaping             what completions are worth that were cut: "penalise" them or "drop" them; of samples
    monitor             of samples; demonstrations climb no reward
    skip_long_prompts   leave out, and count, the prompts that leave no room for an answer
    """

    run: RunConfig = field(default_factory=lambda: RunConfig(name="rejection", checkpoint_every=500))
    rejection: RejectionConfig = field(default_factory=RejectionConfig)
    sft: SupervisedConfig = field(default_factory=SupervisedConfig)
    validation: ValidationConfig = field(default_factory=lambda: ValidationConfig(every=500))
    skip_long_prompts: bool = False
    log_every: int = 50

    def __post_init__(self) -> None:
        self.shaping.require_selection(self.generation)


@dataclass
class Kept:
    """The texts that training goes through now. begun: `seconds` that the run had trained before their round."""

    texts: TokenizedTexts
    batches: Batches
    begun: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Tokens, position and time."""
        return {"texts": self.texts.state_dict(), "batches": self.batches.state_dict(), "begun": self.begun}

    @classmethod
    def from_state(cls, state: dict[str, Any], *, batch_size: int) -> Kept:
        """Continue from `state_dict()`."""
        texts = TokenizedTexts.from_state(state["texts"])
        batches = Batches(len(texts), batch_size, seed=0)
        batches.load_state_dict(state["batches"])
        return cls(texts, batches, float(state.get("begun", 0.0)))


@dataclass
class Learner:
    """What a run moves, and what it must remember to go on after a break. reference: folder of the
    policy as it was when the run began; shown: of the round, what the monitor sees."""

    optimizer: torch.optim.Optimizer
    sampler: Sampler
    counters: Counters
    reference: Path
    shaper: Shaper
    monitor: Monitor
    kept: Kept | None = None
    shown: Shown | None = None

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights, which have a folder of their own."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "sampling": self.sampler.generator.get_state(),
            "counters": self.counters.state_dict(),
            "kept": None if self.kept is None else self.kept.state_dict(),
            "monitor": self.monitor.state_dict(),
            "shown": None if self.shown is None else self.shown.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, batch_size: int) -> None:
        """Continue from `state_dict()`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.sampler.generator.set_state(state["sampling"])
        self.counters.load_state_dict(state["counters"])
        if state["kept"] is not None:
            self.kept = Kept.from_state(state["kept"], batch_size=batch_size)
        if state.get("monitor") is not None:
            self.monitor.load_state_dict(state["monitor"])
        if state.get("shown") is not None:
            self.shown = Shown(**state["shown"])


def train(config: TrainRejectionConfig, *, resume: Path | None = None) -> RunResult:
    """Alternate between filtering and imitating. Raises UserError if nothing reaches the threshold."""
    chosen = config.rejection
    require_precision(config.sft.precision, setting="sft.precision")
    if chosen.source == "samples":
        require_trained(config.model)
        announce_looks(config.monitor, updates=config.sft.steps, every=config.validation.every)
    task = build_task(config.task, rewards=config.rewards)
    with Run.start(config, recipe=RECIPE, resume=resume) as run:
        announce(task)
        learner = build_learner(run, task, config)
        policy, tokenizer = learner.sampler.policy, learner.sampler.tokenizer
        start = 0 if run.checkpoint is None else run.checkpoint.step
        total = 1 if config.run.dry_run else config.sft.steps
        run.begin_loop(total)
        for step in range(start + 1, total + 1):
            began = time.process_time()
            kept, metrics = filtered(learner, config, step=step)
            with stopping_on_nan(run, "sft.learning_rate"), at_temperature(policy, 1.0):
                losses = supervised_step(
                    policy,
                    learner.optimizer,
                    kept.texts,
                    kept.batches,
                    config.sft,
                    step=step,
                    counters=learner.counters,
                    progress=schedule_progress(config, kept, learner.counters, step=step),
                )
            learner.counters.seconds += time.process_time() - began
            limit = config.sft.max_seconds
            last = step == total or (limit is not None and learner.counters.seconds >= limit)
            due = last or step % max(config.validation.every, 1) == 0
            looked = validate(
                policy,
                tokenizer,
                learner.sampler.task,
                config.validation,
                due=due,
                max_new_tokens=learner.sampler.max_new_tokens,
                rewards_timeout=config.rewards_timeout,
                reference=learner.reference if chosen.source == "samples" else None,
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
                folders=writer(policy, tokenizer),
            )
            if last:
                break
        return run.finish()


def build_learner(run: Run, task: Task, config: TrainRejectionConfig) -> Learner:
    """A learner at the run's start or, when resuming, exactly where its checkpoint left it.

    The policy as it is at the start of a run that draws is kept in RUN/reference, for the KL and for restarts.
    """
    drawing = config.rejection.source == "samples"
    policy, tokenizer = build_policy(
        checkpoint_policy(run, config.model),
        alphabet=task.alphabet,
        temperature=config.generation.temperature,
    )
    if drawing and config.skip_long_prompts:
        task = with_room_to_sample(task, tokenizer, policy, config.generation)
    sampler = build_sampler(
        policy,
        tokenizer,
        task,
        rewards=config.rewards,
        generation=config.generation,
        seed=config.run.seed,
        rewards_timeout=config.rewards_timeout,
        safety=config.safety,
    )
    require_room_to_sample(sampler, model=config.model, validation=config.validation, training=drawing)
    learner = Learner(
        make_optimizer(policy, config.sft),
        sampler,
        Counters(),
        run.folder / START,
        Shaper(config.shaping, config.shaping.cut_of(config.generation)),
        Monitor(config.monitor),
    )
    if run.checkpoint is not None:
        learner.load_state_dict(run.checkpoint.state, batch_size=config.sft.batch_size)
    elif drawing:
        policy.save_pretrained(learner.reference)
    return learner


def filtered(learner: Learner, config: TrainRejectionConfig, *, step: int) -> tuple[Kept, dict[str, float]]:
    """The texts of update `step`, new ones where a round begins; and metrics of what was filtered for them."""
    chosen, size, seed = config.rejection, config.sft.batch_size, config.run.seed
    if chosen.source == "samples" and (step - 1) % chosen.steps_per_round == 0:
        texts, metrics, learner.shown = best_samples(learner, chosen, step=step)
        if chosen.restart and step > 1:
            start_again(learner)
        earlier = learner.kept.texts if learner.kept is not None and chosen.accumulate else None
        texts = gathered(earlier, texts, chosen, step=step)
        learner.kept = Kept(texts, Batches(len(texts), size, seed=seed + step), learner.counters.seconds)
    elif learner.kept is None:
        texts, metrics = good_demonstrations(learner.sampler, chosen, context=learner.sampler.policy.context)
        learner.kept = Kept(texts, Batches(len(texts), size, seed=seed))
    else:
        metrics = {}
    return learner.kept, metrics


def schedule_progress(config: TrainRejectionConfig, kept: Kept, counters: Counters, *, step: int) -> float:
    """How far the learning rate's schedule is before update `step`, 0..1: as far as the run or, where every round
    starts again, as its round, which ends with its last update or at the run's time limit."""
    sft, chosen = config.sft, config.rejection
    if not chosen.restart:
        return progress_of(step, sft.steps, counters, sft.max_seconds)
    done = (step - 1) % chosen.steps_per_round
    updates = min(chosen.steps_per_round, sft.steps - (step - 1 - done))
    limit = sft.max_seconds
    if limit is not None and limit > kept.begun:  # a run that is resumed after its limit has one more update
        limit -= kept.begun
    return progress_of(done + 1, updates, Counters(seconds=counters.seconds - kept.begun), limit)


def gathered(
    earlier: TokenizedTexts | None, found: TokenizedTexts | None, config: RejectionConfig, *, step: int
) -> TokenizedTexts:
    """What the round of update `step` learns from: the texts of earlier rounds, if they count, and what this one
    found that is not among them. Says where it found nothing. Raises UserError if that leaves no text."""
    nothing = nothing_kept("completion", config)
    if found is None:
        if earlier is None:
            raise UserError(f"{nothing}; ask for less, or draw more samples per prompt")
        announce_line(f"update {step}: {nothing}; this round learns the {len(earlier)} texts of those before it")
        return earlier
    if earlier is None:
        return found
    known = set(keys_of(earlier))
    new = torch.tensor([key not in known for key in keys_of(found)])
    if not new.any():
        return earlier
    return concatenate([earlier, TokenizedTexts(found.input_ids[new], found.attention_mask[new], found.mask[new])])


def keys_of(texts: TokenizedTexts) -> list[tuple[tuple[int, ...], tuple[bool, ...]]]:
    """What makes a text another one: its tokens, and which of them are learned; not where it stands in its row."""
    rows = zip(texts.input_ids, texts.attention_mask.bool(), texts.mask, strict=True)
    return [(tuple(ids[real].tolist()), tuple(mask[real].tolist())) for ids, real, mask in rows]


def best_samples(
    learner: Learner, config: RejectionConfig, *, step: int
) -> tuple[TokenizedTexts | None, dict[str, float], Shown]:
    """Draw for every training prompt; keep its best distinct completions that reach the threshold.

    Returns them (None if there is none), metrics, and what the monitor sees of the round: these metrics and the
    first block of completions.
    """
    sampler, counters = learner.sampler, learner.counters
    written: tuple[list[str], list[str]] | None = None
    rows = range(len(sampler.task.train))
    parts: list[TokenizedTexts] = []
    begun = kept_start(learner.reference, sampler.policy)
    solved = scored = 0
    reward = spent = 0.0
    for begin in range(0, len(rows), config.prompts):
        block = list(rows[begin : begin + config.prompts])
        samples, scores = sampler.draw(
            block, samples_per_prompt=config.samples_per_prompt, drawn_before=counters.samples
        )
        counters.samples += len(scores.total)
        counters.tokens += int(samples.mask.sum())
        reward += float(scores.total.sum())
        scored += int(scores.scored.sum())
        spent += float(kl_spent(samples, reference_log_probs(begun, samples)).sum())
        written = written or texts_of(samples, sampler.tokenizer)
        judged = learner.shaper.judged(samples, scores)
        totals, good = (values.view(len(block), -1) for values in (judged.total, reaching(judged, config)))
        index: list[int] = []
        for prompt, rewards in enumerate(totals):
            first = prompt * config.samples_per_prompt
            chosen = _best_distinct(samples.input_ids, rewards, good[prompt], first_row=first, keep=config.keep)
            solved += bool(chosen)
            index += chosen
        if index:
            picked = torch.tensor(index)
            parts.append(
                TokenizedTexts(samples.input_ids[picked], samples.attention_mask[picked], samples.mask[picked])
            )
    texts = concatenate(parts) if parts else None
    metrics = {
        "rejection/kept": 0.0 if texts is None else float(len(texts)),
        "rejection/prompts_solved": solved / len(rows),
        "objective/scores": reward / max(scored, 1),
        "objective/kl": spent / (len(rows) * config.samples_per_prompt),
    }
    assert written is not None
    return texts, metrics, Shown(*written, metrics, step)


def start_again(learner: Learner) -> None:
    """The policy is the one that the run began with, and its optimizer a new one."""
    policy = learner.sampler.policy
    policy.load_state_dict(kept_start(learner.reference, policy).state_dict())
    learner.optimizer.state.clear()


def reaching(scores: Scores, config: RejectionConfig) -> torch.Tensor:
    """[B] bool; the texts that may be kept: scored, no hard rule broken, the threshold reached."""
    good = scores.scored & (scores.total >= config.floor)
    return good if scores.broken is None else good & ~scores.broken


def nothing_kept(what: str, config: RejectionConfig) -> str:
    """Why none of these texts is learned from."""
    if config.threshold is None:
        return f"rejection: no {what} was scored without breaking a rule"
    return f"rejection.threshold: no {what} reached {config.threshold}"


def _best_distinct(
    input_ids: torch.Tensor, rewards: torch.Tensor, good: torch.Tensor, *, first_row: int, keep: int
) -> list[int]:
    """Rows of one prompt's samples that are kept, at most `keep`, the best first.

    rewards, good   [K], of rows first_row, first_row + 1, ...; only good ones may be kept
    """
    chosen: dict[tuple[int, ...], int] = {}
    for offset in rewards.argsort(descending=True, stable=True).tolist():
        if len(chosen) == keep:
            break
        if good[offset]:
            chosen.setdefault(tuple(input_ids[first_row + offset].tolist()), first_row + offset)
    return list(chosen.values())


def good_demonstrations(
    sampler: Sampler, config: RejectionConfig, *, context: int
) -> tuple[TokenizedTexts, dict[str, float]]:
    """The demonstrations that reach the threshold."""
    examples = list(sampler.task.demonstrations)
    columns = demonstrated_columns(examples)
    scores = sampler.rewards(
        [example.prompt for example in examples], [example.completion for example in examples], columns
    )
    good = reaching(scores, config).tolist()
    kept: list[Example] = [example for example, keep in zip(examples, good, strict=True) if keep]
    if not kept:
        raise UserError(f"{nothing_kept('demonstration', config)}; ask for less")
    texts = tokenize(kept, sampler.tokenizer, context=context, pad=pad_id(sampler.tokenizer))
    return texts, {"rejection/kept": float(len(kept)), "rejection/share": len(kept) / len(examples)}
