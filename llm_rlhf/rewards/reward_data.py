"""Comparisons laid out for a reward model: every different text once, comparisons by prompt and objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from experiment.errors import UserError
from llm_rlhf.data.pairs import concatenated, tokenize_pairs
from llm_rlhf.data.records import Comparison
from llm_rlhf.models.tokenizer import pad_id


@dataclass(frozen=True)
class RewardData:
    """N comparisons of P prompts over U different texts.

    input_ids, attention_mask   [U, T] int; padding anywhere
    completion                  [U, T] bool, the completion's tokens, its EOS included
    lengths                     [U] int, how many those are
    chosen, rejected            [N] int, rows of the texts
    margin                      [N] float, NaN = none
    tied                        [N] bool
    prompt                      [N] int in 0..P-1
    objective                   [N] int, which head a comparison trains
    share                       [N] float, 1 / comparisons of the same prompt and objective: what each weighs, so
                                that a prompt with many answers counts once (Ouyang 2022, 2203.02155 eq. 1)
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion: Tensor
    lengths: Tensor
    chosen: Tensor
    rejected: Tensor
    margin: Tensor
    tied: Tensor
    prompt: Tensor
    objective: Tensor
    share: Tensor

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def prompts(self) -> int:
        """P, how many different prompts there are."""
        return int(self.prompt.max()) + 1

    def of_prompts(self, prompts: Tensor) -> Tensor:
        """The comparisons of the prompts [B], in their order: row numbers [n]."""
        return torch.cat([self._by_prompt[prompt] for prompt in prompts.tolist()])

    @cached_property
    def _by_prompt(self) -> tuple[Tensor, ...]:
        """The comparisons of each prompt."""
        return self.prompt.argsort(stable=True).split(torch.bincount(self.prompt).tolist())

    def texts(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """input_ids, attention_mask and completion of the texts [u], as `RewardModel.features` takes them."""
        return self.input_ids[rows], self.attention_mask[rows], self.completion[rows]

    def texts_of(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The different texts of the comparisons [n]: their numbers [u], and where chosen and rejected are in
        them."""
        texts, place = torch.cat([self.chosen[rows], self.rejected[rows]]).unique(return_inverse=True)
        return texts, place[: len(rows)], place[len(rows) :]


def objectives_of(comparisons: Sequence[Comparison], column: str) -> tuple[str, ...]:
    """The names in a column, sorted; ("reward",) where no comparison has it.

    Raises UserError where some have it and some do not, or it is not text.
    """
    without = [comparison for comparison in comparisons if column not in comparison.columns]
    if len(without) == len(comparisons):
        return ("reward",)
    for comparison in comparisons:
        value = comparison.columns.get(column)
        if not isinstance(value, str) or not value:
            what = "is missing" if column not in comparison.columns else f"is {value!r}, not a name"
            raise UserError(
                f"pairs: column {column!r} {what} in a comparison of the prompt {_short(comparison.prompt)}; "
                "name every comparison's objective, or none's"
            )
    return tuple(sorted({str(comparison.columns[column]) for comparison in comparisons}))


def reward_data(
    comparisons: Sequence[Comparison],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    objectives: Sequence[str],
    column: str,
    with_ties: bool = True,
    max_prompt: int | None = None,
    named: str = "training",
) -> tuple[RewardData, dict[str, int]]:
    """Tokenize comparisons; returns them and how many were left out or cut, by reason.

    column      of the data that names the objective; not looked at where there is only one
    with_ties   False leaves tied comparisons out

    Raises UserError if nothing is left.
    """
    single = len(objectives) == 1
    known = [c for c in comparisons if single or c.columns.get(column) in objectives]
    kept = [c for c in known if with_ties or not c.tied]
    counts = {"comparisons of an unknown objective": len(comparisons) - len(known), "ties": len(known) - len(kept)}
    if not kept:
        raise UserError(
            f"pairs: no {named} comparison is left" + "".join(f"; {r}: {n}" for r, n in counts.items() if n)
        )
    pairs, cut = tokenize_pairs(kept, tokenizer, context=context, pad=pad_id(tokenizer), max_prompt=max_prompt)
    both = concatenated(pairs)
    numbers: dict[tuple[bytes, bytes], int] = {}
    first: list[int] = []
    text = torch.empty(len(both), dtype=torch.long)
    lengths = both.mask.sum(1)
    for row in range(len(both)):
        real = both.attention_mask[row].bool()
        key = (both.input_ids[row][real].numpy().tobytes(), both.mask[row][real].numpy().tobytes())
        if key not in numbers:
            numbers[key] = len(first)
            first.append(row)
        text[row] = numbers[key]
    objective = torch.tensor([0 if single else objectives.index(str(c.columns[column])) for c in kept])
    prompt = pairs.prompt.unique(return_inverse=True)[1]
    group = prompt * len(objectives) + objective
    rows = torch.tensor(first)
    data = RewardData(
        input_ids=both.input_ids[rows],
        attention_mask=both.attention_mask[rows],
        completion=both.mask[rows],
        lengths=lengths[rows],
        chosen=text[: len(pairs)],
        rejected=text[len(pairs) :],
        margin=pairs.margin.float(),
        tied=pairs.tied,
        prompt=prompt,
        objective=objective,
        share=1.0 / torch.bincount(group)[group].float(),
    )
    return data, {name: count for name, count in {**counts, **cut}.items() if count}


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
