"""GSM8K: its file, the rules that read an answer, scores."""

import json
from decimal import Decimal
from pathlib import Path

import pytest

from experiment.errors import UserError
from llm_rlhf.evaluation.benchmarks.exact_answer import (
    STOP,
    flexible_number,
    gsm8k_prompt,
    marked_number,
    read_gsm8k,
    score_gsm8k,
)
from llm_rlhf.evaluation.subject import cut_at

ROWS = [
    {"question": "How many?", "answer": "She has 48/2 = <<48/2=24>>24.\nSo 24+24 = <<24+24=48>>48.\n#### 48"},
    {"question": "How much?", "answer": "It is $1,000.\n#### 1,000"},
]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_file(tmp_path: Path) -> None:
    items = read_gsm8k(write(tmp_path / "test.jsonl", ROWS))
    assert [item.right for item in items] == [48, 1000]
    assert items[0].worked == "She has 48/2 = 24.\nSo 24+24 = 48.\n#### 48"
    assert gsm8k_prompt(items[1], items[:1]) == (
        f"Question: How many?\nAnswer: {items[0].worked}\n\nQuestion: How much?\nAnswer:"
    )
    with pytest.raises(UserError, match=r"bad\.jsonl:1: column 'answer' does not end with `#### NUMBER`"):
        read_gsm8k(write(tmp_path / "bad.jsonl", [{"question": "q", "answer": "12"}]))
    with pytest.raises(UserError, match=r"bad\.jsonl:1: column 'answer' is missing"):
        read_gsm8k(write(tmp_path / "bad.jsonl", [{"question": "q"}]))


@pytest.mark.parametrize(
    ("text", "marked", "flexible"),
    [
        ("so\n#### 18", "18", "18"),
        ("#### 5\nno wait\n#### -1,234.50", "-1234.5", "-1234.5"),
        ("#### $7", "7", "7"),
        (r"thus \boxed{42} apples, not 43", None, "42"),
        (r"\boxed{\$3.50}", None, "3.5"),
        ("The answer is 12. There are 3 left.", None, "12"),
        ("the answer is: -$8", None, "-8"),
        ("first 3, then 10-4=6.", None, "6"),
        ("from 10-4", None, "4"),  # a minus between numbers is no sign
        ("it costs 1,000,000 in 2 parts: 5", None, "5"),
        ("12,34", None, "34"),  # no thousands
        ("half is .5", None, "0.5"),
        ("no idea", None, None),
        ("#### nothing", None, None),
    ],
)
def test_reading_a_number(text: str, marked: str | None, flexible: str | None) -> None:
    assert marked_number(text) == (None if marked is None else Decimal(marked))
    assert flexible_number(text) == (None if flexible is None else Decimal(flexible))


def test_scores_by_hand(tmp_path: Path) -> None:
    items = read_gsm8k(write(tmp_path / "test.jsonl", ROWS))
    one = score_gsm8k(items, [["#### 48.0"], ["the answer is 1000"]]).figures()
    assert (one["accuracy"], one["accuracy_flexible"], one["without_number"]) == (0.5, 1.0, 0)
    assert "any_accuracy" not in one
    two = score_gsm8k(items, [["#### 48", "#### 1"], ["none", "1000"]]).figures()
    assert (two["accuracy"], two["accuracy_flexible"]) == (0.25, 0.5)
    assert (two["any_accuracy"], two["any_accuracy_flexible"]) == (0.5, 1.0)
    assert (two["samples"], two["without_number"]) == (2, 1)


def test_a_model_that_goes_on_asking_is_stopped() -> None:
    assert flexible_number(cut_at(" 4\n#### 4\n\nQuestion: and 5?\nAnswer: #### 9", STOP)) == 4
