"""Soft actor-critic (Haarnoja 2018, 1812.05905): off-policy learning with an entropy bonus of adaptive weight.

The online half of CQL and Cal-QL; with many normalised critics, a random pair of them in the target and half of
each batch from prior data it is RLPD (Ball 2023, 2302.02948).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from policy_core.critics import ActorCritic, bootstrap, of_decisions, polyak_, td_loss
from policy_core.masking import masked_mean
from policy_core.metrics import Metrics
from policy_core.rollout import Transitions


@dataclass(frozen=True)
class SACConfig:
    """initial_temperature   weight of the entropy at the start; it adapts unless its learning rate is 0
    target_entropy        nats that the temperature steers to; None: minus the number of action dimensions
    soft_backup           the target value has the entropy bonus too
    target_critics        critics, drawn at every update, whose minimum is the target; None: all
    target_rate           share of the critics that their slow copy takes over an update
    """

    initial_temperature: float = 1.0
    target_entropy: float | None = None
    soft_backup: bool = True
    target_critics: int | None = None
    target_rate: float = 0.005

    def __post_init__(self) -> None:
        if self.initial_temperature <= 0:
            raise ValueError(f"initial_temperature must be positive, got {self.initial_temperature}")
        if self.target_critics is not None and self.target_critics < 1:
            raise ValueError(f"target_critics must be at least 1, got {self.target_critics}")
        if not 0 < self.target_rate <= 1:
            raise ValueError(f"target_rate must be in (0, 1], got {self.target_rate}")


class Coefficient(nn.Module):
    """A positive number that is learned: the exponential of its parameter."""

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.log_value = Parameter(torch.tensor(math.log(initial)))

    def forward(self) -> Tensor:
        """[]."""
        return self.log_value.exp()


@dataclass(frozen=True)
class Optimizers:
    """One for each thing that moves; None leaves a coefficient as it is."""

    policy: torch.optim.Optimizer
    critic: torch.optim.Optimizer
    temperature: torch.optim.Optimizer | None = None


def temperature_loss(*, temperature: Tensor, log_probs: Tensor, mask: Tensor, target_entropy: float) -> Tensor:
    """-temperature * mean(log_prob + target_entropy) (eq. 18): shrinks the temperature of too random a policy.

    temperature []; log_probs [N] nats (no gradient flows into them).
    """
    return -temperature * masked_mean(log_probs.detach() + target_entropy, mask)


def policy_loss(*, log_probs: Tensor, q_values: Tensor, temperature: Tensor, mask: Tensor) -> Tensor:
    """mean(temperature * log_prob - Q) of reparameterised actions (eq. 7).

    log_probs [N]; q_values [N], the critics' minimum (SAC) or mean (RLPD).
    """
    return masked_mean(temperature.detach() * log_probs - q_values, mask)


def update(
    networks: ActorCritic,
    temperature: Coefficient,
    optimizers: Optimizers,
    batch: Transitions,
    config: SACConfig,
    *,
    generator: torch.Generator | None = None,
    improve: bool = True,
) -> Metrics:
    """One step of critics, policy, temperature and slow critics, in place.

    improve     False leaves policy and temperature as they are
    """
    with torch.no_grad():
        drawn = networks.policy.distribution_of(batch.next_observations).rsample_with_log_prob(generator)
        following = lowest(networks.target(batch.next_observations, drawn[0]), config, generator)
        if config.soft_backup:
            following = following - temperature() * of_decisions(drawn[1], batch)
    q_values = networks.critic(batch.observations, batch.actions)
    loss = td_loss(q_values=q_values, targets=bootstrap(batch, following), mask=batch.mask)
    optimizers.critic.zero_grad()
    loss.backward()
    optimizers.critic.step()
    metrics = {"critic_loss": loss.detach(), "q_values": masked_mean(q_values.detach().mean(0), batch.mask)}
    if improve:
        metrics |= improve_policy(networks, temperature, optimizers, batch, config, generator=generator)
    polyak_(networks.target, networks.critic, rate=config.target_rate)
    return metrics


def lowest(q_values: Tensor, config: SACConfig, generator: torch.Generator | None) -> Tensor:
    """Minimum over the target's critics, [M, ...] -> [...]."""
    if config.target_critics is not None and config.target_critics < len(q_values):
        chosen = torch.randperm(len(q_values), generator=generator)[: config.target_critics]
        q_values = q_values[chosen]
    return q_values.amin(0)


def improve_policy(
    networks: ActorCritic,
    temperature: Coefficient,
    optimizers: Optimizers,
    batch: Transitions,
    config: SACConfig,
    *,
    generator: torch.Generator | None = None,
) -> Metrics:
    """One step of the temperature and then of the policy, up the critics as they are now.

    With more than two critics the policy climbs their mean (RLPD), else their minimum. The critics get no gradient.
    """
    parameters = list(networks.policy.actor_parameters())
    actions, by_factor = networks.policy.distribution_of(batch.observations).rsample_with_log_prob(generator)
    log_probs = of_decisions(by_factor, batch)
    if optimizers.temperature is not None:
        target = -float(actions.shape[-1]) if config.target_entropy is None else config.target_entropy
        of_temperature = temperature_loss(
            temperature=temperature(), log_probs=log_probs, mask=batch.mask, target_entropy=target
        )
        optimizers.temperature.zero_grad()
        of_temperature.backward()
        optimizers.temperature.step()
    q_values = networks.critic(batch.observations, actions)
    climbed = q_values.amin(0) if len(q_values) <= 2 else q_values.mean(0)
    loss = policy_loss(log_probs=log_probs, q_values=climbed, temperature=temperature(), mask=batch.mask)
    optimizers.policy.zero_grad()
    loss.backward(inputs=parameters)
    optimizers.policy.step()
    return {
        "policy_loss": loss.detach(),
        "entropy": -masked_mean(log_probs.detach(), batch.mask),
        "temperature": temperature().detach(),
    }
