"""MMLU and TruthfulQA: files in their published formats, scores by hand and by a tiny model."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from experiment.errors import UserError
from llm_rlhf.evaluation.benchmarks.multiple_choice import (
    ChoiceItem,
    TruthfulItem,
    ask_mmlu,
    ask_truthfulqa,
    credit,
    mmlu_prompt,
    read_mmlu,
    read_truthfulqa,
    score_mmlu,
    score_truthfulqa,
)
from llm_rlhf.evaluation.subject import Likelihood, Subject

Make = Callable[..., Subject]
CSV = """"Which is even, of these?",1,2,3,5,B
"He said ""what?"" and
left",yes,no,maybe,never,D
"""


def test_mmlu_as_published(tmp_path: Path) -> None:
    """No header, quotes and line breaks within a cell; the subject is in the file's name."""
    (tmp_path / "abstract_algebra_test.csv").write_text(CSV)
    items = read_mmlu(tmp_path / "abstract_algebra_test.csv")
    assert items[0] == ChoiceItem("Which is even, of these?", ("1", "2", "3", "5"), 1, "abstract_algebra")
    assert items[1].question == 'He said "what?" and\nleft'
    (tmp_path / "zoology_test.csv").write_text("question,A,B,C,D,answer,subject\nQ,1,2,3,4,a,animals\n")
    assert read_mmlu(tmp_path)[2:] == [ChoiceItem("Q", ("1", "2", "3", "4"), 0, "animals")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q,1,2,3,B\n", r":1: expected the 6 columns question, a, b, c, d, answer, got 5"),
        ("q,1,2,3,4,A\nq,1,2,3,4,E\n", r":2: column 'answer' is 'E', not one of A, B, C, D"),
        ("", "there are no questions"),
    ],
)
def test_bad_mmlu_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_mmlu(tmp_path / "x.csv")


def test_mmlu_is_asked_as_in_the_paper() -> None:
    item = ChoiceItem("1+1?", ("1", "2", "3", "4"), 1, "school_maths")
    assert mmlu_prompt(item, [item], "letters") == (
        "The following are multiple choice questions (with answers) about school maths.\n\n"
        "1+1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n1+1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    )
    assert mmlu_prompt(item, [item], "text") == "Question: 1+1?\nAnswer: 2\n\nQuestion: 1+1?\nAnswer:"


def test_mmlu_by_a_model(make_subject: Make) -> None:
    """The likelihoods are those of " A" to " D" after the prompt; a uniform model shares the point."""
    items = [ChoiceItem("1+1?", ("1", "2", "3", "4"), 1, "a"), ChoiceItem("2*2?", ("one", "4", "x", "y"), 1, "b")]
    subject = make_subject(context=128)
    found = ask_mmlu(subject, items)
    expected = subject.likelihoods([(mmlu_prompt(items[1], [], "letters"), f" {letter}") for letter in "ABCD"])
    assert [one.log_prob for one in found[1]] == pytest.approx([one.log_prob for one in expected], abs=1e-4)
    assert [len(options) for options in ask_mmlu(subject, items, style="text")] == [4, 4]
    assert ask_mmlu(subject, items, style="text")[1][0].size == len(" one")
    figures = score_mmlu(items, ask_mmlu(make_subject(context=128, uniform=True), items)).figures()
    assert figures["accuracy"] == 0.25
    assert figures["accuracy_by_subject"] == {"a": 0.25, "b": 0.25}


def options(*pairs: tuple[float, int]) -> list[Likelihood]:
    return [Likelihood(log_prob, 1, size) for log_prob, size in pairs]


def test_length_normalisation_by_hand() -> None:
    """The long right option loses by -4 against -3, and wins by -0.5 against -1 a byte."""
    item = ChoiceItem("q", ("long one", "abc", "x", "y"), 0)
    figures = score_mmlu([item], [options((-4.0, 8), (-3.0, 3), (-9.0, 1), (-9.0, 1))]).figures()
    assert (figures["accuracy"], figures["accuracy_normalised"]) == (0.0, 1.0)
    assert credit([1.0, 1.0, 0.0], {0}) == 0.5
    assert credit([1.0, 1.0, 0.0], {2}) == 0.0


def test_truthfulqa_in_both_formats(tmp_path: Path, make_subject: Make) -> None:
    as_lists = {"choices": ["no", "yes"], "labels": [1, 0]}
    rows = [
        {"question": "q1", "mc1_targets": as_lists, "mc2_targets": {**as_lists}},
        {"question": "q2", "mc1_targets": {"a": 0, "b": 1}, "mc2_targets": {"a": 0, "b": 1, "c": 1}},
    ]
    (tmp_path / "mc_task.json").write_text(json.dumps(rows))
    items = read_truthfulqa(tmp_path / "mc_task.json")
    assert items[0].mc1 == (("no", True), ("yes", False))
    assert items[1].mc2 == (("a", False), ("b", True), ("c", True))
    subject = make_subject()
    found = ask_truthfulqa(subject, items, primer="Q: x\nA: y\n\n")
    assert [len(second) for _, second in found] == [2, 3]
    asked = "Q: x\nA: y\n\nQ: q2\nA:"
    expected = subject.likelihoods([(asked, " a"), (asked, " b")])
    assert [one.log_prob for one in found[1][0]] == pytest.approx([one.log_prob for one in expected], abs=1e-4)


def test_truthfulqa_by_hand() -> None:
    """mc2: true answers of probability 1/8 and 1/8 against a false one of 1/4: half of the mass."""
    item = TruthfulItem("q", (("t", True), ("f", False)), (("t", True), ("u", True), ("f", False)))
    first = options((math.log(1 / 8), 1), (math.log(1 / 4), 1))
    second = options((math.log(1 / 8) - 500, 1), (math.log(1 / 8) - 500, 1), (math.log(1 / 4) - 500, 1))
    figures = score_truthfulqa([item], [(first, second)]).figures()
    assert (figures["mc1"], figures["mc2"]) == (0.0, pytest.approx(0.5))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "mc1_targets": {"a": 1, "b": 1}, "mc2_targets": {"a": 1, "b": 0}}, "exactly one true"),
        ({"question": "q", "mc1_targets": {"a": 1, "b": 0}, "mc2_targets": {"a": 1}}, "both true and false"),
        ({"question": "q", "mc1_targets": {"a": 1, "b": 0}}, "column 'mc2_targets' must be"),
        (
            {"question": "q", "mc1_targets": {"choices": ["a"], "labels": [1, 0]}, "mc2_targets": {}},
            "'mc1_targets' must",
        ),
        ({"mc1_targets": {}}, "column 'question' is missing"),
    ],
)
def test_bad_truthfulqa_rows(tmp_path: Path, row: dict[str, object], message: str) -> None:
    (tmp_path / "x.json").write_text(json.dumps([row]))
    with pytest.raises(UserError, match=rf"x\.json: row 1: .*{message}"):
        read_truthfulqa(tmp_path / "x.json")
