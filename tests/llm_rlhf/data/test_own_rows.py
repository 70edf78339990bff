"""The task `rows` over every type of column: what is demonstrated, asked for, and left out."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from experiment.errors import UserError
from llm_rlhf.data.chat import PLAIN, Chat
from llm_rlhf.data.columns import kind_of
from llm_rlhf.models.causal import build_policy
from llm_rlhf.models.loading import ModelConfig
from llm_rlhf.tasks.rows import RowsConfig, split_prompts
from llm_rlhf.tasks.task import Task, TaskConfig, build_task
from llm_rlhf.train_sft import TextsConfig, training_texts


def build(path: Path, rows: list[dict[str, Any]], **settings: Any) -> Task:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build_task(TaskConfig(name="rows", data=str(path), rows=RowsConfig(**settings)))


def chat(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": f"a{number}"}]


def test_conversations_are_asked_for_their_first_answer(tmp_path: Path) -> None:
    task = build(tmp_path / "rows.jsonl", [{"messages": chat(i) + chat(9)} for i in range(20)])
    first = task.train[0]
    assert isinstance(first.prompt, Chat)
    assert first.prompt.startswith("user: q")
    assert first.columns["answer"] == "a" + first.prompt[len("user: q") : -len("\nassistant: ")]
    assert first.completion.endswith("\nuser: q9\nassistant: a9")
    assert set("user: assistant\nq0123456789") <= set(task.alphabet)


def test_comparisons_and_thumbs_show_what_was_good(tmp_path: Path) -> None:
    pairs = [{"prompt": f"p{i}", "chosen": "yes", "rejected": "no"} for i in range(20)]
    pairs.append({"prompt": "same", "chosen": "x", "rejected": "x"})
    task = build(tmp_path / "pairs.jsonl", pairs)
    assert {example.completion for example in task.demonstrations} == {"yes"}
    assert task.notes[1] == f"{tmp_path}/pairs.jsonl: 1 of 21 rows are left out: 1 with equal answers"
    thumbs = [{"prompt": f"p{i}", "completion": str(i), "label": i % 2 == 0} for i in range(40)]
    task = build(tmp_path / "thumbs.jsonl", thumbs)
    assert all(int(example.completion) % 2 == 0 for example in task.demonstrations)


def test_texts_alone_are_divided_by_themselves(tmp_path: Path) -> None:
    task = build(tmp_path / "rows.jsonl", [{"text": f"t{i}"} for i in range(20)])
    assert len(task.demonstrations) == 17
    assert {example.prompt for example in task.demonstrations} == {""}


def test_an_empty_completion_is_still_shown(tmp_path: Path) -> None:
    """It teaches to say nothing, which a comparison cannot."""
    task = build(tmp_path / "rows.jsonl", [{"prompt": f"p{i}", "completion": ""} for i in range(20)])
    assert len(task.demonstrations) == len(task.train) == 17


def test_prompts_alone_need_a_judge(tmp_path: Path) -> None:
    rows = [{"prompt": chat(i)[:1], "level": i} for i in range(20)]
    with pytest.raises(
        UserError, match=r"rows\.jsonl:1: column 'completion' is missing \(there is prompt, level\)"
    ):
        build(tmp_path / "rows.jsonl", rows)
    judge = f"{tmp_path}/judge.py:score"
    task = build(tmp_path / "rows.jsonl", rows, judge=judge)
    assert task.demonstrations == []
    assert task.gold == {judge: 1.0}
    assert task.train[0].columns["level"] in range(20)
    assert "answer" not in task.train[0].columns


def test_rewards_judge_what_nothing_else_can(tmp_path: Path) -> None:
    """A run's own rewards are what its validation reports, so prompts alone will do; the completion, if asked for,
    goes on to judge."""
    prompts = [{"prompt": chat(i)[:1]} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    config = TaskConfig(name="rows", data=str(tmp_path / "rows.jsonl"))
    rewards = {"mine.py:score": 0.5, "runs/reward": 2.0}
    task = build_task(config, rewards=rewards)
    assert task.gold == rewards
    assert len(task.train) == 17
    with pytest.raises(UserError, match="column 'completion' is missing"):
        build_task(config, rewards={**rewards, "exact_match": 1.0})
    judged = replace(config, rows=RowsConfig(judge="judge.py:score"))
    assert build_task(judged, rewards=rewards).gold == {"judge.py:score": 1.0}


def test_a_parquet_file_with_names_of_its_own(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "reply": "r"} for i in range(20)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    names = RowsConfig(prompt="question", completion="reply")
    task = build_task(TaskConfig(name="rows", data=str(tmp_path / "rows.parquet"), rows=names))
    assert task.train[0].completion == "r"
    with pytest.raises(
        UserError, match=r"rows\.parquet: row 1: column 'prompt' is missing \(there is question, reply"
    ):
        build_task(TaskConfig(name="rows", data=str(tmp_path / "rows.parquet")))


def test_two_columns_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two kinds of column are both called 'label'; give the one"):
        RowsConfig(completion="label")
    with pytest.raises(ValueError, match="two kinds of column are both called 'body'"):
        RowsConfig(completion="body", text="body")
    assert RowsConfig(completion="label", label="no column").completion == "label"
    given = RowsConfig(completion="text")  # a column that is whole texts elsewhere
    assert kind_of({"prompt": "a", "text": "b"}, given) == "prompt-completion"


def test_shares() -> None:
    prompts = [str(i) for i in range(10)]
    assert [len(part) for part in split_prompts(prompts, validation=0.0, test=0.2, seed=0, data="x")] == [8, 0, 2]
    with pytest.raises(UserError, match="10 different prompts are too few"):
        split_prompts(prompts, validation=0.0, test=0.01, seed=0, data="x")
    with pytest.raises(ValueError, match="max_new_tokens"):
        RowsConfig(max_new_tokens=0)


def test_thoughts_that_the_template_leaves_out_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, tokenizer = build_policy(
        ModelConfig(layers=1, width=16, heads=2), alphabet="think</>user: aq0123456789"
    )
    tokenizer.chat_template = PLAIN.replace("message['content']", "message['content'].split('</think>')[-1]")
    chats = [chat(i) for i in range(10)]
    for thought in chats[:4]:
        thought[1]["content"] = "think</think>" + thought[1]["content"]
    task = build(tmp_path / "rows.jsonl", [{"messages": one} for one in chats], validation=0.0, test=0.0)
    assert len(training_texts(task, tokenizer, policy, TextsConfig())) == 10
    assert "4 of 10 completions are shown in part by the chat template: what" in capsys.readouterr().out
