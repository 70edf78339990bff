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
from policy_core.networks import MANY
from policy_core.policy import Actor
from policy_core.rollout import Outcomes, Transitions


class EnsembleCritic(nn.Module):
    """`members` networks Q(s, a) of the same widths, no weight shared: Linear, [LayerNorm], ReLU, ..., Linear.

    Weights start as torch's own linear layers do, uniform within 1 / sqrt(inputs).

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
        self.members, self.layer_norm = members, layer_norm
        sizes = [observation_size + action_size, *hidden, 1]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in itertools.pairwise(sizes):
            self.weights.append(_uniform((members, inputs, outputs), inputs))
            self.biases.append(_uniform((members, 1, outputs), inputs))
        norms = list(hidden) if layer_norm else []
        self.gains = nn.ParameterList(Parameter(torch.ones(members, 1, width)) for width in norms)
        self.shifts = nn.ParameterList(Parameter(torch.zeros(members, 1, width)) for width in norms)

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """observations [N, D], actions [N, A] -> [M, N]; K actions of every state, [K, N, A] -> [M, K, N]."""
        leading = actions.shape[:-1]
        rows = torch.cat([observations.expand(*leading, -1), actions], dim=-1).flatten(0, -2)
        if len(rows) >= MANY and rows.device.type == "cpu" and torch.get_num_threads() == 1:
            return torch.stack(self._one_by_one(rows)).view(self.members, *leading)
        hidden = rows.expand(self.members, *rows.shape)
        *inner, (last_weight, last_bias) = zip(self.weights, self.biases, strict=True)
        for layer, (weight, bias) in enumerate(inner):
            hidden = torch.baddbmm(bias, hidden, weight)
            if self.layer_norm:
                hidden = _scaled(hidden, self.gains[layer], self.shifts[layer])
            hidden = torch.relu_(hidden)
        return _values(hidden, last_weight, last_bias).view(self.members, *leading)

    def _one_by_one(self, rows: Tensor) -> list[Tensor]:
        """Every member's [R]."""
        hidden = [rows] * self.members
        *inner, (last_weight, last_bias) = zip(self.weights, self.biases, strict=True)
        for layer, (weight, bias) in enumerate(inner):
            layers = zip(hidden, weight.unbind(0), bias.unbind(0), strict=True)
            hidden = [torch.addmm(b, h, w) for h, w, b in layers]
            if self.layer_norm:
                norms = zip(hidden, self.gains[layer].unbind(0), self.shifts[layer].unbind(0), strict=True)
                hidden = [_scaled(h, gain, shift) for h, gain, shift in norms]
            hidden = [torch.relu_(h) for h in hidden]
        lasts = zip(hidden, last_weight.unbind(0), last_bias.unbind(0), strict=True)
        return [_values(h, w, b) for h, w, b in lasts]


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
    errors = torch.where(mask, q_values - targets.detach(), 0.0)
    return masked_mean(errors.square().sum(0), mask, denominator=denominator)


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


def _scaled(hidden: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(hidden, hidden.shape[-1:]), gain)


def _values(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """hidden [R, D] or [M, R, D], weight [(M), D, 1], bias [(M), 1, 1] -> [(M), R], in the weights' precision.

    A product in bfloat16 rounds values of hundreds to eight bits. A second one, which begins with the first one's
    negative, is what was rounded away.
    """
    one_member = hidden.dim() == 2
    if hidden.dtype == weight.dtype and not one_member:
        return (hidden * weight.mT).sum(-1) + bias[..., 0]  # a batched product of one column is slow
    values = torch.matmul(hidden, weight)
    if values.dtype != weight.dtype:
        with torch.no_grad():
            rest = (torch.addmm if one_member else torch.baddbmm)(-values, hidden, weight)
        values = values.to(weight.dtype) + rest
    return values.squeeze(-1) + bias[..., 0]


def _uniform(shape: tuple[int, ...], fan_in: int) -> Parameter:
    bound = 1.0 / math.sqrt(fan_in)
    return Parameter(torch.empty(shape).uniform_(-bound, bound))
