import math
from pathlib import Path

import pytest
import torch

from experiment.errors import UserError
from llm_rlhf.rewards import RewardSet, exact_match, random_reward, resolve


def length(prompts: list[str], completions: list[str]) -> list[float | None]:
    return [float(len(text)) for text in completions]


def sometimes(prompts: list[str], completions: list[str]) -> list[float | None]:
    return [None if text == "?" else 1.0 for text in completions]


def write(folder: Path, body: str) -> str:
    file = folder / "mine.py"
    file.write_text(body)
    return f"{file}:score"


def test_weighted_sum_and_metrics() -> None:
    rewards = RewardSet({"exact_match": exact_match, "length": length}, {"exact_match": 2.0, "length": -0.5})
    scores = rewards(["a", "b"], ["xx", "yyyy"], {"answer": ["xx", "y"], "other": [1, 2]})
    assert scores.total.tolist() == [2.0 - 1.0, -2.0]
    assert scores.scored.all()
    metrics = scores.metrics()
    assert metrics["rewards/exact_match/mean"] == 0.5
    assert metrics["rewards/length/mean"] == 3.0
    assert metrics["rewards/length/std"] == 1.0
    assert metrics["objective/scores"] == -0.5


def test_none_is_unscored_only_where_every_function_says_none() -> None:
    both = RewardSet({"length": length, "sometimes": sometimes}, {"length": 1.0, "sometimes": 1.0})
    scores = both(["", ""], ["?", "ab"], {})
    assert scores.total.tolist() == [1.0, 3.0]
    assert scores.scored.all()
    alone = RewardSet({"sometimes": sometimes}, {"sometimes": 1.0})(["", ""], ["?", "ab"], {})
    assert alone.scored.tolist() == [False, True]
    assert alone.metrics()["rewards/unscored"] == 0.5
    assert math.isnan(float(alone.by_name["sometimes"][0]))
    assert alone.metrics()["objective/scores"] == 1.0


def test_random_reward_depends_on_the_sample_alone() -> None:
    first = random_reward(["a"] * 2000, ["x"] * 2000, list(range(2000)))
    again = random_reward(["b"] * 2000, ["y"] * 2000, list(range(2000)))
    assert first == again
    mean = float(torch.tensor([float(value or 0.0) for value in first]).mean())
    assert abs(mean - 0.5) < 0.05
    assert set(first) == {0.0, 1.0}


def test_own_function_from_a_file_with_columns(tmp_path: Path) -> None:
    name = write(
        tmp_path,
        "def score(prompts, completions, answer, bonus=(), **rest):\n"
        "    assert 'sample_index' in rest\n"
        "    return [float(a == c) for a, c in zip(answer, completions)]\n",
    )
    rewards = resolve({name: 3.0}, own={}, columns=["answer"])
    scores = rewards(["p", "q"], ["1", "2"], {"answer": ["1", "1"], "sample_index": [0, 1]})
    assert scores.total.tolist() == [3.0, 0.0]


@pytest.mark.parametrize(
    "body, message",
    [
        ("import nothing_of_that_name\n", "importing .* failed: ModuleNotFoundError"),
        ("def score(:\n", "importing .* failed: SyntaxError"),
        ("def other(prompts, completions):\n    return []\n", "has no score"),
        (
            "def score(prompts, completions, label):\n    return []\n",
            "asks for a column 'label'; the data has answer",
        ),
    ],
)
def test_functions_that_cannot_be_used_are_named_at_the_start(tmp_path: Path, body: str, message: str) -> None:
    name = write(tmp_path, body)
    with pytest.raises(UserError, match=message) as caught:
        resolve({name: 1.0}, own={}, columns=["answer"])
    assert "mine.py:score" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "result, message",
    [
        ("[1.0]", "returned 1 rewards for 2 completions"),
        ("[1.0, float('nan')]", "returned nan for completion 'b'"),
        ("[float('inf'), 0.0]", "returned inf for completion 'a'"),
        ("['good', 0.0]", "returned 'good' for completion 'a'"),
        ("[1 / 0, 0.0]", "raised ZeroDivisionError: division by zero"),
        ("None", "raised TypeError"),
    ],
)
def test_bad_results_name_the_function(tmp_path: Path, result: str, message: str) -> None:
    name = write(tmp_path, f"def score(prompts, completions):\n    return {result}\n")
    rewards = resolve({name: 1.0}, own={}, columns=[])
    with pytest.raises(UserError, match=message) as caught:
        rewards(["p", "p"], ["a", "b"], {})
    assert "mine.py:score" in str(caught.value)


def test_names_and_weights_are_checked() -> None:
    with pytest.raises(UserError, match="unknown; there is exact_match, random, optimality"):
        resolve({"optimalty": 1.0}, own={"optimality": length}, columns=[])
    with pytest.raises(UserError, match="at least one"):
        resolve({}, own={}, columns=[])
    with pytest.raises(UserError, match="finite"):
        resolve({"random": math.inf}, own={}, columns=[])
    with pytest.raises(UserError, match="no file"):
        resolve({"nowhere.py:score": 1.0}, own={}, columns=[])
