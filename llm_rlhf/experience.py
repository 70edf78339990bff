"""Drawing completions of training prompts, scoring them, and describing them under TRL's names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llm_rlhf.generation import GenerationConfig, Samples, generate
from llm_rlhf.models import LanguagePolicy
from llm_rlhf.rewards import RewardSet, Scores, resolve
from llm_rlhf.tasks.task import Task
from llm_rlhf.text_data import columns_of, encode_prompts
from llm_rlhf.tokenizer import decode_completions, pad_id
from policy_core.kl import KLConfig, kl_rewards
from policy_core.rollout import Rollout


@dataclass(frozen=True)
class Sampler:
    """Everything that turns training prompts into scored completions; prompts are their tokens, by row."""

    policy: LanguagePolicy
    tokenizer: PreTrainedTokenizerBase
    task: Task
    rewards: RewardSet
    generation: GenerationConfig
    generator: torch.Generator
    prompts: list[list[int]]
    columns: dict[str, list[Any]]

    @property
    def max_new_tokens(self) -> int:
        """The configured limit, or the task's."""
        return self.generation.max_new_tokens or self.task.max_new_tokens

    def draw(self, rows: Sequence[int], *, samples_per_prompt: int, drawn_before: int) -> tuple[Samples, Scores]:
        """Complete the training prompts `rows` and score what comes.

        drawn_before    completions that the run had drawn before, for the column sample_index
        """
        samples = generate(
            self.policy,
            [self.prompts[row] for row in rows],
            samples_per_prompt=samples_per_prompt,
            max_new_tokens=self.max_new_tokens,
            eos=int(self.tokenizer.eos_token_id),
            pad=pad_id(self.tokenizer),
            generator=self.generator,
        )
        which = [row for row in rows for _ in range(samples_per_prompt)]
        columns = {name: [column[row] for row in which] for name, column in self.columns.items()}
        columns["sample_index"] = list(range(drawn_before, drawn_before + len(which)))
        texts = decode_completions(self.tokenizer, samples.completions(without=int(self.tokenizer.eos_token_id)))
        return samples, self.rewards([self.task.train[row].prompt for row in which], texts, columns)


def build_sampler(
    policy: LanguagePolicy,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    rewards: dict[str, float],
    generation: GenerationConfig,
    seed: int,
) -> Sampler:
    """A sampler with its own generator. Raises UserError for rewards that cannot be used."""
    columns = columns_of(task.train)
    weights = rewards or {task.default_reward: 1.0}
    resolved = resolve(weights, own=task.rewards, columns=list(columns))
    generator = torch.Generator().manual_seed(seed)
    prompts = encode_prompts(tokenizer, [example.prompt for example in task.train])
    return Sampler(policy, tokenizer, task, resolved, generation, generator, prompts, columns)


def reference_log_probs(reference: LanguagePolicy, samples: Samples) -> Tensor:
    """Log-probs [B, T] of the drawn tokens under the frozen reference, 0 elsewhere."""
    with torch.no_grad():
        log_probs = reference.evaluate(samples.observations(), samples.input_ids).log_probs
    return torch.where(samples.mask, log_probs, 0.0)


def sample_metrics(samples: Samples, scores: Scores, ref_log_probs: Tensor | None) -> dict[str, float]:
    """TRL's names: what was drawn, what it earned, and how far from the reference it is (nats a completion)."""
    lengths = samples.mask.sum(1).float()
    metrics = {
        **scores.metrics(),
        "completions/mean_length": float(lengths.mean()),
        "completions/finished": float(samples.finished.float().mean()),
        "objective/entropy": float(samples.entropy.sum(1).mean()),
        "policy/entropy_avg": float(samples.entropy.sum() / samples.mask.sum().clamp(min=1)),
    }
    if ref_log_probs is not None:
        difference = torch.where(samples.mask, samples.log_probs - ref_log_probs, 0.0)
        metrics["objective/kl"] = float(difference.sum(1).mean())
    return metrics


def policy_metrics(statistics: dict[str, float]) -> dict[str, float]:
    """`ppo.update`'s statistics under TRL's names; what has none there goes under `policy/`."""
    names = {
        "approx_kl": "policy/approxkl_avg",
        "clip_fraction": "policy/clipfrac_avg",
        "policy_loss": "loss/policy_avg",
        "value_loss": "loss/value_avg",
        "value_clip_fraction": "val/clipfrac_avg",
        "explained_variance": "val/explained_variance",
        "entropy": "policy/entropy_updated",
        "reference_kl": "loss/reference_kl",
    }
    return {names.get(name, f"policy/{name}"): value for name, value in statistics.items()}


def with_kl_rewards(rollout: Rollout, *, config: KLConfig, coef: float) -> tuple[Rollout, dict[str, float]]:
    """The rollout with the KL penalty in its rewards, where the configuration puts it there; and metrics."""
    if config.placement != "reward" or coef == 0 or rollout.ref_log_probs is None:
        return rollout, {}
    shaped, kl = kl_rewards(
        rewards=rollout.rewards,
        old_log_probs=rollout.old_log_probs,
        ref_log_probs=rollout.ref_log_probs,
        mask=rollout.mask,
        coef=coef,
        estimator=config.estimator,
    )
    metrics = {
        "objective/non_score_reward": float(-coef * kl.sum(1).mean()),
        "objective/rlhf_reward": float(shaped.sum(1).mean()),
    }
    return replace(rollout, rewards=shaped), metrics
