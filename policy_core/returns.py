"""Returns and advantages over decisions, chunks and tokens alike."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from policy_core.masking import episode_index
from policy_core.rollout import Rollout, next_decision


def next_values_of(
    *, values: Tensor, mask: Tensor, episode: Tensor, terminated: Tensor, final_values: Tensor | None
) -> Tensor:
    """The value that each decision bootstraps from; all tensors [B, T].

    values          at each decision's own observation
    final_values    at the true next observation, read only where a decision is the last of its episode in the
                    row and not terminated (a truncation, or the end of the rollout)

    Returns the value at the same episode's next decision, else final_values, else 0 where terminated.
    Raises ValueError if a value is needed that neither gives.
    """
    width = values.shape[1]
    following = next_decision(mask)
    at = following.clamp(max=width - 1)
    same_episode = (following < width) & (episode.gather(1, at) == episode)
    next_values = torch.where(same_episode, values.gather(1, at), 0.0)
    needs_final = mask & ~same_episode & ~terminated
    if final_values is not None:
        return torch.where(needs_final, final_values, next_values)
    if needs_final.any():
        row, column = needs_final.nonzero()[0].tolist()
        raise ValueError(f"row {row}, column {column}: an episode is cut here and final_values is not given")
    return next_values


def gae(rollout: Rollout, *, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman 2016, 1506.02438, eq. 16) over decisions.

    delta_t = r_t + discount_t * V(next) * (1 - terminated_t) - V_t
    A_t     = delta_t + discount_t * lambda * (1 - terminated_t)(1 - truncated_t) * A_(next decision)

    A masked column passes the carry on as it is: no discount, no lambda. At the end of a row the carry is 0 and
    the bootstrap is next_values.

    Returns advantages and returns (advantages + values), [B, T], 0 on masked columns.
    Raises ValueError if the rollout has no values.
    """
    if rollout.values is None or rollout.next_values is None:
        raise ValueError("gae needs values and next_values; use group advantages for a policy without a critic")
    mask = rollout.mask
    bootstrap = torch.where(rollout.terminated, 0.0, rollout.next_values)
    delta = torch.where(mask, rollout.rewards + rollout.discount * bootstrap - rollout.values, 0.0)
    going_on = ~(rollout.terminated | rollout.truncated)
    decay = torch.where(mask, rollout.discount * gae_lambda * going_on, 1.0)
    advantages = torch.empty_like(delta)
    carry = torch.zeros_like(delta[:, 0])
    columns = zip(delta.unbind(1), decay.unbind(1), advantages.unbind(1), strict=True)
    for delta_t, decay_t, advantage_t in reversed(list(columns)):
        carry = torch.addcmul(delta_t, decay_t, carry)
        advantage_t.copy_(carry)
    advantages = torch.where(mask, advantages, 0.0)
    return advantages, torch.where(mask, advantages + rollout.values, 0.0)


def episode_returns(rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
    """Undiscounted sum of rewards of every episode that has a decision.

    Returns returns [E], index [B, T] int (the episode of each decision, -1 elsewhere) and group [E] int (of the
    episode's first decision; all 0 without groups). Rewards are read on decisions only: `credit_decisions` first.
    """
    index, episodes = episode_index(rollout.mask, rollout.episode)
    decisions = index[rollout.mask]
    returns = rollout.rewards.new_zeros(episodes).index_add_(0, decisions, rollout.rewards[rollout.mask])
    group = torch.zeros(episodes, dtype=torch.long, device=index.device)
    if rollout.group is not None:
        group[decisions] = rollout.group[rollout.mask].long()
    return returns, index, group


def rest_of_episode(rollout: Rollout) -> Tensor:
    """Undiscounted rewards of each decision and those after it in its episode, summed. [B, T], 0 where masked."""
    nothing = torch.zeros_like(rollout.rewards)
    alone = replace(rollout, values=nothing, next_values=nothing, discount=torch.ones_like(nothing))
    return gae(alone, gae_lambda=1.0)[0]


def fold_chunk(*, rewards: Tensor, executed: Tensor, gamma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Make one decision of a chunk of k steps of which the first j were executed (the episode may end inside).

    rewards     [..., k] of the single steps; what lies beyond `executed` is ignored
    executed    [...] int, 1..k

    Returns reward sum_{i<j} gamma^i r_i [...], discount gamma^j [...] and step_mask [..., k] bool (True for the
    executed steps), from which the caller makes the factor_mask.
    Raises ValueError if a count is outside 1..k.
    """
    length = rewards.shape[-1]
    if ((executed < 1) | (executed > length)).any():
        raise ValueError(f"a chunk of {length} steps executed {executed.min()}..{executed.max()} of them")
    steps = torch.arange(length, device=rewards.device)
    step_mask = steps < executed.unsqueeze(-1)
    powers = gamma ** steps.to(rewards.dtype)
    reward = (torch.where(step_mask, rewards, 0.0) * powers).sum(-1)
    return reward, gamma ** executed.to(rewards.dtype), step_mask


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var[returns - values] / Var[returns] over decisions; NaN where returns do not vary. [B, T] -> scalar."""
    counted = returns[mask]
    if counted.numel() == 0:
        return returns.new_tensor(torch.nan)
    variance = counted.var(correction=0)
    residual = (counted - values[mask]).var(correction=0)
    return torch.where(variance > 0, 1 - residual / variance, torch.nan)
