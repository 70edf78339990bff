"""Which splits of a task are measured."""

import json
from pathlib import Path

import pytest

from experiment.errors import UserError
from llm_rlhf.evaluate import chosen_splits
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
