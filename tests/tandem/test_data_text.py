"""What `tandem data validate` says of texts."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest

from experiment.errors import UserError
from llm_rlhf.models.tokenizer import character_tokenizer
from llm_rlhf.rewards.process_reward import StepsConfig, read_solutions
from llm_rlhf.tasks.scored import ScoredConfig, build
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
        f"{path}:6: this row is prompt-completion, the first one preference",
        f"{path}:7: the rejected answer scores more than the chosen one",
        f"{path}:8: the two answers have no question in common",
        f"{path}:5: no known column type (there is question); say what the columns are called here with --columns, "
        "such as --columns prompt=question,completion=answer",
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


def test_unknown_columns_are_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": f"q{i}", "answer": "a"} for i in range(3000)]
    path = write(tmp_path / "own.jsonl", [*rows, {"other": 1}])
    assert validate(options(path)) == 1
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3
    assert said[0].startswith(
        f"{path}:1: no known column type (there is question, answer), and 2,999 more rows like it; say what"
    )
    assert "--columns prompt=question,completion=answer" in said[0]
    assert said[1].startswith(f"{path}:3001: no known column type (there is other); say")
    assert validate(options(path, "--columns", "prompt=question,completion=answer")) == 1  # the last one is left


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", GOOD)
    assert examine(path, columns="chosen=winner").problems == [
        "--columns chosen=winner: no row has a column 'winner' (there is prompt, chosen, rejected, margin)"
    ]
    assert not examine(path, columns="chosen=chosen").problems


def test_rewards_of_scored_texts(tmp_path: Path) -> None:
    """What llm/ilql would refuse: missing, null, NaN, text; of conversations, the row's and the messages'."""
    texts: list[Any] = [{"prompt": "p", "completion": str(i), "reward": 0.5} for i in range(6)]
    assert not examine(write(tmp_path / "good.jsonl", texts)).problems
    assert "rewards    6 of 6 rows" in describe(examine(tmp_path / "good.jsonl"))
    del texts[0]["reward"]
    for row, value in zip(texts[1:], (None, math.nan, "good", True), strict=False):
        row["reward"] = value
    path = write(tmp_path / "bad.jsonl", texts)
    assert examine(path).problems == [
        f"{path}:3: column 'reward' is nan; a finite number is needed (at most 1e30)",
        f"{path}:4: column 'reward' is str, not a number",
        f"{path}:5: column 'reward' is bool, not a number",
        f"{path}:1: it has no 'reward', and 4 other rows have one",
        f"{path}:2: it has no 'reward', and 4 other rows have one",
    ]
    for row, message in (
        (0, "'reward' is missing"),
        (1, "'reward' is NoneType"),
        (3, "'reward' is str, not a number"),
    ):
        with pytest.raises(UserError, match=message):
            build(ScoredConfig(), data=write(tmp_path / "one.jsonl", texts[row : row + 1]), seed=0)
    assert not examine(write(tmp_path / "none.jsonl", [{"prompt": "p", "completion": "c"}])).problems
    own = write(tmp_path / "own.jsonl", [{"prompt": "p", "completion": "c", "score": "x"}])
    assert examine(own, columns="reward=score").problems == [f"{own}:1: column 'score' is str, not a number"]
    assert "no row has a column 'worth'" in examine(own, columns="reward=worth").problems[0]

    def talk(reward: Any) -> list[dict[str, Any]]:
        return [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reward": reward}]

    bare = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chats = [{"messages": talk(1)}, {"messages": bare, "reward": 2}, {"messages": talk("x")}, {"messages": bare}]
    path = write(tmp_path / "chats.jsonl", chats)
    assert examine(path).problems == [
        f"{path}:3: message 2: column 'reward' is str, not a number",
        f"{path}:4: it has no 'reward', and 3 other rows have one",
    ]


def test_solutions_in_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the recipe reads them, and every row that it would refuse."""
    good: list[Any] = [
        {"prompt": "p", "steps": ["ab", "c", "d"], "labels": [1, 0.5, 0]},
        {"prompt": "q", "steps": ["ab", "c"], "labels": [True, None]},
        {"prompt": "q", "steps": ["ab", "c"], "labels": [False, None]},
    ]
    path = write(tmp_path / "steps.jsonl", good)
    assert validate(options(path)) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [
        "type       stepwise supervision (3 rows)",
        "steps      7, of their labels 3 right, 2 wrong, 2 null",
    ]
    assert "solution   4 characters in the middle, 95% up to 6, at most 6" in said
    assert "duplicate rows" not in "".join(said)
    bad: list[Any] = [
        {"prompt": "p", "steps": "oops", "labels": [7]},
        {"prompt": "p", "steps": ["a"], "labels": [7]},
        {"prompt": "p", "steps": ["a\nb"], "labels": [1]},
        {"steps": ["a"], "labels": [1]},
        {"prompt": "p", "completions": ["a"], "labels": [1]},
    ]
    path = write(tmp_path / "bad.jsonl", bad)
    problems = examine(path).problems
    assert problems == [
        f"{path}:1: column 'steps' must be a list that is not empty",
        f"{path}:2: column 'labels': label 1 is 7; it must be 0 to 1, or null",
        f"{path}:3: column 'steps': step 1 holds the separator '\\n'",
        f"{path}:4: column 'prompt' is missing (there is steps, labels)",
        f"{path}:5: this row is prompt-only, the first one stepwise supervision",
    ]
    for row, problem in zip(bad[:4], problems, strict=False):
        one = write(tmp_path / "one.jsonl", [row])
        with pytest.raises(UserError) as found:
            read_solutions(StepsConfig(path=one))
        assert str(found.value) == f"{one}:1{problem[len(path) + 2 :]}"


def test_solutions_in_steps_under_other_names(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "completions": ["a", "b"], "labels": [True, False]},
        {"prompt": "p", "completions": "c"},
    ]
    path = write(tmp_path / "trl.jsonl", rows[:1])
    report = examine(path)
    assert not report.problems
    assert describe(report)[:3] == [
        "type       stepwise supervision (1 rows)",
        "steps      2, of their labels 1 right, 1 wrong, 0 null",
        "           for llm/process_reward, say steps.steps=completions",
    ]
    assert describe(examine(path, columns="steps=completions")) == describe(report)
    path = write(tmp_path / "trl.jsonl", rows)
    assert examine(path, columns="steps=completions").problems == [
        f"{path}:2: column 'completions' must be a list that is not empty"
    ]
    own = write(tmp_path / "own.jsonl", [{"q": "p", "parts": ["a"], "good": [1]}])
    report = examine(own, columns="prompt=q,steps=parts,labels=good")
    assert (report.problems, report.labels) == ([], {"right": 1})
    prompts = examine(write(tmp_path / "prompts.jsonl", [{"prompt": "p", "labels": [1]}]))
    assert prompts.kinds == {"prompt-only": 1}


def test_thoughts_that_the_template_leaves_out_are_counted(tmp_path: Path) -> None:
    words = character_tokenizer("think</>user: a")
    words.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    words.save_pretrained(str(tmp_path / "words"))

    def talk(answer: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]}

    path = write(tmp_path / "chats.jsonl", [talk("hi"), talk("think</think>hi"), talk("think</think>")])
    report = examine(path, tokenizer=str(tmp_path / "words"))
    assert report.problems == [
        f"{path}:3: the chat template leaves out what the assistant says in message 2; use one that shows contents "
        "that are text"
    ]
    assert "           the chat template leaves out a part of what the assistant says in 1 rows" in describe(report)
    assert report.tokens["completion"] == [3, 3]  # each with its EOS


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
    with pytest.raises(UserError, match="--columns completion=label: two kinds of column are both called 'label'"):
        column_names("completion=label")
    assert column_names("chosen=winner, rejected=loser").chosen == "winner"
