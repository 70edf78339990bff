"""Your own data: prompts and completions, conversations, texts or comparisons, from a file or folder of any kind.

`llm_rlhf.data.columns` says which columns a row may have, `llm_rlhf.data.files` which files are read.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from experiment.errors import UserError
from llm_rlhf.data.columns import ColumnNames, Transcripts, kind_of, read_demonstration, read_prompt
from llm_rlhf.data.files import read_rows
from llm_rlhf.rewards.functions import exact_match
from llm_rlhf.tasks.examples import Example

EXACT = "exact_match"


@dataclass(frozen=True)
class RowsConfig(ColumnNames):
    """What the columns are called (of a comparison the chosen answer is imitated, of labelled completions the good
    ones), and how the rows are divided and judged.

    validation, test    shares of the prompts kept out of training
    judge       `file.py:function`, or a reward model's run, that scores what is written in validation and
                evaluation; None = the run's own `rewards` or, where it has none or exact_match is among them,
                exact_match with the completion. Unless judged by that, rows may be prompts alone
    transcripts of Anthropic's "\n\nHuman: ...\n\nAssistant: ..." comparisons: text, or chat for a conversation
    """

    judge: str | None = None
    transcripts: Transcripts = "text"
    validation: float = 0.05
    test: float = 0.1
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.validation, self.test) < 0 or self.validation + self.test >= 1:
            raise ValueError("task.rows: validation and test must be shares that leave something to train on")
        if self.max_new_tokens < 1:
            raise ValueError("task.rows: max_new_tokens must be at least 1")


def split_prompts(
    prompts: Iterable[str], *, validation: float, test: float, seed: int, data: str
) -> tuple[list[str], list[str], list[str]]:
    """Different prompts -> those to train, to validate and to test on; a share of 0 gets none.

    Raises UserError if they are too few.
    """
    shuffled = sorted(prompts)
    random.Random(seed).shuffle(shuffled)
    test_count, validation_count = round(len(shuffled) * test), round(len(shuffled) * validation)
    held_out = test_count + validation_count
    empty = (test > 0 and test_count < 1) or (validation > 0 and validation_count < 1)
    if len(shuffled) - held_out < 1 or empty:
        raise UserError(f"{data}: {len(shuffled)} different prompts are too few to train, validate and test on")
    return shuffled[held_out:], shuffled[test_count:held_out], shuffled[:test_count]


def build(
    config: RowsConfig, *, data: str | None, seed: int, rewards: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Read the data and split them by prompt, so that no held-out prompt is trained on. rewards: of the run.

    Every column of a row is offered to reward functions; `answer` is the completion where there is no such column.
    Raises UserError if the file is not given, damaged, or too small to split.
    """
    if data is None:
        raise UserError("task.data: give the file that holds your prompts and completions")
    gold = gold_of(config, rewards or {})
    by_prompt: dict[str, list[Example]] = {}
    shown: dict[str, list[Example]] = {}
    left_out: Counter[str] = Counter()
    rows = 0
    for row in read_rows(data):
        rows += 1
        alone = EXACT not in gold and kind_of(row.columns, config) == "prompt-only"
        if alone:
            example: Example | str = read_prompt(row, config)
        else:
            example = read_demonstration(row, config, transcripts=config.transcripts)
        if isinstance(example, str):
            left_out[example] += 1
            continue
        example = replace(example, place=row.place)
        key = example.prompt or example.completion  # a text without a prompt is split by itself
        by_prompt.setdefault(key, []).append(example)
        if not alone:
            shown.setdefault(key, []).append(example)
    train, validation, test = split_prompts(
        by_prompt, validation=config.validation, test=config.test, seed=seed, data=data
    )
    notes = [f"{data}: {len(train)} prompts to train on, {len(validation)} validation, {len(test)} test"]
    if left_out:
        reasons = ", ".join(f"{count} with {reason}" for reason, count in sorted(left_out.items()))
        notes.append(f"{data}: {sum(left_out.values())} of {rows} rows are left out: {reasons}")
    return {
        "demonstrations": [example for prompt in train for example in shown.get(prompt, ())],
        "train": [by_prompt[prompt][0] for prompt in train],
        "splits": {
            "validation": [by_prompt[prompt][0] for prompt in validation],
            "test": [by_prompt[prompt][0] for prompt in test],
        },
        "rewards": {EXACT: exact_match},
        "gold": gold,
        "max_new_tokens": config.max_new_tokens,
        "limited_by": "task.rows.max_new_tokens",
        "alphabet": _alphabet(by_prompt),
        "notes": notes,
    }


def gold_of(config: RowsConfig, rewards: Mapping[str, float]) -> dict[str, float]:
    """What judges an answer, reward -> weight."""
    if config.judge is not None:
        return {config.judge: 1.0}
    return {EXACT: 1.0} if not rewards or EXACT in rewards else dict(rewards)


def _alphabet(by_prompt: Mapping[str, Iterable[Example]]) -> str:
    characters: set[str] = set()
    for examples in by_prompt.values():
        for example in examples:
            characters.update(example.prompt, example.completion)
    return "".join(sorted(characters)) or " "
