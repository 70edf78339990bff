"""Credit for the control steps of a chunk, against GAE by hand and against chunks of one step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from embodied.vla.chunk_rollout import ChunkExperience, judge_chunks
from embodied.vla.step_credit import control_steps, credit_steps, fit_critic
from policy_core.optimizer import NonFiniteLoss
from policy_core.returns import gae
from tests.embodied.tables import tiny_policy

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
    credit = credit_steps(experience(), gamma=GAMMA, gae_lambda=LAMBDA, critic=CRITIC)
    third = 2.0 - 3.0  # terminated: nothing follows
    second = -1.0 + 0.9 * 3.0 - 2.0 + 0.72 * third
    first = 0.5 + 0.9 * 2.0 - 1.0 + 0.72 * second
    torch.testing.assert_close(credit.advantages, torch.tensor([[[first, second], [third, 0.0]]]))
    torch.testing.assert_close(credit.returns, torch.tensor([first + 1.0, second + 2.0, third + 3.0]))
    torch.testing.assert_close(credit.states, torch.tensor([[1.0], [2.0], [3.0]]))
    residual = torch.tensor([first, second, third]).var(correction=0)
    assert credit.explained == pytest.approx(float(1 - residual / credit.returns.var(correction=0)))


def test_a_truncation_bootstraps_from_the_true_final_state() -> None:
    cut = experience(terminated=torch.tensor([[False, False]]), truncated=torch.tensor([[False, True]]))
    advantages = credit_steps(cut, gamma=GAMMA, gae_lambda=LAMBDA, critic=CRITIC).advantages
    assert advantages[0, 1, 0].item() == pytest.approx(2.0 + 0.9 * 50.0 - 3.0)


def test_the_rollouts_end_bootstraps_from_the_next_state() -> None:
    going_on = experience(
        executed=torch.tensor([[2, 2]]), terminated=torch.tensor([[False, False]]), final_states=[]
    )
    advantages = credit_steps(going_on, gamma=GAMMA, gae_lambda=LAMBDA, critic=CRITIC).advantages
    assert advantages[0, 1, 1].item() == pytest.approx(99.0 + 0.9 * 60.0 - 77.0)


def test_an_episode_that_begins_after_the_end_shares_nothing() -> None:
    ended = experience(executed=torch.tensor([[1, 2]]), terminated=torch.tensor([[True, False]]), final_states=[])
    before = credit_steps(ended, gamma=GAMMA, gae_lambda=LAMBDA, critic=CRITIC).advantages
    richer = replace(ended, rewards=ended.rewards + torch.tensor([[[0.0, 0.0], [10.0, 10.0]]]))
    after = credit_steps(richer, gamma=GAMMA, gae_lambda=LAMBDA, critic=CRITIC).advantages
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
    of_steps = credit_steps(single, gamma=GAMMA, gae_lambda=LAMBDA, critic=CRITIC)
    advantages, returns = gae(judge_chunks(single, gamma=GAMMA, critic=CRITIC), gae_lambda=LAMBDA)
    torch.testing.assert_close(of_steps.advantages.squeeze(-1), advantages)
    torch.testing.assert_close(of_steps.returns, returns.flatten())


def test_the_critic_learns_the_returns_and_nothing_else_moves() -> None:
    policy = tiny_policy()
    credit = credit_steps(experience(), gamma=GAMMA, gae_lambda=LAMBDA, critic=CRITIC)
    states = torch.randn(64, policy.spaces.state_size, generator=torch.Generator().manual_seed(1))
    credit = replace(credit, states=states, returns=states[:, 0])
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    options: dict[str, Any] = {"minibatch_size": 16, "generator": torch.Generator().manual_seed(0)}
    first = fit_critic(policy, optimizer, credit, epochs=1, **options)
    assert fit_critic(policy, optimizer, credit, epochs=30, **options) < 0.2 * first
    changed = {
        name.partition(".")[0] for name, tensor in policy.state_dict().items() if not tensor.equal(before[name])
    }
    assert changed == {"critic"}
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    with pytest.raises(NonFiniteLoss, match="critic's loss") as caught:
        fit_critic(policy, optimizer, replace(credit, returns=credit.returns * torch.inf), epochs=1, **options)
    assert caught.value.setting == "critic_learning_rate"
    assert all(tensor.equal(before[name]) for name, tensor in policy.state_dict().items())  # nothing is spoiled
