"""From what the workers collected to transitions in learner's units, and what their episodes earned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from embodied.logged.transitions import discounted
from embodied.policies.state_mlp import StatePolicy
from embodied.rollouts.rollout import Experience
from policy_core.replay import Replay
from policy_core.rollout import Transitions


@torch.no_grad()
def experienced(
    experience: Experience, policy: StatePolicy, *, gamma: float, scale: float, shift: float
) -> Transitions:
    """Every step [B * T], environment by environment, its true next observation beside it."""
    observations = experience.observations
    following = torch.cat([observations[:, 1:], experience.next_observations.unsqueeze(1)], dim=1)
    for row, column, final in experience.final_observations:
        following[row, column] = torch.from_numpy(final)
    rewards = experience.rewards.flatten() * scale + shift
    actions = policy.to_learner(experience.actions.flatten(0, 1)).clamp(-1.0, 1.0)
    return Transitions(
        observations=policy.normalizer(observations.flatten(0, 1)),
        actions=actions,
        rewards=rewards,
        next_observations=policy.normalizer(following.flatten(0, 1)),
        terminated=experience.terminated.flatten(),
        discount=torch.full_like(rewards, gamma),
        mask=torch.ones_like(rewards, dtype=torch.bool),
    )


class OpenEpisodes:
    """Remembers where the steps of unfinished episodes lie in the replay, to write their returns once they end."""

    def __init__(self, environments: int, gamma: float, *, worst: float) -> None:
        """worst: what is left of an episode that is cut is worth this at least (`OfflineData.worst`)."""
        self.gamma, self.worst = gamma, worst
        self.where: list[Tensor] = [torch.zeros(0, dtype=torch.long) for _ in range(environments)]
        self.rewards: list[Tensor] = [torch.zeros(0) for _ in range(environments)]

    def add(self, replay: Replay, where: Tensor, rewards: Tensor, *, terminated: Tensor, truncated: Tensor) -> None:
        """where, rewards, terminated, truncated [B, T]: places in the replay, scaled rewards, what ended there."""
        ended = terminated | truncated
        assert replay.returns is not None
        for row in range(len(where)):
            begin = 0
            for end in (ended[row].nonzero().flatten() + 1).tolist():
                self._grow(row, where[row, begin:end], rewards[row, begin:end])
                rest = 0.0 if bool(terminated[row, end - 1]) else self.worst
                replay.returns[self.where[row]] = discounted(self.rewards[row], self.gamma, rest=rest)
                self.where[row], self.rewards[row] = self.where[row][:0], self.rewards[row][:0]
                begin = end
            self._grow(row, where[row, begin:], rewards[row, begin:])

    def forget(self) -> None:
        """New episodes begin: what was open never ends."""
        self.where = [where[:0] for where in self.where]
        self.rewards = [rewards[:0] for rewards in self.rewards]

    def _grow(self, row: int, where: Tensor, rewards: Tensor) -> None:
        self.where[row] = torch.cat([self.where[row], where])
        self.rewards[row] = torch.cat([self.rewards[row], rewards])

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"where": list(self.where), "rewards": list(self.rewards)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.where, self.rewards = list(state["where"]), list(state["rewards"])
