"""Credit for the control steps of a chunk, against GAE by hand and against chunks of one step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from embodied.chunk_rollout import ChunkExperience, judge_chunks
from embodied.step_credit import control_steps, step_advantages
from policy_core.returns import gae

GAMMA, LAMBDA = 0.9, 0.8


class Critic:
    """The value of a state is its first number."""

    def values(self, observations: dict[str, Tensor]) -> Tensor:
        return observations["state"][..., 0]


CRITIC: Any = Critic()


def experience(**changes: Any) -> ChunkExperience:
    """One row of two chunks of two steps: the first is played in full, in the second the episode ends at once."""
    made = ChunkExperience(
        observations={"state": torch.tensor([[[1.0], [3.0]]])},
        actions=torch.zeros(1, 2, 2, 4),
        log_probs=torch.zeros(1, 2, 2),
        rewards=torch.tensor([[[0.5, -1.0], [2.0, 99.0]]]),
        executed=torch.tensor([[2, 1]]),
        terminated=torch.tensor([[False, True]]),
        truncated=torch.tensor([[False, False]]),
        final_states=[(0, 1, np.array([50.0], np.float32))],
        next_states=torch.tensor([[60.0]]),
        episodes=[],
        step_states=torch.tensor([[[[1.0], [2.0]], [[3.0], [77.0]]]]),
    )
    return replace(made, **changes)


def test_by_hand() -> None:
    advantages, returns = step_advantages(experience(), gamma=GAMMA, gae_lambda=LAMBDA, critic=CRITIC)
    third = 2.0 - 3.0  # terminated: nothing follows
    second = -1.0 + 0.9 * 3.0 - 2.0 + 0.72 * third
    first = 0.5 + 0.9 * 2.0 - 1.0 + 0.72 * second
    torch.testing.assert_close(advantages, torch.tensor([[[first, second], [third, 0.0]]]))
    torch.testing.assert_close(returns, torch.tensor([[first + 1.0, third + 3.0]]))


def test_a_truncation_bootstraps_from_the_true_final_state() -> None:
    cut = experience(terminated=torch.tensor([[False, False]]), truncated=torch.tensor([[False, True]]))
    advantages, _ = step_advantages(cut, gamma=GAMMA, gae_lambda=LAMBDA, critic=CRITIC)
    assert advantages[0, 1, 0].item() == pytest.approx(2.0 + 0.9 * 50.0 - 3.0)


def test_the_rollouts_end_bootstraps_from_the_next_state() -> None:
    going_on = experience(
        executed=torch.tensor([[2, 2]]), terminated=torch.tensor([[False, False]]), final_states=[]
    )
    advantages, _ = step_advantages(going_on, gamma=GAMMA, gae_lambda=LAMBDA, critic=CRITIC)
    assert advantages[0, 1, 1].item() == pytest.approx(99.0 + 0.9 * 60.0 - 77.0)


def test_an_episode_that_begins_after_the_end_shares_nothing() -> None:
    ended = experience(executed=torch.tensor([[1, 2]]), terminated=torch.tensor([[True, False]]), final_states=[])
    before, _ = step_advantages(ended, gamma=GAMMA, gae_lambda=LAMBDA, critic=CRITIC)
    richer = replace(ended, rewards=ended.rewards + torch.tensor([[[0.0, 0.0], [10.0, 10.0]]]))
    after, _ = step_advantages(richer, gamma=GAMMA, gae_lambda=LAMBDA, critic=CRITIC)
    assert before[0, 0, 0].item() == pytest.approx(0.5 - 1.0)
    torch.testing.assert_close(before[0, 0], after[0, 0])
    assert not torch.equal(before[0, 1], after[0, 1])


def test_the_rollout_is_valid_and_masks_what_was_not_executed() -> None:
    rollout = control_steps(experience(), gamma=GAMMA, critic=CRITIC)
    assert rollout.mask.tolist() == [[True, True, True, False]]
    assert rollout.terminated.tolist() == [[False, False, True, False]]
    assert rollout.episode.tolist() == [[0, 0, 0, -1]]


def test_chunks_of_one_step_are_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 5, 1, generator=generator)
    terminated = torch.rand(3, 5, generator=generator) < 0.3
    single = ChunkExperience(
        observations={"state": states},
        actions=torch.zeros(3, 5, 1, 4),
        log_probs=torch.zeros(3, 5, 1),
        rewards=torch.randn(3, 5, 1, generator=generator),
        executed=torch.ones(3, 5, dtype=torch.int64),
        terminated=terminated,
        truncated=torch.zeros_like(terminated),
        final_states=[],
        next_states=torch.randn(3, 1, generator=generator),
        episodes=[],
        step_states=states.unsqueeze(2),
    )
    of_steps = step_advantages(single, gamma=GAMMA, gae_lambda=LAMBDA, critic=CRITIC)
    of_chunks = gae(judge_chunks(single, gamma=GAMMA, critic=CRITIC), gae_lambda=LAMBDA)
    torch.testing.assert_close(of_steps[0].squeeze(-1), of_chunks[0])
    torch.testing.assert_close(of_steps[1], of_chunks[1])
