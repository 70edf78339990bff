"""What the core asks of a policy, whatever its body."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.nn import Parameter


@dataclass(frozen=True)
class Evaluation:
    """A policy's view of decisions that were made, under its present weights.

    log_probs   [B, T] or [B, T, F] nats
    entropy     as log_probs
    values      [B, T], or None for a policy without a critic
    """

    log_probs: Tensor
    entropy: Tensor
    values: Tensor | None = None


class Policy(Protocol):
    """Judges decisions. How actions are sampled is its adapter's affair (a simulator's loop, a token loop)."""

    def evaluate(self, observations: Any, actions: Any) -> Evaluation:
        """The decisions in `actions`, leading with [B, T], under the present weights, with gradients.

        Both are whatever the adapter put into the rollout, a tensor or a mapping of tensors.
        """
        ...

    def parameters(self) -> Iterator[Parameter]:
        """All trainable parameters."""
        ...

    def critic_parameters(self) -> Iterator[Parameter]:
        """Those that only the value depends on: the ones a critic warm-up trains. Empty without a critic."""
        ...


class Actor(Protocol):
    """What offline and off-policy learning ask of a policy, in the units of their data."""

    def distribution_of(self, observations: Any) -> Any:
        """Observations [N, ...] -> one of policy_core.distributions; CQL and SAC need one that reparameterises."""
        ...

    def values_of(self, observations: Any) -> Tensor:
        """Observations [N, ...] -> state values [N]."""
        ...

    def both_of(self, observations: Any) -> tuple[Any, Tensor]:
        """The distribution and the values, in one pass where that is cheaper."""
        ...

    def actor_parameters(self) -> Iterator[Parameter]:
        """Those that the distribution depends on."""
        ...
