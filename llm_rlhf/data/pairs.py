"""Comparisons and thumbs: read from a user's file, split by prompt, tokenized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from experiment.errors import UserError
from llm_rlhf.data.columns import ColumnNames, Transcripts, read_comparison, read_feedback_row
from llm_rlhf.data.files import Row, read_rows
from llm_rlhf.data.records import Comparison, Feedback
from llm_rlhf.data.texts import Encoded, TokenizedTexts, encode, fit, lay_out
from llm_rlhf.tasks.rows import split_prompts

Record = TypeVar("Record", Comparison, Feedback)


@dataclass(frozen=True)
class PairsConfig(ColumnNames):
    """Where the data are, what their columns are called, and how they are divided.

    path            a .jsonl, .jsonl.gz, .json or .parquet file, a folder of these, or one that `datasets` saved
    validation, test                shares of the different prompts that are kept out of training
    validation_path, test_path      data of their own instead; prompts that occur there are not trained on
    seed            of the division
    max_prompt      longest prompt in tokens, its end is kept; None: as long as the context allows
    transcripts     of Anthropic's "\\n\\nHuman: ...\\n\\nAssistant: ...": text as it is, or chat, a conversation
    limit           at most this many rows of each path, the first ones; None = all
    """

    path: str = ""
    validation: float = 0.05
    test: float = 0.1
    validation_path: str | None = None
    test_path: str | None = None
    seed: int = 0
    max_prompt: int | None = None
    transcripts: Transcripts = "text"
    limit: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.validation, self.test) < 0 or self.validation + self.test >= 1:
            raise ValueError("pairs: validation and test must be shares that leave something to train on")
        for name in ("max_prompt", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"pairs.{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class Data(Generic[Record]):
    """Records to train, to validate and to test on; notes for the user; every character that occurs."""

    train: list[Record]
    validation: list[Record]
    test: list[Record]
    notes: list[str]
    alphabet: str


PairData = Data[Comparison]
FeedbackData = Data[Feedback]


def read_pairs(config: PairsConfig) -> PairData:
    """Comparisons, divided by prompt. Equal and empty answers are left out and counted in the notes.

    Raises UserError naming the row and column that cannot be used, or if there is too little.
    """

    def record(row: Row) -> Comparison | str:
        return read_comparison(row, config, transcripts=config.transcripts)

    data = _read(config, record, "comparisons")
    every = [*data.train, *data.validation, *data.test]
    tied, against = (
        sum(comparison.tied for comparison in every),
        sum(not comparison.tied and (comparison.margin or 0.0) < 0 for comparison in every),
    )
    if tied:
        data.notes.append(f"{tied} of {len(every)} comparisons are ties")
    if against:
        data.notes.append(
            f"{against} of {len(every)} comparisons have a negative margin: their scores prefer rejected"
        )
    return data


def read_feedback(config: PairsConfig) -> FeedbackData:
    """Thumbs, divided by prompt. Empty completions are left out and counted in the notes.

    Raises UserError naming the row and column that cannot be used, or if there is too little.
    """
    return _read(config, lambda row: read_feedback_row(row, config), "completions")


def _read(config: PairsConfig, record: Callable[[Row], Record | str], what: str) -> Data[Record]:
    if not config.path:
        raise UserError("pairs.path: give the file or folder that holds your data")
    notes: list[str] = []
    own = {
        name: _records(path, record, config.limit, notes, what) if path is not None else None
        for name, path in (("validation", config.validation_path), ("test", config.test_path))
    }
    by_prompt: dict[str, list[Record]] = {}
    for one in _records(config.path, record, config.limit, notes, what):
        by_prompt.setdefault(one.prompt, []).append(one)
    held_out = {one.prompt for records in own.values() for one in records or ()}
    doubled = held_out & by_prompt.keys()
    if doubled:
        notes.append(f"{config.path}: {len(doubled)} prompts are held out elsewhere too, and not trained on")
    left = {prompt: records for prompt, records in by_prompt.items() if prompt not in held_out}
    shares = {name: 0.0 if own[name] is not None else float(getattr(config, name)) for name in own}
    train, validation, test = split_prompts(
        left, validation=shares["validation"], test=shares["test"], seed=config.seed, data=config.path
    )
    parts = {
        name: [one for prompt in prompts for one in left[prompt]]
        for name, prompts in (("train", train), ("validation", validation), ("test", test))
    }
    for name, records in own.items():
        parts[name] = parts[name] if records is None else records
    said = ", ".join(
        f"{len(records)} {what} ({len({one.prompt for one in records})} prompts) {purpose}"
        for records, purpose in zip(parts.values(), ("to train on", "to validate", "to test"), strict=True)
        if records
    )
    notes.insert(0, f"{config.path}: {said}")
    characters: set[str] = set()
    for records in parts.values():
        for one in records:
            characters.update(one.prompt, *_completions(one))
    return Data(parts["train"], parts["validation"], parts["test"], notes, "".join(sorted(characters)) or " ")


def _records(
    path: str, record: Callable[[Row], Record | str], limit: int | None, notes: list[str], what: str
) -> list[Record]:
    """The records of a file; what was left out and why goes into `notes`. Raises UserError if nothing is left."""
    found: list[Record] = []
    left_out: Counter[str] = Counter()
    rows = 0
    for row in read_rows(path):
        if rows == limit:
            break
        rows += 1
        one = record(row)
        if isinstance(one, str):
            left_out[one] += 1
        else:
            found.append(one)
    reasons = ", ".join(f"{count} with {reason}" for reason, count in sorted(left_out.items()))
    if not found:
        raise UserError(f"{path}: no {what} to learn from in {rows} rows" + (f" ({reasons})" if reasons else ""))
    if left_out:
        notes.append(f"{path}: {sum(left_out.values())} of {rows} rows are left out: {reasons}")
    return found


def _completions(record: Comparison | Feedback) -> tuple[str, ...]:
    return (record.completion,) if isinstance(record, Feedback) else (record.chosen, record.rejected)


# ---------------------------------------------------------------- tokens

IN_PART = "answers_shown_in_part_by_the_chat_template"
"""A count: answers of which the template leaves out a part, such as their thoughts."""


@dataclass(frozen=True)
class TokenizedPairs:
    """Comparisons as tokens.

    chosen, rejected    N texts each, laid out with one prompt width and one completion width
    margin              [N] float; NaN = none
    tied                [N] bool
    prompt              [N] int; the same prompt has the same number
    """

    chosen: TokenizedTexts
    rejected: TokenizedTexts
    margin: Tensor
    tied: Tensor
    prompt: Tensor

    def __len__(self) -> int:
        return len(self.chosen)

    def select(self, rows: Tensor) -> TokenizedPairs:
        """The rows [B]."""
        return TokenizedPairs(
            _rows(self.chosen, rows),
            _rows(self.rejected, rows),
            self.margin[rows],
            self.tied[rows],
            self.prompt[rows],
        )


@dataclass(frozen=True)
class TokenizedFeedback:
    """Thumbs as tokens: N texts, desirable [N] bool, prompt [N] int (the same prompt has the same number)."""

    texts: TokenizedTexts
    desirable: Tensor
    prompt: Tensor

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, rows: Tensor) -> TokenizedFeedback:
        """The rows [B]."""
        return TokenizedFeedback(_rows(self.texts, rows), self.desirable[rows], self.prompt[rows])


def tokenize_pairs(
    comparisons: Sequence[Comparison],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    pad: int,
    max_prompt: int | None = None,
) -> tuple[TokenizedPairs, dict[str, int]]:
    """Tokenize comparisons, one row each in their order, so that both answers stand behind the same prompt.

    context     longest prompt and completion together, in tokens
    max_prompt  longest prompt; a longer one keeps its end

    Where a prompt and its longer answer do not fit, the prompt gives way first, down to half of the context; then
    the answers are cut and have no EOS. Counts: prompts_cut, chosen_cut, rejected_cut, answers_made_equal, pairs
    that were cut to the same tokens, and IN_PART, of both answers. Raises UserError if there are no comparisons, or
    all were cut so.
    """
    if not comparisons:
        raise UserError("there are no comparisons to train on")
    counts = dict.fromkeys(("prompts_cut", "chosen_cut", "rejected_cut", "answers_made_equal", IN_PART), 0)
    rows: tuple[list[Encoded], list[Encoded]] = [], []
    for comparison in comparisons:
        whole = [encode(tokenizer, comparison.prompt, text) for text in (comparison.chosen, comparison.rejected)]
        (chosen, rejected), prompt_cut, cut = fit(whole, context=context, max_prompt=max_prompt)
        counts["prompts_cut"] += prompt_cut
        counts["chosen_cut"] += cut[0]
        counts["rejected_cut"] += cut[1]
        counts[IN_PART] += chosen.in_part + rejected.in_part
        counts["answers_made_equal"] += (
            chosen.completion == rejected.completion and whole[0].completion != whole[1].completion
        )
        rows[0].append(chosen)
        rows[1].append(rejected)
    if counts["answers_made_equal"] == len(comparisons):
        raise UserError(
            f"all {len(comparisons)} comparisons are equal within the context of {context} tokens, to which they "
            "were cut: there is nothing to prefer; shorten the prompts (pairs.max_prompt), or take a longer context"
        )
    both = lay_out([*rows[0], *rows[1]], pad=pad)
    size = len(comparisons)
    pairs = TokenizedPairs(
        chosen=_rows(both, slice(None, size)),
        rejected=_rows(both, slice(size, None)),
        margin=torch.tensor([float("nan") if one.margin is None else one.margin for one in comparisons]),
        tied=torch.tensor([one.tied for one in comparisons]),
        prompt=_numbers(one.prompt for one in comparisons),
    )
    return pairs, counts


def tokenize_feedback(
    feedback: Sequence[Feedback],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    pad: int,
    max_prompt: int | None = None,
) -> tuple[TokenizedFeedback, dict[str, int]]:
    """Tokenize thumbs as `tokenize_pairs` does comparisons. Counts: prompts_cut, completions_cut, IN_PART.

    Raises UserError if there are none.
    """
    if not feedback:
        raise UserError("there are no completions to train on")
    counts = {"prompts_cut": 0, "completions_cut": 0, IN_PART: 0}
    rows: list[Encoded] = []
    for one in feedback:
        whole = encode(tokenizer, one.prompt, one.completion)
        (short,), prompt_cut, (completion_cut,) = fit([whole], context=context, max_prompt=max_prompt)
        counts["prompts_cut"] += prompt_cut
        counts["completions_cut"] += completion_cut
        counts[IN_PART] += short.in_part
        rows.append(short)
    desirable = torch.tensor([one.desirable for one in feedback])
    return TokenizedFeedback(lay_out(rows, pad=pad), desirable, _numbers(one.prompt for one in feedback)), counts


def concatenated(pairs: TokenizedPairs) -> TokenizedTexts:
    """All 2N texts for one forward pass: chosen first, then rejected."""
    chosen, rejected = pairs.chosen, pairs.rejected
    return TokenizedTexts(
        torch.cat([chosen.input_ids, rejected.input_ids]),
        torch.cat([chosen.attention_mask, rejected.attention_mask]),
        torch.cat([chosen.mask, rejected.mask]),
    )


def _rows(texts: TokenizedTexts, rows: Tensor | slice) -> TokenizedTexts:
    return TokenizedTexts(texts.input_ids[rows], texts.attention_mask[rows], texts.mask[rows])


def _numbers(prompts: Iterable[str]) -> Tensor:
    """[N] int, the same for the same prompt, in order of first appearance."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(prompt, len(numbers)) for prompt in prompts])
