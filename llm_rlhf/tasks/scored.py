"""Your own scored texts: a file of prompts and completions, or of conversations, with rewards.

A row is {"prompt": ..., "completion": ..., "reward": 0.5}, or a conversation

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...], "reward": 0.5}

in which any assistant message may have a reward of its own; the row's is added to the last one. A conversation is
rendered by the tokenizer's chat template, or as lines "ROLE: CONTENT". Every assistant message is chosen and ends
with EOS; everything else is given. What the model is asked for in validation and evaluation is the first one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiment.errors import UserError
from llm_rlhf.data.chat import ASSISTANT, Chat, Message
from llm_rlhf.data.files import number_column, read_rows, text_column
from llm_rlhf.rewards.functions import RewardFunction
from llm_rlhf.tasks.examples import Example, Piece
from llm_rlhf.tasks.rows import split_prompts


@dataclass(frozen=True)
class ScoredConfig:
    """prompt, completion, messages, reward: names of the columns; validation, test: shares of prompts kept out

    judge   `file.py:function` that scores what is written in validation and evaluation; None = "logged", the mean
            reward that this very completion has in the file, nothing where it is not there
    """

    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    reward: str = "reward"
    judge: str | None = None
    validation: float = 0.05
    test: float = 0.1
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        if min(self.validation, self.test) < 0 or self.validation + self.test >= 1:
            raise ValueError("task.scored: validation and test must be shares that leave something to train on")
        if self.max_new_tokens < 1:
            raise ValueError("task.scored: max_new_tokens must be at least 1")


def build(config: ScoredConfig, *, data: str | None, seed: int) -> dict[str, Any]:
    """Read the file and split it by prompt, so that no held-out prompt is trained on.

    Raises UserError naming file and line for a row that cannot be used, or if there are too few rows.
    """
    if data is None:
        raise UserError("task.data: give the file that holds your prompts, completions and rewards")
    by_prompt: dict[str, list[tuple[Example, list[Piece]]]] = {}
    for row in read_rows(data):
        text = _pieces(row.columns, config, row.place)
        columns = {name: value for name, value in row.columns.items() if name not in ("prompts", "completions")}
        example = Example(text[0].text, text[1].text, columns, row.place)
        by_prompt.setdefault(example.prompt, []).append((example, text))
    train, validation, test = split_prompts(
        by_prompt, validation=config.validation, test=config.test, seed=seed, data=data
    )
    rows = [pair for pairs in by_prompt.values() for pair in pairs]
    logged = [text for prompt in train for _, text in by_prompt[prompt]]
    return {
        "demonstrations": [example for prompt in train for example, _ in by_prompt[prompt]],
        "train": [by_prompt[prompt][0][0] for prompt in train],
        "splits": {
            "validation": [by_prompt[prompt][0][0] for prompt in validation],
            "test": [by_prompt[prompt][0][0] for prompt in test],
        },
        "rewards": {"logged": logged_reward([text for _, text in rows])},
        "gold": {config.judge or "logged": 1.0},
        "max_new_tokens": config.max_new_tokens,
        "limited_by": "task.scored.max_new_tokens",
        "alphabet": "".join(sorted({character for _, text in rows for piece in text for character in piece.text})),
        "notes": [
            f"{data}: {len(train)} prompts ({len(logged)} texts) to train on, {len(validation)} validation, "
            f"{len(test)} test"
        ],
        "logged": logged,
    }


def logged_reward(texts: Sequence[Sequence[Piece]]) -> RewardFunction:
    """The reward function that knows the file: the mean of what a completion earned there, None where it is new."""
    earned: dict[tuple[str, str], list[float]] = {}
    for text in texts:
        earned.setdefault((text[0].text, text[1].text), []).append(sum(piece.reward or 0.0 for piece in text))

    def logged(prompts: list[str], completions: list[str]) -> list[float | None]:
        found = [earned.get(pair) for pair in zip(prompts, completions, strict=True)]
        return [None if known is None else sum(known) / len(known) for known in found]

    return logged


def _pieces(row: Mapping[str, Any], config: ScoredConfig, place: str) -> list[Piece]:
    """A row as given and chosen pieces in turn, the first given, the last chosen."""
    if row.get(config.messages) is not None:
        return _conversation(row, config, place)
    prompt = text_column(row, config.prompt, place)
    completion = text_column(row, config.completion, place)
    if not completion:
        raise UserError(f"{place}: column {config.completion!r} is empty; there is nothing that earned the reward")
    return [Piece(prompt, None), Piece(completion, number_column(row, config.reward, place))]


def _conversation(row: Mapping[str, Any], config: ScoredConfig, place: str) -> list[Piece]:
    """Messages up to the last assistant message."""
    messages = row[config.messages]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"{place}: column {config.messages!r} must be a list of objects with `role` and `content`")
    pieces: list[Piece] = []
    given: list[Message] = []
    scored = row.get(config.reward) is not None
    for number, message in enumerate(messages, start=1):
        where = f"{place}: message {number}"
        role, content = text_column(message, "role", where), text_column(message, "content", where)
        if role != ASSISTANT:
            given.append({"role": role, "content": content})
            continue
        if not content:
            raise UserError(f"{where}: column 'content' is empty; an assistant message must say something")
        rewarded = message.get(config.reward) is not None  # parquet has every column in every row
        earned = number_column(message, config.reward, where) if rewarded else 0.0
        scored |= rewarded
        before = Chat.between(given, place=place) if pieces else Chat.prompt(given, place=place)
        pieces += [Piece(before, None), Piece(content, earned)]
        given = []
    if not pieces:
        raise UserError(f"{place}: no message has the role {ASSISTANT!r}; there is nothing to learn from")
    if not scored:
        raise UserError(f"{place}: neither the row nor a message has a {config.reward!r}")
    if row.get(config.reward) is not None:
        last = pieces[-1]
        pieces[-1] = Piece(last.text, (last.reward or 0.0) + number_column(row, config.reward, place))
    return pieces
