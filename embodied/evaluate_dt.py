"""`tandem eval RUN` of a decision transformer: test episodes played with its target return."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from embodied.evaluate import (
    TEST_SEEDS,
    EvaluateConfig,
    asked_for,
    require_plain,
    seeds,
    summarize,
    write_report,
)
from embodied.policies.decision_transformer import DecisionTransformer
from embodied.train_dt import TrainDTConfig, play
from experiment.checkpoint import find_checkpoint
from experiment.config import build, read_tree
from experiment.errors import UserError
from experiment.metrics import read_metrics

__all__ = ["EvaluateConfig", "evaluate_run"]

SIDE_BY_SIDE = 50


def evaluate_run(run_folder: Path, config: EvaluateConfig) -> dict[str, float]:
    """Evaluate a run's checkpoint and write RUN/eval.json; returns the figures.

    UserError if the folder is no such run or holds no checkpoint yet, or for a film or samples.
    """
    require_plain(config, "a decision transformer's run")
    tree = read_tree(run_folder / "config.yaml")
    tree.pop("recipe", None)
    trained = build(tree, TrainDTConfig)
    environment = asked_for(config, trained.environment)
    checkpoint = find_checkpoint(run_folder, config.checkpoint)
    policy = DecisionTransformer.from_pretrained(checkpoint / "policy")
    asked = [
        row["eval/target_return"]
        for row in read_metrics(run_folder / "metrics.jsonl")
        if "eval/target_return" in row
    ]
    target = trained.target_return if trained.target_return is not None else asked[-1] if asked else None
    if target is None:
        raise UserError(
            f"{run_folder}: the run never played, so it has no target return; set target_return and episodes"
        )
    chosen = np.array(seeds(TEST_SEEDS, config.episodes))
    pieces = np.array_split(chosen, -(-len(chosen) // SIDE_BY_SIDE))
    records = [record for piece in pieces for record in play(policy, environment, piece.tolist(), target)]
    figures = summarize(records) | {"eval/target_return": target}
    write_report(run_folder, checkpoint, environment, config, figures)
    return figures
