"""Advantage-weighted actor-critic (Nair 2020, 2006.09359): clone what was done in proportion to how good it was.

Unlike IQL its critics evaluate the policy itself, which suits going on online.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from policy_core.critics import ActorCritic, actions_of, bootstrap, of_decisions, polyak_, td_loss
from policy_core.iql import weighted_likelihood_loss
from policy_core.masking import masked_mean
from policy_core.metrics import Metrics
from policy_core.rollout import Transitions


@dataclass(frozen=True)
class AWACConfig:
    """temperature   lambda of eq. 13: small trusts the advantage, large clones
    samples       actions whose mean value is the state's
    target_rate   share of the critics that their slow copy takes over an update
    """

    temperature: float = 1.0
    samples: int = 1
    target_rate: float = 0.005

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.samples < 1:
            raise ValueError("temperature must be positive and samples at least 1")


def batch_weights(*, advantages: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """exp(advantage / temperature), normalised to a mean of 1 over the counted decisions; [N] -> [N]."""
    logits = torch.where(mask, advantages.detach() / temperature, -torch.inf)
    return torch.softmax(logits, dim=0) * mask.sum()


def update(
    networks: ActorCritic,
    policy_optimizer: torch.optim.Optimizer,
    critic_optimizer: torch.optim.Optimizer,
    batch: Transitions,
    config: AWACConfig,
    *,
    generator: torch.Generator | None = None,
) -> Metrics:
    """One step of critics, policy and slow critics, in place."""
    policy, critic = networks.policy, networks.critic
    with torch.no_grad():
        taken = policy.distribution_of(batch.next_observations).sample(generator).clamp(-1.0, 1.0)
        following = networks.target(batch.next_observations, taken).amin(0)
    q_values = critic(batch.observations, batch.actions)
    loss = td_loss(q_values=q_values, targets=bootstrap(batch, following), mask=batch.mask)
    critic_optimizer.zero_grad()
    loss.backward()
    critic_optimizer.step()
    distribution = policy.distribution_of(batch.observations)
    with torch.no_grad():
        own = torch.stack([distribution.sample(generator).clamp(-1.0, 1.0) for _ in range(config.samples)])
        judged = critic(batch.observations, torch.cat([actions_of(batch).unsqueeze(0), own])).amin(0)
        advantages = judged[0] - judged[1:].mean(0)
        weights = batch_weights(advantages=advantages, mask=batch.mask, temperature=config.temperature)
    log_probs = of_decisions(distribution.log_prob(batch.actions), batch)
    of_policy = weighted_likelihood_loss(log_probs=log_probs, weights=weights, mask=batch.mask)
    policy_optimizer.zero_grad()
    of_policy.backward()
    policy_optimizer.step()
    polyak_(networks.target, critic, rate=config.target_rate)
    return {
        "critic_loss": loss.detach(),
        "policy_loss": of_policy.detach(),
        "q_values": masked_mean(q_values.detach().mean(0), batch.mask),
        "advantage": masked_mean(advantages, batch.mask),
    }
