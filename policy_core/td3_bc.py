"""TD3+BC (Fujimoto 2021, 2106.06860) and its successor ReBRAC (Tarasov 2023, 2305.09836).

A deterministic policy climbs the critic and is held to the data by a squared distance. ReBRAC holds the target's
action to the data's next action as well, with a weight of its own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from policy_core.critics import ActorCritic, actions_of, bootstrap, polyak_, td_loss
from policy_core.masking import masked_mean
from policy_core.metrics import Metrics
from policy_core.policy import Actor
from policy_core.rollout import Transitions


@dataclass(frozen=True)
class TD3BCConfig:
    """alpha            weight of the normalised critic (eq. 5); ReBRAC: 1
    imitation        weight of the squared distance to the data; ReBRAC's actor beta
    critic_penalty   ReBRAC's critic beta: what the target loses for the squared distance to the next action done
    policy_delay     critic updates for each of the policy
    target_noise     deviation of the noise on the target's action, clipped to +-noise_clip
    distance         "mean" over action dimensions (TD3+BC) or their "sum" (ReBRAC)
    target_rate      share that the slow copies take over
    """

    alpha: float = 2.5
    imitation: float = 1.0
    critic_penalty: float = 0.0
    policy_delay: int = 2
    target_noise: float = 0.2
    noise_clip: float = 0.5
    distance: Literal["mean", "sum"] = "mean"
    target_rate: float = 0.005

    def __post_init__(self) -> None:
        if self.alpha <= 0 or self.policy_delay < 1:
            raise ValueError("alpha must be positive and policy_delay at least 1")
        if self.target_noise < 0 or self.noise_clip < 0 or self.critic_penalty < 0:
            raise ValueError("target_noise, noise_clip and critic_penalty must not be negative")


@dataclass
class TD3Networks(ActorCritic):
    """With a slow copy of the policy, which has to be a module."""

    target_policy: Actor

    @classmethod
    def copying(cls, networks: ActorCritic) -> TD3Networks:
        """With a copy of the policy as it is."""
        slow = copy.deepcopy(networks.policy)
        assert isinstance(slow, nn.Module)
        return cls(networks.policy, networks.critic, networks.target, slow.requires_grad_(False))


def policy_loss(
    *, actions: Tensor, q_values: Tensor, data_actions: Tensor, mask: Tensor, config: TD3BCConfig
) -> tuple[Tensor, Metrics]:
    """-alpha / mean|Q| * mean(Q) + imitation * squared distance to the data's actions (eq. 3 to 5).

    actions, data_actions [N, A]; q_values [N]. Metrics: policy_loss, imitation_loss.
    """
    scale = config.alpha / masked_mean(q_values.detach().abs(), mask)
    squares = (data_actions - actions).square()
    distance = squares.mean(-1) if config.distance == "mean" else squares.sum(-1)
    away = masked_mean(distance, mask)
    loss = config.imitation * away - scale * masked_mean(q_values, mask)
    return loss, {"policy_loss": loss.detach(), "imitation_loss": away.detach()}


def target_values(
    networks: TD3Networks, batch: Transitions, config: TD3BCConfig, *, noise: Tensor, next_actions: Tensor | None
) -> Tensor:
    """Minimum of the slow critics at the slow policy's smoothed action, [N].

    noise           [N, A] standard normal
    next_actions    [N, A] of the data, for ReBRAC's penalty
    """
    disturbed = (config.target_noise * noise).clamp(-config.noise_clip, config.noise_clip)
    actions = (networks.target_policy.distribution_of(batch.next_observations).mode() + disturbed).clamp(-1.0, 1.0)
    values = networks.target(batch.next_observations, actions).amin(0)
    if config.critic_penalty:
        assert next_actions is not None
        values = values - config.critic_penalty * (actions - next_actions).square().sum(-1)
    return values


def update(
    networks: TD3Networks,
    policy_optimizer: torch.optim.Optimizer,
    critic_optimizer: torch.optim.Optimizer,
    batch: Transitions,
    config: TD3BCConfig,
    *,
    number: int,
    noise: Tensor | None = None,
    next_actions: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Metrics:
    """The `number`-th update (from 1): critics, and at every `policy_delay`-th the policy and the slow copies."""
    logged = actions_of(batch)
    with torch.no_grad():
        if noise is None:
            noise = torch.randn(logged.shape, generator=generator, device=logged.device)
        following = target_values(networks, batch, config, noise=noise, next_actions=next_actions)
    q_values = networks.critic(batch.observations, batch.actions)
    loss = td_loss(q_values=q_values, targets=bootstrap(batch, following), mask=batch.mask)
    critic_optimizer.zero_grad()
    loss.backward()
    critic_optimizer.step()
    metrics = {"critic_loss": loss.detach(), "q_values": masked_mean(q_values.detach().mean(0), batch.mask)}
    if number % config.policy_delay:
        return metrics
    actions = networks.policy.distribution_of(batch.observations).mode()
    climbed = networks.critic(batch.observations, actions)
    climbed = climbed[0] if config.distance == "mean" else climbed.amin(0)
    of_policy, described = policy_loss(
        actions=actions, q_values=climbed, data_actions=logged, mask=batch.mask, config=config
    )
    policy_optimizer.zero_grad()
    of_policy.backward(inputs=list(networks.policy.actor_parameters()))
    policy_optimizer.step()
    polyak_(networks.target, networks.critic, rate=config.target_rate)
    polyak_(networks.target_policy, networks.policy, rate=config.target_rate)
    return metrics | described
