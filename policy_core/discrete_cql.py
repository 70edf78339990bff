"""Conservative Q-learning over choices: double DQN whose values of what was never chosen are held down.

Kumar 2020 (2006.04779, section 3.2 and appendix E); double DQN's targets (van Hasselt 2016, 1509.06461); the Huber
loss and the weights of the two terms as in d3rlpy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policy_core.cql import discrete_conservative_gap
from policy_core.critics import bootstrap, polyak_
from policy_core.masking import masked_mean
from policy_core.metrics import Metrics
from policy_core.rollout import Transitions

ActionValues = Callable[[Tensor], Tensor]
"""Observations [N, D] -> the value of every choice [N, K]."""


@dataclass(frozen=True)
class DiscreteCQLConfig:
    """weight         of the conservative term
    target_rate    share that the slow copy takes over at every update; 1 copies
    """

    weight: float = 1.0
    target_rate: float = 0.005

    def __post_init__(self) -> None:
        if self.weight < 0 or not 0 < self.target_rate <= 1:
            raise ValueError("weight must not be negative and target_rate must be in (0, 1]")


def double_targets(batch: Transitions, *, next_values: Tensor, slow_next_values: Tensor) -> Tensor:
    """r + discount * slow Q(s', argmax Q(s', .)); next_values, slow_next_values [N, K] -> [N]."""
    best = next_values.argmax(-1, keepdim=True)
    return bootstrap(batch, slow_next_values.gather(-1, best).squeeze(-1)).detach()


def loss(
    *, values: Tensor, actions: Tensor, targets: Tensor, mask: Tensor, config: DiscreteCQLConfig
) -> tuple[Tensor, Metrics]:
    """Huber(Q(s, a), target) + weight * (logsumexp Q(s, .) - Q(s, a)), averaged over counted decisions.

    values [N, K]; actions [N] int; targets [N]; mask [N]. Metrics: td_loss, conservative_gap, q_values.
    """
    chosen = values.gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)
    of_targets = masked_mean(F.huber_loss(chosen, targets, reduction="none"), mask)
    gap = discrete_conservative_gap(q_values=values, actions=actions, mask=mask)
    metrics = {"td_loss": of_targets, "conservative_gap": gap, "q_values": masked_mean(chosen, mask)}
    return of_targets + config.weight * gap, {name: value.detach() for name, value in metrics.items()}


def update(
    model: nn.Module,
    target: nn.Module,
    values_of: Callable[[nn.Module], ActionValues],
    optimizer: torch.optim.Optimizer,
    batch: Transitions,
    config: DiscreteCQLConfig,
) -> Metrics:
    """One step of `model` and then of its slow copy `target`. values_of: a module's values of every choice."""
    observations, following = batch.observations, batch.next_observations
    assert isinstance(observations, Tensor)
    assert isinstance(following, Tensor)
    assert isinstance(batch.actions, Tensor)
    with torch.no_grad():
        next_values, slow_next_values = values_of(model)(following), values_of(target)(following)
    targets = double_targets(batch, next_values=next_values, slow_next_values=slow_next_values)
    values = values_of(model)(observations)
    total, metrics = loss(values=values, actions=batch.actions, targets=targets, mask=batch.mask, config=config)
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
    polyak_(target, model, rate=config.target_rate)
    return {"loss": total.detach(), **metrics}
