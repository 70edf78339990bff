"""Action values: several critics Q(s, a) evaluated as one batched product, and their slow copies."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from policy_core.masking import masked_mean
from policy_core.policy import Actor
from policy_core.rollout import Outcomes, Transitions

Metrics = dict[str, Tensor]


class EnsembleCritic(nn.Module):
    """`members` networks Q(s, a) of the same widths, no weight shared: Linear, [LayerNorm], ReLU, ..., Linear.

    The first layer keeps its state half and its action half apart, so that many actions of one state (CQL has 31)
    share the state's half. Weights start as torch's own linear layers do, uniform within 1 / sqrt(inputs).

    layer_norm   normalise every hidden layer before its activation; with few data it keeps values from running off
                 where there are none (RLPD, Ball 2023, 2302.02948 sec. 4.2)
    """

    def __init__(
        self,
        members: int,
        observation_size: int,
        action_size: int,
        hidden: Sequence[int],
        *,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        if not hidden:
            raise ValueError("a critic needs at least one hidden layer")
        self.members, self.observation_size, self.action_size = members, observation_size, action_size
        self.layer_norm = layer_norm
        inputs = observation_size + action_size
        self.state_weight = _uniform((members, observation_size, hidden[0]), inputs)
        self.action_weight = _uniform((members, action_size, hidden[0]), inputs)
        self.biases = nn.ParameterList([_uniform((members, 1, hidden[0]), inputs)])
        self.weights = nn.ParameterList()
        for fan_in, width in itertools.pairwise([*hidden, 1]):
            self.weights.append(_uniform((members, fan_in, width), fan_in))
            self.biases.append(_uniform((members, 1, width), fan_in))
        norms = list(hidden) if layer_norm else []
        self.gains = nn.ParameterList(Parameter(torch.ones(members, 1, width)) for width in norms)
        self.shifts = nn.ParameterList(Parameter(torch.zeros(members, 1, width)) for width in norms)

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """observations [N, D], actions [N, A] -> [M, N]; K actions of every state, [K, N, A] -> [M, K, N]."""
        many = actions.dim() == 3
        rows = observations.expand(self.members, *observations.shape)
        hidden = torch.baddbmm(self.biases[0], rows, self.state_weight)
        flat = actions.reshape(-1, self.action_size)
        flat = flat.expand(self.members, *flat.shape)
        if many:
            by_action = torch.bmm(flat, self.action_weight)
            count = actions.shape[0]
            hidden = (by_action.view(self.members, count, *hidden.shape[1:]) + hidden.unsqueeze(1)).flatten(1, 2)
        else:
            hidden = torch.baddbmm(hidden, flat, self.action_weight)
        hidden = self._activated(hidden, 0)
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases[1:], strict=True)):
            hidden = torch.baddbmm(bias, hidden, weight)
            if layer < last:
                hidden = self._activated(hidden, layer + 1)
        return hidden.view(self.members, *actions.shape[:-1])

    def _activated(self, hidden: Tensor, layer: int) -> Tensor:
        if self.layer_norm:
            normal = F.layer_norm(hidden, hidden.shape[-1:])
            hidden = torch.addcmul(self.shifts[layer], normal, self.gains[layer])
        return torch.relu(hidden)


@dataclass
class ActorCritic:
    """What offline and off-policy learning move: a policy, critics, and the critics' slow copy."""

    policy: Actor
    critic: EnsembleCritic
    target: EnsembleCritic

    @classmethod
    def of(cls, policy: Actor, critic: EnsembleCritic) -> ActorCritic:
        """With a copy of the critics as they are."""
        return cls(policy, critic, copy.deepcopy(critic).requires_grad_(False))


def polyak_(target: Any, online: Any, *, rate: float) -> None:
    """Move module `target` towards `online` in place: target += rate * (online - target); rate 1 copies."""
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)


def td_loss(*, q_values: Tensor, targets: Tensor, mask: Tensor, denominator: float | None = None) -> Tensor:
    """Squared error of every critic, averaged over counted decisions and summed over critics.

    q_values [M, ...], targets [...] (no gradient flows into them), mask [...] -> [].
    denominator     as in `masked_mean`
    """
    squares = (q_values - targets.detach()).square()
    return masked_mean(squares.sum(0), mask, denominator=denominator)


def bootstrap(batch: Outcomes, next_values: Tensor) -> Tensor:
    """r + discount * V(s'), without V(s') where the episode terminated; next_values [...] -> [...]."""
    return batch.rewards + batch.discount * torch.where(batch.terminated, 0.0, next_values)


def actions_of(batch: Transitions) -> Tensor:
    """The batch's actions [N, A], which for critics are one tensor."""
    assert isinstance(batch.actions, Tensor)
    return batch.actions


def of_decisions(log_probs: Tensor, batch: Transitions) -> Tensor:
    """Log-probs [N, F] of a decision's factors, or [N], -> [N]."""
    return log_probs if log_probs.dim() == batch.mask.dim() else log_probs.sum(-1)


def _uniform(shape: tuple[int, ...], fan_in: int) -> Parameter:
    bound = 1.0 / math.sqrt(fan_in)
    return Parameter(torch.empty(shape).uniform_(-bound, bound))
