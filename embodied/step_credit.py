"""Credit for the single control steps of a chunk.

A chunk is chosen at once, but each of its actions has consequences of its own, and the critic, which reads the
simulator's state, can judge them one by one: the advantage of the j-th action is that of the control step in which
it was executed, GAE over control steps. It weighs that action's ratio alone (ratio level "factor"), which leaves
the policy gradient unbiased and takes from each action the noise of the others' consequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from embodied.chunk_rollout import ChunkExperience, final_values_of
from embodied.policies.vla import VLAPolicy
from policy_core.returns import gae, next_values_of
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


def step_advantages(
    experience: ChunkExperience,
    *,
    gamma: float,
    gae_lambda: float,
    critic: VLAPolicy,
) -> tuple[Tensor, Tensor]:
    """Advantages [B, T, k] of the control steps of each chunk, and the returns [B, T] from its start on."""
    rollout = control_steps(experience, gamma=gamma, critic=critic)
    advantages, returns = gae(rollout, gae_lambda=gae_lambda)
    shape = experience.rewards.shape
    return advantages.view(shape), returns.view(shape)[..., 0]
