"""Multiple choice by log-likelihood: MMLU (Hendrycks 2021, 2009.03300) and TruthfulQA (Lin 2022, 2109.07958).

The model chooses the option that it finds likeliest after the question: by the option's log-probability
(`accuracy`) and by that over its bytes, so that long options are not put at a disadvantage (`accuracy_normalised`).
Options that are exactly as likely share the point.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiment.errors import UserError
from llm_rlhf.data.files import Row, read_rows, text_column
from llm_rlhf.evaluation.results import Measure, Result
from llm_rlhf.evaluation.subject import Likelihood, Subject

LETTERS = "ABCD"
Style = Literal["letters", "text"]


@dataclass(frozen=True)
class ChoiceItem:
    """question; options; right: the number of the right one; subject: of the question, "" where there are none."""

    question: str
    options: tuple[str, ...]
    right: int
    subject: str = ""


@dataclass(frozen=True)
class TruthfulItem:
    """A question with the two sets of answers of the multiple-choice task: (answer, whether it is true)."""

    question: str
    mc1: tuple[tuple[str, bool], ...]
    mc2: tuple[tuple[str, bool], ...]


# ---------------------------------------------------------------- MMLU


def read_mmlu(path: str | Path) -> list[ChoiceItem]:
    """A csv file of MMLU, or a folder of them (its `test/`): question, A, B, C, D, answer (a letter).

    As published the files have no header; one with these names (and perhaps `subject`) is understood too. The
    subject is the file's name without `_test`, `_dev` or `_val`. Raises UserError naming file and line.
    """
    source = Path(path)
    if source.is_dir():
        files = sorted(source.glob("*.csv"))
        if not files:
            raise UserError(f"{path}: there are no csv files in this folder; give MMLU's `test` folder or one file")
        return [item for file in files for item in read_mmlu(file)]
    subject = source.stem
    for ending in ("_test", "_dev", "_val"):
        subject = subject.removesuffix(ending)
    items: list[ChoiceItem] = []
    names = ["question", *LETTERS.lower(), "answer"]
    try:
        with source.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            for cells in reader:
                place = f"{path}:{reader.line_num}"
                lowered = [cell.strip().lower() for cell in cells]
                if not items and set(names) - {"question"} <= set(lowered):
                    names = lowered
                elif cells:
                    items.append(_mmlu_item(cells, names, subject, place))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a csv file in UTF-8: {error}") from error
    if not items:
        raise UserError(f"{path}: there are no questions in it")
    return items


def _mmlu_item(values: Sequence[str], names: Sequence[str], subject: str, place: str) -> ChoiceItem:
    if len(values) != len(names) or "question" not in names:
        raise UserError(f"{place}: expected the {len(names)} columns {', '.join(names)}, got {len(values)}")
    cells = dict(zip(names, values, strict=True))
    letter = cells["answer"].strip().upper()
    if len(letter) != 1 or letter not in LETTERS:
        raise UserError(f"{place}: column 'answer' is {cells['answer']!r}, not one of A, B, C, D")
    options = tuple(cells[name.lower()] for name in LETTERS)
    return ChoiceItem(cells["question"], options, LETTERS.index(letter), cells.get("subject") or subject)


def mmlu_prompt(item: ChoiceItem, shots: Sequence[ChoiceItem], style: Style) -> str:
    """The question as the paper asks it (letters), or alone (text), after worked examples of its subject."""
    if style == "text":
        head = "".join(f"Question: {shot.question}\nAnswer: {shot.options[shot.right]}\n\n" for shot in shots)
        return f"{head}Question: {item.question}\nAnswer:"
    about = f" about {item.subject.replace('_', ' ')}" if item.subject else ""
    head = f"The following are multiple choice questions (with answers){about}.\n\n"
    return head + "".join(f"{_lettered(shot)} {LETTERS[shot.right]}\n\n" for shot in shots) + _lettered(item)


def _lettered(item: ChoiceItem) -> str:
    lines = "".join(f"{letter}. {option}\n" for letter, option in zip(LETTERS, item.options, strict=True))
    return f"{item.question.strip()}\n{lines}Answer:"


def ask_mmlu(
    subject: Subject, items: Sequence[ChoiceItem], *, shots: Sequence[ChoiceItem] = (), style: Style = "letters"
) -> list[list[Likelihood]]:
    """The likelihood of every option of every item; of the shots, those of the item's subject are shown."""
    pairs = []
    for item in items:
        prompt = mmlu_prompt(item, [shot for shot in shots if shot.subject == item.subject], style)
        answers = list(LETTERS) if style == "letters" else list(item.options)
        pairs += [(prompt, f" {answer}") for answer in answers]
    return _folded(subject.likelihoods(pairs), [len(item.options) for item in items])


def score_mmlu(items: Sequence[ChoiceItem], found: Sequence[Sequence[Likelihood]]) -> Result:
    """Accuracy over questions, and by subject where there are several."""
    plain, normalised, rows = [], [], []
    for item, options in zip(items, found, strict=True):
        plain.append(credit([option.log_prob for option in options], {item.right}))
        normalised.append(credit([option.per_byte for option in options], {item.right}))
        rows.append(
            {
                "question": item.question,
                "options": list(item.options),
                "right": item.right,
                "log_probs": [option.log_prob for option in options],
                "accuracy": plain[-1],
            }
        )
    counts: dict[str, Any] = {"questions": len(items)}
    subjects = sorted({item.subject for item in items})
    if len(subjects) > 1:
        of = {
            name: [point for item, point in zip(items, plain, strict=True) if item.subject == name]
            for name in subjects
        }
        counts["accuracy_by_subject"] = {name: sum(found) / len(found) for name, found in of.items()}
    return Result({"accuracy": Measure(plain), "accuracy_normalised": Measure(normalised)}, counts, rows=rows)


# ---------------------------------------------------------------- TruthfulQA


def read_truthfulqa(path: str | Path) -> list[TruthfulItem]:
    """TruthfulQA's multiple-choice file: question, mc1_targets, mc2_targets.

    The targets are {answer: 0 or 1}, as in the authors' mc_task.json, or {choices: [...], labels: [...]}.
    Raises UserError naming the row.
    """
    items = []
    for row in read_rows(path):
        question = text_column(row.columns, "question", row.place)
        mc1, mc2 = (_targets(row, name) for name in ("mc1_targets", "mc2_targets"))
        if sum(true for _, true in mc1) != 1:
            raise UserError(f"{row.place}: column 'mc1_targets' must have exactly one true answer")
        if not any(true for _, true in mc2) or all(true for _, true in mc2):
            raise UserError(f"{row.place}: column 'mc2_targets' needs both true and false answers")
        items.append(TruthfulItem(question, mc1, mc2))
    if not items:
        raise UserError(f"{path}: there are no questions in it")
    return items


def _targets(row: Row, name: str) -> tuple[tuple[str, bool], ...]:
    value = row.columns.get(name)
    pairs: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping) and set(value) == {"choices", "labels"}:
        choices, labels = value["choices"], value["labels"]
        if isinstance(choices, list) and isinstance(labels, list) and len(choices) == len(labels):
            pairs = list(zip(choices, labels, strict=True))
    elif isinstance(value, Mapping):
        pairs = list(value.items())
    if not pairs or not all(isinstance(text, str) and text and label in (0, 1) for text, label in pairs):
        raise UserError(
            f"{row.place}: column {name!r} must be {{answer: 0 or 1}} or {{choices: [texts], labels: [0 or 1]}}"
        )
    return tuple((text, bool(label)) for text, label in pairs)


def ask_truthfulqa(
    subject: Subject, items: Sequence[TruthfulItem], *, primer: str = ""
) -> list[tuple[list[Likelihood], list[Likelihood]]]:
    """The likelihoods of both sets of answers; primer: what stands before every question (worked examples)."""
    pairs, sizes = [], []
    for item in items:
        for answers in (item.mc1, item.mc2):
            pairs += [(f"{primer}Q: {item.question}\nA:", f" {text}") for text, _ in answers]
            sizes.append(len(answers))
    found = _folded(subject.likelihoods(pairs), sizes)
    return list(zip(found[::2], found[1::2], strict=True))


def score_truthfulqa(
    items: Sequence[TruthfulItem], found: Sequence[tuple[Sequence[Likelihood], Sequence[Likelihood]]]
) -> Result:
    """mc1: the true answer is the likeliest. mc2: the share of the answers' probability that lies on true ones."""
    mc1, normalised, mc2, rows = [], [], [], []
    for item, (first, second) in zip(items, found, strict=True):
        right = {number for number, (_, true) in enumerate(item.mc1) if true}
        mc1.append(credit([option.log_prob for option in first], right))
        normalised.append(credit([option.per_byte for option in first], right))
        most = max(option.log_prob for option in second)
        weights = [math.exp(option.log_prob - most) for option in second]
        true_mass = sum(weight for weight, (_, true) in zip(weights, item.mc2, strict=True) if true)
        mc2.append(true_mass / sum(weights))
        rows.append({"question": item.question, "mc1": mc1[-1], "mc2": mc2[-1]})
    measures = {"mc1": Measure(mc1), "mc1_normalised": Measure(normalised), "mc2": Measure(mc2)}
    return Result(measures, {"questions": len(items)}, rows=rows)


# ---------------------------------------------------------------- parts


def credit(scores: Sequence[float], right: set[int]) -> float:
    """1 where the highest score is a right option's; options that are equally high share the point."""
    best = max(scores)
    chosen = [number for number, score in enumerate(scores) if score == best]
    return len(right.intersection(chosen)) / len(chosen)


def _folded(flat: Sequence[Likelihood], sizes: Sequence[int]) -> list[list[Likelihood]]:
    """A list into consecutive parts of these sizes."""
    parts, start = [], 0
    for size in sizes:
        parts.append(list(flat[start : start + size]))
        start += size
    return parts
