"""Prompts that leave no room for an answer: said in one line before anything is trained, by every recipe."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from experiment.config import build_from_dict
from experiment.errors import UserError
from llm_rlhf import (
    train_grpo,
    train_ilql,
    train_iterative_dpo,
    train_ppo,
    train_rejection,
    train_sft,
    train_turns_grpo,
    train_turns_ppo,
    train_turns_sft,
)
from llm_rlhf.evaluate import EvaluateConfig, evaluate_run
from llm_rlhf.models.tokenizer import character_tokenizer
from llm_rlhf.tasks.examples import Example
from llm_rlhf.tasks.room import leaving_room, require_room
from llm_rlhf.tasks.rows import RowsConfig
from llm_rlhf.tasks.rows import build as build_rows
from llm_rlhf.tasks.scored import ScoredConfig
from llm_rlhf.tasks.scored import build as build_scored

TOKENIZER = character_tokenizer("abcdefghij ")
LONG = Example("abcdefghij", "a", place="rows.jsonl:7")
SHORT = Example("abc", "a", place="rows.jsonl:1")


def line(examples: Sequence[Example], **settings: Any) -> str:
    """What is said of them."""
    chosen = {"max_new_tokens": 8, "limited_by": "generation.max_new_tokens", "new_model": False, **settings}
    with pytest.raises(UserError) as found:
        require_room(examples, TOKENIZER, context=16, **chosen)
    return str(found.value)


def test_the_line_names_the_row_both_numbers_and_the_settings() -> None:
    require_room([SHORT], TOKENIZER, context=11, max_new_tokens=8, limited_by="x", new_model=True)
    assert leaving_room([LONG, SHORT], TOKENIZER, context=11, max_new_tokens=8) == [SHORT]
    assert line([SHORT, LONG, SHORT, LONG]) == (
        "rows.jsonl:7: a prompt of 10 tokens and 8 new ones (generation.max_new_tokens) do not fit the model's "
        "context of 16, nor do 1 others of 4 prompts; set generation.max_new_tokens to at most 6, or take a model "
        "with a longer context"
    )
    assert line([LONG], limited_by="", new_model=True).endswith("prompts; set model.context to at least 18")
    assert "(" not in line([LONG], limited_by="")


def test_a_prompt_that_fills_the_context_has_to_go() -> None:
    wide = Example("abcdefgh " * 6, "a")
    found = line([SHORT, wide], max_new_tokens=1)
    assert found.startswith("'abcdefgh abcdefgh abcdefgh abcdefgh a...': a prompt of 54 tokens and an answer ")
    assert found.endswith("; take a model with a longer context, or leave that prompt out")


def test_tokens_that_are_known_are_not_made_again() -> None:
    """A prompt of the first one's text, which is said to have twelve tokens."""
    assert "a prompt of 12 tokens" in line([SHORT, SHORT], known=[[4] * 12])


def test_rows_remember_where_they_stood(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"p{i}", "completion": "a", "reward": 1.0} for i in range(20)]
    data.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    for parts in (
        build_rows(RowsConfig(), data=str(data), seed=0),
        build_scored(ScoredConfig(), data=str(data), seed=0),
    ):
        for example in [*parts["train"], *parts["splits"]["test"]]:
            assert example.place == f"{data}:{int(example.prompt[1:]) + 1}"


# ---------------------------------------------------------------- the recipes


def rows_file(folder: Path) -> str:
    """Twenty short texts with rewards, and (without any) twenty prompts of 40 characters."""
    data = folder / "rows.jsonl"
    short = [{"prompt": f"ab{i}", "completion": "cd"} for i in range(20)]
    long = [{"prompt": f"{i:02d}" + "abcdefghij" * 4} for i in range(20)]
    data.write_text("".join(json.dumps(row) + "\n" for row in [*short, *long]))
    (folder / "own.py").write_text(
        "def judge(prompts, completions):\n    return [float('c' in text) for text in completions]\n"
    )
    return str(data)


def settings(folder: Path, data: str, **sections: Any) -> dict[str, Any]:
    rows = {"judge": f"{Path(data).parent}/own.py:judge", "validation": 0.3, "test": 0.1, "max_new_tokens": 4}
    return {
        "run": {"folder": str(folder), "wandb": "disabled", "checkpoint_every": 2},
        "task": {"name": "rows", "data": data, "rows": rows},
        "model": {"layers": 1, "width": 8, "heads": 2, "context": 32},
        "validation": {"every": 1, "samples": 2},
        **sections,
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return rows_file(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    """A model with a context of 32."""
    tree = settings(
        tmp_path_factory.mktemp("base") / "run", data, sft={"steps": 1, "batch_size": 4}, validation={"every": 0}
    )
    return train_sft.train(build_from_dict(tree, train_sft.TrainSFTConfig)).folder


SAMPLING: list[tuple[Callable[..., Any], type, dict[str, Any]]] = [
    (train_ppo.train, train_ppo.TrainPPOConfig, {}),
    (train_ppo.train, train_ppo.TrainPPOConfig, {"critic": {"model": "separate"}}),
    (train_grpo.train, train_grpo.TrainGRPOConfig, {}),
    (train_rejection.train, train_rejection.TrainRejectionConfig, {}),
    (train_iterative_dpo.train, train_iterative_dpo.TrainIterativeDPOConfig, {}),
    (train_turns_ppo.train, train_turns_ppo.TrainTurnsPPOConfig, {"turns": {"tools": ["calculator"]}}),
    (train_turns_grpo.train, train_turns_grpo.TrainTurnsGRPOConfig, {"turns": {"tools": ["calculator"]}}),
]


@pytest.mark.parametrize(("train", "config", "sections"), SAMPLING)
def test_recipes_that_sample_say_it_first(
    tmp_path: Path, data: str, base: Path, train: Callable[..., Any], config: type, sections: dict[str, Any]
) -> None:
    tree = settings(tmp_path / "run", data, model={"path": str(base)}, **sections)
    with pytest.raises(UserError, match=r"rows\.jsonl:\d+: a prompt of 42 tokens and .* context of 32, nor do"):
        train(build_from_dict(tree, config))
    assert not (tmp_path / "run").exists(), "there is nothing to continue"


SMALL: dict[str, Any] = {"updates": 1, "prompts": 4}
SKIPPING: list[tuple[Callable[..., Any], type, dict[str, Any]]] = [
    (train_ppo.train, train_ppo.TrainPPOConfig, {"sampling": SMALL}),
    (train_ppo.train, train_ppo.TrainPPOConfig, {"sampling": SMALL, "critic": {"model": "separate"}}),
    (train_grpo.train, train_grpo.TrainGRPOConfig, {"sampling": SMALL}),
    (
        train_rejection.train,
        train_rejection.TrainRejectionConfig,
        {"rejection": {"threshold": None}, "sft": {"steps": 1, "batch_size": 4}},
    ),
    (
        train_iterative_dpo.train,
        train_iterative_dpo.TrainIterativeDPOConfig,
        {"iterative": {"prompts": 20}, "learning": {"steps": 1}},
    ),
]


@pytest.mark.parametrize(("train", "config", "sections"), SKIPPING)
def test_recipes_of_single_answers_skip_them_where_they_may(
    tmp_path: Path,
    data: str,
    base: Path,
    capsys: pytest.CaptureFixture[str],
    train: Callable[..., Any],
    config: type,
    sections: dict[str, Any],
) -> None:
    tree = settings(tmp_path / "run", data, model={"path": str(base)}, skip_long_prompts=True, **sections)
    metrics = train(build_from_dict(tree, config)).metrics
    said = capsys.readouterr().out
    behind = "prompts leave no room for 4 new tokens in the context of 32 and are left out"
    training, validation = (
        re.search(rf"{part}: (\d+) of (\d+) {behind}", said) for part in ("training", "validation")
    )
    assert training is not None
    assert validation is not None
    assert 0 < int(training[1]) < int(training[2])
    assert metrics["eval/prompts"] == int(validation[2]) - int(validation[1]) > 0
    judged = evaluate_run(tmp_path / "run", EvaluateConfig(samples=1, splits=("test",)))
    assert judged["test"]["prompts_without_room"] + judged["test"]["prompts"] == 4


def test_where_no_prompt_is_left_one_is_named(tmp_path: Path, data: str, base: Path) -> None:
    tree = settings(tmp_path / "run", data, model={"path": str(base)}, skip_long_prompts=True)
    tree["generation"] = {"max_new_tokens": 31}
    with pytest.raises(UserError, match=r"42 tokens and 31 new ones \(generation\.max_new_tokens\)"):
        train_grpo.train(build_from_dict(tree, train_grpo.TrainGRPOConfig))


def test_a_limit_that_is_too_large_is_said_with_its_setting(tmp_path: Path, base: Path) -> None:
    tree = settings(
        tmp_path / "run",
        "",
        task={"name": "random_walks", "random_walks": {"walks": 20}},
        model={"path": str(base)},
        generation={"max_new_tokens": 32},
    )
    message = r"of 1 tokens and 32 new ones \(generation\.max_new_tokens\) .* to at most 31, or take a model"
    with pytest.raises(UserError, match=message):
        train_grpo.train(build_from_dict(tree, train_grpo.TrainGRPOConfig))


@pytest.mark.parametrize(
    ("train", "config", "sections"),
    [
        (train_sft.train, train_sft.TrainSFTConfig, {}),
        (train_ilql.train, train_ilql.TrainILQLConfig, {}),
        (train_turns_sft.train, train_turns_sft.TrainTurnsSFTConfig, {"turns": {"tools": ["calculator"]}}),
    ],
)
def test_recipes_that_only_look_say_it_first(
    tmp_path: Path, data: str, train: Callable[..., Any], config: type, sections: dict[str, Any]
) -> None:
    tree = settings(tmp_path / "run", data, **sections)
    with pytest.raises(UserError, match=r"rows\.jsonl:\d+: a prompt of 42 tokens and .* set model\.context to at"):
        train(build_from_dict(tree, config))
    assert not (tmp_path / "run").exists()


def test_where_texts_may_be_cut_such_prompts_are_not_looked_at(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sections: dict[str, Any] = {"texts": {"cut": True}, "sft": {"steps": 1, "batch_size": 4}}
    tree = settings(tmp_path / "run", data, **sections)
    metrics = train_sft.train(build_from_dict(tree, train_sft.TrainSFTConfig)).metrics
    found = re.search(r"validation: (\d+) of 12 prompts leave no room for 4 new tokens", capsys.readouterr().out)
    assert found is not None
    assert metrics["eval/prompts"] == 12 - int(found[1]) > 0
    tree["task"]["rows"]["max_new_tokens"] = 31
    tree["run"]["folder"] = str(tmp_path / "none")
    with pytest.raises(UserError, match=r"42 tokens and 31 new ones \(task\.rows\.max_new_tokens\)"):
        train_sft.train(build_from_dict(tree, train_sft.TrainSFTConfig))


def test_validation_without_prompts_is_one_line(tmp_path: Path, data: str) -> None:
    tree = settings(tmp_path / "run", data)
    tree["task"]["rows"]["validation"] = 0.0
    with pytest.raises(UserError, match=r"validation\.every: no prompts .* or set validation\.every=0"):
        train_sft.train(build_from_dict(tree, train_sft.TrainSFTConfig))
