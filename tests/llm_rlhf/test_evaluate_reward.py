"""How far to trust a reward model: every audit by hand on numbers, then a run's own report."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experiment.config import build_from_dict
from experiment.errors import UserError
from llm_rlhf import train_reward
from llm_rlhf.data.records import Comparison
from llm_rlhf.evaluate_reward import EvaluateConfig, calibration, evaluate_run
from llm_rlhf.rewards.reward_audit import (
    accuracy_sweep,
    bag_of_words,
    best_of_n_sweep,
    correlation,
    disagreement_audit,
    efficient,
    length_audit,
    length_slope,
    share_right,
    sweep_rows,
    weight_grid,
    words_of,
)
from llm_rlhf.rewards.reward_data import RewardData
from llm_rlhf.train_reward import TrainRewardConfig

# ---------------------------------------------------------------- by hand


def laid_out(lengths: list[int], chosen: list[int], rejected: list[int]) -> RewardData:
    """Comparisons of texts of which only the lengths matter."""
    count = len(chosen)
    ids = torch.zeros(len(lengths), 1, dtype=torch.long)
    return RewardData(
        input_ids=ids,
        attention_mask=ids + 1,
        completion=ids == 0,
        lengths=torch.tensor(lengths),
        chosen=torch.tensor(chosen),
        rejected=torch.tensor(rejected),
        margin=torch.full((count,), math.nan),
        tied=torch.zeros(count, dtype=torch.bool),
        prompt=torch.arange(count),
        objective=torch.zeros(count, dtype=torch.long),
        share=torch.ones(count),
    )


def test_a_score_that_is_length_is_found_out() -> None:
    """Chosen are longer three times of four (one pair has equal lengths); without length nothing is left."""
    data = laid_out([2, 4, 6, 8, 10, 10], [1, 2, 3, 0, 4], [0, 1, 2, 3, 5])
    scores = 0.5 * data.lengths.float().unsqueeze(1)
    difference = (scores[data.chosen] - scores[data.rejected]).squeeze(1)
    slope = torch.tensor([length_slope(scores[:, 0], data.lengths)])
    assert slope.item() == pytest.approx(0.5)
    found = length_audit(data, scores, rows=torch.arange(5), difference=difference, slope=slope)
    assert found["correlation"] == pytest.approx(1.0)
    assert found["rank_correlation"] == pytest.approx(1.0)
    assert found["correlation_within_comparisons"] == pytest.approx(1.0)
    assert (found["longer_wins"], found["shorter_wins"]) == (0.75, 0.25)
    assert (found["accuracy_where_longer_is_right"], found["accuracy_where_shorter_is_right"]) == (1.0, 0.0)
    assert found["accuracy_without_length"] == 0.0
    assert (found["mean_tokens_chosen"], found["mean_tokens_rejected"]) == (6.0, 6.0)
    assert found["longer_wins_interval"][0] < 0.75 < found["longer_wins_interval"][1]


def test_quality_beside_length_survives_its_removal() -> None:
    data = laid_out([2, 4, 2, 4], [0, 2], [1, 3])
    quality = torch.tensor([[1.0], [0.0], [1.0], [0.0]]) + 0.2 * data.lengths.float().unsqueeze(1)
    difference = (quality[data.chosen] - quality[data.rejected]).squeeze(1)
    found = length_audit(
        data, quality, rows=torch.arange(2), difference=difference, slope=torch.tensor([0.2], dtype=torch.float64)
    )
    assert found["accuracy_without_length"] == 1.0
    assert "accuracy_where_longer_is_right" not in found
    assert "correlation_within_comparisons" not in found  # the lengths do not vary there


def test_correlations_by_hand() -> None:
    first, second = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 10.0, 5.0])
    assert correlation(first, second, ranks=True) == pytest.approx(0.5)
    assert correlation(first, second) == pytest.approx(4 / math.sqrt(2 * 122 / 3), rel=1e-6)
    assert correlation(first, torch.ones(3)) is None
    assert length_slope(first, torch.ones(3)) == 0.0
    assert share_right(torch.zeros(0, dtype=torch.bool)) == {}


def test_disagreement_by_hand() -> None:
    right = torch.tensor([True, True, False, True, False])
    spread = torch.tensor([0.1, 0.2, 0.3, 0.3, 0.9])
    found = disagreement_audit(spread, right)
    assert found["error_auroc"] == pytest.approx((2.5 + 3) / 6)  # pairs of an error and a right answer
    assert found["accuracy_least_disagreement"] == 1.0
    assert found["accuracy_most_disagreement"] == pytest.approx(1 / 3)
    assert "error_auroc" not in disagreement_audit(spread, torch.ones(5, dtype=torch.bool))


def test_calibration_by_hand() -> None:
    """Logits of log 3 say 0.75; they are right half of the time, so a huge temperature is fitted and mends it."""
    logits = math.log(3.0) * torch.tensor([1.0, 1.0, -1.0, -1.0])
    found = calibration(logits, logits, bins=4)
    assert found["expected_calibration_error"] == pytest.approx(0.25, abs=1e-6)
    assert found["loss"] == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2, abs=1e-6)
    assert found["temperature"] > 50
    assert found["expected_calibration_error_with_temperature"] < 0.01
    assert found["loss_with_temperature"] == pytest.approx(math.log(2), abs=1e-3)
    row = found["reliability"][-1]
    assert (row["low"], row["high"], row["count"], row["frequency"]) == (0.75, 1.0, 4, 0.5)


def test_grids_and_fronts() -> None:
    assert weight_grid(2, 2).tolist() == [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
    grid = weight_grid(3, 4)
    assert grid.shape == (15, 3)
    assert torch.equal(grid.sum(1), torch.ones(15, dtype=torch.float64))
    points = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.4, 0.5], [0.0, 1.0], [0.0, 1.0]])
    assert efficient(points).tolist() == [True, True, False, True, True]
    with pytest.raises(ValueError, match="grid of weights"):
        weight_grid(2, 0)


CANDIDATES = torch.tensor([[3.0, 0.0], [2.0, 2.0], [0.0, 3.0], [1.0, 1.0], [0.0, 5.0]])


def test_the_sweeps_choice_by_hand() -> None:
    prompt = torch.tensor([4, 4, 4, 9, 9])
    found = best_of_n_sweep(CANDIDATES, prompt, weight_grid(2, 2))
    assert found.tolist() == [[2.0, 0.5], [1.0, 3.5], [0.0, 4.0]]
    difference = torch.tensor([[1.0, -3.0], [-1.0, 2.0], [2.0, 1.0]])
    accuracy = accuracy_sweep(difference, torch.tensor([0, 1, 0]), weight_grid(2, 2))
    assert accuracy.tolist() == [[1.0, 0.0], [0.5, 1.0], [0.5, 1.0]]
    rows = sweep_rows(("a", "b"), weight_grid(2, 2), found, "mean_score")
    assert rows[0] == {"weights": {"a": 1.0, "b": 0.0}, "mean_score": {"a": 2.0, "b": 0.5}, "efficient": True}
    empty = sweep_rows(("a",), weight_grid(1, 1), torch.tensor([[math.nan]]), "accuracy")
    assert empty[0]["accuracy"] == {}


def worded(good: str, bad: str, count: int = 12) -> list[Comparison]:
    return [Comparison(f"q{i}", f"thing{i % 3} {good}.", f"thing{i % 3} {bad}!") for i in range(count)]


def test_counting_words_learns_words_and_only_words() -> None:
    assert words_of("Don't STOP, now") == ["don", "'", "t", "stop", ",", "now"]
    train = worded("kind", "rude")
    found = bag_of_words(train, worded("kind", "rude", 4), worded("kind", "rude", 5))
    assert (found["accuracy"], found["l2"]) == (1.0, 1e-4)
    assert found["words"] == len({"thing0", "thing1", "thing2", "kind", "rude", ".", "!"})
    assert found == bag_of_words(train, worded("kind", "rude", 4), worded("kind", "rude", 5))
    assert bag_of_words(train, [], worded("rude", "kind", 4))["accuracy"] == 0.0  # punctuation outweighed or not
    ordered = [Comparison("q", "a b", "b a"), Comparison("q", "b a", "a b")]
    assert bag_of_words(ordered, [], ordered)["accuracy"] == 0.0  # a tie of scores is not right
    assert bag_of_words([Comparison("q", "a", "b")], [], ordered) == {}
    assert bag_of_words([], [], ordered) == {}


# ---------------------------------------------------------------- a run's report


def rows(path: Path, *, objectives: bool) -> str:
    lines: list[dict[str, Any]] = []
    for first in "pqrstu":
        for second in "vwxyz":
            prompt = {"prompt": f"{first}{second}"}
            lines.append({**prompt, "chosen": "yes", "rejected": "no", "objective": "helpful"})
            lines.append({**prompt, "chosen": "yes", "rejected": "so", "tie": True, "objective": "helpful"})
            if objectives:
                lines.append({**prompt, "chosen": "no", "rejected": "yes", "objective": "short"})
    if not objectives:
        lines = [{name: value for name, value in line.items() if name != "objective"} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def trained(folder: Path, path: str, **sections: Any) -> Path:
    settings = {
        "run": {"folder": str(folder), "wandb": "disabled", "seed": 5},
        "pairs": {"path": path, "validation": 0.2, "test": 0.3},
        "model": {"layers": 1, "width": 16, "heads": 2, "context": 24},
        "learning": {"steps": 12, "batch_size": 8, "learning_rate": 1e-2, "head_learning_rate": 1e-2},
        "validation": {"every": 4},
        **sections,
    }
    return train_reward.train(build_from_dict(settings, TrainRewardConfig)).folder


def finite(value: Any) -> bool:
    """Whether JSON can hold it, and every number is one."""
    if isinstance(value, dict):
        return all(finite(inner) for inner in value.values())
    if isinstance(value, list):
        return all(finite(inner) for inner in value)
    return isinstance(value, str | bool) or math.isfinite(value)


def test_a_runs_report(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run", rows(tmp_path / "rows.jsonl", objectives=False), reward={"heads": 3})
    found = evaluate_run(folder, EvaluateConfig(splits=("test", "train"), bag_of_words=True))
    test = found["test"]
    assert (test["comparisons"], test["tied"], test["prompts"]) == (18, 9, 9)
    assert test["accuracy"] == 1.0
    assert test["accuracy_interval"][0] == pytest.approx(0.7008, abs=1e-3)  # nine of nine
    assert test["length"]["longer_wins"] == 1.0
    assert test["length"]["accuracy_where_longer_is_right"] == 1.0
    assert test["disagreement"]["mean"] > 0
    assert test["bag_of_words"]["accuracy"] == 1.0
    assert test["calibration"]["loss"] < math.log(2)
    assert finite(found)
    written = json.loads((folder / "eval.json").read_text())
    assert written["splits"] == json.loads(json.dumps(found))
    assert written["checkpoint"] == "best"


def test_a_report_by_objective_and_on_other_data(tmp_path: Path) -> None:
    path = rows(tmp_path / "rows.jsonl", objectives=True)
    folder = trained(tmp_path / "run", path, scoring={"length_penalty": 0.0})
    test = evaluate_run(folder, EvaluateConfig(pareto=2))["test"]
    assert (test["accuracy_helpful"], test["accuracy_short"]) == (1.0, 1.0)
    sweep = test["pareto"]["accuracy"]
    assert [row["weights"]["helpful"] for row in sweep] == [1.0, 0.5, 0.0]
    assert sweep[0]["accuracy"] == {"helpful": 1.0, "short": 0.0}
    assert sweep[2]["accuracy"] == {"helpful": 0.0, "short": 1.0}
    best = test["pareto"]["best_of_n"]
    assert best[0]["mean_score"]["helpful"] > best[2]["mean_score"]["helpful"]
    assert "disagreement" not in test
    other = evaluate_run(folder, EvaluateConfig(data=path, pareto=0))
    assert list(other) == ["rows.jsonl"]
    assert other["rows.jsonl"]["comparisons"] == 90
    assert "pareto" not in other["rows.jsonl"]


def test_all_of_another_file_is_judged_and_nothing_else(tmp_path: Path) -> None:
    path, held_out = rows(tmp_path / "rows.jsonl", objectives=False), tmp_path / "held.jsonl"
    held_out.write_text("".join(Path(path).read_text().splitlines(keepends=True)[:30]))
    other = tmp_path / "other.jsonl"
    other.write_text("".join(Path(path).read_text().splitlines(keepends=True)[:5]))
    pairs = {"path": path, "validation_path": str(held_out), "test_path": str(held_out), "limit": 40}
    folder = trained(tmp_path / "run", path, pairs=pairs, learning={"steps": 2})
    found = evaluate_run(folder, EvaluateConfig(data=str(other), checkpoint="last"))
    assert found["other.jsonl"]["comparisons"] == 5


def test_without_validation_nothing_is_fitted_and_the_rest_is_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = rows(tmp_path / "rows.jsonl", objectives=False)
    sections: dict[str, Any] = {"validation": {"every": 0}, "learning": {"steps": 2}}
    folder = trained(tmp_path / "run", path, pairs={"path": path, "validation": 0.0, "test": 0.3}, **sections)
    test = evaluate_run(folder, EvaluateConfig(checkpoint="last", bag_of_words=True))["test"]
    said = (
        "no comparison validates (pairs.validation), so there is no temperature and no accuracy without the "
        "effect of length"
    )
    assert said in capsys.readouterr().out
    assert test["not_fitted"] == said
    assert (test["comparisons"], test["tied"]) == (18, 9)
    assert set(test["calibration"]) == {"loss", "expected_calibration_error", "reliability"}
    assert test["length"]["longer_wins"] == 1.0
    assert not [name for name in test["length"] if "without_length" in name or "slope" in name]
    assert test["bag_of_words"]["accuracy"] == 1.0
    assert finite(test)
    found = evaluate_run(folder, EvaluateConfig(checkpoint="last", data=path))["rows.jsonl"]
    assert (found["comparisons"], found["not_fitted"]) == (60, said)


def test_a_split_that_was_not_kept_is_told_with_its_setting(tmp_path: Path) -> None:
    path = rows(tmp_path / "rows.jsonl", objectives=False)
    folder = trained(
        tmp_path / "run", path, pairs={"path": path, "validation": 0.2, "test": 0.0}, learning={"steps": 2}
    )
    with pytest.raises(UserError, match=r"pairs\.test is 0, so no comparisons were kept for it; say another split"):
        evaluate_run(folder, EvaluateConfig(checkpoint="last"))
    found = evaluate_run(folder, EvaluateConfig(checkpoint="last", splits=("validation",)))
    assert "temperature" in found["validation"]["calibration"]


def test_a_length_penalty_is_judged_too(tmp_path: Path) -> None:
    """With a penalty that outweighs everything, the shorter answer wins and the report says so."""
    path = rows(tmp_path / "rows.jsonl", objectives=False)
    folder = trained(tmp_path / "run", path, scoring={"length_penalty": 1e3})
    assert evaluate_run(folder, EvaluateConfig())["test"]["accuracy"] == 0.0


def test_what_cannot_be_judged_says_why(tmp_path: Path) -> None:
    path = rows(tmp_path / "rows.jsonl", objectives=False)
    folder = trained(tmp_path / "run", path, validation={"every": 0}, learning={"steps": 1})
    with pytest.raises(UserError, match="there is no checkpoint 'best' to evaluate"):
        evaluate_run(folder, EvaluateConfig(checkpoint="best"))
    tied = tmp_path / "tied.jsonl"
    tied.write_text(
        "".join(
            json.dumps({"prompt": f"p{i}", "chosen": "so", "rejected": "no", "tie": True}) + "\n" for i in range(9)
        )
    )
    with pytest.raises(UserError, match=r"every tied\.jsonl comparison is tied"):
        evaluate_run(folder, EvaluateConfig(checkpoint="last", data=str(tied)))
    with pytest.raises(ValueError, match="name a split"):
        EvaluateConfig(splits=())


def test_probabilities_use_the_fitted_temperature(tmp_path: Path) -> None:
    from llm_rlhf.rewards.reward_model import RewardModel

    folder = trained(tmp_path / "run", rows(tmp_path / "rows.jsonl", objectives=False))
    model = RewardModel.from_pretrained(folder)
    chosen: Tensor = torch.tensor([2.0])
    assert model.temperature != 1.0
    expected = 1 / (1 + math.exp(-2.0 / model.temperature))
    assert model.probability(chosen, torch.zeros(1)).item() == pytest.approx(expected, abs=1e-6)
