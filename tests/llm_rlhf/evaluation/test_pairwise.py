"""AlpacaEval, Arena-Hard and MT-Bench: files as published, answers turn by turn, judged against a reference."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from experiment.errors import UserError
from llm_rlhf.evaluation.benchmarks.pairwise import (
    Question,
    answer,
    compare,
    read_alpaca_eval,
    read_model_answers,
    read_questions,
)
from llm_rlhf.evaluation.subject import Decoding, Subject
from llm_rlhf.evaluation.win_rate import one_by_one


def lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_alpaca_eval(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Say hi", "output": "hi", "generator": "davinci", "dataset": "helpful_base"},
        {"instruction": "Say no", "output": "no", "generator": "davinci", "dataset": "koala"},
    ]
    (tmp_path / "reference.json").write_text(json.dumps(rows))
    questions, answers = read_alpaca_eval(tmp_path / "reference.json")
    assert questions[1] == Question("Say no", ("Say no",), "koala")
    assert answers == {"Say hi": ("hi",), "Say no": ("no",)}
    (tmp_path / "bad.json").write_text(json.dumps([{"prompt": "x"}]))
    with pytest.raises(UserError, match=r"bad\.json: row 1: column 'instruction' is missing"):
        read_alpaca_eval(tmp_path / "bad.json")


def test_arena_hard_of_both_versions(tmp_path: Path) -> None:
    first = {
        "question_id": "ab12",
        "category": "arena-hard-v0.1",
        "cluster": "Maths",
        "turns": [{"content": "1+1?"}],
    }
    second = {"uid": "cd34", "category": "hard_prompt", "subcategory": "coding", "prompt": "Write it"}
    questions = read_questions(lines(tmp_path / "question.jsonl", [first, second]))
    assert questions == [Question("ab12", ("1+1?",), "Maths"), Question("cd34", ("Write it",), "coding")]
    old = {
        "question_id": "ab12",
        "answer_id": "x",
        "model_id": "m",
        "choices": [{"index": 0, "turns": [{"content": "2"}]}],
    }
    new = {
        "uid": "cd34",
        "ans_id": "y",
        "model": "m",
        "messages": [{"role": "user", "content": "Write it"}, {"role": "assistant", "content": {"answer": "done"}}],
    }
    assert read_model_answers(lines(tmp_path / "m.jsonl", [old, new])) == {"ab12": ("2",), "cd34": ("done",)}


def test_mt_bench(tmp_path: Path) -> None:
    rows = [{"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite."], "reference": ["a", "b"]}]
    assert read_questions(lines(tmp_path / "q.jsonl", rows)) == [Question("81", ("Write.", "Rewrite."), "writing")]
    answers = [{"question_id": 81, "model_id": "m", "choices": [{"index": 0, "turns": ["one", "two"]}]}]
    assert read_model_answers(lines(tmp_path / "a.jsonl", answers)) == {"81": ("one", "two")}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"turns": ["a"]}, "column 'question_id' .* is missing"),
        ({"question_id": 1, "turns": []}, "expected a column 'prompt', or 'turns' as a list of texts"),
        ({"question_id": 1, "turns": [1]}, "expected a column 'prompt', or 'turns'"),
    ],
)
def test_bad_questions(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"q\.jsonl:1: {message}"):
        read_questions(lines(tmp_path / "q.jsonl", [row]))
    with pytest.raises(UserError, match=r"a\.jsonl:1: no answer: expected choices"):
        read_model_answers(lines(tmp_path / "a.jsonl", [{"question_id": 1, "choices": []}]))


@pytest.mark.parametrize("chat", [True, False])
def test_later_turns_see_the_models_own_answers(make_subject: Callable[..., Subject], chat: bool) -> None:
    subject = make_subject(context=128, chat=chat)
    decoding = Decoding(max_new_tokens=5)
    questions = [Question("1", ("hi", "and?")), Question("2", ("yo",))]
    found = answer(subject, questions, decoding)
    first = subject.complete(["hi"], decoding)[0][0]
    talk = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "and?"},
    ]
    assert found["1"] == (first, subject.complete([talk], decoding)[0][0])
    assert found["2"] == (subject.complete(["yo"], decoding)[0][0],)


def test_comparing_with_a_reference() -> None:
    """The judge takes the longer: turn 1 is won, turn 2 lost, the other question won: 0.5 and 1."""
    shown: list[tuple[str, str, str]] = []

    def longer(prompt: str, a: str, b: str) -> str:
        shown.append((prompt, a, b))
        return "tie" if len(a) == len(b) else "a" if len(a) > len(b) else "b"

    questions = [Question("1", ("x", "y"), "writing"), Question("2", ("z",), "maths")]
    ours = {"1": ("long", "s"), "2": ("longer",)}
    theirs = {"1": ("no", "much longer"), "2": ("same",)}
    result = compare(questions, ours, theirs, one_by_one(longer, "longer"), source="ref.jsonl")
    assert result.figures()["win_rate"] == 0.75
    assert result.counts["win_rate_by"] == {"maths": 1.0, "turn_1": 1.0, "turn_2": 0.0, "writing": 0.5}
    assert ("x\n\ny", "long\n\ns", "no\n\nmuch longer") in shown
    assert [(row["question"], row["turn"], row["verdict"]) for row in result.rows] == [
        ("1", 1, "a"),
        ("1", 2, "b"),
        ("2", 1, "a"),
    ]
    with pytest.raises(UserError, match=r"ref\.jsonl: no answer to all turns of question '1'"):
        compare(questions, ours, {"1": ("one",)}, one_by_one(longer, "longer"), source="ref.jsonl")
