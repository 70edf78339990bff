"""What reinforcement learning of a language policy moves, whoever it plays with, and what it must remember."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from experiment.errors import UserError
from llm_rlhf.data.texts import Batches
from llm_rlhf.models.causal import LanguagePolicy
from llm_rlhf.online.critic import ActorCritic, ValueModel
from llm_rlhf.online.experience import Shaper
from llm_rlhf.online.monitor import Monitor
from llm_rlhf.online.pretraining_mix import PretrainingMix
from policy_core.kl import KLController
from policy_core.policy import Policy
from policy_core.ppo import AuxiliaryLoss, PPOConfig
from policy_core.schedules import scheduled, set_learning_rate


@dataclass
class Counters:
    """How much a run has done: what `samples`, `tokens` and `time` limits are counted by."""

    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """All three."""
        return {"samples": self.samples, "tokens": self.tokens, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.samples, self.tokens = int(state["samples"]), int(state["tokens"])
        self.seconds = float(state["seconds"])


def progress_of(step: int, total: int, counters: Counters, max_seconds: float | None) -> float:
    """How far a run is before update `step`, 0..1: by updates or, where that is further, by its time limit."""
    if max_seconds is not None and max_seconds <= 0:
        raise UserError(f"max_seconds must be above 0, got {max_seconds:g}")
    by_time = 0.0 if max_seconds is None else counters.seconds / max_seconds
    return min(max((step - 1) / total, by_time), 1.0)


class Imitated(Protocol):
    """Texts whose likelihood is learned beside the policy's own experience."""

    def loss(self, policy: LanguagePolicy) -> tuple[Tensor, dict[str, Tensor]]:
        """The term on its next texts, and its metrics."""
        ...


@dataclass(kw_only=True)
class Moved:
    """What PPO and GRPO move and remember, of single answers and of several turns.

    sampling    source of what is drawn
    critic      a value model of its own, or None where the policy has a value head or there are no values
    ptx         texts whose likelihood is learned beside, or None
    """

    policy: LanguagePolicy
    reference: LanguagePolicy
    optimizer: torch.optim.Optimizer
    prompts: Batches
    sampling: torch.Generator
    shuffling: torch.Generator
    controller: KLController
    counters: Counters
    shaper: Shaper
    monitor: Monitor
    critic: ValueModel | None = None
    ptx: PretrainingMix | None = None

    @property
    def trained(self) -> Policy:
        """What `ppo.update` improves: the policy, with its separate value model where there is one."""
        return self.policy if self.critic is None else ActorCritic(self.policy, self.critic)

    def imitated(self) -> list[Imitated]:
        """Texts that are learned from beside, as the configuration asks."""
        return [] if self.ptx is None else [self.ptx]

    def auxiliary(self) -> AuxiliaryLoss | None:
        """The terms of `imitated`, where there are any."""
        asked = self.imitated()
        if not asked:
            return None

        def loss() -> tuple[Tensor, dict[str, Tensor]]:
            parts = [texts.loss(self.policy) for texts in asked]
            total = parts[0][0]
            for term, _ in parts[1:]:
                total = total + term
            return total, {name: value for _, metrics in parts for name, value in metrics.items()}

        return loss

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights, which have a folder of their own."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "prompts": self.prompts.state_dict(),
            "controller": self.controller.state_dict(),
            "counters": self.counters.state_dict(),
            "shaper": self.shaper.state_dict(),
            "ptx": None if self.ptx is None else self.ptx.state_dict(),
            "monitor": self.monitor.state_dict(),
            "sampling": self.sampling.get_state(),
            "shuffling": self.shuffling.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; what its run began without (a term that was added since) is new."""
        for name in ("optimizer", "prompts", "controller", "counters"):
            getattr(self, name).load_state_dict(state[name])
        for name in ("shaper", "monitor", "ptx"):
            part = getattr(self, name)
            if part is not None and state.get(name) is not None:
                part.load_state_dict(state[name])
        self.sampling.set_state(state["sampling"])
        self.shuffling.set_state(state["shuffling"])


def set_rates(
    learner: Moved,
    ppo: PPOConfig,
    *,
    step: int,
    total: int,
    max_seconds: float | None,
    critic_rate: float | None = None,
) -> float:
    """Set the learning rates of update `step`; returns the policy's.

    critic_rate     the first rate of a separate value model, the optimizer's last group; None = the policy's
    """
    progress = progress_of(step, total, learner.counters, max_seconds)

    def now(initial: float) -> float:
        return scheduled(initial, schedule=ppo.schedule, progress=progress, warmup=ppo.warmup)

    rate = now(ppo.learning_rate)
    set_learning_rate(learner.optimizer, rate)
    if critic_rate is not None:
        learner.optimizer.param_groups[-1]["lr"] = now(critic_rate)
    return rate
