"""What `tandem data validate` says of texts."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from experiment.errors import UserError
from llm_rlhf.models.tokenizer import character_tokenizer
from tandem.data_text import arguments, column_names, describe, examine, is_text, validate


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    arguments(parser)
    return parser.parse_args(words)


GOOD = [{"prompt": f"q{i % 3}", "chosen": "a" * (i + 1), "rejected": "b", "margin": 1.0} for i in range(5)]


def test_a_good_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(
        tmp_path / "pairs.jsonl", [*GOOD, GOOD[0], {"prompt": "t", "chosen": "x", "rejected": "y", "tie": 1}]
    )
    assert validate(options(path)) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "type       preference (7 rows)"
    assert "prompts    4 different, up to 3 rows of one" in said
    assert "chosen     2 characters in the middle, 95% up to 5, at most 5" in said
    assert "duplicate rows 1 of 7 rows" in said
    assert "ties       1 of 7 rows" in said
    assert "margins    6 of 7 rows" in said
    assert said[-1] == "7 rows checked: no problems"


def test_every_problem_has_its_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad: list[Any] = [
        GOOD[0],
        {"prompt": "p", "chosen": "x", "rejected": "x"},
        {"prompt": "p", "chosen": "x", "rejected": ""},
        {"prompt": "p", "chosen": "x", "rejected": 3},
        {"question": "p"},
        {"prompt": "p", "completion": "c"},
        {"prompt": "p", "chosen": "x", "rejected": "y", "score_chosen": 1, "score_rejected": 2},
        {"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]},
    ]
    path = write(tmp_path / "pairs.jsonl", bad)
    assert validate(options(path)) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[:7] == [
        f"{path}:2: both answers are the same, so they say nothing",
        f"{path}:3: an answer is empty",
        f"{path}:4: column 'rejected' is int, not text",
        f"{path}:5: no known column type (there is question)",
        f"{path}:6: this row is prompt-completion, the first one preference",
        f"{path}:7: the rejected answer scores more than the chosen one",
        f"{path}:8: the two answers have no question in common",
    ]
    assert said[-1] == "8 rows checked: 7 problems"


def test_a_file_that_breaks_off(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xff"}\n')
    report = examine(file)
    assert report.problems == [f"{file}:2: not UTF-8 text"]
    assert describe(report)[0] == "type       prompt-completion (1 rows)"
    (tmp_path / "empty.jsonl").write_text("")
    assert examine(tmp_path / "empty.jsonl").problems == [f"{tmp_path}/empty.jsonl: there are no rows"]
    with pytest.raises(UserError, match="no such file or folder"):
        examine(tmp_path / "none.jsonl")


def test_other_types_are_named(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    report = examine(write(tmp_path / "chats.jsonl", [{"messages": chat}]))
    assert describe(report)[:2] == ["type       language modeling (1 rows)", "           conversational in 1 rows"]
    thumbs = [{"prompt": "p", "completion": str(i), "label": i > 0} for i in range(3)]
    lines = describe(examine(write(tmp_path / "thumbs.jsonl", thumbs)))
    assert lines[0] == "type       unpaired preference (3 rows)"
    assert "thumbs up  2 of 3 rows" in lines
    prompts = examine(write(tmp_path / "prompts.jsonl", [{"prompt": "p"}]))
    assert describe(prompts)[0] == "type       prompt-only (1 rows)"
    named = examine(write(tmp_path / "own.jsonl", [{"question": "p"}]), columns="prompt=question")
    assert not named.problems


def test_tokens_and_special_ones(tmp_path: Path) -> None:
    character_tokenizer("abq<eos>").save_pretrained(str(tmp_path / "words"))
    rows = [{"prompt": "qq", "completion": "ab"}, {"prompt": "q", "completion": "a<eos>b"}]
    path = write(tmp_path / "rows.jsonl", rows)
    report = examine(path, tokenizer=str(tmp_path / "words"))
    assert report.problems == [f"{path}:2: completion: the text '<eos>' would become a special token"]
    assert report.tokens == {"prompt": [2, 1], "completion": [3, 4]}  # each with its EOS


def test_what_is_for_this_command(tmp_path: Path) -> None:
    assert is_text(tmp_path / "a.parquet")
    assert not is_text(tmp_path / "a.hdf5")
    assert not is_text(tmp_path)
    (tmp_path / "state.json").write_text("{}")
    assert is_text(tmp_path)
    (tmp_path / "meta").mkdir()  # LeRobot's
    assert not is_text(tmp_path)
    with pytest.raises(UserError, match=r"--columns winner=chosen: write KIND=NAME, where KIND is one of prompt"):
        column_names("winner=chosen")
    assert column_names("chosen=winner, rejected=loser").chosen == "winner"
