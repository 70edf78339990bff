"""How far to trust a reward model: accuracy, calibration, length, disagreement, and what counting words would do.

Everything is measured on comparisons that were not trained on, with intervals. What must be fitted (temperature,
the effect of length, the strength of the word model's penalty) is fitted on validation and judged on the split.
Where no comparison validates, temperature and effect of length are left out, and the output says so.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from experiment.checkpoint import Which, find_checkpoint, write_atomically
from experiment.config import build_from_dict, read_tree
from experiment.device import find_device
from experiment.errors import UserError
from llm_rlhf.data.pairs import PairData, PairsConfig, read_pairs
from llm_rlhf.data.records import Comparison
from llm_rlhf.rewards.reward_audit import (
    Result,
    accuracy_sweep,
    bag_of_words,
    best_of_n_sweep,
    disagreement_audit,
    length_audit,
    length_slope,
    share_right,
    sweep_rows,
    weight_grid,
)
from llm_rlhf.rewards.reward_data import RewardData, reward_data
from llm_rlhf.rewards.reward_model import FOLDER, RewardModel, combine, load_reward_tokenizer
from llm_rlhf.train_reward import RewardConfig, features_of
from policy_core.calibration import both_ways, expected_calibration_error, fit_temperature, reliability_table

_NOT_FITTED = (
    "no comparison validates (pairs.validation), so there is no temperature and no accuracy without the effect of "
    "length"
)


@dataclass(frozen=True)
class EvaluateConfig:
    """splits          "test", "validation", "train"
    checkpoint      which one of a run
    data            another file of comparisons, all of it judged instead of the splits; columns as in training
    bins            of the reliability table
    bag_of_words    fit the word-count baseline too
    pareto          steps of the grid of objectives' weights, for a model with several; 0 = no sweep
    """

    splits: tuple[Literal["train", "validation", "test"], ...] = ("test",)
    checkpoint: Which = "auto"
    data: str | None = None
    bins: int = 10
    bag_of_words: bool = False
    pareto: int = 10

    def __post_init__(self) -> None:
        if not self.splits or self.bins < 1 or self.pareto < 0:
            raise ValueError("evaluation: name a split; bins must be at least 1, pareto not negative")


@dataclass(frozen=True)
class Judged:
    """A reward model's view of a split.

    data        the comparisons
    scores      [U, K, M] of its texts
    values      [U, M] one number for each objective, heads combined and lengths penalised as the model is set
    rows        [n] comparisons with a right side
    difference  [n] chosen less rejected, by the comparison's own objective
    """

    data: RewardData
    scores: Tensor
    values: Tensor
    rows: Tensor
    difference: Tensor


def evaluate_run(run_folder: str | Path, config: EvaluateConfig = EvaluateConfig()) -> dict[str, Result]:
    """Judge a run's reward model on comparisons it was not trained on and write RUN/eval.json.

    Returns split -> what `evaluate_reward` returns. Raises UserError if there is no such checkpoint, or data to
    judge: a split that the run kept nothing for is told with its setting.
    """
    folder = Path(run_folder)
    place = str(folder / "config.yaml")
    values = read_tree(folder / "config.yaml").values
    pairs_config = build_from_dict(values.get("pairs") or {}, PairsConfig, place)
    settings = build_from_dict(values.get("reward") or {}, RewardConfig, place)
    source = find_checkpoint(folder, config.checkpoint) / FOLDER
    model = RewardModel.from_pretrained(source).requires_grad_(False).eval()
    model.place(find_device("auto", setting="device"))
    pairs = read_pairs(pairs_config)
    splits: dict[str, Sequence[Comparison]] = {name: getattr(pairs, name) for name in config.splits}
    if config.data is not None:
        whole = dataclasses.replace(pairs_config, path=config.data, validation=0.0, test=0.0, limit=None)
        other = read_pairs(dataclasses.replace(whole, validation_path=None, test_path=None))
        splits = {Path(config.data).name: other.train}
    for name, split in splits.items():
        if not split:
            raise UserError(
                f"{folder}: pairs.{name} is 0, so no comparisons were kept for it; say another split, or data=FILE"
            )
    if not _can_fit(model, pairs.validation, column=settings.objective):
        print(_NOT_FITTED, flush=True)
    results = {
        name: evaluate_reward(model, source, pairs, split, config=config, settings=settings, split=name)
        for name, split in splits.items()
    }
    write_atomically(
        folder / "eval.json", json.dumps({"checkpoint": source.parent.name, "splits": results}, indent=2) + "\n"
    )
    return results


def evaluate_reward(
    model: RewardModel,
    source: Path,
    pairs: PairData,
    comparisons: Sequence[Comparison],
    *,
    config: EvaluateConfig,
    settings: RewardConfig,
    split: str,
) -> Result:
    """Everything about one split, on which nothing is fitted.

    source      the folder of the model's tokenizer
    pairs       what the run was trained and validated on; where nothing validates, what is fitted there is left
                out, and `not_fitted` says so

    Returns comparisons, prompts, accuracy with its interval (and by objective), margin, the calibration, length,
    disagreement (several heads), bag_of_words (when asked for) and pareto (several objectives); see docs.
    """
    judged = judge(model, source, comparisons, settings=settings, named=split)
    fitting = None
    if _can_fit(model, pairs.validation, column=settings.objective):
        fitting = judge(model, source, pairs.validation, settings=settings, named="validation")
    data, right = judged.data, judged.difference > 0
    result: Result = {
        "comparisons": len(data),
        "prompts": data.prompts,
        "tied": int(data.tied.sum()),
        **share_right(right),
        "margin": float(judged.difference.mean()),
        "calibration": calibration(
            judged.difference, None if fitting is None else fitting.difference, bins=config.bins
        ),
        "length": _length(judged, fitting),
    }
    if fitting is None:
        result["not_fitted"] = _NOT_FITTED
    if len(model.objectives) > 1:
        asked = data.objective[judged.rows]
        for number, name in enumerate(model.objectives):
            result |= share_right(right[asked == number], f"accuracy_{name}")
        if config.pareto:
            result["pareto"] = pareto(model, judged, steps=config.pareto)
    if model.ensemble > 1:
        spread = head_differences(judged).std(1)
        result["disagreement"] = disagreement_audit(spread, right)
    if config.bag_of_words:
        result["bag_of_words"] = word_baselines(model, pairs, comparisons, column=settings.objective)
    return result


def _can_fit(model: RewardModel, validation: Sequence[Comparison], *, column: str) -> bool:
    """Whether a comparison that the model judges has a right side."""
    single = len(model.objectives) == 1
    return any(not one.tied and (single or one.columns.get(column) in model.objectives) for one in validation)


def _length(judged: Judged, fitting: Judged | None) -> Result:
    """`length_audit`, without the linear effect of length where there is nothing to fit it on."""
    slope = torch.zeros(judged.values.shape[1])
    if fitting is not None:
        slope = torch.tensor([length_slope(column, fitting.data.lengths) for column in fitting.values.T])
    found = length_audit(judged.data, judged.values, rows=judged.rows, difference=judged.difference, slope=slope)
    fitted = () if fitting is not None else ("slope_per_token", "accuracy_without_length")
    return {name: value for name, value in found.items() if name.removesuffix("_interval") not in fitted}


def judge(
    model: RewardModel,
    source: Path,
    comparisons: Sequence[Comparison],
    *,
    settings: RewardConfig,
    named: str,
) -> Judged:
    """Score every text of some comparisons. Raises UserError where none of them has a right side."""
    data, _ = reward_data(
        comparisons,
        load_reward_tokenizer(source),
        context=model.context,
        objectives=model.objectives,
        column=settings.objective,
        max_prompt=model.max_prompt,
        named=named,
    )
    scores = model.raw(features_of(model, data)) - model.offset
    columns = [
        combine(
            scores,
            data.lengths,
            objectives=model.objectives,
            config=dataclasses.replace(model.scoring, weights={name: 1.0}),
        )[0]
        for name in model.objectives
    ]
    values = torch.stack(columns, dim=1)
    rows = (~data.tied).nonzero().squeeze(1)
    if not len(rows):
        raise UserError(f"pairs: every {named} comparison is tied; nothing can be right or wrong")
    objective = data.objective[rows]
    difference = values[data.chosen[rows], objective] - values[data.rejected[rows], objective]
    return Judged(data, scores, values, rows, difference)


def head_differences(judged: Judged) -> Tensor:
    """Each head's chosen less rejected of the comparisons with a right side: [n, K]."""
    data, rows = judged.data, judged.rows
    objective = data.objective[rows]
    return judged.scores[data.chosen[rows], :, objective] - judged.scores[data.rejected[rows], :, objective]


def calibration(difference: Tensor, fitting: Tensor | None, *, bins: int) -> Result:
    """Do preference probabilities mean what they say, before and after the temperature that `fitting` [n] asks for.

    None: there is nothing to fit it on, so before alone.

    Each comparison is looked at both ways round, so 0.5 is no information. Losses in nats a comparison; ln 2 is
    what a model that knows nothing has.
    """
    scales = {"": 1.0}
    result: Result = {}
    if fitting is not None:
        scales["_with_temperature"] = result["temperature"] = fit_temperature(*both_ways(fitting))
    for name, scale in scales.items():
        logits, outcomes = both_ways(difference / scale)
        probabilities = torch.sigmoid(logits.double())
        result[f"loss{name}"] = float(softplus(-difference.double() / scale).mean())
        result[f"expected_calibration_error{name}"] = expected_calibration_error(probabilities, outcomes, bins)
        rows = reliability_table(probabilities, outcomes, bins)
        result[f"reliability{name}"] = [dataclasses.asdict(row) for row in rows]
    return result


def pareto(model: RewardModel, judged: Judged, *, steps: int) -> Result:
    """What each weighting of the objectives costs the others.

    accuracy    by objective, on its own comparisons, of the weighted score
    best_of_n   mean score by objective of the completion that the weighting chooses among each prompt's, each
                objective in standard deviations over all texts
    """
    data, rows, names = judged.data, judged.rows, model.objectives
    weights = weight_grid(len(names), steps)
    standard = (judged.values - judged.values.mean(0)) / judged.values.std(0).clamp(min=1e-8)
    difference = standard[data.chosen[rows]] - standard[data.rejected[rows]]
    owner = torch.zeros(len(data.input_ids), dtype=torch.long)
    owner[data.chosen], owner[data.rejected] = data.prompt, data.prompt
    accuracy = accuracy_sweep(difference, data.objective[rows], weights)
    chosen = best_of_n_sweep(standard, owner, weights)
    return {
        "accuracy": sweep_rows(names, weights, accuracy, "accuracy"),
        "best_of_n": sweep_rows(names, weights, chosen, "mean_score"),
    }


def word_baselines(
    model: RewardModel, pairs: PairData, comparisons: Sequence[Comparison], *, column: str
) -> Result:
    """`bag_of_words`, for each objective where there are several."""
    if len(model.objectives) == 1:
        return bag_of_words(pairs.train, pairs.validation, comparisons)

    def about(part: Sequence[Comparison], name: str) -> list[Comparison]:
        return [comparison for comparison in part if comparison.columns.get(column) == name]

    return {
        name: bag_of_words(about(pairs.train, name), about(pairs.validation, name), about(comparisons, name))
        for name in model.objectives
    }
