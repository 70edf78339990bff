"""Conservative Q-learning (Kumar 2020, 2006.04779), its calibrated form, and the same term over a vocabulary.

Critics are pushed down where the policy would go and up where the data went, so that what was never tried does not
look good. Continuous actions are SAC's with importance-weighted samples; discrete ones (choices, words) need none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from policy_core import sac
from policy_core.critics import ActorCritic, Metrics, actions_of, bootstrap, polyak_, td_loss
from policy_core.distributions import TanhGaussian
from policy_core.masking import masked_mean
from policy_core.rollout import Transitions
from policy_core.sac import Coefficient, SACConfig


@dataclass(frozen=True)
class CQLConfig:
    """weight           of the conservative term
    threshold        nats of the term that the multiplier steers to (the Lagrange form, eq. 30); None: no multiplier
    samples          actions a state of each source: uniform, the policy here, the policy at the next observation
    max_backup       the target value is the best of `samples` actions instead of the policy's own
    sac              its entropy and slow critics; the target has no entropy bonus unless sac.soft_backup
    """

    weight: float = 5.0
    threshold: float | None = None
    samples: int = 10
    max_backup: bool = False
    sac: SACConfig = field(default_factory=lambda: SACConfig(soft_backup=False))

    def __post_init__(self) -> None:
        if self.weight < 0 or self.samples < 1:
            raise ValueError("weight must not be negative and samples at least 1")


@dataclass(frozen=True)
class Noise:
    """What an update draws; actions are [K, N, A] with K = samples.

    uniform         within [-1, 1]
    here, following standard normal, for the policy's actions at the observations and at the next ones
    """

    uniform: Tensor
    here: Tensor
    following: Tensor

    @classmethod
    def draw(cls, samples: int, actions: Tensor, generator: torch.Generator | None = None) -> Noise:
        """For a batch with these actions [N, A]."""
        shape = (samples, *actions.shape)
        uniform, here, following = (
            actions.new_empty(shape).uniform_(-1.0, 1.0, generator=generator),
            torch.randn(shape, generator=generator, device=actions.device),
            torch.randn(shape, generator=generator, device=actions.device),
        )
        return cls(uniform, here, following)


@dataclass(frozen=True)
class Multiplier:
    """The Lagrange multiplier of the conservative term, with what moves it."""

    coefficient: Coefficient
    optimizer: torch.optim.Optimizer

    def ascend(self, excess: Tensor) -> Tensor:
        """Grow while the term exceeds its threshold, excess [M]; returns the new multiplier [], at most 1e6."""
        self.optimizer.zero_grad()
        (-(self.coefficient().clamp(max=1e6) * excess.detach()).mean()).backward()
        self.optimizer.step()
        return self.coefficient().detach().clamp(max=1e6)


def conservative_gap(*, q_values: Tensor, log_densities: Tensor, data_q_values: Tensor, mask: Tensor) -> Tensor:
    """log of the integral of exp Q over actions, by importance sampling, minus Q of what was done (eq. 4, CQL(H)).

    q_values        [M, K, N] of sampled actions
    log_densities   [K, N] nats, of the distribution that each was drawn from
    data_q_values   [M, N]

    Returns the mean over counted decisions, [M].
    """
    soft_maximum = torch.logsumexp(q_values - log_densities, dim=1)
    return torch.where(mask, soft_maximum - data_q_values, 0.0).sum(-1) / mask.sum().clamp(min=1)


def discrete_conservative_gap(
    *, q_values: Tensor, actions: Tensor, mask: Tensor, denominator: float | None = None
) -> Tensor:
    """logsumexp of Q over all choices minus Q of the chosen, averaged over counted decisions.

    q_values [..., V] (choices or words), actions [...] int, mask [...] -> []. Cross-entropy of Q read as logits.
    denominator     as in `masked_mean`
    """
    chosen = q_values.gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)
    return masked_mean(torch.logsumexp(q_values, dim=-1) - chosen, mask, denominator=denominator)


def calibrated(policy_q_values: Tensor, returns: Tensor) -> Tensor:
    """Cal-QL (Nakamoto 2023, 2303.05479, eq. 5.1): never push below what the data itself is known to earn.

    policy_q_values [M, K, N] of the policy's actions; returns [N] discounted, from each decision to its episode's
    end.
    """
    return torch.maximum(policy_q_values, returns)


def update(
    networks: ActorCritic,
    temperature: Coefficient,
    optimizers: sac.Optimizers,
    batch: Transitions,
    config: CQLConfig,
    *,
    multiplier: Multiplier | None = None,
    returns: Tensor | None = None,
    noise: Noise | None = None,
    generator: torch.Generator | None = None,
) -> Metrics:
    """One step of multiplier, critics, temperature, policy and slow critics, in place and in this order.

    multiplier  of the Lagrange form; needs config.threshold
    returns     [N] makes it Cal-QL
    noise       instead of drawing
    """
    logged = actions_of(batch)
    noise = Noise.draw(config.samples, logged, generator) if noise is None else noise
    with torch.no_grad():
        here = networks.policy.distribution_of(batch.observations)
        following = networks.policy.distribution_of(batch.next_observations)
        sampled = [here.from_noise(noise.here), following.from_noise(noise.following)]
        targets = bootstrap(batch, _next_values(networks, following, sampled[1], temperature, batch, config))
        uniform = noise.uniform.new_full(noise.uniform.shape[:-1], -math.log(2.0) * logged.shape[-1])
        densities = torch.cat([*(log_probs.sum(-1) for _, log_probs in sampled), uniform])
        actions = torch.cat([logged.unsqueeze(0), *(taken for taken, _ in sampled), noise.uniform])
    q_values = networks.critic(batch.observations, actions)
    done, others = q_values[:, 0], q_values[:, 1:]
    if returns is not None:
        of_policy = 2 * config.samples
        others = torch.cat([calibrated(others[:, :of_policy], returns), others[:, of_policy:]], dim=1)
    gap = conservative_gap(q_values=others, log_densities=densities, data_q_values=done, mask=batch.mask)
    td = td_loss(q_values=done, targets=targets, mask=batch.mask)
    if multiplier is None:
        penalty = config.weight * gap.sum()
    else:
        assert config.threshold is not None
        excess = config.weight * (gap - config.threshold)
        penalty = multiplier.ascend(excess) * excess.sum()
    optimizers.critic.zero_grad()
    (td + penalty).backward()
    optimizers.critic.step()
    metrics = {
        "critic_loss": td.detach(),
        "conservative_gap": gap.detach().mean(),
        "q_values": masked_mean(done.detach().mean(0), batch.mask),
    }
    if multiplier is not None:
        metrics["multiplier"] = multiplier.coefficient().detach()
    metrics |= sac.improve_policy(networks, temperature, optimizers, batch, config.sac, generator=generator)
    polyak_(networks.target, networks.critic, rate=config.sac.target_rate)
    return metrics


def _next_values(
    networks: ActorCritic,
    following: TanhGaussian,
    sampled: tuple[Tensor, Tensor],
    temperature: Coefficient,
    batch: Transitions,
    config: CQLConfig,
) -> Tensor:
    """The value at the next observations [N]: of the policy's mode, a sample with its entropy, or the best."""
    if config.max_backup:
        return networks.target(batch.next_observations, sampled[0]).amin(0).amax(0)
    if config.sac.soft_backup:
        q_values = networks.target(batch.next_observations, sampled[0][0])
        return q_values.amin(0) - temperature() * sampled[1][0].sum(-1)
    return networks.target(batch.next_observations, following.mode()).amin(0)
