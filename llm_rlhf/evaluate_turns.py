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
from llm_rlhf.evaluate import START, Result, chosen_splits, means, numbers, scores, unscored
from llm_rlhf.models.causal import LanguagePolicy
from llm_rlhf.models.generation import at_temperature
from llm_rlhf.models.tokenizer import load_tokenizer
from llm_rlhf.online.experience import kl_spent, reference_log_probs
from llm_rlhf.online.settings import ValidationConfig
from llm_rlhf.rewards.functions import Scores
from llm_rlhf.tasks.examples import Example
from llm_rlhf.tasks.task import TaskConfig, build_task
from llm_rlhf.turns.episodes import TurnsConfig
from llm_rlhf.turns.playing import Judge, Played, Player, build_judge, build_player, judging


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure.

    splits          names of the task's prompt sets; empty = all but "validation"
    samples         episodes played on a row (the k of pass@k)
    temperature     of those
    batch_size      rows at once
    seed            of the draws
    checkpoint      which one of a run
    own_rewards     score by the run's `rewards:` as well, where they are not the gold ones
    """

    splits: tuple[str, ...] = ()
    samples: int = 8
    temperature: float = 1.0
    batch_size: int = 256
    seed: int = 10_000
    checkpoint: Which = "last"
    own_rewards: bool = True

    def __post_init__(self) -> None:
        if self.samples < 1 or self.batch_size < 1:
            raise ValueError("evaluation: samples and batch_size must be at least 1")


def evaluate_player(
    player: Player,
    examples: Sequence[Example],
    config: EvaluateConfig,
    *,
    reference: LanguagePolicy | None = None,
    own: Judge | None = None,
) -> Result:
    """Measure the player's policy on rows.

    own     what a run climbed, where that is not what the player is judged by; it scores the same episodes

    Returns greedy, greedy_solved, sampled, pass@K (each with NAME_interval), turns, calls and failed_calls (of the
    samples), mean_length (tokens that the policy wrote), finished (share that the environment ended), prompts,
    greedy_unscored and sampled_unscored (shares that nobody could judge), kl where there is a reference, and
    `rewards`: greedy and sampled by `own`, with intervals and what it left unscored.
    """
    generator = torch.Generator().manual_seed(config.seed)
    names = ("gold",) if own is None else ("gold", "own")
    greedy: dict[str, list[Tensor]] = {name: [] for name in names}
    drawn: dict[str, list[Tensor]] = {name: [] for name in names}
    looks: list[Played] = []
    with at_temperature(player.policy, config.temperature):
        for start in range(0, len(examples), config.batch_size):
            batch = examples[start : start + config.batch_size]
            for count, source, results in ((1, None, greedy), (config.samples, generator, drawn)):
                first = start * count
                look = player.play(batch, samples_per_prompt=count, generator=source, first_index=first)
                results["gold"].append(_judged(look.scores).view(len(batch), count))
                if own is not None:
                    climbed, _ = own(look.episodes, look.examples, look.completions, first_index=first)
                    results["own"].append(_judged(climbed).view(len(batch), count))
                if source is not None:
                    looks.append(look)
    found = {name: (torch.cat(greedy[name]).squeeze(1), torch.cat(drawn[name])) for name in names}
    result = {**scores(*found["gold"]), **unscored(*found["gold"]), **_course(looks)}
    if own is not None:
        result["rewards"] = {**means(*found["own"]), **unscored(*found["own"])}
    if reference is not None:
        with at_temperature(reference, config.temperature):
            result["kl"] = _kl(looks, reference)
    return result


def _judged(found: Scores) -> Tensor:
    """[B] what episodes earned, NaN where nobody could judge."""
    return torch.where(found.scored, found.total, torch.nan)


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
    player: Player,
    examples: Sequence[Example],
    config: ValidationConfig,
    *,
    due: bool,
    reference: LanguagePolicy | None = None,
) -> dict[str, float]:
    """Validation metrics (eval/...) when they are due, else nothing. Draws from a generator of its own.

    reference   what eval/kl (nats an episode) is measured to; None = no eval/kl
    """
    if config.every == 0 or not due:
        return {}
    few, measured = examples[: config.prompts], EvaluateConfig(samples=config.samples)
    result = evaluate_player(player, few, measured, reference=reference)
    return numbers(result, prefix="eval")


def evaluate_run(run_folder: str | Path, config: EvaluateConfig = EvaluateConfig()) -> dict[str, Result]:
    """Evaluate a run's checkpoint on its task's held-out rows and write RUN/eval.json.

    Returns split -> what `evaluate_player` returns. Raises UserError if the folder holds no run with a checkpoint,
    or a split does not exist or is empty.
    """
    folder = Path(run_folder)
    place = str(folder / "config.yaml")
    values: dict[str, Any] = read_tree(folder / "config.yaml").values
    turns = build_from_dict(values.get("turns") or {}, TurnsConfig, place)
    rewards: dict[str, float] = values.get("rewards") or {}
    task = build_task(build_from_dict(values.get("task") or {}, TaskConfig, place), rewards=judging(rewards, turns))
    source = find_checkpoint(folder, config.checkpoint) / "policy"
    policy = LanguagePolicy.from_pretrained(source).eval()
    limit = (values.get("generation") or {}).get("max_new_tokens")
    player = build_player(policy, load_tokenizer(source), task, turns, rewards={}, max_new_tokens=limit)
    reference = LanguagePolicy.from_pretrained(folder / START).eval() if (folder / START).is_dir() else None
    own = None
    if config.own_rewards and rewards and rewards != (judging({}, turns) or task.gold):
        own = build_judge(rewards, task, turns, rewards_timeout=values.get("rewards_timeout"))
    results = {
        split: evaluate_player(player, task.splits[split], config, reference=reference, own=own)
        for split in chosen_splits(task, config.splits)
    }
    written = {"checkpoint": source.parent.name, "seed": config.seed, "splits": results}
    write_atomically(folder / "eval.json", json.dumps(written, indent=2) + "\n")
    return results
