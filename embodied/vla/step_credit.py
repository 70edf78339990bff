"""Credit for the single control steps of a chunk.

A chunk is chosen at once, but each of its actions has consequences of its own, and the critic, which reads the
simulator's state, can judge them one by one: the advantage of the j-th action is that of the control step in which
it was executed, GAE over control steps. It weighs that action's ratio alone (ratio level "factor"), which leaves
the policy gradient unbiased and takes from each action the noise of the others' consequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from embodied.policies.vla import VLAPolicy
from embodied.vla.chunk_rollout import ChunkExperience, final_values_of
from policy_core.optimizer import NonFiniteLoss
from policy_core.returns import explained_variance, gae, next_values_of
from policy_core.rollout import Rollout


@torch.no_grad()
def control_steps(experience: ChunkExperience, *, gamma: float, critic: VLAPolicy) -> Rollout:
    """The experience as a rollout whose columns are control steps, [B, T * k]; those not executed are masked.

    For GAE alone: it has no observations, actions and log-probs.
    """
    length = experience.rewards.shape[-1]
    steps = torch.arange(length)
    count = experience.executed.unsqueeze(-1)
    last = steps == count - 1

    def of_last_step(column: Tensor) -> Tensor:
        return torch.where(last, column.unsqueeze(-1), torch.zeros((), dtype=column.dtype)).flatten(1)

    mask = (steps < count).flatten(1)
    terminated, truncated = of_last_step(experience.terminated), of_last_step(experience.truncated)
    ended = (terminated | truncated).long()
    episode = torch.where(mask, ended.cumsum(1) - ended, -1)
    values = critic.values({"state": experience.step_states}).flatten(1)
    return Rollout(
        observations={},
        actions={},
        rewards=torch.where(mask, experience.rewards.flatten(1), 0.0),
        terminated=terminated,
        truncated=truncated,
        mask=mask,
        discount=torch.full_like(values, gamma),
        old_log_probs=torch.zeros_like(values),
        episode=episode,
        values=values,
        next_values=next_values_of(
            values=values,
            mask=mask,
            episode=episode,
            terminated=terminated,
            final_values=of_last_step(final_values_of(experience, critic)),
        ),
    )


@dataclass(frozen=True)
class StepCredit:
    """advantages [B, T, k] of the control steps of each chunk; and of the N executed ones the states [N, S], the
    returns [N], and how much of these returns' variance the critic explained."""

    advantages: Tensor
    states: Tensor
    returns: Tensor
    explained: float


def credit_steps(experience: ChunkExperience, *, gamma: float, gae_lambda: float, critic: VLAPolicy) -> StepCredit:
    """Judge every control step. gamma and gae_lambda are per control step."""
    rollout = control_steps(experience, gamma=gamma, critic=critic)
    advantages, returns = gae(rollout, gae_lambda=gae_lambda)
    assert rollout.values is not None
    return StepCredit(
        advantages=advantages.view(experience.rewards.shape),
        states=experience.step_states.flatten(1, 2)[rollout.mask],
        returns=returns[rollout.mask],
        explained=float(explained_variance(rollout.values, returns, rollout.mask)),
    )


def fit_critic(
    policy: VLAPolicy,
    optimizer: torch.optim.Optimizer,
    credit: StepCredit,
    *,
    epochs: int,
    minibatch_size: int,
    generator: torch.Generator,
) -> float:
    """Passes of regression of the critic to the returns of single control steps; returns the last one's mean loss.

    The critic reads numbers, so it can afford more passes than a policy that reads pictures. Raises NonFiniteLoss.
    """
    mean = float("nan")
    for _ in range(epochs):
        losses = []
        for rows in torch.randperm(len(credit.returns), generator=generator).split(minibatch_size):
            loss = F.mse_loss(policy.state_values(credit.states[rows]), credit.returns[rows])
            if not math.isfinite(loss.item()):
                raise NonFiniteLoss("NaN or infinity in the critic's loss", setting="critic_learning_rate")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        mean = float(torch.stack(losses).mean())
    return mean
