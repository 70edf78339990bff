"""`tandem eval RUN` of a run whose algorithm is another library's: the same test episodes, the same figures."""

from __future__ import annotations

import json
from pathlib import Path

from embodied.backends import d3rlpy_backend, sb3_backend
from embodied.backends.backend import Backend, Units, play
from embodied.evaluate import (
    TEST_SEEDS,
    EvaluateConfig,
    asked_for,
    require_plain,
    seeds,
    summarize,
    write_report,
)
from embodied.train_backend import UNITS, TrainBackendConfig
from experiment.checkpoint import find_checkpoint
from experiment.config import build, read_tree

__all__ = ["EvaluateConfig", "evaluate_run"]


def evaluate_run(run_folder: Path, config: EvaluateConfig) -> dict[str, float]:
    """Evaluate a run's checkpoint and write RUN/eval.json; returns the figures.

    UserError if the folder is no such run or holds no checkpoint yet, or for a film or samples.
    """
    require_plain(config, "a back end's run")
    tree = read_tree(run_folder / "config.yaml")
    tree.pop("recipe", None)
    trained = build(tree, TrainBackendConfig)
    environment = asked_for(config, trained.environment)
    checkpoint = find_checkpoint(run_folder, config.checkpoint)
    folder = checkpoint / "policy"
    units = Units.from_json(json.loads((folder / UNITS).read_text()))
    backend: Backend
    if trained.algorithm.startswith("d3rlpy/"):
        backend = d3rlpy_backend.load(folder)
    else:
        backend = sb3_backend.load(folder, environment, units)
    figures = summarize(play(backend, units, environment, seeds(TEST_SEEDS, config.episodes)))
    write_report(run_folder, checkpoint, environment, config, figures)
    return figures
