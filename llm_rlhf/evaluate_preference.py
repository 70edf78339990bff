"""`tandem eval RUN` of a run that learned from comparisons or thumbs: its implicit reward on rows held out.

Accuracies carry Wilson intervals. No text is drawn here; the `policy` folder is a plain model for whatever draws.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiment.checkpoint import Checkpoint, Which, find_checkpoint, load_checkpoint, write_atomically
from experiment.config import build, read_tree
from experiment.errors import UserError
from experiment.yaml_tree import ConfigTree
from llm_rlhf import train_dpo, train_kto
from llm_rlhf.data.pairs import read_feedback, read_pairs
from llm_rlhf.models.causal import LanguagePolicy
from llm_rlhf.models.tokenizer import load_tokenizer
from llm_rlhf.preferences.learning import reference_of, tokenized_sets, validate_pairs

Result = dict[str, dict[str, float]]


@dataclass(frozen=True)
class EvaluateConfig:
    """splits: which held-out rows, "validation" or "test"; checkpoint: which one of the run."""

    splits: tuple[Literal["validation", "test"], ...] = ("test",)
    checkpoint: Which = "last"

    def __post_init__(self) -> None:
        if not self.splits:
            raise ValueError("evaluation.splits must name validation, test or both")


def evaluate_run(run_folder: str | Path, config: EvaluateConfig = EvaluateConfig()) -> Result:
    """Judge a run's checkpoint on rows that it was not trained on and write RUN/eval.json.

    Returns split -> loss, rewards/accuracies with its interval, rewards/margins, whatever validation logs. Raises
    UserError if the folder holds no run with a checkpoint, or a split has no rows.
    """
    folder = Path(run_folder)
    tree = read_tree(folder / "config.yaml")
    judge = _judge_thumbs if tree.pop("recipe") == train_kto.RECIPE else _judge_pairs
    chosen = find_checkpoint(folder, config.checkpoint)
    checkpoint = load_checkpoint(chosen)
    policy = LanguagePolicy.from_pretrained(checkpoint.folder / "policy").eval()
    results = judge(folder, tree, checkpoint, policy, config.splits)
    written = {"checkpoint": chosen.name, "splits": results}
    write_atomically(folder / "eval.json", json.dumps(written, indent=2) + "\n")
    return results


def _judge_pairs(
    folder: Path, tree: ConfigTree, checkpoint: Checkpoint, policy: LanguagePolicy, splits: tuple[str, ...]
) -> Result:
    settings = build(tree, train_dpo.TrainDPOConfig)
    tokenizer = load_tokenizer(checkpoint.folder / "policy")
    pairs, _ = tokenized_sets(
        read_pairs(settings.pairs), tokenizer, context=policy.context, max_prompt=settings.pairs.max_prompt
    )
    _require(pairs, splits)
    began_with = reference_of(checkpoint)
    sets, _ = train_dpo.with_reference(settings, policy, pairs, folder=folder, began_with=began_with)
    return {
        name: validate_pairs(policy, sets[name], preference=settings.preference, learning=settings.learning)
        for name in splits
    }


def _judge_thumbs(
    folder: Path, tree: ConfigTree, checkpoint: Checkpoint, policy: LanguagePolicy, splits: tuple[str, ...]
) -> Result:
    settings = build(tree, train_kto.TrainKTOConfig)
    tokenizer = load_tokenizer(checkpoint.folder / "policy")
    data = read_feedback(settings.pairs)
    verdicts, _ = train_kto.verdict_sets(data, tokenizer, settings.pairs, context=policy.context)
    _require(verdicts, splits)
    began_with = reference_of(checkpoint)
    sets, _ = train_kto.with_reference(settings, policy, verdicts, folder=folder, began_with=began_with)
    return {name: train_kto.judge_verdicts(policy, sets[name], settings) for name in splits}


def _require(sets: Mapping[str, Sized], splits: tuple[str, ...]) -> None:
    """Raises UserError for a split without rows."""
    for name in splits:
        if not len(sets.get(name, ())):
            raise UserError(f"evaluation.splits: no rows are held out in {name!r}; the share is pairs.{name}")
