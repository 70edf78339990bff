"""Drawing completions of training prompts, scoring them, and describing them under TRL's names."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from experiment.errors import UserError
from llm_rlhf.data.texts import columns_of, encode_prompts
from llm_rlhf.models.causal import LanguagePolicy
from llm_rlhf.models.generation import GenerationConfig, Samples, generate
from llm_rlhf.models.tokenizer import decode_completions, end_ids, pad_id
from llm_rlhf.rewards.functions import RewardSet, Scores, resolve
from llm_rlhf.rewards.safety import SafetyConfig, constrained
from llm_rlhf.tasks.task import Task
from policy_core.grpo import overlong_punishment
from policy_core.kl import KLConfig, kl_rewards
from policy_core.rollout import Rollout

Cut = Literal["penalise", "drop", "bootstrap"]
AT_ONCE = 2**26
"""Logits of one pass that judges what was drawn: 256 MiB of float32, and as much again for their log-softmax."""


@dataclass(frozen=True)
class OverlongConfig:
    """A reward for ending in time, beside the others (DAPO's soft overlong punishment, 2503.14476 eq. 13).

    0 for a completion of up to max_new_tokens - buffer tokens (its EOS is one), falling linearly to -weight at
    max_new_tokens, so that the punishment is felt before completions are cut.

    max_new_tokens  null = the generation's limit
    """

    buffer: int
    max_new_tokens: int | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.buffer < 1 or (self.max_new_tokens is not None and self.max_new_tokens < self.buffer):
            raise ValueError("overlong.buffer must be at least 1 and at most overlong.max_new_tokens")
        if self.weight < 0:
            raise ValueError(f"overlong.weight must not be negative, got {self.weight}")


@dataclass(frozen=True)
class ShapingConfig:
    """What becomes of scores before a policy learns from them.

    cut     what a completion is that reached max_new_tokens without EOS:
            "penalise"  finished: it ends there, and missing_eos_penalty is subtracted from its score
            "drop"      not there: it is masked out whole, so neither its score nor its KL teaches (2503.14476
                        section 3.4); metrics and the KL's controller still count it
            "bootstrap" unfinished: it was cut, and the value of what would have come stands for the rest of its
                        score; needs a critic
            null        what generation.cut_is_end says: "penalise" for true (the default), "bootstrap" for false
    missing_eos_penalty     in the score's own units
    scale   divide scores by their standard deviation: "batch": of this rollout; "running": of all scores of the run
            so far; "none". Nothing is subtracted, so a score keeps its sign, and the penalty, its units
    """

    cut: Cut | None = None
    missing_eos_penalty: float = 0.0
    scale: Literal["none", "batch", "running"] = "none"

    def __post_init__(self) -> None:
        if self.missing_eos_penalty < 0:
            raise ValueError(f"shaping.missing_eos_penalty must not be negative, got {self.missing_eos_penalty}")
        if self.missing_eos_penalty > 0 and self.cut in ("drop", "bootstrap"):
            raise ValueError(f"shaping.missing_eos_penalty is of shaping.cut penalise, not of {self.cut}")

    def cut_of(self, generation: GenerationConfig) -> Cut:
        """What is done with cut completions. Raises ValueError where the two sections contradict each other."""
        if self.cut is None and self.missing_eos_penalty == 0:
            return "penalise" if generation.cut_is_end else "bootstrap"
        chosen = self.cut or "penalise"
        if not generation.cut_is_end and chosen != "bootstrap":
            raise ValueError(f"shaping.cut {chosen} contradicts generation.cut_is_end false; leave the latter out")
        return chosen

    def require_no_bootstrap(self, generation: GenerationConfig) -> None:
        """For recipes without values. Raises ValueError where cut completions would bootstrap."""
        if self.cut_of(generation) == "bootstrap":
            raise ValueError("shaping.cut bootstrap needs a critic, and there is none here: penalise or drop")

    def require_selection(self, generation: GenerationConfig) -> None:
        """For recipes that choose among completions. Raises ValueError for what a choice cannot have."""
        self.require_no_bootstrap(generation)
        if self.scale != "none":
            raise ValueError("shaping.scale is of policy gradients: a choice is by the scores as they are")


@dataclass
class Spread:
    """Count, mean and sum of squared deviations of numbers that come in batches (Chan 1979)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values: Tensor) -> None:
        """Take in a batch [N]."""
        if values.numel() == 0:
            return
        size, mean = float(values.numel()), float(values.double().mean())
        squares = float((values.double() - mean).square().sum())
        total, step = self.count + size, mean - self.mean
        self.squares += squares + step**2 * self.count * size / total
        self.mean += step * size / total
        self.count = total

    @property
    def deviation(self) -> float:
        """The population's standard deviation; 0 of nothing."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0


@dataclass
class Shaper:
    """Scores -> what is learned from; `spread` is of every score of the run, where it scales by it."""

    config: ShapingConfig
    cut: Cut
    spread: Spread = field(default_factory=Spread)

    @property
    def cut_is_end(self) -> bool:
        """What `to_rollout` does with a cut completion."""
        return self.cut != "bootstrap"

    def judged(self, samples: Samples, scores: Scores) -> Scores:
        """Scores less the penalty of those without EOS, or without those rows."""
        if self.cut == "drop":
            return replace(scores, scored=scores.scored & samples.finished)
        if self.config.missing_eos_penalty == 0:
            return scores
        penalised = scores.total - self.config.missing_eos_penalty * (~samples.finished).float()
        return replace(scores, total=torch.where(scores.scored, penalised, 0.0))

    def scaled(self, scores: Scores) -> tuple[Scores, dict[str, float]]:
        """Judged scores by their standard deviation, where they differ at all; and metrics. Once a rollout."""
        divisor, metrics = self.divisor(scores)
        return replace(scores, total=scores.total / divisor), metrics

    def divisor(self, scores: Scores) -> tuple[float, dict[str, float]]:
        """What judged scores are divided by, and metrics. Once a rollout."""
        if self.config.scale == "none":
            return 1.0, {}
        if self.config.scale == "batch":
            self.spread = Spread()
        self.spread.add(scores.total[scores.scored])
        deviation = self.spread.deviation
        return deviation if deviation > 1e-8 else 1.0, {"objective/score_deviation": deviation}

    def state_dict(self) -> dict[str, float]:
        """What the running deviation is made of."""
        return {"count": self.spread.count, "mean": self.spread.mean, "squares": self.spread.squares}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from `state_dict()`."""
        self.spread = Spread(**{name: float(value) for name, value in state.items()})


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
    overlong: OverlongConfig | None = None

    @property
    def max_new_tokens(self) -> int:
        """The configured limit, or the task's."""
        return self.generation.max_new_tokens or self.task.max_new_tokens

    def draw(
        self, rows: Sequence[int], *, samples_per_prompt: int, drawn_before: int, bootstrap: bool = False
    ) -> tuple[Samples, Scores]:
        """Complete the training prompts `rows` and score what comes.

        drawn_before    completions that the run had drawn before, for the column sample_index
        bootstrap       compute the values that completions which were cut would have gone on from
        """
        samples = generate(
            self.policy,
            [self.prompts[row] for row in rows],
            samples_per_prompt=samples_per_prompt,
            max_new_tokens=self.max_new_tokens,
            ends=end_ids(self.tokenizer, self.policy.model),
            pad=pad_id(self.tokenizer),
            generator=self.generator,
            bootstrap=bootstrap,
        )
        which = [row for row in rows for _ in range(samples_per_prompt)]
        columns = {name: [column[row] for row in which] for name, column in self.columns.items()}
        columns["sample_index"] = list(range(drawn_before, drawn_before + len(which)))
        columns["finished"] = samples.finished.tolist()
        texts = decode_completions(self.tokenizer, samples.completions())
        scores = self.rewards([self.task.train[row].prompt for row in which], texts, columns)
        if not scores.scored.any():
            warnings.warn(
                f"no reward function scored any of {len(texts)} completions (they answered None): nothing is "
                "learned from these",
                stacklevel=2,
            )
        return samples, scores if self.overlong is None else self._with_overlong(samples, scores, self.overlong)

    def _with_overlong(self, samples: Samples, scores: Scores, config: OverlongConfig) -> Scores:
        """The scores with the reward for ending in time among them, for what was scored at all."""
        limit = config.max_new_tokens or self.max_new_tokens
        punishment = overlong_punishment(samples.mask.sum(1), max_length=limit, cache=config.buffer)
        total = torch.where(scores.scored, scores.total + config.weight * punishment, 0.0)
        return replace(scores, total=total, by_name={**scores.by_name, "overlong": punishment})


def build_sampler(
    policy: LanguagePolicy,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    rewards: dict[str, float],
    generation: GenerationConfig,
    seed: int,
    rewards_timeout: float | None = None,
    overlong: OverlongConfig | None = None,
    safety: SafetyConfig | None = None,
) -> Sampler:
    """A sampler with its own generator. Raises UserError for rewards or rules that cannot be used."""
    columns = columns_of(task.train)
    weights = rewards or task.gold
    resolved = resolve(weights, own=task.rewards, columns=list(columns), timeout=rewards_timeout)
    resolved = constrained(resolved, safety or SafetyConfig())
    generator = torch.Generator().manual_seed(seed)
    prompts = encode_prompts(tokenizer, [example.prompt for example in task.train])
    sampler = Sampler(policy, tokenizer, task, resolved, generation, generator, prompts, columns, overlong)
    if overlong is not None and (overlong.max_new_tokens or sampler.max_new_tokens) < overlong.buffer:
        raise UserError(
            f"overlong.buffer {overlong.buffer} is more than the {sampler.max_new_tokens} tokens of a completion"
        )
    return sampler


def joined(parts: Sequence[Samples], *, pad: int) -> Samples:
    """Several draws with the same limit as one; prompts are numbered through, and all completions aligned."""
    if len(parts) == 1:
        return parts[0]
    starts = [part.mask.shape[1] - _new_columns(part) for part in parts]
    before = max(starts)

    def columns(name: str, fill: float = 0) -> Tensor:
        return torch.cat(
            [
                torch.nn.functional.pad(getattr(part, name), (before - start, 0), value=fill)
                for part, start in zip(parts, starts, strict=True)
            ]
        )

    final = [part.final_values for part in parts if part.final_values is not None]
    prompts, first = [], 0
    for part in parts:
        prompts.append(part.prompt + first)
        first += int(part.prompt.max()) + 1
    return Samples(
        input_ids=columns("input_ids", pad),
        attention_mask=columns("attention_mask"),
        mask=columns("mask"),
        finished=torch.cat([part.finished for part in parts]),
        log_probs=columns("log_probs"),
        entropy=columns("entropy"),
        values=None if parts[0].values is None else columns("values"),
        prompt=torch.cat(prompts),
        final_values=torch.cat(final) if len(final) == len(parts) else None,
    )


def _new_columns(samples: Samples) -> int:
    """How many columns completions have: from the first drawn token on."""
    return samples.mask.shape[1] - int(samples.mask.any(0).nonzero()[0])


def joined_scores(parts: Sequence[Scores]) -> Scores:
    """The scores of several draws by the same functions as one."""
    if len(parts) == 1:
        return parts[0]
    broken = [part.broken for part in parts if part.broken is not None]
    return Scores(
        total=torch.cat([part.total for part in parts]),
        scored=torch.cat([part.scored for part in parts]),
        by_name={name: torch.cat([part.by_name[name] for part in parts]) for name in parts[0].by_name},
        broken=torch.cat(broken) if broken else None,
    )


@torch.no_grad()
def recomputed_log_probs(policy: LanguagePolicy, samples: Samples) -> Tensor:
    """Log-probs [B, T] of the drawn tokens by the forward pass that training uses, 0 elsewhere.

    What sampling says of its tokens is that up to rounding. Where it is not (bfloat16 decoding, another engine), a
    rollout's old_log_probs must be these, or the first ratio is not 1: `settled_log_probs` sees to that.

    Taken in passes of as many rows as give AT_ONCE logits; the rows of a prompt stay together.
    """
    if not bool(samples.mask.any()):
        return torch.zeros_like(samples.log_probs)
    observations = samples.observations()
    together = int((samples.prompt == samples.prompt[0]).sum())
    size = AT_ONCE // (_new_columns(samples) * int(policy.model.config.get_text_config().vocab_size))
    passes = torch.arange(len(samples.mask)).split(max(size // together, 1) * together)
    parts = [
        policy.log_probs({name: values[rows] for name, values in observations.items()}, samples.input_ids[rows])
        for rows in passes
    ]
    return torch.where(samples.mask, torch.cat(parts), 0.0)


def settled_log_probs(
    policy: LanguagePolicy, samples: Samples, *, compare: bool = False
) -> tuple[Samples, dict[str, float]]:
    """The samples with the log-probs that an update starts from; and sampling/logprob_gap, the largest difference
    of a token to sampling's in nats, where it is known.

    In float32 those are sampling's own, which are compared with the training forward's only on demand. In bf16
    they differ by hundredths of a nat, as cached and whole passes round apart: the training forward's replace them,
    and sampling/mismatch_kl is KL(what sampled || policy), nats a token. `with_behaviour` keeps what they were.
    """
    exact = policy.precision == "float32"
    if exact and not compare:
        return samples, {}
    recomputed = recomputed_log_probs(policy, samples)
    difference = samples.log_probs - recomputed
    gap = {
        "sampling/logprob_gap": float(difference.abs().max()),
        "sampling/mismatch_kl": float(difference.sum() / samples.mask.sum().clamp(min=1)),
    }
    return samples if exact else replace(samples, log_probs=recomputed), gap


def with_behaviour(rollout: Rollout, drawn: Samples) -> Rollout:
    """The rollout with the log-probs that its tokens were drawn with, where it starts from others (bf16): the
    update weighs what is learned by the difference (`ppo.mismatch_cap`)."""
    if torch.equal(rollout.old_log_probs, drawn.log_probs):
        return rollout
    return replace(rollout, behaviour_log_probs=drawn.log_probs)


def with_dense_rewards(rollout: Rollout, dense: Tensor) -> Rollout:
    """The rollout with a reward for every token beside those it has: what a process reward model says.

    dense   [B, T], 0 on prompts and padding; rows that are masked out whole (unscored, dropped) stay without

    Raises ValueError for another shape, numbers that are not finite, or a reward where nothing was decided.
    """
    if dense.shape != rollout.rewards.shape:
        raise ValueError(f"dense rewards must be {tuple(rollout.rewards.shape)}, got {tuple(dense.shape)}")
    if not torch.isfinite(dense).all():
        raise ValueError("dense rewards must be finite")
    stray = (dense != 0) & ~rollout.mask & rollout.mask.any(1, keepdim=True)
    if stray.any():
        row, column = stray.nonzero()[0].tolist()
        raise ValueError(
            f"row {row}, column {column}: a dense reward lies on a token that the policy did not choose"
        )
    return replace(rollout, rewards=rollout.rewards + torch.where(rollout.mask, dense, 0.0).to(rollout.rewards))


def reference_log_probs(reference: LanguagePolicy, samples: Samples) -> Tensor:
    """Log-probs [B, T] of the drawn tokens under the frozen reference, 0 elsewhere."""
    return recomputed_log_probs(reference, samples)


def kl_spent(samples: Samples, ref_log_probs: Tensor) -> Tensor:
    """[B] log-ratio of each completion to the reference in nats: its mean estimates the KL."""
    return torch.where(samples.mask, samples.log_probs - ref_log_probs, 0.0).sum(1)


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
        metrics["objective/kl"] = float(kl_spent(samples, ref_log_probs).mean())
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
        "ptx": "loss/ptx",
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
