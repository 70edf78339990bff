"""Other people's implementations, brought to this project's shapes."""

from __future__ import annotations

import gymnasium
import numpy as np
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from torch import Tensor


def sb3_gae(
    *,
    rewards: Tensor,
    values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    final_values: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """stable-baselines3's advantages and returns, [B, T] in float64, of rows without a masked column.

    final_values    [B, T], the value at the true next observation, read at truncations and at the end of a row

    As its collect_rollouts does, a truncation's bootstrap is put into the reward.
    """
    rows, width = rewards.shape
    space = gymnasium.spaces.Box(-1.0, 1.0, (1,))
    buffer = RolloutBuffer(width, space, space, gamma=gamma, gae_lambda=gae_lambda, n_envs=rows)
    cut_short = truncated & ~terminated
    dones = (terminated | truncated).double()
    buffer.rewards = torch.where(cut_short, rewards + gamma * final_values, rewards).T.numpy()
    buffer.values = values.T.numpy()
    buffer.advantages = np.zeros((width, rows))
    buffer.episode_starts = torch.cat([torch.ones(rows, 1), dones[:, :-1]], dim=1).T.numpy()
    buffer.compute_returns_and_advantage(last_values=final_values[:, -1], dones=dones[:, -1].numpy())
    return torch.from_numpy(buffer.advantages.T.copy()), torch.from_numpy(buffer.returns.T.copy())
