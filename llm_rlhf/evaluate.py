"""How good a language policy is on prompts that it was not trained on.

Greedy decoding, the mean over samples, and pass@k (some sample of k is right); entropy, length and, with a
reference, the KL spent. Shares carry Wilson intervals, means carry bootstrap intervals over prompts. The task's own
reward is the gold one; where a run climbed other rewards, what these say of the same texts stands beside it.
Answers that no reward function could judge are left out, and how many those are is said; so are prompts that leave
no room for an answer, where the run was told to cut texts or to skip such prompts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from experiment.checkpoint import find_checkpoint, write_atomically
from experiment.config import build_from_dict, read_tree
from experiment.device import find_device
from experiment.errors import UserError
from experiment.statistics import bootstrap_interval, wilson_interval
from llm_rlhf.data.texts import columns_of, encode_prompts
from llm_rlhf.evaluation.frontier import best_of
from llm_rlhf.logged.value_heads import AdvantageSteering
from llm_rlhf.models.causal import LanguagePolicy
from llm_rlhf.models.generation import Samples, at_temperature, generate
from llm_rlhf.models.loading import model_folder
from llm_rlhf.models.tokenizer import decode_completions, end_ids, load_tokenizer, pad_id, require_known_tokens
from llm_rlhf.online.experience import kl_spent, reference_log_probs
from llm_rlhf.rewards.functions import RewardSet, resolve
from llm_rlhf.tasks.examples import Example
from llm_rlhf.tasks.room import require_room, skipping_long
from llm_rlhf.tasks.task import Task, TaskConfig, build_task

SOLVED = 1.0 - 1e-6
START = "reference"
"""In a run's folder: the policy as it was when the run began."""
Result = dict[str, Any]


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure.

    splits          names of the task's prompt sets; empty = all but "validation"
    prompts         at most so many of each, the first ones; None = all
    samples         completions drawn per prompt (the k of pass@k)
    temperature     of those samples
    batch_size      prompts at once
    seed            of the draws
    checkpoint      which one of a run; "start": the policy as it was before the run, where the run kept it
    best_of         sizes n, at most `samples`: what the best of n samples is worth, chosen by the run's own rewards
    reference       a model to measure the KL to; None = the run's own reference, if it has one
    beta            of a run with value heads (llm/ilql): how strongly they steer, 0 = the language model alone;
                    None = as the run was configured
    own_rewards     score by the run's `rewards:` as well, where they are not the task's own
    device          where the models compute, as model.device
    """

    splits: tuple[str, ...] = ()
    prompts: int | None = None
    samples: int = 8
    temperature: float = 1.0
    batch_size: int = 256
    seed: int = 10_000
    checkpoint: Literal["auto", "best", "last", "start"] = "last"
    best_of: tuple[int, ...] = ()
    reference: str | None = None
    beta: float | None = None
    own_rewards: bool = True
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.samples < 1 or self.batch_size < 1:
            raise ValueError("evaluation: samples and batch_size must be at least 1")
        if not 0 < self.temperature < float("inf") or not 0 <= self.seed < 2**63:
            raise ValueError("evaluation: temperature must be above 0, seed between 0 and 2**63 - 1")
        if self.prompts is not None and self.prompts < 1:
            raise ValueError(f"evaluation.prompts must be at least 1, got {self.prompts}")
        if any(not 1 <= size <= self.samples for size in self.best_of):
            raise ValueError(
                f"evaluation.best_of: sizes are from 1 to samples ({self.samples}), got {self.best_of}"
            )


def evaluate_policy(
    policy: LanguagePolicy,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    split: str,
    config: EvaluateConfig = EvaluateConfig(),
    max_new_tokens: int | None = None,
    reference: LanguagePolicy | None = None,
    rewards: Mapping[str, float] | None = None,
    rewards_timeout: float | None = None,
) -> Result:
    """Measure one split with the task's own reward.

    rewards             name -> weight, of what the policy was trained on; they score the same completions, where
                        they are not the task's own
    rewards_timeout     seconds that one call of a reward function may take; None = any

    Returns what `scores` does, greedy_unscored and sampled_unscored (shares of answers that nobody could judge),
    entropy (nats a token), mean_length (tokens), finished (share with EOS), kl (nats a completion) where there is a
    reference, what `best_of` does, and `rewards`: greedy, sampled and best of n by the given rewards, with
    intervals and what these left unscored.
    """
    examples = task.splits[split][: config.prompts]
    gold = dict(task.gold)
    judges = {"gold": gold} if not rewards or dict(rewards) == gold else {"gold": gold, "own": dict(rewards)}
    columns = list(columns_of(examples))
    judging = {
        name: resolve(weights, own=task.rewards, columns=columns, timeout=rewards_timeout)
        for name, weights in judges.items()
    }
    limit = max_new_tokens or task.max_new_tokens
    generator = torch.Generator().manual_seed(config.seed)
    greedy: dict[str, list[Tensor]] = {name: [] for name in judging}
    drawn: dict[str, list[Tensor]] = {name: [] for name in judging}
    ends = end_ids(tokenizer, policy.model)
    totals = {"entropy": 0.0, "tokens": 0.0, "finished": 0.0, "kl": 0.0}
    with at_temperature(policy, config.temperature):
        for start in range(0, len(examples), config.batch_size):
            batch = examples[start : start + config.batch_size]
            for count, source, results in ((1, None, greedy), (config.samples, generator, drawn)):
                samples = generate(
                    policy,
                    encode_prompts(tokenizer, [example.prompt for example in batch]),
                    samples_per_prompt=count,
                    max_new_tokens=limit,
                    ends=ends,
                    pad=pad_id(tokenizer),
                    generator=source,
                )
                for name, scores in _score(samples, batch, tokenizer, judging).items():
                    results[name].append(scores.view(len(batch), count))
                if source is not None:
                    _add_totals(totals, samples, reference, config.temperature)
    found = {name: (torch.cat(greedy[name]).squeeze(1), torch.cat(drawn[name])) for name in judging}
    result = _summary(*found["gold"], totals, with_kl=reference is not None)
    gold_drawn, chosen_by = found["gold"][1], found.get("own", found["gold"])[1]
    result |= best_of(gold_drawn, chosen_by, config.best_of)
    if "own" in found:
        result["rewards"] = {
            **means(*found["own"]),
            **unscored(*found["own"]),
            **best_of(chosen_by, chosen_by, config.best_of),
        }
    return result


def _score(
    samples: Samples, batch: Sequence[Example], tokenizer: PreTrainedTokenizerBase, judging: Mapping[str, RewardSet]
) -> dict[str, Tensor]:
    """Rewards [B] of a batch's samples by each judge; NaN where none of its functions could judge."""
    which = samples.prompt.tolist()
    texts = decode_completions(tokenizer, samples.completions())
    columns = {name: [column[i] for i in which] for name, column in columns_of(batch).items()}
    columns["sample_index"] = list(range(len(which)))
    columns["finished"] = samples.finished.tolist()
    prompts = [batch[i].prompt for i in which]
    found = {name: rewards(prompts, texts, columns) for name, rewards in judging.items()}
    return {name: torch.where(each.scored, each.total, torch.nan) for name, each in found.items()}


def _add_totals(
    totals: dict[str, float], samples: Samples, reference: LanguagePolicy | None, temperature: float
) -> None:
    totals["entropy"] += float(samples.entropy.sum())
    totals["tokens"] += float(samples.mask.sum())
    totals["finished"] += float(samples.finished.sum())
    if reference is not None:
        with at_temperature(reference, temperature):
            log_probs = reference_log_probs(reference, samples)
        totals["kl"] += float(kl_spent(samples, log_probs).sum())


def scores(greedy: Tensor, drawn: Tensor) -> Result:
    """greedy [P], drawn [P, K], NaN where nobody could judge -> means and shares of what was judged.

    prompts             P
    greedy, sampled     means over the prompts with a judged answer, of its judged answers; bootstrap intervals
    greedy_solved       share of the judged answers that are right; Wilson interval
    pass@K              share of the prompts with a judged answer that have a right one; Wilson interval. A lower
                        bound for these prompts, where not all of a prompt's K were judged

    A mean or share of nothing is None.
    """
    name = f"pass@{drawn.shape[1]}"
    return {
        "prompts": len(greedy),
        **means(greedy, drawn),
        **_share("greedy_solved", greedy >= SOLVED, ~greedy.isnan()),
        **_share(name, (drawn >= SOLVED).any(1), ~drawn.isnan().all(1)),
    }


def _share(name: str, right: Tensor, judged: Tensor) -> Result:
    """right, judged [P] bool -> the share of the judged that are right, with its interval."""
    solved, prompts = int(right.sum()), int(judged.sum())
    if not prompts:
        return {name: None}
    return {name: solved / prompts, f"{name}_interval": list(wilson_interval(solved, prompts))}


def unscored(greedy: Tensor, drawn: Tensor) -> Result:
    """greedy [P], drawn [P, K] -> the shares that nobody could judge."""
    return {
        "greedy_unscored": float(greedy.isnan().float().mean()),
        "sampled_unscored": float(drawn.isnan().float().mean()),
    }


def _summary(greedy: Tensor, drawn: Tensor, totals: dict[str, float], *, with_kl: bool) -> Result:
    """greedy [P], drawn [P, K] -> one flat dict."""
    result: Result = {
        **scores(greedy, drawn),
        **unscored(greedy, drawn),
        "entropy": totals["entropy"] / max(totals["tokens"], 1.0),
        "mean_length": totals["tokens"] / drawn.numel(),
        "finished": totals["finished"] / drawn.numel(),
    }
    if with_kl:
        result["kl"] = totals["kl"] / drawn.numel()
    return result


def means(greedy: Tensor, drawn: Tensor) -> Result:
    """greedy [P], drawn [P, K] -> means over prompts of their judged answers' means, with intervals; None of none.

    NaN is an answer that was not judged.
    """
    result: Result = {}
    for name, values in (("greedy", greedy.unsqueeze(1)), ("sampled", drawn)):
        means = values.double().nanmean(1)
        known = means[~means.isnan()]
        result[name] = float(known.mean()) if len(known) else None
        if len(known):
            result[f"{name}_interval"] = list(bootstrap_interval(known.tolist()))
    return result


def numbers(result: Result, *, prefix: str) -> dict[str, float]:
    """The scalars of a result as metrics, NaN for a mean of nothing; intervals stay in eval.json."""
    scalars = {name: value for name, value in result.items() if value is None or isinstance(value, int | float)}
    return {f"{prefix}/{name}": math.nan if value is None else float(value) for name, value in scalars.items()}


def _steering(source: Path, policy: LanguagePolicy, beta: float | None) -> AdvantageSteering | None:
    """What the folder's value heads do to the decoding. Raises UserError for a beta without heads."""
    steering = AdvantageSteering.load(source, policy)
    if beta is None:
        return steering
    if steering is None:
        raise UserError(f"evaluation.beta: {source} has no value heads, so nothing can steer; leave beta out")
    return AdvantageSteering(steering.heads, beta=beta, top_k=steering.top_k)


def evaluate_run(run_folder: str | Path, config: EvaluateConfig = EvaluateConfig()) -> dict[str, Result]:
    """Evaluate a run's checkpoint on its task's held-out prompts and write RUN/eval.json.

    Returns split -> what `evaluate_policy` returns and, of a run that cuts or skips (texts.cut, skip_long_prompts),
    prompts_without_room: how many were left out because they leave no room for an answer. Raises UserError if the
    folder holds no run with a checkpoint, a split does not exist or is empty, or a prompt that may not be left out
    leaves no room.
    """
    folder = Path(run_folder)
    checkpoint, results = measure_run(folder, config)
    written = {"checkpoint": checkpoint, "seed": config.seed, "splits": results}
    write_atomically(folder / "eval.json", json.dumps(written, indent=2) + "\n")
    return results


def measure_run(folder: Path, config: EvaluateConfig) -> tuple[str, dict[str, Result]]:
    """As `evaluate_run`, without writing: the checkpoint's name, and split -> figures."""
    values = read_tree(folder / "config.yaml").values
    rewards: dict[str, float] = values.get("rewards") or {}
    task = build_task(
        build_from_dict(values.get("task") or {}, TaskConfig, str(folder / "config.yaml")), rewards=rewards
    )
    source = _source(folder, config.checkpoint)
    tokenizer = load_tokenizer(find_checkpoint(folder, "auto") / "policy" if source == folder / START else source)
    device = find_device(config.device, setting="device")
    policy = LanguagePolicy.from_pretrained(source).eval().to(device)
    policy.steering = _steering(source, policy, config.beta)
    reference = None
    if config.reference is not None:
        reference = load_reference(config.reference, tokenizer)
    elif (folder / START).is_dir():
        reference = LanguagePolicy.from_pretrained(folder / START).eval()
    if reference is not None:
        reference.to(device)
    limit = (values.get("generation") or {}).get("max_new_tokens")
    skipping = bool((values.get("texts") or {}).get("cut") or values.get("skip_long_prompts"))
    results = {}
    for split in chosen_splits(task, config.splits):
        chosen = task.splits[split][: config.prompts]
        longest = limit or task.max_new_tokens
        fitting = chosen
        if skipping:
            fitting = skipping_long(chosen, tokenizer, context=policy.context, max_new_tokens=longest, what=split)
        require_room(
            fitting, tokenizer, context=policy.context, max_new_tokens=longest, limited_by="", new_model=False
        )
        results[split] = evaluate_policy(
            policy,
            tokenizer,
            replace(task, splits={**task.splits, split: fitting}),
            split=split,
            config=config,
            max_new_tokens=limit,
            reference=reference,
            rewards=rewards if config.own_rewards else None,
            rewards_timeout=values.get("rewards_timeout"),
        )
        if skipping:
            results[split]["prompts_without_room"] = len(chosen) - len(fitting)
    return START if source == folder / START else source.parent.name, results


def chosen_splits(task: Task, named: Sequence[str]) -> tuple[str, ...]:
    """The splits to measure: the named ones or, of those with prompts, all but "validation".

    Raises UserError for one that the task has not or that is empty, and where nothing is left.
    """
    for split in named:
        if split not in task.splits:
            raise UserError(f"evaluation.splits: this task has no {split!r}; it has {', '.join(task.splits)}")
        if not task.splits[split]:
            raise UserError(f"evaluation.splits: {split!r} of this task is empty")
    found = tuple(named) or tuple(name for name, rows in task.splits.items() if rows and name != "validation")
    if not found:
        raise UserError(
            "this task keeps nothing for a test; say splits=[validation], or task.rows.test=0.1 in training"
        )
    return found


def _source(folder: Path, checkpoint: Literal["auto", "best", "last", "start"]) -> Path:
    """Where a run's policy lies. Raises UserError for one that is not there."""
    if checkpoint != "start":
        return find_checkpoint(folder, checkpoint) / "policy"
    if not (folder / START).is_dir():
        raise UserError(
            f"{folder}: checkpoint=start: this run kept no policy of its start; evaluate that one itself"
        )
    return folder / START


def load_reference(path: str, tokenizer: PreTrainedTokenizerBase) -> LanguagePolicy:
    """A model that a KL is measured to. Raises UserError for none, or one that reads another tokenizer's tokens."""
    source = model_folder(path)
    reference = LanguagePolicy.from_pretrained(source).eval()
    require_known_tokens(tokenizer, reference.model, path=path)
    own = Path(source, "tokenizer_config.json").is_file()  # a run's own reference is a model alone
    if own and load_tokenizer(source).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"evaluation.reference: {path} reads another tokenizer's tokens than the policy, so there is no KL "
            "between them"
        )
    return reference
