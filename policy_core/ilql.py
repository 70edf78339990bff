"""Implicit language Q-learning (Snell 2022, 2206.11871): IQL over a vocabulary, with a conservative term.

A token is a decision, and its critics say what every other token would have been worth. The policy is the language
model itself, fitted by likelihood; what was learned steers it where it writes, by `advantage_shift`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from policy_core import iql
from policy_core.cql import discrete_conservative_gap
from policy_core.iql import IQLConfig
from policy_core.metrics import Metrics
from policy_core.rollout import Outcomes

MASKED_OUT = -1e9
"""A logit that is never drawn, finite so that probability times log-probability is 0."""


@dataclass(frozen=True)
class ILQLConfig:
    """conservative_weight  of the conservative term (the paper's alpha)
    likelihood_weight    of the language model's own term; 0 leaves it to the other terms
    iql                  expectile and slow critics; above 0, inverse_temperature weighs the likelihood by advantage
    """

    conservative_weight: float = 0.1
    likelihood_weight: float = 1.0
    iql: IQLConfig = field(default_factory=lambda: IQLConfig(expectile=0.9, inverse_temperature=0.0))

    def __post_init__(self) -> None:
        if min(self.conservative_weight, self.likelihood_weight) < 0:
            raise ValueError("conservative_weight and likelihood_weight must not be negative")


def loss(
    *,
    log_probs: Tensor,
    values: Tensor,
    next_values: Tensor,
    q_values: Tensor,
    slow_q_values: Tensor,
    actions: Tensor,
    batch: Outcomes,
    config: ILQLConfig,
    denominator: float | None = None,
) -> tuple[Tensor, Metrics]:
    """What section 4 of the paper minimises over the tokens a of logged texts, h being what stands before them:

    sum over critics of (r + discount * V(h') - Q(h, a))^2
    + |expectile - 1(u < 0)| u^2 with u = min slow Q(h, a) - V(h)
    + conservative_weight * sum over critics of (log sum_b exp Q(h, b) - Q(h, a))
    - likelihood_weight * log pi_LM(a|h)

    log_probs           [...] nats, of the language model for what was written
    values, next_values [...] at each decision and at the next one of its text; no gradient flows into the latter
    q_values            [M, ..., V] of the critics, for every token
    slow_q_values       [M, ...] of their slow copy, for the token that was written
    actions             [...] int, the tokens
    denominator         counted decisions of the whole optimizer step, when this is one of several micro-batches

    Metrics: value_loss, critic_loss, conservative_gap, policy_loss, values, q_values, advantage_weight.
    """
    index = actions.long().expand(q_values.shape[:-1]).unsqueeze(-1)
    of_critics, metrics = iql.critic_loss(
        values=values,
        next_values=next_values.detach(),
        q_values=q_values.gather(-1, index).squeeze(-1),
        slow_q_values=slow_q_values,
        batch=batch,
        expectile=config.iql.expectile,
        denominator=denominator,
    )
    gaps = [
        discrete_conservative_gap(q_values=member, actions=actions, mask=batch.mask, denominator=denominator)
        for member in q_values
    ]
    gap = torch.stack(gaps).sum()
    of_policy, of_likelihood = iql.policy_loss(
        log_probs=log_probs,
        values=values,
        slow_q_values=slow_q_values,
        mask=batch.mask,
        config=config.iql,
        denominator=denominator,
    )
    total = of_critics + config.conservative_weight * gap + config.likelihood_weight * of_policy
    return total, {**metrics, **of_likelihood, "conservative_gap": gap.detach()}


def advantage_shift(
    *, logits: Tensor, slow_q_values: Tensor, values: Tensor, beta: float, top_k: int | None = None
) -> Tensor:
    """The paper's policy: log pi(a|h) = log pi_LM(a|h) + beta * (min slow Q(h, a) - V(h)), up to a constant.

    logits [..., V]; slow_q_values [M, ..., V]; values [...]
    top_k   tokens that stay possible, the best after the shift; None = all

    Returns logits [..., V]; beta 0 without top_k gives them back as they are.
    """
    if beta != 0:
        logits = logits + beta * (slow_q_values.amin(0) - values.unsqueeze(-1))
    if top_k is None or top_k >= logits.shape[-1]:
        return logits
    least = logits.topk(top_k, dim=-1).values[..., -1:]
    return torch.where(logits < least, MASKED_OUT, logits)
