"""Files of scored texts: what a row may be, and one line for each row that cannot be used."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from experiment.errors import UserError
from llm_rlhf.tasks.examples import Piece
from llm_rlhf.tasks.scored import ScoredConfig
from llm_rlhf.tasks.task import Task, TaskConfig, build_task

SAID = {"role": "assistant", "content": "hi"}
ASKED = {"role": "user", "content": "hello"}


def good_rows() -> list[dict[str, Any]]:
    return [
        {"prompt": f"q{i}", "completion": f"{word}{i}", "reward": reward}
        for i in range(20)
        for word, reward in (("good", 1), ("bad", -0.5))
    ]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path, rows: list[Any], **settings: Any) -> Task:
    return build_task(TaskConfig(name="scored", data=write(path, rows), scored=ScoredConfig(**settings)))


def test_prompts_and_completions(tmp_path: Path) -> None:
    task = read(tmp_path / "rows.jsonl", good_rows())
    assert {len(split) for split in task.splits.values()} == {1, 2}
    assert len(task.train) == 17
    assert len(task.logged) == len(task.demonstrations) == 34
    trained = {text[0].text for text in task.logged}
    held_out = {example.prompt for split in task.splits.values() for example in split}
    assert not trained & held_out
    assert all(len(text) == 2 and text[0].reward is None for text in task.logged)
    assert {text[1].reward for text in task.logged} == {1.0, -0.5}
    assert set("qgodba0123456789") == set(task.alphabet)


def test_parquet_says_the_same(tmp_path: Path) -> None:
    """Its columns and fields are there in every row, null where nobody wrote them."""
    rows = [
        *good_rows(),
        {"messages": [ASKED, {**SAID, "reward": 0.25}, ASKED, SAID]},
        {"messages": [ASKED, SAID], "reward": 2},
    ]
    columns = {name: [row.get(name) for row in rows] for name in ("prompt", "completion", "messages", "reward")}
    parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    table = build_task(TaskConfig(name="scored", data=str(tmp_path / "rows.parquet")))
    lines = read(tmp_path / "rows.jsonl", rows)
    assert table.logged == lines.logged
    assert [example.prompt for example in table.train] == [example.prompt for example in lines.train]


def test_the_reward_that_knows_the_file(tmp_path: Path) -> None:
    rows = [*good_rows(), {"prompt": "q3", "completion": "good3", "reward": 0.0}]
    task = read(tmp_path / "rows.jsonl", rows)
    logged = task.rewards["logged"]
    assert list(logged(prompts=["q3", "q4", "q4"], completions=["good3", "bad4", "new"])) == [0.5, -0.5, None]
    own = read(tmp_path / "rows.jsonl", rows, judge="own.py:judge")
    assert own.gold == {"own.py:judge": 1.0}


def test_conversations_alternate_given_and_chosen(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "be kind"},
        ASKED,
        {**SAID, "reward": 0.25},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "so long"},
        {"role": "user", "content": "unheard"},
    ]
    rows = [{"messages": messages, "reward": 1}, {"messages": [ASKED, SAID], "reward": 0}, *good_rows()]
    task = build_task(TaskConfig(name="scored", data=write(tmp_path / "rows.jsonl", rows), seed=1))
    expected = [
        Piece("system: be kind\nuser: hello\nassistant: ", None),
        Piece("hi", 0.25),
        Piece("\nuser: bye\nassistant: ", None),
        Piece("so long", 1.0),
    ]
    assert expected in [list(text) for text in task.logged]
    assert "unheard" not in json.dumps([[piece.text for piece in text] for text in task.logged])


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "a", "completion": "b"}, r"column 'reward' is missing \(there is prompt, completion\)"),
        ({"prompt": "a", "completion": "b", "reward": float("nan")}, "column 'reward' is nan; a finite number"),
        ({"prompt": "a", "completion": "b", "reward": float("-inf")}, "column 'reward' is -inf; a finite"),
        ({"prompt": "a", "completion": "b", "reward": 10**400}, "column 'reward' is inf; a finite"),
        ({"prompt": "a", "completion": "b", "reward": "1"}, "column 'reward' is str, not a number"),
        ({"prompt": "a", "completion": "b", "reward": True}, "column 'reward' is bool, not a number"),
        ({"prompt": "a", "completion": "b", "reward": None}, "column 'reward' is NoneType, not a number"),
        ({"prompt": "a", "completion": "", "reward": 1}, "column 'completion' is empty"),
        ({"prompt": "a", "reward": 1}, "column 'completion' is missing"),
        ({"prompt": "a\ud800", "completion": "b", "reward": 1}, "column 'prompt' holds half of a character"),
        ({"messages": "hello", "reward": 1}, "column 'messages' must be a list"),
        ({"messages": [ASKED], "reward": 1}, "no message has the role 'assistant'"),
        ({"messages": [ASKED, SAID]}, "neither the row nor a message has a 'reward'"),
        ({"messages": [ASKED, {"role": "assistant", "content": ""}], "reward": 1}, "message 2: .* is empty"),
        ({"messages": [{"content": "x"}, SAID], "reward": 1}, "message 1: column 'role' is missing"),
        ({"messages": [ASKED, {**SAID, "reward": float("nan")}]}, "message 2: column 'reward' is nan"),
        ([1, 2], "expected a JSON object, got list"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"rows\.jsonl:3: {message}"):
        read(tmp_path / "rows.jsonl", [*good_rows()[:2], row, *good_rows()[2:]])


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"prompt": "a", "completion"', "not valid JSON"),
        (b'{"prompt": "a", "completion": "\xff\xfe", "reward": 1}', "not UTF-8 text"),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, good_rows()[:2])
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(UserError, match=rf"rows\.jsonl:3: {message}"):
        build_task(TaskConfig(name="scored", data=str(path)))


def test_missing_and_short_files_are_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task\.data"):
        build_task(TaskConfig(name="scored"))
    with pytest.raises(UserError, match="no such file"):
        build_task(TaskConfig(name="scored", data=str(tmp_path / "none.jsonl")))
    with pytest.raises(UserError, match="0 different prompts are too few"):
        read(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match="shares"):
        ScoredConfig(test=1.0)
    with pytest.raises(ValueError, match="max_new_tokens"):
        ScoredConfig(max_new_tokens=0)
