"""Rows as comparisons, thumbs and demonstrations: TRL's column types, by their names and contents.

    language modeling       text, or messages
    prompt-only             prompt
    prompt-completion       prompt, completion
    preference              prompt, chosen, rejected; or chosen, rejected with a common start (implicit prompt)
    unpaired preference     prompt, completion, label (true = a thumb up)

Texts are standard (strings) or conversational (lists of {role, content}). A preference may have a margin, or
score_chosen and score_rejected, and a tie. Two strings "\\n\\nHuman: ...\\n\\nAssistant: ..." (Anthropic's
transcripts) share everything up to the last "\\n\\nAssistant:" that they have in common.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from experiment.errors import UserError
from llm_rlhf.data.chat import ASSISTANT, Chat, Message, is_conversation, read_messages
from llm_rlhf.data.files import Row, number_column, text_column
from llm_rlhf.data.records import Comparison, Feedback
from llm_rlhf.tasks.examples import Example

Kind = Literal["preference", "unpaired preference", "language modeling", "prompt-completion", "prompt-only"]
Transcripts = Literal["text", "chat"]
EQUAL, EMPTY, UNRELATED = "equal answers", "empty answers", "no common prompt"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_REPLY = "\n\nAssistant:"


@dataclass(frozen=True)
class ColumnNames:
    """What the columns are called in the data.

    Raises ValueError where two kinds have one name. Only `text`, which goes with no other kind, gives way while it
    is called as here.
    """

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    completion: str = "completion"
    label: str = "label"
    messages: str = "messages"
    text: str = "text"
    margin: str = "margin"
    score_chosen: str = "score_chosen"
    score_rejected: str = "score_rejected"
    tie: str = "tie"

    def __post_init__(self) -> None:
        kinds = [one for one in fields(ColumnNames) if one.name != "text" or self.text != one.default]
        names = Counter(getattr(self, one.name) for one in kinds)
        twice = next((name for name, count in names.items() if count > 1), None)
        if twice is not None:
            raise ValueError(
                f"two kinds of column are both called {twice!r}; give the one that your data lack another name"
            )


def listed(columns: Mapping[str, Any]) -> str:
    """The columns of a row, and which of them are null: those count as missing."""
    return ", ".join(name if value is not None else f"{name} = null" for name, value in columns.items())


def kind_of(columns: Mapping[str, Any], names: ColumnNames) -> Kind | None:
    """The column type of a row; null columns count as absent. None where it is none of them."""
    there = {name for name, value in columns.items() if value is not None}
    if {names.chosen, names.rejected} <= there:
        return "preference"
    if {names.completion, names.label} <= there:
        return "unpaired preference"
    if names.messages in there:
        return "language modeling"
    if {names.prompt, names.completion} <= there:
        return "prompt-completion"
    if names.text in there:
        return "language modeling"
    return "prompt-only" if names.prompt in there else None


def read_comparison(row: Row, names: ColumnNames, *, transcripts: Transcripts = "text") -> Comparison | str:
    """The comparison in a row, or why it says nothing: EQUAL, EMPTY or UNRELATED.

    transcripts     "chat": Anthropic's transcripts become conversations, which a chat template renders

    Raises UserError naming the row and the column that is missing or of another type.
    """
    columns, place = row.columns, row.place
    for name in (names.chosen, names.rejected):
        if columns.get(name) is None:
            raise UserError(f"{place}: column {name!r} is missing (there is {listed(columns)})")
    tied = _flag(columns, names.tie, place) if columns.get(names.tie) is not None else False
    parts = _three_texts(row, names, transcripts)
    if parts is None:
        return EQUAL if columns[names.chosen] == columns[names.rejected] and not tied else UNRELATED
    prompt, chosen, rejected = parts
    if _blank(chosen) or _blank(rejected):
        return EMPTY
    if not tied and _same(chosen, rejected):
        return EQUAL
    used = {names.prompt, names.chosen, names.rejected}
    others = {name: value for name, value in columns.items() if name not in used}
    return Comparison(prompt, chosen, rejected, _margin(columns, names, place), tied, others)


def read_feedback_row(row: Row, names: ColumnNames) -> Feedback | str:
    """The thumb in a row, or EMPTY. Raises UserError naming the row and the column that is wrong."""
    columns, place = row.columns, row.place
    for name in (names.completion, names.label):
        if columns.get(name) is None:
            raise UserError(f"{place}: column {name!r} is missing (there is {listed(columns)})")
    desirable = _flag(columns, names.label, place)
    if columns.get(names.prompt) is not None:
        prompt, completion = _prompt_and(row, names, names.completion)
    else:
        prompt, completion = _alone(columns[names.completion], names.completion, place)
    if _blank(completion):
        return EMPTY
    used = {names.prompt, names.completion, names.label}
    return Feedback(prompt, completion, desirable, {n: v for n, v in columns.items() if n not in used})


def read_demonstration(row: Row, names: ColumnNames, *, transcripts: Transcripts = "text") -> Example | str:
    """What a row shows: its completion, its conversation, its text, its chosen answer, its completion if labelled
    good. Every column is kept, and `answer` is the (first) completion where there is no such column.

    Returns a string that says why there is nothing to imitate: EMPTY, EQUAL, UNRELATED or "thumbs down". Raises
    UserError naming the row and the column that is wrong or missing.
    """
    columns, kind = row.columns, kind_of(row.columns, names)
    prompt: str
    completion: str
    if kind == "preference":
        comparison = read_comparison(row, names, transcripts=transcripts)
        if isinstance(comparison, str):
            return comparison
        prompt, completion = comparison.prompt, comparison.chosen
    elif kind == "unpaired preference":
        feedback = read_feedback_row(row, names)
        if isinstance(feedback, str):
            return feedback
        if not feedback.desirable:
            return "thumbs down"
        prompt, completion = feedback.prompt, feedback.completion
    elif kind == "language modeling" and columns.get(names.messages) is not None:
        prompt, completion = _conversation(read_messages(columns[names.messages], names.messages, row.place), row)
    elif kind == "language modeling":
        prompt, completion = "", text_column(columns, names.text, row.place)
    else:
        text_or_messages(columns, names.prompt, row.place)
        prompt, completion = _prompt_and(row, names, names.completion)
    answer = completion.messages[0]["content"] if isinstance(completion, Chat) else completion
    kept = {name: value for name, value in columns.items() if name not in ("prompts", "completions")}
    return Example(prompt, completion, {"answer": answer, **kept})


def read_prompt(row: Row, names: ColumnNames) -> Example:
    """A prompt without a completion. Raises UserError naming the row if the column is wrong or missing."""
    prompt = _as_prompt(text_or_messages(row.columns, names.prompt, row.place), names.prompt, row.place)
    kept = {name: value for name, value in row.columns.items() if name not in ("prompts", "completions")}
    return Example(prompt, "", kept)


def text_or_messages(columns: Mapping[str, Any], name: str, place: str) -> str | list[Message]:
    """A column that is text or a list of messages. Raises UserError naming `place` and the column."""
    value = columns.get(name)
    return read_messages(value, name, place) if isinstance(value, list) else text_column(columns, name, place)


# ---------------------------------------------------------------- where the prompt ends


def common_start(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """How many first characters or messages two answers share, as TRL's `extract_prompt` counts them.

    A space before the first difference belongs to the answers; where one answer is a prefix of the other, its last
    character or message is left to it.
    """
    same = _shared(chosen, rejected)
    if same == min(len(chosen), len(rejected)):
        return max(same - 1, 0)
    return same - 1 if same > 0 and chosen[same - 1] == " " else same


def _shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many first items are equal, by bisection."""
    low, high = 0, min(len(first), len(second))  # the first `low` are equal, no more than `high` are
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[low:middle] == second[low:middle] else (low, middle - 1)
    return low


def split_transcripts(chosen: str, rejected: str) -> tuple[str, str, str] | None:
    """Anthropic's transcripts -> prompt (up to "\n\nAssistant:"), two replies; None without a common question."""
    start = chosen.rfind(_REPLY, 0, _shared(chosen, rejected))
    if start < 0:
        return None
    end = start + len(_REPLY)
    return chosen[:end], chosen[end:], rejected[end:]


def is_transcript(value: Any) -> bool:
    """Whether a column looks like "\n\nHuman: ...\n\nAssistant: ..."."""
    return isinstance(value, str) and value.startswith("\n\nHuman:") and _REPLY in value


def _turns(transcript: str) -> list[Message]:
    """Messages of a transcript."""
    _, *parts = _TURN.split(transcript)
    roles = {"Human": "user", "Assistant": ASSISTANT}
    return [
        {"role": roles[who], "content": text.strip()} for who, text in zip(parts[::2], parts[1::2], strict=True)
    ]


def _three_texts(row: Row, names: ColumnNames, transcripts: Transcripts) -> tuple[str, str, str] | None:
    """Prompt, chosen and rejected; None where the two answer different questions."""
    columns, place = row.columns, row.place
    chosen = text_or_messages(columns, names.chosen, place)
    rejected = text_or_messages(columns, names.rejected, place)
    given = columns.get(names.prompt)
    # A text beside whole conversations repeats their first message (as in UltraFeedback), so they say more.
    replies = isinstance(chosen, str) or chosen[0]["role"] == ASSISTANT
    if given is not None and (isinstance(given, list) or replies):
        first, second = _prompt_and(row, names, names.chosen), _prompt_and(row, names, names.rejected)
        return first[0], first[1], second[1]
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _three_chats(chosen, rejected, place)
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise UserError(f"{place}: one of {names.chosen!r} and {names.rejected!r} is text, the other messages")
    if not (is_transcript(chosen) and is_transcript(rejected)):
        start = common_start(chosen, rejected)
        return None if chosen == rejected else (chosen[:start], chosen[start:], rejected[start:])
    if transcripts == "chat":
        return _three_chats(_turns(chosen), _turns(rejected), place)
    return split_transcripts(chosen, rejected)


def _three_chats(chosen: list[Message], rejected: list[Message], place: str) -> tuple[str, str, str] | None:
    """Whole conversations -> what they have in common, and two replies of the assistant."""
    start = common_start(chosen, rejected)
    replies = chosen[start:], rejected[start:]
    if start == 0 or chosen[start - 1]["role"] == ASSISTANT:
        return None
    if any(not reply or reply[0]["role"] != ASSISTANT for reply in replies):
        return None
    first, second = (Chat.completion(reply, place=place) for reply in replies)
    return Chat.prompt(chosen[:start], place=place), first, second


def _prompt_and(row: Row, names: ColumnNames, name: str) -> tuple[str, str]:
    """The prompt column and the completion in column `name`, which may repeat the prompt's messages."""
    place = row.place
    given = text_or_messages(row.columns, names.prompt, place)
    reply = text_or_messages(row.columns, name, place)
    if isinstance(given, str):
        if isinstance(reply, str):
            return given, reply
        given = [{"role": "user", "content": given}]
    prompt = _as_prompt(given, names.prompt, place)
    if isinstance(reply, str):
        return prompt, Chat.completion([{"role": ASSISTANT, "content": reply}], place=place)
    if reply[: len(given)] == given:
        reply = reply[len(given) :]
    if not reply or reply[0]["role"] != ASSISTANT:
        raise UserError(f"{place}: column {name!r}: the first message must be the {ASSISTANT}'s")
    return prompt, Chat.completion(reply, place=place)


def _as_prompt(given: str | list[Message], name: str, place: str) -> str:
    if isinstance(given, str):
        return given
    if given[-1]["role"] == ASSISTANT:
        raise UserError(
            f"{place}: column {name!r}: the last message is the {ASSISTANT}'s; there is nothing to answer"
        )
    return Chat.prompt(given, place=place)


def _conversation(messages: list[Message], row: Row) -> tuple[Chat, Chat]:
    """A conversation, cut before the assistant's first answer; a greeting of its own is given."""
    start = next((i for i, message in enumerate(messages) if message["role"] == ASSISTANT and i > 0), None)
    if start is None:
        raise UserError(
            f"{row.place}: no message of the {ASSISTANT!r} answers another; there is nothing to learn from"
        )
    return Chat.prompt(messages[:start], place=row.place), Chat.completion(messages[start:], place=row.place)


def _alone(value: Any, name: str, place: str) -> tuple[str, str]:
    """A completion that brings its prompt: a conversation or transcript up to its last reply; else no prompt."""
    if is_conversation(value):
        messages = read_messages(value, name, place)
        if messages[-1]["role"] != ASSISTANT or len(messages) < 2:
            raise UserError(
                f"{place}: column {name!r}: the last message must be the {ASSISTANT}'s answer to another"
            )
        prompt = _as_prompt(messages[:-1], name, place)
        return prompt, Chat.completion(messages[-1:], place=place)
    text = text_column({name: value}, name, place)
    end = text.rfind(_REPLY) + len(_REPLY) if is_transcript(text) else 0
    return text[:end], text[end:]


# ---------------------------------------------------------------- small columns


def _margin(columns: Mapping[str, Any], names: ColumnNames, place: str) -> float | None:
    if columns.get(names.margin) is not None:
        return number_column(columns, names.margin, place)
    if columns.get(names.score_chosen) is None or columns.get(names.score_rejected) is None:
        return None
    return number_column(columns, names.score_chosen, place) - number_column(columns, names.score_rejected, place)


def _flag(columns: Mapping[str, Any], name: str, place: str) -> bool:
    value = columns[name]
    if isinstance(value, bool) or (isinstance(value, int | float) and value in (0, 1)):
        return bool(value)
    raise UserError(f"{place}: column {name!r} is {str(value)[:40]!r}; it must be true or false")


def _blank(text: str) -> bool:
    """Whether nothing was answered; of a conversation, whether all answers are empty."""
    if isinstance(text, Chat):
        return not any(message["content"].strip() for message in text.messages if message["role"] == ASSISTANT)
    return not text.strip()


def _same(chosen: str, rejected: str) -> bool:
    if isinstance(chosen, Chat) and isinstance(rejected, Chat):
        return chosen.messages == rejected.messages
    return chosen == rejected
