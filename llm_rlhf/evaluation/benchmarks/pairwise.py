"""AlpacaEval, Arena-Hard and MT-Bench: open questions; a judge compares the answers with a reference model's.

The published figures come from a judge behind an API. Here the judge is pluggable (a local model's reward, a user's
function), so figures compare models judged by the same judge, never with a published table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment.errors import UserError
from llm_rlhf.data.chat import ASSISTANT, Chat
from llm_rlhf.data.files import Row, read_rows, text_column
from llm_rlhf.evaluation.results import Result
from llm_rlhf.evaluation.subject import Decoding, Message, Subject
from llm_rlhf.evaluation.win_rate import POINTS, Judge, Pair, win_rate


@dataclass(frozen=True)
class Question:
    """key: by which answers are found; turns: what the user says, one after the other; category: "" = none."""

    key: str
    turns: tuple[str, ...]
    category: str = ""


Answers = dict[str, tuple[str, ...]]
"""key -> the assistant's answer to each turn."""


# ---------------------------------------------------------------- files


def read_alpaca_eval(path: str | Path) -> tuple[list[Question], Answers]:
    """AlpacaEval's json of a model's outputs: instruction, output (and generator, dataset).

    Returns the questions and, where there are outputs, the answers. Raises UserError naming the row.
    """
    questions: dict[str, Question] = {}
    answers: Answers = {}
    for row in read_rows(path):
        instruction = text_column(row.columns, "instruction", row.place)
        questions[instruction] = Question(instruction, (instruction,), str(row.columns.get("dataset") or ""))
        if "output" in row.columns:
            answers[instruction] = (text_column(row.columns, "output", row.place),)
    return _some(list(questions.values()), path), answers


def read_questions(path: str | Path) -> list[Question]:
    """question.jsonl of Arena-Hard (v0.1: question_id, cluster, turns of {content}; v2.0: uid, prompt) and of
    MT-Bench (question_id, category, turns of texts). Raises UserError naming the line."""
    found = []
    for row in read_rows(path):
        category = row.columns.get("cluster") or row.columns.get("category") or ""
        found.append(Question(_key(row), _turns(row), str(row.columns.get("subcategory") or category)))
    return _some(found, path)


def read_model_answers(path: str | Path) -> Answers:
    """A model_answer file: choices of turns (MT-Bench, Arena-Hard v0.1) or messages (Arena-Hard v2.0).

    Raises UserError naming the line.
    """
    found: Answers = {}
    for row in read_rows(path):
        replies: Any
        if "messages" in row.columns:
            messages = row.columns["messages"]
            replies = [
                message.get("content")
                for message in (messages if isinstance(messages, list) else [])
                if isinstance(message, Mapping) and message.get("role") == "assistant"
            ]
        else:
            choices = row.columns.get("choices")
            first = choices[0] if isinstance(choices, list) and choices else None
            replies = first.get("turns") if isinstance(first, Mapping) else None
        texts = tuple(_plain(reply) for reply in replies) if isinstance(replies, list) else ()
        if not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(
                f"{row.place}: no answer: expected choices[0].turns, or messages with one of the assistant's"
            )
        found[_key(row)] = texts
    if not found:
        raise UserError(f"{path}: there are no answers in it")
    return found


def _plain(value: Any) -> Any:
    """A turn or a message's content as text: {content: ...} and {answer: ...} are unpacked."""
    if isinstance(value, Mapping):
        return _plain(value.get("content", value.get("answer")))
    return value


def _key(row: Row) -> str:
    for name in ("question_id", "uid"):
        if name in row.columns:
            return str(row.columns[name])
    raise UserError(f"{row.place}: column 'question_id' (or 'uid') is missing (there is {', '.join(row.columns)})")


def _turns(row: Row) -> tuple[str, ...]:
    if "prompt" in row.columns:
        return (text_column(row.columns, "prompt", row.place),)
    turns = row.columns.get("turns")
    texts = tuple(_plain(turn) for turn in turns) if isinstance(turns, list) else ()
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{row.place}: expected a column 'prompt', or 'turns' as a list of texts")
    return texts


def _some(questions: list[Question], path: str | Path) -> list[Question]:
    if not questions:
        raise UserError(f"{path}: there are no questions in it")
    return questions


# ---------------------------------------------------------------- asking and judging


def answer(subject: Subject, questions: Sequence[Question], decoding: Decoding) -> Answers:
    """The model's answer to every turn; later turns see its own earlier answers."""
    talks: dict[str, list[Message]] = {question.key: [] for question in questions}
    answers: dict[str, list[str]] = {question.key: [] for question in questions}
    for turn in range(max(len(question.turns) for question in questions)):
        going = [question for question in questions if turn < len(question.turns)]
        for question in going:
            talks[question.key].append({"role": "user", "content": question.turns[turn]})
        alone = not subject.chat and turn == 0  # a model that knows no conversation is given the bare text
        asked = [question.turns[0] if alone else talks[question.key] for question in going]
        for question, (text,) in zip(going, subject.complete(asked, decoding), strict=True):
            talks[question.key].append({"role": "assistant", "content": text})
            answers[question.key].append(text)
    return {key: tuple(texts) for key, texts in answers.items()}


def compare(
    questions: Sequence[Question],
    answers: Answers,
    reference: Answers,
    judge: Judge,
    *,
    source: str,
    chat: bool = False,
) -> Result:
    """Win rate over the reference's answers (questions weigh alike), by turn where there are several, by category.

    source      the reference's file, for messages
    chat        the model was asked through a chat template: the judge is given conversations (`Chat`)

    Of a later turn the judge is shown each side's own conversation. As text, the prompt is what the user said
    throughout, each answer is that side's replies up to this turn; as `Chat`, the prompt is the first question and
    each answer all that followed. Raises UserError for a question that the reference did not answer.
    """
    pairs, of = [], []
    for question in questions:
        ours, theirs = answers[question.key], reference.get(question.key, ())
        if len(theirs) < len(question.turns):
            raise UserError(f"{source}: no answer to all turns of question {question.key[:40]!r}")
        for turn in range(len(question.turns)):
            turns = question.turns[: turn + 1]
            prompt = Chat.prompt([{"role": "user", "content": turns[0]}]) if chat else "\n\n".join(turns)
            a, b = (followed(turns, side) if chat else joined(side[: turn + 1]) for side in (ours, theirs))
            pairs.append(Pair(prompt, a, b, question.key))
            of.append((question, turn))
    result = win_rate(pairs, judge)
    counts = dict(result.counts)
    names: dict[str, list[float]] = {}
    for (question, turn), row in zip(of, result.rows, strict=True):
        if row["verdict"] is None:
            continue
        if len(question.turns) > 1:
            names.setdefault(f"turn_{turn + 1}", []).append(POINTS[row["verdict"]])
        if question.category:
            names.setdefault(question.category, []).append(POINTS[row["verdict"]])
    if names:
        counts["win_rate_by"] = {name: sum(points) / len(points) for name, points in sorted(names.items())}
    rows = [
        {"question": question.key, "turn": turn + 1, **row}
        for (question, turn), row in zip(of, result.rows, strict=True)
    ]
    return Result(result.measures, counts, result.notes, rows)


def followed(turns: Sequence[str], answers: Sequence[str]) -> str:
    """What followed the first of a user's turns: one side's reply, or a conversation that begins with it."""
    if len(turns) == 1:
        return answers[0]
    messages: list[Message] = []
    for number, said in enumerate(turns):
        messages += [{"role": "user", "content": said}] if number else []
        messages.append({"role": ASSISTANT, "content": answers[number]})
    return Chat.completion(messages)


def joined(answers: Sequence[str]) -> str:
    """One side's replies as one text; a single one as it is."""
    return "\n\n".join(answers)
