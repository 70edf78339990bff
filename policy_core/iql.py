"""Implicit Q-learning (Kostrikov 2021, 2110.06169): learn from logged decisions without asking for others.

A value by expectile regression on the critics' minimum, critics by the value at the next observation, a policy by
weighted likelihood. The losses serve steps, chunks and tokens: [N] is any number of decisions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from policy_core.critics import ActorCritic, bootstrap, of_decisions, polyak_, td_loss
from policy_core.masking import masked_mean
from policy_core.metrics import Metrics
from policy_core.rollout import Outcomes, Transitions
from policy_core.traced import TracedGradient


@dataclass(frozen=True)
class IQLConfig:
    """expectile             tau of eq. 5: 0.5 is the mean, towards 1 the best that was done
    inverse_temperature   beta of eq. 7: 0 is cloning
    max_weight            bound of exp(beta * advantage)
    target_rate           share of the critics that their slow copy takes over an update
    """

    expectile: float = 0.7
    inverse_temperature: float = 3.0
    max_weight: float = 100.0
    target_rate: float = 0.005

    def __post_init__(self) -> None:
        if not 0 < self.expectile < 1:
            raise ValueError(f"expectile must be in (0, 1), got {self.expectile}")
        if self.inverse_temperature < 0 or self.max_weight <= 0:
            raise ValueError("inverse_temperature must not be negative, max_weight must be positive")
        if not 0 < self.target_rate <= 1:
            raise ValueError(f"target_rate must be in (0, 1], got {self.target_rate}")


def expectile_loss(
    *, values: Tensor, targets: Tensor, mask: Tensor, expectile: float, denominator: float | None = None
) -> Tensor:
    """Mean of |expectile - 1(u < 0)| u^2 with u = targets - values (eq. 5); equal shapes -> [].

    No gradient flows into the targets. denominator: as in `masked_mean`.
    """
    error = torch.where(mask, targets.detach() - values, 0.0)
    weight = torch.where(error < 0, 1.0 - expectile, expectile)
    return masked_mean(weight * error.square(), mask, denominator=denominator)


def advantage_weights(*, advantages: Tensor, inverse_temperature: float, max_weight: float) -> Tensor:
    """min(exp(beta * advantage), max_weight), without gradient (eq. 7); equal shapes in and out."""
    return (advantages.detach() * inverse_temperature).exp().clamp(max=max_weight)


def weighted_likelihood_loss(
    *, log_probs: Tensor, weights: Tensor, mask: Tensor, denominator: float | None = None
) -> Tensor:
    """Negative mean of weight * log-probability over counted decisions; equal shapes -> [].

    denominator: as in `masked_mean`.
    """
    return -masked_mean(weights.detach() * log_probs, mask, denominator=denominator)


def critic_loss(
    *,
    values: Tensor,
    next_values: Tensor,
    q_values: Tensor,
    slow_q_values: Tensor,
    batch: Outcomes,
    expectile: float,
    denominator: float | None = None,
) -> tuple[Tensor, Metrics]:
    """Value by expectile regression plus critics by the value at the next observation (eq. 5 and 6).

    values, next_values [...]; q_values [M, ...] of the critics, slow_q_values [M, ...] of their slow copy.
    denominator     as in `masked_mean`, of losses and metrics alike

    Metrics: value_loss, critic_loss, values, q_values.
    """
    mask = batch.mask
    value_loss = expectile_loss(
        values=values, targets=slow_q_values.amin(0), mask=mask, expectile=expectile, denominator=denominator
    )
    q_loss = td_loss(q_values=q_values, targets=bootstrap(batch, next_values), mask=mask, denominator=denominator)
    metrics = {
        "value_loss": value_loss.detach(),
        "critic_loss": q_loss.detach(),
        "values": masked_mean(values.detach(), mask, denominator=denominator),
        "q_values": masked_mean(q_values.detach().mean(0), mask, denominator=denominator),
    }
    return value_loss + q_loss, metrics


def policy_loss(
    *,
    log_probs: Tensor,
    values: Tensor,
    slow_q_values: Tensor,
    mask: Tensor,
    config: IQLConfig,
    denominator: float | None = None,
) -> tuple[Tensor, Metrics]:
    """Likelihood of what was done, weighted by its advantage (eq. 7).

    log_probs [...] nats; values [...]; slow_q_values [M, ...]; denominator as in `masked_mean`.
    Metrics: policy_loss, advantage_weight.
    """
    weights = advantage_weights(
        advantages=slow_q_values.amin(0) - values,
        inverse_temperature=config.inverse_temperature,
        max_weight=config.max_weight,
    )
    loss = weighted_likelihood_loss(log_probs=log_probs, weights=weights, mask=mask, denominator=denominator)
    weight = masked_mean(weights, mask, denominator=denominator)
    return loss, {"policy_loss": loss.detach(), "advantage_weight": weight}


@dataclass(frozen=True)
class Judged:
    """What the networks say of a batch: log_probs, values, next_values [N]; q_values, slow_q_values [M, N]."""

    log_probs: Tensor
    values: Tensor
    next_values: Tensor
    q_values: Tensor
    slow_q_values: Tensor


def judge(networks: ActorCritic, batch: Transitions) -> Judged:
    """Under the present weights; no gradient flows into next_values and slow_q_values."""
    policy = networks.policy
    with torch.no_grad():
        slow = networks.target(batch.observations, batch.actions)
        following = policy.values_of(batch.next_observations)
    distribution, values = policy.both_of(batch.observations)
    return Judged(
        log_probs=of_decisions(distribution.log_prob(batch.actions), batch),
        values=values,
        next_values=following,
        q_values=networks.critic(batch.observations, batch.actions),
        slow_q_values=slow,
    )


def critic_term(judged: Judged, batch: Transitions, config: IQLConfig) -> tuple[Tensor, Metrics]:
    """`critic_loss` of a judged batch."""
    return critic_loss(
        values=judged.values,
        next_values=judged.next_values,
        q_values=judged.q_values,
        slow_q_values=judged.slow_q_values,
        batch=batch,
        expectile=config.expectile,
    )


def policy_term(judged: Judged, batch: Transitions, config: IQLConfig) -> tuple[Tensor, Metrics]:
    """`policy_loss` of a judged batch."""
    return policy_loss(
        log_probs=judged.log_probs,
        values=judged.values,
        slow_q_values=judged.slow_q_values,
        mask=batch.mask,
        config=config,
    )


def both_terms(judged: Judged, batch: Transitions, config: IQLConfig) -> tuple[Tensor, Metrics]:
    """Their sum, at the same weights."""
    loss, metrics = critic_term(judged, batch, config)
    imitation, of_policy = policy_term(judged, batch, config)
    return loss + imitation, metrics | of_policy


def update(
    networks: ActorCritic,
    optimizer: torch.optim.Optimizer,
    batch: Transitions,
    config: IQLConfig,
    *,
    traced: TracedGradient | None = None,
) -> Metrics:
    """One step of everything, in place: all losses are taken at the weights before it and share a backward pass.

    traced  replays the gradient's operations (`traced_gradient(networks)`, kept by the caller) instead of
            autograd's: the same numbers, faster for small networks
    """
    optimizer.zero_grad()
    if traced is None:
        loss, metrics = both_terms(judge(networks, batch), batch, config)
        loss.backward()
    else:
        metrics = traced(batch, lambda judged, part, _: both_terms(judged, part, config), kind=config)
    optimizer.step()
    polyak_(networks.target, networks.critic, rate=config.target_rate)
    return metrics


def update_in_turn(
    networks: ActorCritic,
    optimizer: torch.optim.Optimizer,
    policy_optimizer: torch.optim.Optimizer,
    batch: Transitions,
    config: IQLConfig,
) -> Metrics:
    """One step of critics and value (`optimizer`), then of the policy, weighted by the value after its step.

    d3rlpy's order, a sixth slower than `update`.
    """
    judged = judge(networks, batch)
    loss, metrics = critic_term(judged, batch, config)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        values = networks.policy.values_of(batch.observations)
    imitation, of_policy = policy_term(replace(judged, values=values), batch, config)
    policy_optimizer.zero_grad()
    imitation.backward()
    policy_optimizer.step()
    polyak_(networks.target, networks.critic, rate=config.target_rate)
    return metrics | of_policy


def traced_gradient(networks: ActorCritic) -> TracedGradient:
    """For `update(traced=...)`: of a policy that is a module without randomness, dropout or branches on data."""
    policy = networks.policy
    assert isinstance(policy, nn.Module)
    modules = nn.ModuleDict({"policy": policy, "critic": networks.critic, "target": networks.target})

    def judge_modules(held: Any, batch: Transitions) -> Judged:
        return judge(ActorCritic(held["policy"], held["critic"], held["target"]), batch)

    return TracedGradient(modules, judge=judge_modules)
