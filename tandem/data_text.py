"""`tandem data validate` for texts: what kind of data a file holds, and every row that cannot be used."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiment.errors import UserError, user_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llm_rlhf.data.columns import ColumnNames
    from llm_rlhf.data.files import Row
    from llm_rlhf.data.records import Comparison, Feedback
    from llm_rlhf.rewards.process_reward import Solution
    from llm_rlhf.tasks.examples import Example

_MOST_PROBLEMS = 100
REWARD, STEPS, LABELS = "reward", "steps", "labels"
"""Columns of scored texts (llm/ilql; in rows or in the assistant's messages) and of solutions in steps
(llm/process_reward); `ColumnNames` has the others."""
STEPWISE, _TRL_STEPS = "stepwise supervision", "completions"
_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")


@dataclass
class Report:
    """What was found; `lengths` and `tokens` of each column, in characters and tokens; `kinds`: rows by type.

    columns     every name that a row has a column of
    unknown     the column names of rows of no known type -> where the first of them is, and how many there are
    rewarded    rows with a reward; unrewarded: places of rows that could have one and do not
    labels      of steps: how many are right, wrong (below 0.5) and null
    in_part     rows of which the chat template leaves out a part of what the assistant says, such as its thoughts
    """

    rows: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, list[int]] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    prompts: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    conversations: int = 0
    ties: int = 0
    margins: int = 0
    thumbs_up: int = 0
    columns: dict[str, None] = field(default_factory=dict)
    unknown: dict[str, tuple[str, int]] = field(default_factory=dict)
    rewarded: int = 0
    unrewarded: list[str] = field(default_factory=list)
    labels: Counter[str] = field(default_factory=Counter)
    in_part: int = 0


def is_text(path: str | Path) -> bool:
    """Whether a path is for this command: a jsonl, json or parquet file, a folder of them, or one of `datasets`.

    Robots' data sets lie in folders with `meta/` or are hdf5, so none of them is.
    """
    from llm_rlhf.data.files import SUFFIXES

    place = Path(path)
    if place.is_dir():
        names = [entry.name for entry in place.iterdir() if entry.is_file()]
        return not (place / "meta").is_dir() and any(name.endswith((*SUFFIXES, *_SAVED)) for name in names)
    return place.name.endswith(SUFFIXES)


def arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments beside the path."""
    texts = parser.add_argument_group("of texts")
    texts.add_argument("--tokenizer", metavar="FOLDER", help="count tokens too, and look for special ones in texts")
    texts.add_argument(
        "--columns",
        default="",
        metavar="A=B,...",
        help="what they are called here, such as chosen=winner; what is named must be there, as reward=reward",
    )


def validate(options: argparse.Namespace) -> int:
    """Print what the data are and every problem on a line; exit code 1 if there is one."""
    report = examine(
        options.path, tokenizer=getattr(options, "tokenizer", None), columns=getattr(options, "columns", "")
    )
    for problem in report.problems[:_MOST_PROBLEMS]:
        print(problem)
    if len(report.problems) > _MOST_PROBLEMS:
        print(f"and {len(report.problems) - _MOST_PROBLEMS} more")
    for line in describe(report):
        print(line)
    found = len(report.problems)
    print(f"{report.rows} rows checked: {found or 'no'} problem{'' if found == 1 else 's'}")
    return 1 if found else 0


def examine(path: str | Path, *, tokenizer: str | None = None, columns: str = "") -> Report:
    """Read every row as training would.

    tokenizer   a folder or hub name; None counts characters only
    columns     "prompt=question,chosen=winner"

    What is wrong with a row, and a file that breaks off, goes into `problems`. Raises UserError for a path, a
    tokenizer or a column name that there is not.
    """
    from llm_rlhf.data.files import read_rows
    from llm_rlhf.models.tokenizer import load_tokenizer

    given = given_names(columns)
    names, reward = column_names(columns), given.get(REWARD, REWARD)
    words = None if tokenizer is None else load_tokenizer(tokenizer)
    if not Path(path).exists():
        raise UserError(f"{path}: no such file or folder")
    report = Report()
    seen: set[int] = set()
    first: str | None = None
    steps: StepsNames | None = None
    rows = read_rows(path)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            break
        except UserError as error:  # nothing can be read behind this
            report.problems.append(str(error))
            break
        report.rows += 1
        report.columns.update(dict.fromkeys(row.columns))
        spelled = steps or StepsNames.of(row.columns, given)
        kind = _kind(row.columns, names, spelled)
        if kind is None:
            there = ", ".join(row.columns) or "no column"
            place, count = report.unknown.get(there, (row.place, 0))
            report.unknown[there] = place, count + 1
            continue
        report.kinds[kind] += 1
        first = first or kind
        steps = spelled if kind == STEPWISE else steps
        if kind != first:
            report.problems.append(f"{row.place}: this row is {kind}, the first one {first}")
        try:
            record = _read(row, kind, names, spelled)
            _count_reward(report, row, kind, names, reward)
            if isinstance(record, str):
                report.left_out[record] += 1
                if record not in ("thumbs down",):
                    report.problems.append(f"{row.place}: {_SAYS[record]}")
                continue
            _count(report, record, row, words, seen)
        except UserError as error:
            report.problems.append(str(error))
    if report.rows == 0 and not report.problems:
        report.problems.append(f"{path}: there are no rows")
    report.problems += _of_the_whole(report, given, reward)
    return report


@dataclass(frozen=True)
class StepsNames:
    """What the columns of solutions in steps are called; said: whether the user did say it of the steps."""

    steps: str
    labels: str
    said: bool

    @classmethod
    def of(cls, columns: Mapping[str, Any], given: Mapping[str, str]) -> StepsNames:
        """As the user said, else as the recipe has it, or TRL, whichever is there."""
        known = STEPS if columns.get(STEPS) is not None else _TRL_STEPS
        return cls(given.get(STEPS, known), given.get(LABELS, LABELS), STEPS in given)


def _kind(columns: Mapping[str, Any], names: ColumnNames, spelled: StepsNames) -> str | None:
    """The type of a row. One of steps, which most recipes read as a prompt, is told apart here alone."""
    from llm_rlhf.data.columns import kind_of

    kind = kind_of(columns, names)
    needed = (spelled.steps,) if spelled.said else (spelled.steps, spelled.labels)
    stepwise = all(columns.get(name) is not None for name in needed)
    return STEPWISE if kind in (None, "prompt-only") and stepwise else kind


def _of_the_whole(report: Report, given: Mapping[str, str], reward: str) -> Iterator[str]:
    """Problems that only show when every row was read."""
    for there, (place, count) in report.unknown.items():
        more = f", and {count - 1:,} more rows like it" if count > 1 else ""
        yield (
            f"{place}: no known column type (there is {there}){more}; say what the columns are called here with "
            "--columns, such as --columns prompt=question,completion=answer"
        )
    there = ", ".join(report.columns)
    for kind, name in given.items():
        found = report.rewarded if kind == REWARD else name in report.columns
        if report.rows and not found:
            yield f"--columns {kind}={name}: no row has a column {name!r} (there is {there or 'no column'})"
    if report.rewarded:
        for place in report.unrewarded:
            yield f"{place}: it has no {reward!r}, and {report.rewarded:,} other rows have one"


def _count_reward(report: Report, row: Row, kind: str, names: ColumnNames, reward: str) -> None:
    """A reward as llm/ilql reads it: a finite number of the row, or of some of the assistant's messages."""
    from llm_rlhf.data.chat import ASSISTANT
    from llm_rlhf.data.files import number_column

    messages = row.columns.get(names.messages)
    if kind not in ("prompt-completion", "language modeling") or (kind == "language modeling" and messages is None):
        return
    places = [(row.columns, row.place)]
    if kind == "language modeling":
        said = [
            (message, f"{row.place}: message {number}") for number, message in enumerate(messages or [], start=1)
        ]
        places += [(message, place) for message, place in said if message["role"] == ASSISTANT]
    scored = [(columns, place) for columns, place in places if columns.get(reward) is not None]
    if not scored:
        report.unrewarded.append(row.place)
        return
    report.rewarded += 1
    for columns, place in scored:
        number_column(columns, reward, place)


_SAYS = {
    "equal answers": "both answers are the same, so they say nothing",
    "empty answers": "an answer is empty",
    "no common prompt": "the two answers have no question in common",
}


def column_names(text: str) -> ColumnNames:
    """ColumnNames out of "prompt=question,chosen=winner".

    Raises UserError for a kind that there is not, or two of one name.
    """
    from llm_rlhf.data.columns import ColumnNames

    with user_errors(f"--columns {text}"):
        return ColumnNames(
            **{kind: name for kind, name in given_names(text).items() if kind not in (REWARD, STEPS, LABELS)}
        )


def given_names(text: str) -> dict[str, str]:
    """Kind -> name out of "prompt=question,reward=score". Raises UserError for a kind that there is not."""
    from dataclasses import fields

    from llm_rlhf.data.columns import ColumnNames

    known = [*(one.name for one in fields(ColumnNames)), REWARD, STEPS, LABELS]
    given: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        kind, equals, name = part.partition("=")
        if kind not in known or not equals or not name:
            raise UserError(f"--columns {part}: write KIND=NAME, where KIND is one of {', '.join(known)}")
        given[kind] = name
    return given


def describe(report: Report) -> list[str]:
    """What the data are, a line each."""
    lines = [f"type       {', '.join(f'{kind} ({count:,} rows)' for kind, count in report.kinds.most_common())}"]
    if not report.kinds:
        return []
    if report.conversations:
        lines.append(f"           conversational in {report.conversations:,} rows")
    if report.in_part:
        lines.append(
            f"           the chat template leaves out a part of what the assistant says in {report.in_part:,} rows"
        )
    if report.labels:
        counted = ", ".join(f"{report.labels[name]:,} {name}" for name in ("right", "wrong", "null"))
        lines.append(f"steps      {report.labels.total():,}, of their labels {counted}")
    if report.kinds[STEPWISE] and STEPS not in report.columns and _TRL_STEPS in report.columns:
        lines.append(f"           for llm/process_reward, say steps.steps={_TRL_STEPS}")
    if report.prompts:
        most = max(report.prompts.values())
        lines.append(f"prompts    {len(report.prompts):,} different, up to {most} rows of one")
    for unit, found in (("characters", report.lengths), ("tokens", report.tokens)):
        for name, lengths in found.items():
            middle, high, top = _quantiles(lengths)
            lines.append(f"{name:<10} {middle:,} {unit} in the middle, 95% up to {high:,}, at most {top:,}")
    notes = {
        "duplicate rows": report.duplicates,
        "ties": report.ties,
        "margins": report.margins,
        "thumbs up": report.thumbs_up,
        "rewards": report.rewarded,
    }
    return lines + [f"{name:<10} {count:,} of {report.rows:,} rows" for name, count in notes.items() if count]


def _read(
    row: Row, kind: str, names: ColumnNames, spelled: StepsNames
) -> Comparison | Feedback | Example | Solution | str:
    from llm_rlhf.data import columns

    if kind == STEPWISE:
        from llm_rlhf.rewards.process_reward import StepsConfig, read_solution

        config = StepsConfig(prompt=names.prompt, steps=spelled.steps, labels=spelled.labels)
        return read_solution(dict(row.columns), config, row.place)
    if kind == "preference":
        return columns.read_comparison(row, names)
    if kind == "unpaired preference":
        return columns.read_feedback_row(row, names)
    if kind == "prompt-only":
        return columns.read_prompt(row, names)
    example = columns.read_demonstration(row, names)
    return columns.EMPTY if not isinstance(example, str) and not example.completion.strip() else example


def _count(
    report: Report,
    record: Comparison | Feedback | Example | Solution,
    row: Row,
    words: PreTrainedTokenizerBase | None,
    seen: set[int],
) -> None:
    """Lengths, prompts, duplicates and special tokens of a row that can be used."""
    from llm_rlhf.data.chat import Chat
    from llm_rlhf.data.records import Comparison, Feedback

    texts = dict(_texts(record))
    verdicts = (getattr(record, name, None) for name in ("desirable", "tied", "labels"))
    mark = hash((*texts.items(), *verdicts))
    report.duplicates += mark in seen
    seen.add(mark)
    report.prompts[record.prompt] += 1
    report.conversations += isinstance(record.prompt, Chat)
    for name, text in texts.items():
        report.lengths.setdefault(name, []).append(len(text))
    if isinstance(record, Comparison):
        report.ties += record.tied
        report.margins += record.margin is not None
        if not record.tied and (record.margin or 0.0) < 0:
            report.problems.append(f"{row.place}: the rejected answer scores more than the chosen one")
    elif isinstance(record, Feedback):
        report.thumbs_up += record.desirable
    for label in getattr(record, "labels", ()):
        report.labels["null" if label is None else "right" if label >= 0.5 else "wrong"] += 1
    if words is None:
        return
    from llm_rlhf.data.texts import encode, encode_prompts

    (prompt,) = encode_prompts(words, [record.prompt])
    replies = {name: encode(words, record.prompt, text) for name, text in texts.items() if name != "prompt"}
    report.in_part += any(reply.in_part for reply in replies.values())
    for name, text in texts.items():
        report.tokens.setdefault(name, []).append(len(replies[name].completion if name in replies else prompt))
        special = next((token for token in words.all_special_tokens if token in text), None)
        if special is not None:
            report.problems.append(f"{row.place}: {name}: the text {special!r} would become a special token")


def _texts(record: Comparison | Feedback | Example | Solution) -> Iterator[tuple[str, str]]:
    for name in ("prompt", "completion", "chosen", "rejected"):
        text = getattr(record, name, "")
        if text:
            yield name, text
    if hasattr(record, "steps"):
        yield "solution", "\n".join(record.steps)


def _quantiles(lengths: Sequence[int]) -> tuple[int, int, int]:
    """Median, 95th percentile and maximum."""
    ordered: Any = sorted(lengths)
    last = len(ordered) - 1
    return ordered[last // 2], ordered[round(0.95 * last)], ordered[last]
