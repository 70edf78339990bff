"""GSM8K (Cobbe 2021, 2110.14168): a number is asked for, the answer is right or wrong.

A worked answer ends with `#### N`. What a model writes is read by two rules, and both are reported: `accuracy`
takes the number after the last `####`; `accuracy_flexible` the one after `####`, in the last `\\boxed{...}`, behind
the last "answer is", or else the last number in the text. Numbers are compared as numbers: `1,000`, `$1000` and
`1000.00` are equal.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from experiment.errors import UserError
from llm_rlhf.data.files import read_rows, text_column
from llm_rlhf.evaluation.results import Measure, Result

NUMBER = r"(?<![\d.])(?:-?\$|\$?-)?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
MARKED = re.compile(rf"####\s*({NUMBER})")
FLEXIBLE = (
    MARKED,
    re.compile(rf"\\boxed\{{\s*\\?({NUMBER})"),
    re.compile(rf"answer\s+is\s*:?\s*\\?({NUMBER})", re.IGNORECASE),
    re.compile(rf"({NUMBER})"),
)
ANNOTATION = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class AnswerItem:
    """question; worked: the worked answer, calculator annotations taken out; right: its number."""

    question: str
    worked: str
    right: Decimal


def read_gsm8k(path: str | Path) -> list[AnswerItem]:
    """GSM8K's jsonl: question, answer, where the answer ends with `#### N`. Raises UserError naming the line."""
    items = []
    for row in read_rows(path):
        question, answer = (text_column(row.columns, name, row.place) for name in ("question", "answer"))
        right = marked_number(answer)
        if right is None:
            raise UserError(f"{row.place}: column 'answer' does not end with `#### NUMBER`")
        items.append(AnswerItem(question, ANNOTATION.sub("", answer), right))
    if not items:
        raise UserError(f"{path}: there are no questions in it")
    return items


def marked_number(text: str) -> Decimal | None:
    """The number after the last `####`; None where there is none."""
    return _last(MARKED, text)


def flexible_number(text: str) -> Decimal | None:
    """The number by the first rule that finds one; None where the text has no number."""
    return next((number for rule in FLEXIBLE if (number := _last(rule, text)) is not None), None)


def _last(rule: re.Pattern[str], text: str) -> Decimal | None:
    found = rule.findall(text)
    return _to_number(found[-1]) if found else None


def _to_number(text: str) -> Decimal:
    return Decimal(re.sub(r"[,$]", "", text))


def gsm8k_prompt(item: AnswerItem, shots: Sequence[AnswerItem]) -> str:
    """Worked examples, then the question."""
    head = "".join(f"Question: {shot.question}\nAnswer: {shot.worked}\n\n" for shot in shots)
    return f"{head}Question: {item.question}\nAnswer:"


STOP = ("\nQuestion:",)


def score_gsm8k(items: Sequence[AnswerItem], completions: Sequence[Sequence[str]]) -> Result:
    """completions: at least one of each item; accuracies are means over an item's, any_NAME: one is right."""
    by_rule: dict[str, list[list[float]]] = {"accuracy": [], "accuracy_flexible": []}
    rows = []
    for item, texts in zip(items, completions, strict=True):
        for name, read in (("accuracy", marked_number), ("accuracy_flexible", flexible_number)):
            by_rule[name].append([float(read(text) == item.right) for text in texts])
        rows.append(
            {
                "question": item.question,
                "right": str(item.right),
                "completions": list(texts),
                "accuracy": by_rule["accuracy"][-1],
                "accuracy_flexible": by_rule["accuracy_flexible"][-1],
            }
        )
    measures = {name: Measure([sum(points) / len(points) for points in found]) for name, found in by_rule.items()}
    samples = max(len(texts) for texts in completions)
    if samples > 1:
        measures |= {f"any_{name}": Measure([max(points) for points in found]) for name, found in by_rule.items()}
    unread = sum(flexible_number(text) is None for texts in completions for text in texts)
    return Result(measures, {"questions": len(items), "samples": samples, "without_number": unread}, rows=rows)
