"""Your own data: a jsonl file of prompts and completions."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from experiment.errors import UserError
from llm_rlhf.rewards import exact_match
from llm_rlhf.tasks.examples import Example, read_jsonl, text_column


@dataclass(frozen=True)
class RowsConfig:
    """prompt, completion: names of the columns; validation, test: shares of the prompts kept out of training."""

    prompt: str = "prompt"
    completion: str = "completion"
    validation: float = 0.05
    test: float = 0.1
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        if min(self.validation, self.test) < 0 or self.validation + self.test >= 1:
            raise ValueError("task.rows: validation and test must be shares that leave something to train on")


def split_prompts(
    prompts: Iterable[str], *, validation: float, test: float, seed: int, data: str
) -> tuple[list[str], list[str], list[str]]:
    """Different prompts -> those to train, to validate and to test on. Raises UserError if they are too few."""
    shuffled = sorted(prompts)
    random.Random(seed).shuffle(shuffled)
    test_count, validation_count = round(len(shuffled) * test), round(len(shuffled) * validation)
    held_out = test_count + validation_count
    if len(shuffled) - held_out < 1 or test_count < 1 or validation_count < 1:
        raise UserError(f"{data}: {len(shuffled)} different prompts are too few to train, validate and test on")
    return shuffled[held_out:], shuffled[test_count:held_out], shuffled[:test_count]


def build(config: RowsConfig, *, data: str | None, seed: int) -> dict[str, Any]:
    """Read the file and split it by prompt, so that no held-out prompt is trained on.

    Every column of a row is offered to reward functions; `answer` is the completion where there is no such column.
    Raises UserError if the file is not given, damaged, or too small to split.
    """
    if data is None:
        raise UserError("task.data: give the jsonl file that holds your prompts and completions")
    by_prompt: dict[str, list[Example]] = {}
    for number, row in read_jsonl(data):
        place = f"{data}:{number}"
        prompt = text_column(row, config.prompt, place)
        completion = text_column(row, config.completion, place)
        columns = {"answer": completion, **row}
        for reserved in ("prompts", "completions"):
            columns.pop(reserved, None)
        by_prompt.setdefault(prompt, []).append(Example(prompt, completion, columns))
    train, validation, test = split_prompts(
        by_prompt, validation=config.validation, test=config.test, seed=seed, data=data
    )
    text = "".join(example.prompt + example.completion for rows in by_prompt.values() for example in rows)
    return {
        "demonstrations": [example for prompt in train for example in by_prompt[prompt]],
        "train": [by_prompt[prompt][0] for prompt in train],
        "splits": {
            "validation": [by_prompt[prompt][0] for prompt in validation],
            "test": [by_prompt[prompt][0] for prompt in test],
        },
        "rewards": {"exact_match": exact_match},
        "default_reward": "exact_match",
        "max_new_tokens": config.max_new_tokens,
        "alphabet": "".join(sorted(set(text))) or " ",
        "notes": [f"{data}: {len(train)} prompts to train on, {len(validation)} validation, {len(test)} test"],
    }
