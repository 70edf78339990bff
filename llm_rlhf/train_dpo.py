"""Learn straight from comparisons, without a reward model and without sampling: DPO, IPO, ODPO, SimPO, ORPO, TSO.

`preference.loss` says which. Losses that are anchored to a reference read its log-probs from a file that is written
before the first update; the reference is the model that training starts from, or `reference`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from experiment.errors import UserError
from experiment.run import Run, RunConfig, RunResult
from llm_rlhf.data.pairs import PairsConfig, TokenizedPairs, read_pairs
from llm_rlhf.data.texts import Batches
from llm_rlhf.models.causal import LanguagePolicy, build_policy
from llm_rlhf.models.loading import ModelConfig
from llm_rlhf.models.precision import require_precision
from llm_rlhf.online.learner import checkpoint_policy, require_trained, stopping_on_nan
from llm_rlhf.online.moved import Counters, progress_of
from llm_rlhf.online.recording import log_and_save, writer
from llm_rlhf.preferences.learning import (
    HeldOutConfig,
    LearningConfig,
    PreferenceLearner,
    ReferencedPairs,
    announce_all,
    first_rows,
    make_optimizer,
    pair_step,
    reference_of,
    require_enough,
    require_held_out,
    tokenized_sets,
    validate_pairs,
)
from llm_rlhf.preferences.reference_cache import ReferenceLogProbs, ReferenceSource, reference_log_probs
from policy_core.preference import NEEDS_REFERENCE, PreferenceConfig
from policy_core.schedules import scheduled

RECIPE = "llm/dpo"


@dataclass(frozen=True)
class TrainDPOConfig:
    """Everything a run of direct preference optimization is made of.

    reference       another model to stay near to than the one at model.path
    reference_cache a file for the reference's log-probs that other runs on the same pairs can read, too
    nll_coef        weight of the chosen completions' negative log-likelihood (nats per token) beside the loss
    """

    run: RunConfig = field(default_factory=lambda: RunConfig(name="dpo", checkpoint_every=100))
    pairs: PairsConfig = field(default_factory=PairsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    reference: str | None = None
    reference_cache: str | None = None
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    nll_coef: float = 0.0
    learning: LearningConfig = field(default_factory=LearningConfig)
    validation: HeldOutConfig = field(default_factory=HeldOutConfig)
    log_every: int = 1

    def __post_init__(self) -> None:
        if self.nll_coef < 0:
            raise ValueError(f"nll_coef must not be negative, got {self.nll_coef}")
        if self.preference.loss not in NEEDS_REFERENCE and (self.reference or self.reference_cache):
            raise ValueError(
                f"reference and reference_cache: preference.loss {self.preference.loss!r} has no reference"
            )


def train(config: TrainDPOConfig, *, resume: Path | None = None) -> RunResult:
    """Learn from the training pairs; the run's `policy` folder is a plain transformers model.

    Raises UserError if model.path names no trained model, or the pairs cannot be learned from.
    """
    require_trained(config.model)
    require_precision(config.learning.precision, setting="learning.precision")
    data = read_pairs(config.pairs)
    with Run.start(config, recipe=RECIPE, resume=resume) as run:
        policy, tokenizer = build_policy(checkpoint_policy(run, config.model), alphabet=data.alphabet)
        pairs, notes = tokenized_sets(data, tokenizer, context=policy.context, max_prompt=config.pairs.max_prompt)
        announce_all(notes)
        check(pairs, config)
        sets, reference = with_reference(
            config, policy, pairs, folder=run.folder, began_with=reference_of(run.checkpoint)
        )
        learner = build_learner(
            run, policy, config.learning, rows=len(pairs["train"]), seed=config.run.seed, reference=reference
        )
        held_out = first_rows(sets["validation"], config.validation.rows) if "validation" in sets else None
        start = 0 if run.checkpoint is None else run.checkpoint.step
        total = 1 if config.run.dry_run else config.learning.steps
        run.begin_loop(total)
        for step in range(start + 1, total + 1):
            began = time.process_time()
            with stopping_on_nan(run, "learning.learning_rate"):
                metrics = update(learner, sets["train"], config, step=step)
            learner.counters.seconds += time.process_time() - began
            limit = config.learning.max_seconds
            last = step == total or (limit is not None and learner.counters.seconds >= limit)
            looked: dict[str, float] = {}
            every = config.validation.every
            if held_out is not None and every > 0 and (last or step % every == 0):
                found = validate_pairs(policy, held_out, preference=config.preference, learning=config.learning)
                looked = {f"eval/{name}": value for name, value in found.items()}
            log_and_save(
                run,
                learner,
                metrics,
                looked,
                global_step=step,
                last=last,
                log_every=config.log_every,
                folders=writer(policy, tokenizer),
                epoch=learner.batches.epoch,
                best="eval/rewards/accuracies",
            )
            if last:
                break
        return run.finish()


def check(pairs: Mapping[str, TokenizedPairs], config: TrainDPOConfig) -> None:
    """Raises UserError for pairs that this configuration cannot learn from."""
    require_enough(len(pairs.get("train", ())), batch_size=config.learning.batch_size, what="pairs")
    require_held_out(len(pairs.get("validation", ())), config.validation, what="pairs")
    count = sum(len(part) for part in pairs.values())
    if config.preference.loss == "tso":
        below = sum(int((part.margin < 0).sum()) for part in pairs.values())
        if below:
            raise UserError(
                f"pairs.margin: preference.loss tso is the steeper the better the chosen answer is, and {below} of "
                f"{count} pairs have a number below 0 in column {config.pairs.margin!r}"
            )
    if config.preference.loss != "odpo":
        return
    least = -float("inf") if config.preference.odpo_offset == "linear" else 0.0
    bad = sum(int((~(part.margin > least)).sum()) for part in pairs.values())
    if bad:
        number = "number" if config.preference.odpo_offset == "linear" else "number above 0"
        raise UserError(
            f"pairs.margin: preference.loss odpo needs to know how much better each chosen answer is, and {bad} of "
            f"{count} pairs have no {number} in column {config.pairs.margin!r}"
        )


def with_reference(
    config: TrainDPOConfig,
    policy: LanguagePolicy,
    pairs: Mapping[str, TokenizedPairs],
    *,
    folder: Path,
    began_with: str | None,
) -> tuple[dict[str, ReferencedPairs], str]:
    """The sets, with the reference's log-probs where the loss has one; and the reference's fingerprint, or ""."""
    if config.preference.loss not in NEEDS_REFERENCE:
        return {name: ReferencedPairs(part, None) for name, part in pairs.items()}, ""
    found: ReferenceLogProbs = reference_log_probs(
        policy,
        {name: (part.chosen, part.rejected) for name, part in pairs.items()},
        ReferenceSource.of(
            folder, model=config.model, reference=config.reference, reference_cache=config.reference_cache
        ),
        began_with=began_with,
        learning=config.learning,
    )
    return {name: ReferencedPairs(part, found.by_set[name]) for name, part in pairs.items()}, found.weights


def build_learner(
    run: Run, policy: LanguagePolicy, learning: LearningConfig, *, rows: int, seed: int, reference: str
) -> PreferenceLearner:
    """A learner of `rows` pairs (or texts) at the run's start or, when resuming, where its checkpoint left it."""
    learner = PreferenceLearner(
        policy=policy,
        optimizer=make_optimizer(policy, learning),
        batches=Batches(rows, learning.batch_size, seed=seed),
        counters=Counters(),
        reference=reference,
    )
    if run.checkpoint is not None:
        learner.load_state_dict(run.checkpoint.state)
    return learner


def update(
    learner: PreferenceLearner, data: ReferencedPairs, config: TrainDPOConfig, *, step: int
) -> dict[str, float]:
    """One step on the next batch of pairs; returns metrics under TRL's names."""
    settings, counters = config.learning, learner.counters
    progress = progress_of(step, settings.steps, counters, settings.max_seconds)
    rate = scheduled(settings.learning_rate, schedule=settings.schedule, progress=progress, warmup=settings.warmup)
    rows = learner.batches.next()
    metrics = pair_step(
        learner.policy,
        learner.optimizer,
        data,
        rows,
        preference=config.preference,
        nll_coef=config.nll_coef,
        learning=settings,
        rate=rate,
    )
    counters.samples += len(rows)
    for side in (data.pairs.chosen, data.pairs.rejected):
        counters.tokens += int(side.attention_mask[rows].sum())
    return metrics
