"""How good a policy that writes in turns is on rows that it was not trained on, with its tools or environment.

The numbers of `llm_rlhf.evaluate` (greedy, sampled, pass@k, with intervals), and turns and tool calls an episode.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiment.checkpoint import Which, find_checkpoint, write_atomically
from experiment.config import build_from_dict, read_tree
from experiment.errors import UserError
from llm_rlhf.evaluate import START, Result, numbers, scores, unscored
from llm_rlhf.models.causal import LanguagePolicy
from llm_rlhf.models.generation import at_temperature
from llm_rlhf.models.tokenizer import load_tokenizer
from llm_rlhf.online.experience import kl_spent, reference_log_probs
from llm_rlhf.online.learner import ValidationConfig
from llm_rlhf.tasks.examples import Example
from llm_rlhf.tasks.task import TaskConfig, build_task
from llm_rlhf.turns.episodes import TurnsConfig
from llm_rlhf.turns.playing import Played, Player, build_player


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure.

    splits          names of the task's prompt sets; empty = all but "validation"
    samples         episodes played on a row (the k of pass@k)
    temperature     of those
    batch_size      rows at once
    seed            of the draws
    checkpoint      which one of a run
    """

    splits: tuple[str, ...] = ()
    samples: int = 8
    temperature: float = 1.0
    batch_size: int = 256
    seed: int = 10_000
    checkpoint: Which = "last"

    def __post_init__(self) -> None:
        if self.samples < 1 or self.batch_size < 1:
            raise ValueError("evaluation: samples and batch_size must be at least 1")


def evaluate_player(
    player: Player,
    examples: Sequence[Example],
    config: EvaluateConfig,
    *,
    reference: LanguagePolicy | None = None,
) -> Result:
    """Measure the player's policy on rows.

    Returns greedy, greedy_solved, sampled, pass@K (each with NAME_interval), turns, calls and failed_calls (of the
    samples), mean_length (tokens that the policy wrote), finished (share that the environment ended), prompts,
    greedy_unscored and sampled_unscored (shares that nobody could judge), and kl where there is a reference.
    """
    generator = torch.Generator().manual_seed(config.seed)
    greedy: list[Tensor] = []
    drawn: list[Tensor] = []
    looks: list[Played] = []
    with at_temperature(player.policy, config.temperature):
        for start in range(0, len(examples), config.batch_size):
            batch = examples[start : start + config.batch_size]
            best = player.play(batch, samples_per_prompt=1, generator=None, first_index=start)
            greedy.append(_judged(best))
            look = player.play(
                batch,
                samples_per_prompt=config.samples,
                generator=generator,
                first_index=start * config.samples,
            )
            drawn.append(_judged(look).view(len(batch), config.samples))
            looks.append(look)
    asked, answers = torch.cat(greedy), torch.cat(drawn)
    result = {**scores(asked, answers), **unscored(asked, answers), **_course(looks)}
    if reference is not None:
        with at_temperature(reference, config.temperature):
            result["kl"] = _kl(looks, reference)
    return result


def _judged(look: Played) -> Tensor:
    """[B] what episodes earned, NaN where nobody could judge."""
    return torch.where(look.scores.scored, look.scores.total, torch.nan)


def _kl(looks: Sequence[Played], reference: LanguagePolicy) -> float:
    """The sampled episodes' mean KL, nats an episode; answers cost nothing."""
    spent = 0.0
    for look in looks:
        samples = look.episodes.samples
        spent += float(kl_spent(samples, reference_log_probs(reference, samples)).sum())
    return spent / sum(len(look.examples) for look in looks)


def _course(looks: Sequence[Played]) -> Result:
    """What happened in the sampled episodes, a mean over all of them."""
    sizes = [len(look.examples) for look in looks]
    total = sum(sizes)
    metrics = [look.episodes.metrics() for look in looks]
    calls = [size * each["tools/call_frequency"] for size, each in zip(sizes, metrics, strict=True)]
    failed = [count * each["tools/failure_frequency"] for count, each in zip(calls, metrics, strict=True)]
    return {
        "turns": sum(size * each["turns/mean"] for size, each in zip(sizes, metrics, strict=True)) / total,
        "calls": sum(calls) / total,
        "failed_calls": sum(failed) / total,
        "mean_length": sum(float(look.episodes.samples.mask.sum()) for look in looks) / total,
        "finished": sum(float(look.episodes.samples.finished.sum()) for look in looks) / total,
    }


def validate_player(
    player: Player, examples: Sequence[Example], config: ValidationConfig, *, due: bool
) -> dict[str, float]:
    """Validation metrics (eval/...) when they are due, else nothing. Draws from a generator of its own."""
    if config.every == 0 or not due:
        return {}
    result = evaluate_player(player, examples[: config.prompts], EvaluateConfig(samples=config.samples))
    return numbers(result, prefix="eval")


def evaluate_run(run_folder: str | Path, config: EvaluateConfig = EvaluateConfig()) -> dict[str, Result]:
    """Evaluate a run's checkpoint on its task's held-out rows and write RUN/eval.json.

    Returns split -> what `evaluate_player` returns. Raises UserError if the folder holds no run with a checkpoint,
    or a split does not exist.
    """
    folder = Path(run_folder)
    place = str(folder / "config.yaml")
    values: dict[str, Any] = read_tree(folder / "config.yaml").values
    task = build_task(build_from_dict(values.get("task") or {}, TaskConfig, place))
    turns = build_from_dict(values.get("turns") or {}, TurnsConfig, place)
    source = find_checkpoint(folder, config.checkpoint) / "policy"
    policy = LanguagePolicy.from_pretrained(source).eval()
    limit = (values.get("generation") or {}).get("max_new_tokens")
    player = build_player(policy, load_tokenizer(source), task, turns, rewards={}, max_new_tokens=limit)
    reference = LanguagePolicy.from_pretrained(folder / START).eval() if (folder / START).is_dir() else None
    results = {}
    for split in config.splits or tuple(name for name in task.splits if name != "validation"):
        if split not in task.splits:
            raise UserError(f"evaluation.splits: this task has no {split!r}; it has {', '.join(task.splits)}")
        results[split] = evaluate_player(player, task.splits[split], config, reference=reference)
    written = {"checkpoint": source.parent.name, "seed": config.seed, "splits": results}
    write_atomically(folder / "eval.json", json.dumps(written, indent=2) + "\n")
    return results
