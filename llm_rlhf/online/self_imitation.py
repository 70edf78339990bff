"""Remembering a policy's own verified answers, and imitating them beside the policy gradient.

Self-imitation learning (Oh 2018, 1806.05635) in its simplest form: one good completion is kept per training prompt,
and every optimizer step adds the masked log-likelihood of a few of them. It is `ppo.update`'s auxiliary loss, the
place that PPO-ptx and demonstrations use too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_rlhf.models.causal import LanguagePolicy
from llm_rlhf.models.generation import Samples, at_temperature
from llm_rlhf.online.experience import Sampler
from llm_rlhf.rewards.functions import Scores
from policy_core.bc import bc_loss


@dataclass(frozen=True)
class SelfImitationConfig:
    """coef: weight of the loss, 0 = off; threshold: reward that an answer must reach; batch_size: texts a step."""

    coef: float = 0.0
    threshold: float = 1.0
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.coef < 0 or self.batch_size < 1:
            raise ValueError("self_imitation: coef must not be negative and batch_size at least 1")


class GoodAnswers:
    """The last good completion of every training prompt.

    input_ids, attention_mask, mask     [N, L + R]: prompts of at most L tokens end in column L - 1
    known                               [N] bool
    """

    def __init__(self, config: SelfImitationConfig, *, prompts: int, left: int, right: int, seed: int) -> None:
        self.config = config
        self.left = left
        self.input_ids = torch.zeros(prompts, left + right, dtype=torch.long)
        self.attention_mask = torch.zeros(prompts, left + right, dtype=torch.long)
        self.mask = torch.zeros(prompts, left + right, dtype=torch.bool)
        self.known = torch.zeros(prompts, dtype=torch.bool)
        self.generator = torch.Generator().manual_seed(seed)

    @classmethod
    def of(cls, config: SelfImitationConfig, sampler: Sampler, *, seed: int) -> GoodAnswers:
        """Room for an answer to each of the sampler's prompts."""
        longest = max(len(prompt) for prompt in sampler.prompts)
        return cls(config, prompts=len(sampler.prompts), left=longest, right=sampler.max_new_tokens, seed=seed)

    def remember(self, rows: Tensor, samples: Samples, scores: Scores) -> None:
        """Keep what reached the threshold. rows [B]: the training prompt of each sample; scores: as shaping judged
        them, so that nothing is imitated which should not teach."""
        good_samples = (scores.scored & (scores.total >= self.config.threshold)).nonzero().squeeze(1)
        if good_samples.numel() == 0:
            return
        last = {
            int(rows[sample]): int(sample) for sample in good_samples
        }  # one write a row, so order cannot matter
        good = torch.tensor(list(last.values()))
        start = int(samples.mask.any(0).nonzero()[0])
        begin = self.left - start
        end = begin + samples.input_ids.shape[1]
        for kept, seen in (
            (self.input_ids, samples.input_ids),
            (self.attention_mask, samples.attention_mask),
            (self.mask, samples.mask),
        ):
            kept[rows[good]] = 0
            kept[rows[good], begin:end] = seen[good].to(kept)
        self.known[rows[good]] = True

    def loss(self, policy: LanguagePolicy) -> tuple[Tensor, dict[str, Tensor]]:
        """coef times the mean negative log-likelihood of a random batch of good answers, at temperature 1 whatever
        the sampling's; 0 while there are none."""
        known = self.known.nonzero().squeeze(1)
        if known.numel() == 0:
            return torch.zeros((), requires_grad=True), {}
        chosen = known[torch.randint(len(known), (self.config.batch_size,), generator=self.generator)]
        input_ids, attention_mask, mask = (
            tensor[chosen] for tensor in (self.input_ids, self.attention_mask, self.mask)
        )
        observations = {"input_ids": input_ids, "attention_mask": attention_mask, "decisions": mask}
        with at_temperature(policy, 1.0):
            log_probs = policy.log_probs(observations, input_ids)
        loss, _ = bc_loss(log_probs=log_probs, mask=mask)
        return self.config.coef * loss, {"self_imitation_nll": loss.detach()}

    def state_dict(self) -> dict[str, Any]:
        """Answers and generator."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "mask": self.mask,
            "known": self.known,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        for name in ("input_ids", "attention_mask", "mask", "known"):
            getattr(self, name).copy_(state[name])
        self.generator.set_state(state["generator"])
