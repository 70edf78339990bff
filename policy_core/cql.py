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
from policy_core.critics import ActorCritic, actions_of, bootstrap, polyak_, td_loss
from policy_core.masking import masked_mean
from policy_core.metrics import Metrics
from policy_core.rollout import Transitions
from policy_core.sac import Coefficient, SACConfig, lowest


@dataclass(frozen=True)
class CQLConfig:
    """weight           of the conservative term
    threshold        nats of the term that the multiplier steers to (the Lagrange form, eq. 30); None: no multiplier
    samples          actions a state of each source: uniform, the policy here, the policy at the next observation
    max_backup       the target value is the best of `samples` actions instead of the policy's own
    rows             states whose sampled actions the critics judge at a time, the gradient adding up: what lies
                     between forward and backward then stays in a CPU's cache; twice as many under bfloat16
                     autocast, which fill the same bytes. None: all at once
    sac              its entropy and slow critics; the target has no entropy bonus unless sac.soft_backup
    """

    weight: float = 5.0
    threshold: float | None = None
    samples: int = 10
    max_backup: bool = False
    rows: int | None = 64
    sac: SACConfig = field(default_factory=lambda: SACConfig(soft_backup=False))

    def __post_init__(self) -> None:
        if self.weight < 0 or self.samples < 1 or (self.rows is not None and self.rows < 1):
            raise ValueError("weight must not be negative, samples and rows at least 1")


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

    def value(self) -> Tensor:
        """[], at most 1e6."""
        return self.coefficient().detach().clamp(max=1e6)

    def ascend(self, excess: Tensor) -> None:
        """Grow while the term exceeds its threshold; excess [M]."""
        self.optimizer.zero_grad()
        (-(self.coefficient().clamp(max=1e6) * excess.detach()).mean()).backward()
        self.optimizer.step()


def conservative_gap(
    *,
    q_values: Tensor,
    log_densities: Tensor,
    data_q_values: Tensor,
    mask: Tensor,
    denominator: float | None = None,
) -> Tensor:
    """log of the integral of exp Q over actions, by importance sampling, minus Q of what was done (eq. 4, CQL(H)).

    q_values        [M, K, N] of sampled actions
    log_densities   [K, N] nats, of the distribution that each was drawn from
    data_q_values   [M, N]
    denominator     as in `masked_mean`

    Returns the mean over counted decisions, [M].
    """
    soft_maximum = torch.logsumexp(q_values - log_densities, dim=1)
    gaps = torch.where(mask, soft_maximum - data_q_values, 0.0).sum(-1)
    return gaps / (mask.sum().clamp(min=1) if denominator is None else denominator)


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


@dataclass(frozen=True)
class Sampled:
    """A batch with what its critics are to judge: the logged action first, then the sampled ones.

    actions         [1 + 3K, N, A]: logged, K of the policy here, K of it at the next observation, K uniform
    log_densities   [3K, N] nats of the sampled ones
    targets         [N] of the logged ones
    returns         [N], or None where it is not Cal-QL
    """

    batch: Transitions
    actions: Tensor
    log_densities: Tensor
    targets: Tensor
    returns: Tensor | None


def critic_terms(
    networks: ActorCritic, sampled: Sampled, rows: slice, *, samples: int, denominator: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of some rows of a batch: squared error [], conservative gap [M], and Q of what was done [M, n]."""
    mask, observations = sampled.batch.mask[rows], sampled.batch.observations
    assert isinstance(observations, Tensor)
    q_values = networks.critic(observations[rows], sampled.actions[:, rows])
    done, others = q_values[:, 0], q_values[:, 1:]
    if sampled.returns is not None:
        of_policy = calibrated(others[:, : 2 * samples], sampled.returns[rows])
        others = torch.cat([of_policy, others[:, 2 * samples :]], dim=1)
    gap = conservative_gap(
        q_values=others,
        log_densities=sampled.log_densities[:, rows],
        data_q_values=done,
        mask=mask,
        denominator=denominator,
    )
    return td_loss(q_values=done, targets=sampled.targets[rows], mask=mask, denominator=denominator), gap, done


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
    improve: bool = True,
) -> Metrics:
    """One step of multiplier, critics, temperature, policy and slow critics, in place and in this order.

    With config.rows the multiplier moves after the critics instead of before them: it then answers to the batch's
    gap one update later than d3rlpy's.

    multiplier  of the Lagrange form; needs config.threshold
    returns     [N] makes it Cal-QL
    noise       instead of drawing
    improve     False leaves temperature and policy as they are
    """
    sampled = _sample(networks, temperature, batch, config, returns=returns, noise=noise, generator=generator)
    count = len(batch)
    step = count if config.rows is None else config.rows * (2 if torch.is_autocast_enabled("cpu") else 1)
    denominator = max(1.0, float(batch.mask.sum()))
    new = sampled.targets.new_zeros
    factor = new(()) + 1.0 if multiplier is None else multiplier.value()
    error, gap, q_values = new(()), new(networks.critic.members), []
    optimizers.critic.zero_grad()
    for start in range(0, count, step):
        rows = slice(start, start + step)
        td, part, done = critic_terms(networks, sampled, rows, samples=config.samples, denominator=denominator)
        if multiplier is not None and step >= count:
            multiplier.ascend(config.weight * (part - _threshold(config)))
            factor = multiplier.value()
        (td + factor * config.weight * part.sum()).backward()
        error, gap = error + td.detach(), gap + part.detach()
        q_values.append(done.detach().mean(0))
    if multiplier is not None and step < count:
        multiplier.ascend(config.weight * (gap - _threshold(config)))
    optimizers.critic.step()
    metrics = {
        "critic_loss": error,
        "conservative_gap": gap.mean(),
        "q_values": masked_mean(torch.cat(q_values), batch.mask),
    }
    if multiplier is not None:
        metrics["multiplier"] = multiplier.value()
    if improve:
        metrics |= sac.improve_policy(networks, temperature, optimizers, batch, config.sac, generator=generator)
    polyak_(networks.target, networks.critic, rate=config.sac.target_rate)
    return metrics


def _threshold(config: CQLConfig) -> float:
    if config.threshold is None:
        raise ValueError("a multiplier needs cql.threshold")
    return config.threshold


@torch.no_grad()
def _sample(
    networks: ActorCritic,
    temperature: Coefficient,
    batch: Transitions,
    config: CQLConfig,
    *,
    returns: Tensor | None,
    noise: Noise | None,
    generator: torch.Generator | None,
) -> Sampled:
    """Draw the actions that the critics are to judge, and compute the targets."""
    logged = actions_of(batch)
    noise = Noise.draw(config.samples, logged, generator) if noise is None else noise
    here, here_log_probs = networks.policy.distribution_of(batch.observations).from_noise(noise.here)
    distribution = networks.policy.distribution_of(batch.next_observations)
    following, following_log_probs = distribution.from_noise(noise.following)
    if config.max_backup:
        next_values = lowest(networks.target(batch.next_observations, following), config.sac, generator).amax(0)
    elif config.sac.soft_backup:
        next_values = lowest(networks.target(batch.next_observations, following[0]), config.sac, generator)
        next_values = next_values - temperature() * following_log_probs[0].sum(-1)
    else:
        next_values = lowest(networks.target(batch.next_observations, distribution.mode()), config.sac, generator)
    uniform = noise.uniform.new_full(noise.uniform.shape[:-1], -math.log(2.0) * logged.shape[-1])
    return Sampled(
        batch=batch,
        actions=torch.cat([logged.unsqueeze(0), here, following, noise.uniform]),
        log_densities=torch.cat([here_log_probs.sum(-1), following_log_probs.sum(-1), uniform]),
        targets=bootstrap(batch, next_values),
        returns=returns,
    )
