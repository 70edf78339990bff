"""What the recipes of direct preference learning share: log-probs of pairs, a step on them, a verdict on them.

Chosen and rejected completions go through the model in one pass. Every loss is a weighted sum whose weights have
the whole optimizer step's denominator, so micro-batches, padding and the company of other rows change no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from experiment.checkpoint import Checkpoint
from experiment.errors import UserError
from experiment.statistics import wilson_interval
from llm_rlhf.data.pairs import PairData, TokenizedPairs, concatenated, tokenize_pairs
from llm_rlhf.data.texts import Batches, TokenizedTexts
from llm_rlhf.models.causal import LanguagePolicy
from llm_rlhf.models.precision import Precision, autocast
from llm_rlhf.models.tokenizer import pad_id
from llm_rlhf.online.moved import Counters
from policy_core.optimizer import clipped_step
from policy_core.preference import PREFERENCE_LOSSES, PairLogProbs, PreferenceConfig
from policy_core.schedules import Schedule, set_learning_rate


@dataclass(frozen=True)
class LearningConfig:
    """steps, batch_size    updates, and pairs (or texts) per update
    micro_batch_size    of those per backward pass; None = all at once; changes no number beyond rounding
    learning_rate, schedule, warmup, weight_decay   AdamW's and its course
    precision           "bf16": the model's matrix products in bfloat16 (autocast); log-softmax, losses, weights
                        and optimizer stay float32
    max_seconds         stop after this much CPU time of training (a run that uses it cannot be repeated to the bit)
    """

    steps: int = 1000
    batch_size: int = 64
    micro_batch_size: int | None = None
    learning_rate: float = 1e-6
    schedule: Schedule = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: Precision = "float32"
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, 1 if self.micro_batch_size is None else self.micro_batch_size) < 1:
            raise ValueError("learning: steps, batch_size and micro_batch_size must be at least 1")
        if self.learning_rate < 0 or self.weight_decay < 0 or self.max_grad_norm <= 0:
            raise ValueError(
                "learning: learning_rate and weight_decay must not be negative, max_grad_norm must be above 0"
            )
        if not 0 <= self.warmup < 1:
            raise ValueError(f"learning.warmup must be in [0, 1), got {self.warmup}")

    @property
    def rows(self) -> int:
        """Pairs (or texts) of one forward pass."""
        return self.micro_batch_size or self.batch_size


@dataclass(frozen=True)
class HeldOutConfig:
    """every: updates between looks at the held-out rows (0 = never); rows: how many of them are looked at."""

    every: int = 50
    rows: int = 500

    def __post_init__(self) -> None:
        if self.every < 0 or self.rows < 1:
            raise ValueError("validation: every must be at least 0 and rows at least 1")


# ---------------------------------------------------------------- log-probs


def rows_of(parts: Sequence[TokenizedTexts], rows: Tensor) -> TokenizedTexts:
    """The rows [B] of every part, one part after another, as one batch. Parts are laid out in the same columns."""
    return TokenizedTexts(
        torch.cat([part.input_ids[rows] for part in parts]),
        torch.cat([part.attention_mask[rows] for part in parts]),
        torch.cat([part.mask[rows] for part in parts]),
    )


def completion_log_probs(
    policy: LanguagePolicy, texts: TokenizedTexts, *, precision: Precision = "float32"
) -> Tensor:
    """Log-probs of whole completions, nats summed over their tokens under the mask, [B] float32.

    The head and the log-softmax (always float32) see the columns of completions only; a prompt that rows share is
    run through the model once.
    """
    with autocast(policy, precision):
        columns = policy.columns(
            {"input_ids": texts.input_ids, "attention_mask": texts.attention_mask, "decisions": texts.mask}
        )
    if columns is None:
        return torch.zeros(len(texts))
    window = slice(columns.first, columns.last)
    logits = policy.tempered(columns.logits.float())
    tokens, mask = (tensor[:, window].to(logits.device) for tensor in (texts.input_ids, texts.mask))
    taken = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return torch.where(mask, taken - logits.logsumexp(-1), 0.0).sum(1).to(texts.mask.device)


@torch.no_grad()
def all_log_probs(
    policy: LanguagePolicy, parts: Sequence[TokenizedTexts], *, rows: int, precision: Precision = "float32"
) -> Tensor:
    """`completion_log_probs` of whole sets, without gradients: P parts of N texts -> [P, N].

    parts       such as chosen and rejected: row i of each goes through the model in the same pass, so that a prompt
                they share is computed once
    rows        per pass; neighbours are of about one length, so little is spent on padding
    """
    lengths = torch.stack([part.attention_mask.sum(1) for part in parts]).amax(0)
    result = torch.zeros(len(parts), len(lengths))
    for some in lengths.argsort(stable=True).split(rows):
        log_probs = completion_log_probs(policy, rows_of(parts, some), precision=precision)
        result[:, some] = log_probs.view(len(parts), -1)
    return result


def log_probs_of(log_probs: Tensor, pairs: TokenizedPairs, reference: Tensor | None) -> PairLogProbs:
    """What the losses take: log_probs, reference [2, N] nats, chosen first; offsets are margins, NaN where none."""
    return PairLogProbs(
        chosen=log_probs[0],
        rejected=log_probs[1],
        chosen_length=pairs.chosen.mask.sum(1).float(),
        rejected_length=pairs.rejected.mask.sum(1).float(),
        ref_chosen=None if reference is None else reference[0],
        ref_rejected=None if reference is None else reference[1],
        offset=pairs.margin.float(),
    )


@dataclass(frozen=True)
class ReferencedPairs:
    """Pairs, and what the reference gives them: [2, N] nats, chosen first; None where the loss has no reference."""

    pairs: TokenizedPairs
    ref_log_probs: Tensor | None

    def __len__(self) -> int:
        return len(self.pairs)

    def select(self, rows: Tensor) -> ReferencedPairs:
        """The rows [B]."""
        known = self.ref_log_probs
        return ReferencedPairs(self.pairs.select(rows), None if known is None else known[:, rows])

    def under(self, policy: LanguagePolicy, *, precision: Precision) -> PairLogProbs:
        """Log-probs under the policy, with gradients, from one forward pass over chosen and rejected."""
        log_probs = completion_log_probs(policy, concatenated(self.pairs), precision=precision)
        return log_probs_of(log_probs.view(2, -1), self.pairs, self.ref_log_probs)

    def state_dict(self) -> dict[str, Any]:
        """Tokens, masks, margins and log-probs, for pairs that a run found itself."""
        pairs = self.pairs
        return {
            "chosen": pairs.chosen.state_dict(),
            "rejected": pairs.rejected.state_dict(),
            "margin": pairs.margin,
            "tied": pairs.tied,
            "prompt": pairs.prompt,
            "ref_log_probs": self.ref_log_probs,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> ReferencedPairs:
        """What `state_dict()` gave."""
        chosen, rejected = TokenizedTexts.from_state(state["chosen"]), TokenizedTexts.from_state(state["rejected"])
        pairs = TokenizedPairs(chosen, rejected, state["margin"], state["tied"], state["prompt"])
        return cls(pairs, state["ref_log_probs"])


def first_rows(data: ReferencedPairs, count: int) -> ReferencedPairs:
    """The first `count` pairs, or all where there are fewer."""
    return data.select(torch.arange(min(count, len(data))))


# ---------------------------------------------------------------- what can be learned from


def usable_pairs(pairs: TokenizedPairs) -> tuple[TokenizedPairs, list[str]]:
    """The pairs that prefer one completion to another, and a line on each kind that was left out.

    Tied pairs say nothing to these losses; nor do pairs whose completions are the same tokens (after a cut, say).
    """
    chosen, rejected = (
        torch.where(side.attention_mask.bool(), side.input_ids, -1) for side in (pairs.chosen, pairs.rejected)
    )
    same = (chosen == rejected).all(1)
    empty = ~pairs.chosen.mask.any(1) | ~pairs.rejected.mask.any(1)
    notes = []
    for what, rows in (
        ("are ties", pairs.tied),
        ("have one and the same answer twice", same & ~pairs.tied),
        ("have an answer without a token", empty & ~same & ~pairs.tied),
    ):
        if bool(rows.any()):
            notes.append(f"{int(rows.sum())} of {len(pairs)} pairs {what} and are left out")
    return pairs.select((~(pairs.tied | same | empty)).nonzero().squeeze(1)), notes


def tokenized_sets(
    data: PairData, tokenizer: PreTrainedTokenizerBase, *, context: int, max_prompt: int | None
) -> tuple[dict[str, TokenizedPairs], list[str]]:
    """The usable pairs of "train", "validation" and "test" that have any, and what a run should say of them.

    Raises UserError if no answer of a set reaches its end.
    """
    sets: dict[str, TokenizedPairs] = {}
    notes = list(data.notes)
    for name in ("train", "validation", "test"):
        comparisons = getattr(data, name)
        if not comparisons:
            continue
        pairs, counts = tokenize_pairs(
            comparisons, tokenizer, context=context, pad=pad_id(tokenizer), max_prompt=max_prompt
        )
        require_ends(counts["chosen_cut"] + counts["rejected_cut"], of=2 * len(pairs), context=context)
        pairs, left_out = usable_pairs(pairs)
        said = {what.replace("_", " "): n for what, n in counts.items() if n and what != "answers_made_equal"}
        notes += [f"{name}: {count} {what}" for what, count in said.items()]
        notes += [f"{name}: {line}" for line in left_out]
        if len(pairs):
            sets[name] = pairs
    return sets, notes


def require_ends(cut: int, *, of: int, context: int) -> None:
    """Raises UserError where all answers are cut: a model trained on them would never stop."""
    if cut == of:
        raise UserError(
            f"pairs.path: every answer is cut before its end, the model's context is {context} tokens; "
            "use a model with a longer context, shorten the answers, or lower pairs.max_prompt"
        )


def announce_all(notes: Iterable[str]) -> None:
    """Say what the data is, one line each."""
    for note in notes:
        print(note, flush=True)


def require_enough(rows: int, *, batch_size: int, what: str) -> None:
    """Raises UserError where there is less than one batch to train on."""
    if rows < batch_size:
        raise UserError(
            f"pairs.path: {rows} {what} to train on are fewer than learning.batch_size {batch_size}; lower it"
        )


def require_held_out(rows: int, validation: HeldOutConfig, *, what: str) -> None:
    """Raises UserError where validation is asked for and nothing is held out."""
    if rows == 0 and validation.every > 0:
        raise UserError(
            f"pairs.validation: no {what} are held out to validate on; raise it, or set validation.every=0"
        )


# ---------------------------------------------------------------- a step


@dataclass
class PreferenceLearner:
    """What a run of direct preference learning moves; the weights have a folder of their own.

    reference   fingerprint of the reference's weights, "" where the loss needs none
    """

    policy: LanguagePolicy
    optimizer: torch.optim.Optimizer
    batches: Batches
    counters: Counters
    reference: str

    def state_dict(self) -> dict[str, Any]:
        """Optimizer, position in the data, counters, and which reference."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.state_dict(),
            "counters": self.counters.state_dict(),
            "reference": self.reference,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        for name in ("optimizer", "batches", "counters"):
            getattr(self, name).load_state_dict(state[name])
        self.reference = str(state["reference"])


def reference_of(checkpoint: Checkpoint | None) -> str | None:
    """Fingerprint of the reference that a run began with, from its checkpoint; None at a run's start."""
    return None if checkpoint is None else str(checkpoint.state["reference"])


def make_optimizer(policy: LanguagePolicy, learning: LearningConfig) -> torch.optim.AdamW:
    """AdamW over everything that learns, in its fused form."""
    learned = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(learned, lr=learning.learning_rate, weight_decay=learning.weight_decay, fused=True)


def accumulate(totals: dict[str, Tensor], metrics: Mapping[str, Tensor]) -> None:
    """Add up the metrics of micro-batches, whose weights have the whole step's denominator."""
    for name, value in metrics.items():
        totals[name] = totals.get(name, torch.zeros(())) + value.detach()


def optimizer_step(
    policy: LanguagePolicy,
    optimizer: torch.optim.Optimizer,
    parts: Sequence[Tensor],
    loss_of: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]],
    *,
    learning: LearningConfig,
    rate: float,
) -> dict[str, Tensor]:
    """One update from micro-batches. loss_of: rows [B] -> their share of the step's loss, and metrics that add up.

    Returns the metrics with loss/total, policy/grad_norm and lr. Raises NonFiniteLoss before a step that would
    spoil the weights.
    """
    set_learning_rate(optimizer, rate)
    optimizer.zero_grad(set_to_none=True)
    totals: dict[str, Tensor] = {}
    for rows in parts:
        loss, metrics = loss_of(rows)
        loss.backward()
        accumulate(totals, {"loss/total": loss, **metrics})
    grad_norm = clipped_step(optimizer, max_grad_norm=learning.max_grad_norm, losses=totals)
    return {**totals, "policy/grad_norm": grad_norm, "lr": torch.tensor(rate)}


def pair_loss(
    log_probs: PairLogProbs, *, preference: PreferenceConfig, nll_coef: float, weights: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The preference loss, and `nll_coef` times the negative log-likelihood of the chosen completions: the mean
    over a completion's tokens, then over pairs (Pang 2024, 2404.19733 eq. 1; Llama 3, 2407.21783 section 4.1.4).

    Metrics: the loss's own, loss/preference, nll_loss, completions/chosen_length and /rejected_length (tokens).
    """
    loss, metrics = PREFERENCE_LOSSES[preference.loss](log_probs, config=preference, weights=weights)
    nll = -(weights * log_probs.chosen / log_probs.chosen_length.clamp(min=1)).sum()
    metrics = {
        **metrics,
        "loss/preference": loss.detach(),
        "nll_loss": nll.detach(),
        "completions/chosen_length": (weights * log_probs.chosen_length).sum(),
        "completions/rejected_length": (weights * log_probs.rejected_length).sum(),
    }
    return (loss + nll_coef * nll if nll_coef > 0 else loss), metrics


def pair_step(
    policy: LanguagePolicy,
    optimizer: torch.optim.Optimizer,
    data: ReferencedPairs,
    rows: Tensor,
    *,
    preference: PreferenceConfig,
    nll_coef: float,
    learning: LearningConfig,
    rate: float,
) -> dict[str, float]:
    """One update on the pairs `rows` [B]; returns metrics under TRL's names."""

    def loss_of(part: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        weights = torch.full((len(part),), 1.0 / len(rows))
        log_probs = data.select(part).under(policy, precision=learning.precision)
        return pair_loss(log_probs, preference=preference, nll_coef=nll_coef, weights=weights)

    metrics = optimizer_step(policy, optimizer, rows.split(learning.rows), loss_of, learning=learning, rate=rate)
    return {name: float(value) for name, value in metrics.items()}


# ---------------------------------------------------------------- a verdict


def judge_pairs(log_probs: PairLogProbs, *, preference: PreferenceConfig) -> dict[str, float]:
    """How well the implicit reward orders pairs: the loss, and its metrics as means over the pairs.

    rewards/accuracies      share of pairs whose chosen completion has the higher reward, with its Wilson interval
                            rewards/accuracies_low and _high
    accuracies/chosen_longer, /chosen_shorter   the same where the chosen completion has more, or fewer, tokens: a
                            policy that learned length alone is right on one kind only
    share/chosen_longer, /chosen_shorter        of all pairs: how often "the longer one wins" is right
    """
    count = len(log_probs.chosen)

    def sums(weights: Tensor) -> dict[str, float]:
        loss, metrics = PREFERENCE_LOSSES[preference.loss](log_probs, config=preference, weights=weights)
        return {"loss": float(loss), **{name: float(value) for name, value in metrics.items()}}

    right = round(sums(torch.ones(count))["rewards/accuracies"])
    low, high = wilson_interval(right, count)
    result = {**sums(torch.full((count,), 1.0 / count)), "rewards/accuracies": right / count}
    result |= {"rewards/accuracies_low": low, "rewards/accuracies_high": high, "pairs": count}
    for name, rows in (
        ("chosen_longer", log_probs.chosen_length > log_probs.rejected_length),
        ("chosen_shorter", log_probs.chosen_length < log_probs.rejected_length),
    ):
        result[f"share/{name}"] = float(rows.float().mean())
        if bool(rows.any()):
            result[f"accuracies/{name}"] = sums(rows.float() / rows.sum())["rewards/accuracies"]
    return result


@torch.no_grad()
def validate_pairs(
    policy: LanguagePolicy, data: ReferencedPairs, *, preference: PreferenceConfig, learning: LearningConfig
) -> dict[str, float]:
    """`judge_pairs` under the policy's present weights."""
    pairs = data.pairs
    log_probs = all_log_probs(
        policy, (pairs.chosen, pairs.rejected), rows=learning.rows, precision=learning.precision
    )
    return judge_pairs(log_probs_of(log_probs, pairs, data.ref_log_probs), preference=preference)
