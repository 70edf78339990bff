"""The task of word problems with a calculator: its texts, its judge, GSM8K's own annotations."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiment.config import build_from_dict
from experiment.errors import UserError
from llm_rlhf import train_turns_sft
from llm_rlhf.models.causal import build_policy
from llm_rlhf.models.loading import ModelConfig
from llm_rlhf.tasks.examples import Example
from llm_rlhf.tasks.task import Task, TaskConfig, build_task
from llm_rlhf.tasks.tool_calculator import (
    ToolCalculatorConfig,
    final_answer,
    number_in,
    read_problems,
    without_annotations,
)
from llm_rlhf.train_turns_sft import TrainTurnsSFTConfig
from llm_rlhf.turns.episodes import TurnsConfig
from llm_rlhf.turns.playing import build_judge, build_player, tokenize_demonstrations

DATA = Path(os.environ.get("TANDEM_DATA", Path(__file__).parents[4] / "shared" / "data"))
GSM8K = DATA / "gsm8k_train.jsonl.gz"
SMALL = {"problems": 120, "steps": 1, "by_heart": 0.5, "validation": 10, "test": 12}


def task_of(**changes: Any) -> Task:
    config = ToolCalculatorConfig(**{**SMALL, "by_heart": 0.0, **changes})
    return build_task(TaskConfig(name="tool_calculator", tool_calculator=config))


def test_generated_problems_are_solved_by_their_demonstrations() -> None:
    task = task_of(problems=300, steps=3)
    for example in [*task.demonstrations, *task.splits["test"]]:
        answer = example.columns["answer"]
        assert final_answer([""], [example.completion], [answer]) == [1.0]
        assert final_answer([""], [without_annotations(example.completion)], [answer]) == [1.0]
    prompts = [example.prompt for split in (task.train, *task.splits.values()) for example in split]
    assert len(set(prompts)) == len(prompts) == 300
    assert task_of(problems=300, steps=3) == replace(task, rewards=task_of().rewards)
    heart = task_of(by_heart=0.25)
    assert sum("<<" not in example.completion for example in heart.demonstrations) == round(0.25 * 98)
    with pytest.raises(UserError, match="too few to keep 22 out"):
        task_of(longest=10)


def test_final_answers() -> None:
    texts = ["#### 72", "so #### 1\n#### $72.00", "72", "#### 7 2", "####", "#### 72 pens", "#### nan"]
    assert final_answer([""] * 7, texts, ["72"] * 7) == [1, 1, 0, 0, 0, 0, 0]
    assert number_in(" $1,200. ") == 1200


def test_what_the_tool_answers_is_masked_in_demonstrations() -> None:
    task = task_of()
    _, tokenizer = build_policy(ModelConfig(), alphabet=task.alphabet)
    config = TurnsConfig(tools=("calculator",))
    texts = [Example("a\n", "a <<48/2=24>>24", {}), Example("aa\n", "<<1+1=3>>", {}), Example("r\n", "24", {})]
    data, notes = tokenize_demonstrations(texts, tokenizer, config, context=64)
    assert len(data) == 2
    assert "2 texts with 1 tool calls, 1 left out" in notes[0]
    row, mask = data.input_ids[0], data.mask[0]
    assert tokenizer.decode(row[mask], skip_special_tokens=True) == "a <<48/2=24"
    assert int(row[mask][-1]) == int(tokenizer.eos_token_id)
    given = data.attention_mask[0].bool() & ~mask
    assert tokenizer.decode(row[given]) == "a\n24>>"
    with pytest.raises(UserError, match=r"no texts to train on.* 1 left out"):
        tokenize_demonstrations(texts[1:2], tokenizer, config, context=64)


def test_greedy_play_of_a_model_that_knows_its_text(tmp_path: Path) -> None:
    """A model that has learned one text by heart asks the tool, reads the answer and ends, as the text does."""
    data = tmp_path / "one.jsonl"
    answer = "<<6*7=42>>42\n#### 42"
    rows = [{"question": f"What is {i}?", "answer": answer} for i in range(30)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = build_from_dict(
        {
            "run": {"folder": str(tmp_path / "run"), "wandb": "disabled", "seed": 5},
            "task": {"name": "tool_calculator", "data": str(data), "tool_calculator": {"validation": 3, "test": 3}},
            "turns": {"tools": ["calculator"], "max_turns": 3},
            "model": {"layers": 1, "width": 32, "heads": 2, "context": 48},
            "sft": {"steps": 50, "batch_size": 24, "learning_rate": 1e-2},
            "validation": {"every": 0},
        },
        TrainTurnsSFTConfig,
    )
    folder = train_turns_sft.train(config).folder
    task = build_task(config.task)
    policy, tokenizer = build_policy(ModelConfig(path=str(folder)), alphabet="")
    player = build_player(policy, tokenizer, task, config.turns, rewards={}, max_new_tokens=None)
    played = player.play(task.splits["test"], samples_per_prompt=1, generator=None, first_index=0)
    assert played.completions == [answer] * 3
    assert [[turn.text for turn in turns] for turns in played.episodes.turns] == [["<<6*7=", "42\n#### 42"]] * 3
    assert played.scores.total.tolist() == [1.0] * 3
    metrics = played.episodes.metrics()
    assert metrics["tools/call_frequency"] == 1.0
    assert metrics["turns/masked_share"] == pytest.approx(4 / 21)


def test_judges_take_the_weights_they_are_given() -> None:
    task = task_of()
    own = build_judge({}, task, TurnsConfig(environment="a.py:b"))
    assert (own.functions, own.environment) == (None, 1.0)
    tools = build_judge({}, task, TurnsConfig(tools=("calculator",)))
    assert tools.functions is not None
    assert tools.environment == 0.0
    with pytest.raises(UserError, match=r"rewards\.nobody: unknown"):
        build_judge({"nobody": 1.0}, task, TurnsConfig(tools=("calculator",)))


def test_a_file_that_is_not_gsm8k_is_said(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"question": "How many?", "answer": "#### 5"}\n{"question": "?", "answer": "five"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2: column 'answer' does not end with #### and a number"):
        read_problems(data)
    data.write_text('{"question": "How many?"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:1: column 'answer' is missing"):
        read_problems(data)
    with pytest.raises(UserError, match="no such file"):
        read_problems(tmp_path / "none.jsonl")


@pytest.mark.needs_data
@pytest.mark.skipif(not GSM8K.exists(), reason=f"{GSM8K} is not there")
def test_gsm8ks_own_annotations_are_the_tools_answers() -> None:
    """96 of 100 solutions; the others write numbers in another way (.5, 500.00)."""
    config = ToolCalculatorConfig(longest=350, validation=100, test=100)
    task = build_task(TaskConfig(name="tool_calculator", data=str(GSM8K), tool_calculator=config))
    _, tokenizer = build_policy(ModelConfig(), alphabet=task.alphabet)
    data, notes = tokenize_demonstrations(
        task.demonstrations, tokenizer, TurnsConfig(tools=("calculator",)), context=500
    )
    assert len(data) > 0.95 * len(task.demonstrations) > 1000
    assert "left out" in notes[0]
    texts = [example.completion for example in task.demonstrations]
    answers = [example.columns["answer"] for example in task.demonstrations]
    assert set(final_answer(texts, texts, answers)) == {1.0}
