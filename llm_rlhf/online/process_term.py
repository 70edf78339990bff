"""A process reward model's part in PPO: every step of a completion is paid where it ends."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_rlhf.models.generation import Samples
from llm_rlhf.online.experience import Sampler
from llm_rlhf.rewards.functions import Scores
from llm_rlhf.rewards.process_reward import Form, StepScorer, dense_rewards


@dataclass(frozen=True)
class ProcessTermConfig:
    """model: a process reward model's run or folder, null = none; weight: of what it pays; form: see
    `process_reward.paid`."""

    model: str | None = None
    weight: float = 1.0
    form: Form = "change"

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"process.weight must be a finite number, got {self.weight}")


@dataclass(frozen=True)
class ProcessTerm:
    """A loaded scorer, and the sampler whose completions it pays."""

    config: ProcessTermConfig
    scorer: StepScorer
    sampler: Sampler

    @classmethod
    def of(cls, config: ProcessTermConfig, sampler: Sampler) -> ProcessTerm | None:
        """None where no model is named.

        Raises UserError where there is none at the place, or it reads the policy's tokens and has no room for the
        longest completion. How many another tokenizer makes of a completion is known only when there is one.
        """
        if config.model is None:
            return None
        scorer = StepScorer.from_pretrained(config.model)
        if scorer.scorer.tokenizer.get_vocab() == sampler.tokenizer.get_vocab():
            longest = max(len(prompt) for prompt in sampler.prompts)
            scorer.require_room(prompt=longest, completion=sampler.max_new_tokens, setting="process.model")
        return cls(config, scorer, sampler)

    def pay(self, rows: Sequence[int], samples: Samples, scores: Scores) -> tuple[Tensor, dict[str, float]]:
        """[B, T], 0 but at the steps' last tokens; no step of a completion that broke a rule is paid. And metrics:
        rewards/process/unscored, the share of completions whose steps the scorer could not find, so did not pay.

        rows: the training prompts that were drawn for, in order.
        """
        prompts = [self.sampler.task.train[rows[which]].prompt for which in samples.prompt.tolist()]
        dense, known = dense_rewards(
            self.scorer,
            prompts=prompts,
            input_ids=samples.input_ids,
            mask=samples.mask,
            tokenizer=self.sampler.tokenizer,
            form=self.config.form,
        )
        if not known.any():
            warnings.warn(
                f"process.model: its tokenizer loses steps of each of {len(known)} completions: no step is paid",
                stacklevel=2,
            )
        if scores.broken is not None:
            dense = torch.where(scores.broken.unsqueeze(1), 0.0, dense)
        return self.config.weight * dense, {"rewards/process/unscored": float((~known).float().mean())}
