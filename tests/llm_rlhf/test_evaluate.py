"""Which splits of a task are measured, and which of their prompts."""

import json
from pathlib import Path

import pytest

from experiment.config import build_from_dict, read_tree
from experiment.errors import UserError
from llm_rlhf import train_sft
from llm_rlhf.evaluate import EvaluateConfig, chosen_splits, evaluate_run
from llm_rlhf.tasks.rows import RowsConfig
from llm_rlhf.tasks.task import Task, TaskConfig, build_task


def task(folder: Path, *, test: float) -> Task:
    rows = [{"prompt": f"{letter},", "completion": "a"} for letter in "abcdefghij"]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RowsConfig(validation=0.2, test=test, max_new_tokens=4)
    return build_task(TaskConfig(name="rows", data=str(folder / "rows.jsonl"), rows=config))


def test_all_but_validation(tmp_path: Path) -> None:
    own = task(tmp_path, test=0.1)
    assert chosen_splits(own, ()) == ("test",)
    assert chosen_splits(own, ("validation", "test")) == ("validation", "test")
    with pytest.raises(UserError, match="this task has no 'tests'; it has validation, test"):
        chosen_splits(own, ("tests",))


def test_what_was_not_kept_cannot_be_measured(tmp_path: Path) -> None:
    own = task(tmp_path, test=0.0)
    assert chosen_splits(own, ("validation",)) == ("validation",)
    with pytest.raises(UserError, match="keeps nothing for a test"):
        chosen_splits(own, ())
    with pytest.raises(UserError, match="'test' of this task is empty"):
        chosen_splits(own, ("test",))


def trained(folder: Path, data: Path, *, cut: bool) -> Path:
    """An SFT run with a context of 32."""
    rows = {"validation": 0.2, "test": 0.5, "max_new_tokens": 4}
    settings = {
        "run": {"folder": str(folder), "wandb": "disabled"},
        "task": {"name": "rows", "data": str(data), "rows": rows},
        "model": {"layers": 1, "width": 8, "heads": 2, "context": 32},
        "texts": {"cut": cut},
        "sft": {"steps": 1, "batch_size": 4},
        "validation": {"every": 0},
    }
    return train_sft.train(build_from_dict(settings, train_sft.TrainSFTConfig)).folder


def test_a_run_that_may_cut_texts_leaves_prompts_out_that_fill_the_context(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = [{"prompt": f"ab{i}", "completion": "cd"} for i in range(20)]
    long = [{"prompt": f"{i:02d}" + "abcdefghij" * 4, "completion": "cd"} for i in range(20)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*short, *long]))
    folder = trained(tmp_path / "run", data, cut=True)
    task = build_task(build_from_dict(read_tree(folder / "config.yaml").values["task"], TaskConfig))
    fits = sum(len(example.prompt) + 4 <= 32 for example in task.splits["test"])
    assert 0 < fits < 20
    test = evaluate_run(folder, EvaluateConfig(samples=2))["test"]
    assert (test["prompts"], test["prompts_without_room"]) == (fits, 20 - fits)
    assert f"test: {20 - fits} of 20 prompts leave no room for 4 new tokens in the context of 32" in (
        capsys.readouterr().out
    )
    assert json.loads((folder / "eval.json").read_text())["splits"]["test"]["prompts_without_room"] == 20 - fits


def test_prompts_that_fill_the_context_are_refused_otherwise(tmp_path: Path) -> None:
    """Where the run may not cut, and where nothing would be left."""
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": "abcdefghij" * 2 + f"{i:02d}", "completion": "cd"} for i in range(20)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for cut in (False, True):
        folder = trained(tmp_path / f"run{cut}", data, cut=cut)
        config = folder / "config.yaml"
        config.write_text(config.read_text().replace("max_new_tokens: 4", "max_new_tokens: 11"))
        with pytest.raises(UserError, match=r"of 22 tokens and 11 new ones do not fit the model's context of 32"):
            evaluate_run(folder, EvaluateConfig(samples=2))
