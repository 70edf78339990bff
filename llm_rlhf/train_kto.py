"""Learn from single answers with a thumb up or down: KTO (Ethayarajh 2024, 2402.01306).

An answer's implicit reward is measured against a baseline, the policy's KL to the reference, which is estimated on
mismatched pairs: every prompt with an answer to another one. Who is mismatched with whom is drawn once, before
training, so that the reference's log-probs of those, too, are computed once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from experiment.errors import UserError
from experiment.run import Run, RunConfig, RunResult
from experiment.statistics import wilson_interval
from llm_rlhf.data.pairs import FeedbackData, PairsConfig, read_feedback, tokenize_feedback
from llm_rlhf.data.records import Feedback
from llm_rlhf.data.texts import TokenizedTexts
from llm_rlhf.models.causal import LanguagePolicy, build_policy
from llm_rlhf.models.loading import ModelConfig
from llm_rlhf.models.precision import require_precision
from llm_rlhf.models.tokenizer import pad_id
from llm_rlhf.online.learner import checkpoint_policy, require_trained, stopping_on_nan
from llm_rlhf.online.moved import progress_of
from llm_rlhf.online.recording import log_and_save, writer
from llm_rlhf.preferences.learning import (
    HeldOutConfig,
    LearningConfig,
    PreferenceLearner,
    all_log_probs,
    announce_all,
    completion_log_probs,
    optimizer_step,
    reference_of,
    require_ends,
    require_enough,
    require_held_out,
    rows_of,
)
from llm_rlhf.preferences.reference_cache import ReferenceSource, reference_log_probs
from llm_rlhf.train_dpo import build_learner
from policy_core.preference import KTOConfig, kto_baseline, kto_loss, kto_means
from policy_core.schedules import scheduled

RECIPE = "llm/kto"


@dataclass(frozen=True)
class TrainKTOConfig:
    """Everything a KTO run is made of; `pairs` names the file and its columns (prompt, completion, label).

    reference       another model to stay near to than the one at model.path
    reference_cache a file for the reference's log-probs that other runs on the same texts can read, too
    """

    run: RunConfig = field(default_factory=lambda: RunConfig(name="kto", checkpoint_every=100))
    pairs: PairsConfig = field(default_factory=PairsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    reference: str | None = None
    reference_cache: str | None = None
    kto: KTOConfig = field(default_factory=KTOConfig)
    learning: LearningConfig = field(default_factory=LearningConfig)
    validation: HeldOutConfig = field(default_factory=HeldOutConfig)
    log_every: int = 1


@dataclass(frozen=True)
class Verdicts:
    """N answers with a thumb, as tokens.

    texts           answers under their own prompts
    desirable       [N] bool
    mismatched      the same prompts, each with an answer to another one
    comparable      [N] bool; False where mismatched is no such thing (no other prompt was left)
    ref_log_probs   [N] nats of texts under the reference; ref_mismatched [N] of mismatched. None = not measured yet
    """

    texts: TokenizedTexts
    desirable: Tensor
    mismatched: TokenizedTexts
    comparable: Tensor
    ref_log_probs: Tensor | None = None
    ref_mismatched: Tensor | None = None

    def __len__(self) -> int:
        return len(self.texts)


def train(config: TrainKTOConfig, *, resume: Path | None = None) -> RunResult:
    """Learn from the training texts; the run's `policy` folder is a plain transformers model.

    Raises UserError if model.path names no trained model, or the texts cannot be learned from.
    """
    require_trained(config.model)
    require_precision(config.learning.precision, setting="learning.precision")
    data = read_feedback(config.pairs)
    with Run.start(config, recipe=RECIPE, resume=resume) as run:
        policy, tokenizer = build_policy(checkpoint_policy(run, config.model), alphabet=data.alphabet)
        sets, notes = verdict_sets(data, tokenizer, config.pairs, context=policy.context)
        announce_all(notes)
        check(sets, config)
        sets, reference = with_reference(
            config, policy, sets, folder=run.folder, began_with=reference_of(run.checkpoint)
        )
        learner = build_learner(
            run, policy, config.learning, rows=len(sets["train"]), seed=config.run.seed, reference=reference
        )
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
            if every > 0 and (last or step % every == 0):
                found = judge_verdicts(policy, sets["validation"], config, rows=config.validation.rows)
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
                best="eval/rewards/auc",
            )
            if last:
                break
        return run.finish()


# ---------------------------------------------------------------- the data


def verdict_sets(
    data: FeedbackData, tokenizer: PreTrainedTokenizerBase, config: PairsConfig, *, context: int
) -> tuple[dict[str, Verdicts], list[str]]:
    """The answers of "train", "validation" and "test" that have any, and what a run should say of them.

    Raises UserError if no answer of a set reaches its end.
    """
    sets: dict[str, Verdicts] = {}
    notes = list(data.notes)
    for name in ("train", "validation", "test"):
        feedback: Sequence[Feedback] = getattr(data, name)
        if feedback:
            sets[name], lines = tokenized_verdicts(feedback, tokenizer, config, context=context)
            notes += [f"{name}: {line}" for line in lines]
    return sets, notes


def tokenized_verdicts(
    feedback: Sequence[Feedback], tokenizer: PreTrainedTokenizerBase, config: PairsConfig, *, context: int
) -> tuple[Verdicts, list[str]]:
    """Thumbs as tokens, and a line on what was cut or left out. Raises UserError if all answers are cut."""
    thumbs, counts = tokenize_feedback(
        feedback, tokenizer, context=context, pad=pad_id(tokenizer), max_prompt=config.max_prompt
    )
    require_ends(counts["completions_cut"], of=len(thumbs), context=context)
    notes = [f"{count} {what.replace('_', ' ')}" for what, count in counts.items() if count]
    mismatched, comparable = mismatched_texts(thumbs.texts, thumbs.prompt, context=context, seed=config.seed)
    return Verdicts(thumbs.texts, thumbs.desirable, mismatched, comparable), notes


def mismatched_texts(
    texts: TokenizedTexts, prompt: Tensor, *, context: int, seed: int
) -> tuple[TokenizedTexts, Tensor]:
    """Every prompt with an answer to another prompt; each answer is used once.

    prompt      [N] int; the same prompt has the same number

    Rows are grouped by prompt and their answers rotated by the size of the largest group, so that no prompt meets
    an answer of its own unless it has more than half of all rows. Returns the texts, cut where they would not fit
    the context, and [N] bool: True where the answer is another prompt's.
    """
    shuffled = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    order = shuffled[prompt[shuffled].argsort(stable=True)]
    partner = torch.empty_like(order)
    partner[order] = order.roll(-int(prompt.bincount().max()))
    start = int(texts.mask.any(0).nonzero()[0])

    def with_others(tensor: Tensor) -> Tensor:
        return torch.cat([tensor[:, :start], tensor[partner][:, start:]], dim=1)

    attention = with_others(texts.attention_mask)
    fits = attention.cumsum(1) <= context
    mask = with_others(texts.mask) & fits
    mixed = TokenizedTexts(with_others(texts.input_ids), attention * fits, mask)
    return mixed, (prompt[partner] != prompt) & mask.any(1)


def check(sets: Mapping[str, Verdicts], config: TrainKTOConfig) -> None:
    """Say how the two kinds are balanced. Raises UserError for texts that this configuration cannot learn from."""
    require_held_out(len(sets.get("validation", ())), config.validation, what="texts")
    require_enough(len(sets.get("train", ())), batch_size=config.learning.batch_size, what="texts")
    train = sets["train"]
    good = int(train.desirable.sum())
    bad = len(train) - good
    if good == 0 or bad == 0:
        missing = "desirable" if good == 0 else "undesirable"
        raise UserError(
            f"pairs.path: none of the {len(train)} texts to train on is {missing} (column "
            f"{config.pairs.label!r}); KTO needs both kinds"
        )
    if not bool(train.comparable.any()):
        raise UserError("pairs.path: all texts answer one prompt; KTO's baseline needs answers to another")
    kto = config.kto
    print(f"{good} desirable and {bad} undesirable texts to train on", flush=True)
    worth = kto.desirable_weight * good
    if worth == 0 or kto.undesirable_weight == 0:
        return
    ratio = worth / (kto.undesirable_weight * bad)
    if not 0.99 <= ratio <= 4 / 3 + 0.01:
        print(
            f"weighted, that is {ratio:.2f} to 1; the paper advises 1 to 1.33 (2402.01306): "
            f"kto.undesirable_weight={worth / bad:.3g} gives 1",
            flush=True,
        )


def with_reference(
    config: TrainKTOConfig,
    policy: LanguagePolicy,
    sets: Mapping[str, Verdicts],
    *,
    folder: Path,
    began_with: str | None,
) -> tuple[dict[str, Verdicts], str]:
    """The sets with the reference's log-probs, and the reference's fingerprint."""
    found = reference_log_probs(
        policy,
        {name: (part.texts, part.mismatched) for name, part in sets.items()},
        ReferenceSource.of(
            folder, model=config.model, reference=config.reference, reference_cache=config.reference_cache
        ),
        began_with=began_with,
        learning=config.learning,
    )
    known = found.by_set
    return {
        name: replace(part, ref_log_probs=known[name][0], ref_mismatched=known[name][1])
        for name, part in sets.items()
    }, found.weights


# ---------------------------------------------------------------- learning


@torch.no_grad()
def baseline_of(policy: LanguagePolicy, data: Verdicts, rows: Tensor, *, learning: LearningConfig) -> Tensor:
    """The baseline over the whole step's rows [B], whatever micro-batches it is made in: a scalar, nats."""
    assert data.ref_mismatched is not None
    rows = rows[data.comparable[rows]]
    parts = [
        completion_log_probs(policy, rows_of([data.mismatched], part), precision=learning.precision)
        for part in rows.split(learning.rows)
    ]
    log_probs = torch.cat(parts) if parts else torch.zeros(0)
    return kto_baseline(log_probs=log_probs, ref_log_probs=data.ref_mismatched[rows])


def update(learner: PreferenceLearner, data: Verdicts, config: TrainKTOConfig, *, step: int) -> dict[str, float]:
    """One step on the next batch of texts; returns metrics under TRL's names."""
    settings, policy = config.learning, learner.policy
    progress = progress_of(step, settings.steps, learner.counters, settings.max_seconds)
    rate = scheduled(settings.learning_rate, schedule=settings.schedule, progress=progress, warmup=settings.warmup)
    rows = learner.batches.next()
    kl = baseline_of(policy, data, rows, learning=settings)
    reference = data.ref_log_probs
    assert reference is not None

    def loss_of(part: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return kto_loss(
            log_probs=completion_log_probs(policy, rows_of([data.texts], part), precision=settings.precision),
            ref_log_probs=reference[part],
            desirable=data.desirable[part],
            kl=kl,
            config=config.kto,
            weights=torch.full((len(part),), 1.0 / len(rows)),
        )

    totals = optimizer_step(
        policy, learner.optimizer, rows.split(settings.rows), loss_of, learning=settings, rate=rate
    )
    learner.counters.samples += len(rows)
    learner.counters.tokens += int(data.texts.attention_mask[rows].sum())
    own = {name: totals[name] for name in ("loss/total", "policy/grad_norm", "lr", "share/chosen")}
    return {name: float(value) for name, value in {**own, **kto_means(totals)}.items()}


# ---------------------------------------------------------------- a verdict on the policy


def judge_verdicts(
    policy: LanguagePolicy, data: Verdicts, config: TrainKTOConfig, *, rows: int | None = None
) -> dict[str, float]:
    """How well the implicit reward tells held-out thumbs apart, over the first `rows` texts (None = all).

    loss, kl, rewards/chosen (desirable), rewards/rejected, rewards/margins, logps/...: as in training
    rewards/accuracies  share of texts whose reward lies on its side of the baseline, with a Wilson interval (_low,
                        _high)
    rewards/auc         chance that a desirable text has the higher reward than an undesirable one, ties half: it
                        does not depend on the balance of the two kinds; absent where there is one kind only
    """
    count = min(len(data), rows or len(data))
    learning, index = config.learning, torch.arange(count)
    assert data.ref_log_probs is not None
    kl = baseline_of(policy, data, index, learning=learning)
    few = rows_of([data.texts], index)
    log_probs = all_log_probs(policy, [few], rows=learning.rows, precision=learning.precision)[0]
    desirable = data.desirable[:count]
    loss, totals = kto_loss(
        log_probs=log_probs,
        ref_log_probs=data.ref_log_probs[:count],
        desirable=desirable,
        kl=kl,
        config=config.kto,
        weights=torch.full((count,), 1.0 / count),
    )
    rewards = config.kto.beta * (log_probs - data.ref_log_probs[:count])
    right = int(((rewards > config.kto.beta * kl) == desirable).sum())
    low, high = wilson_interval(right, count)
    result = {"loss": float(loss), **{name: float(value) for name, value in kto_means(totals).items()}}
    result |= {"rewards/accuracies": right / count, "rewards/accuracies_low": low, "rewards/accuracies_high": high}
    result |= {"texts": float(count), "share/chosen": float(desirable.float().mean())}
    good, bad = rewards[desirable], rewards[~desirable]
    if len(good) and len(bad):
        result["rewards/auc"] = auc(good, bad)
    return result


def auc(good: Tensor, bad: Tensor) -> float:
    """Chance that one of `good` [N] is above one of `bad` [M], ties half (Mann and Whitney 1947)."""
    ordered = bad.sort().values
    below = torch.searchsorted(ordered, good, right=False)
    up_to = torch.searchsorted(ordered, good, right=True)
    return float((below + up_to).double().mean()) / (2 * len(bad))
