"""How far to trust a process reward model: accuracy on labelled steps, and the first error of a solution."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from experiment.checkpoint import Which, find_checkpoint, write_atomically
from experiment.config import build_from_dict, read_tree
from experiment.errors import UserError
from experiment.statistics import wilson_interval
from llm_rlhf.rewards.process_reward import (
    FOLDER,
    StepsConfig,
    StepScorer,
    TokenizedSteps,
    read_solutions,
    step_loss,
    token_scores,
    tokenize_steps,
)
from llm_rlhf.train_reward import LOOK


@torch.no_grad()
def judge(steps: StepScorer, data: TokenizedSteps) -> dict[str, float]:
    """How well labelled steps are judged, with 0.5 as the threshold.

    Returns loss, accuracy (of steps), accuracy_right and accuracy_wrong (of steps that are so: whoever calls
    everything right has 1 and 0), first_error (of solutions: the first wrong step, or that there is none, is
    found, as ProcessBench asks, 2412.06559); shares with Wilson bounds NAME_low and NAME_high.
    """
    parts = torch.arange(len(data)).split(LOOK)
    model = steps.scorer.model
    logits = torch.cat([token_scores(model, data.input_ids[part], data.attention_mask[part]) for part in parts])
    known = ~data.labels.isnan()
    good, said = data.labels >= 0.5, logits > 0
    weights = torch.full_like(logits, 1.0 / max(int(known.sum()), 1))
    result = {"loss": float(step_loss(logits=logits, labels=data.labels, weights=weights))}
    first = _first(known & ~good) == _first(known & ~said)
    right = said == good
    shares = {
        "accuracy": right[known],
        "accuracy_right": right[known & good],
        "accuracy_wrong": right[known & ~good],
        "first_error": first,
    }
    for name, found in shares.items():
        if len(found):
            count = int(found.sum())
            low, high = wilson_interval(count, len(found))
            result |= {name: count / len(found), f"{name}_low": low, f"{name}_high": high}
    return result


def _first(found: Tensor) -> Tensor:
    """The first column that is True [N, T] -> [N]; T where none is."""
    columns = torch.arange(found.shape[1]).expand_as(found)
    return torch.where(found, columns, found.shape[1]).amin(1)


@dataclass(frozen=True)
class EvaluateConfig:
    """split: validation or test; checkpoint: which one of a run."""

    split: Literal["validation", "test"] = "test"
    checkpoint: Which = "auto"


def evaluate_run(run_folder: str | Path, config: EvaluateConfig = EvaluateConfig()) -> dict[str, dict[str, float]]:
    """Judge a run's model on held-out solutions and write RUN/eval.json. Returns split -> what `judge` returns.

    Raises UserError if there is no such checkpoint, or no solutions.
    """
    folder = Path(run_folder)
    values = read_tree(folder / "config.yaml").values
    settings = build_from_dict(values.get("steps") or {}, StepsConfig, str(folder / "config.yaml"))
    source = find_checkpoint(folder, config.checkpoint) / FOLDER
    steps = StepScorer.from_pretrained(source)
    solutions = getattr(read_solutions(settings), config.split)
    if not solutions:
        raise UserError(f"{folder}: steps.{config.split} is 0, so no solutions were kept for it; say another split")
    data = tokenize_steps(solutions, steps.scorer, steps.separator)
    results: dict[str, dict[str, float]] = {config.split: judge(steps, data)}
    write_atomically(
        folder / "eval.json", json.dumps({"checkpoint": source.parent.name, "splits": results}, indent=2) + "\n"
    )
    return results
