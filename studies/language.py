"""What the language studies share: an arm is a shipped configuration with a few overrides, trained and judged."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studies.cells import RUNS, Figures

CONFIGS = Path(__file__).parent.parent / "configs" / "llm_rlhf"


@dataclass(frozen=True)
class Arm:
    """A configuration under configs/llm_rlhf and what is changed in it."""

    config: str
    overrides: tuple[str, ...] = ()


def train_arm(arm: Arm, folder: Path, overrides: Sequence[str]) -> Path:
    """Train one arm into `folder`, as `tandem train` would; returns the folder."""
    from tandem.recipes import read_plan

    shutil.rmtree(folder, ignore_errors=True)
    common = [f"run.folder={folder}", "run.wandb=disabled", "run.checkpoint_every=100000", "validation.every=0"]
    plan = read_plan(CONFIGS / f"{arm.config}.yaml", [*common, *arm.overrides, *overrides])
    plan.module.train(plan.config)
    return folder


def judge_arm(folder: Path, splits: Sequence[str], samples: int, *, beta: float | None = None) -> Figures:
    """Test figures of a trained arm, with what it cost. beta: see `EvaluateConfig`."""
    from experiment.metrics import read_metrics
    from llm_rlhf.evaluate import EvaluateConfig, evaluate_run

    judged = evaluate_run(folder, EvaluateConfig(splits=tuple(splits), samples=samples, beta=beta))
    last = read_metrics(folder / "metrics.jsonl")[-1]
    cost = {name: last[name] for name in ("samples", "tokens", "global_step", "time/elapsed") if name in last}
    return {"judged": judged, "cost": cost}


def run_arms(
    study: str,
    cell: str,
    *,
    base: Arm,
    arms: Mapping[str, Arm],
    common: Sequence[str],
    splits: Sequence[str],
    samples: int,
) -> Figures:
    """The base model, then every arm from it (an arm whose overrides say model.path= starts from nothing)."""
    import torch

    torch.set_num_threads(1)
    start = train_arm(base, RUNS / f"{study}-{cell}-base", common)
    figures: Figures = {"base": judge_arm(start, splits, samples)}
    for name, arm in arms.items():
        fresh = "fresh" in name
        folder = RUNS / f"{study}-{cell}-{'-'.join(re.findall('[a-z0-9]+', name.lower()))}"
        train_arm(arm, folder, [*common, *([] if fresh else [f"model.path={start}"])])
        figures[name] = judge_arm(folder, splits, samples)
    return figures


def column(results: Mapping[str, Figures], arm: str, split: str, name: str) -> list[float]:
    """One figure of one arm over all cells that have it."""
    found: list[Any] = [cell[arm]["judged"][split].get(name) for cell in results.values() if arm in cell]
    return [float(value) for value in found if value is not None]
