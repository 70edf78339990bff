"""GAE, bootstrapping, chunks and episode returns, by hand and against stable-baselines3."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from policy_core.returns import episode_returns, explained_variance, fold_chunk, gae, next_values_of
from policy_core.rollout import Rollout
from tests.policy_core.helpers import NAN, close, flags, make_rollout
from tests.policy_core.referees import sb3_gae


def table() -> Rollout:
    """Two rows of text. discount 0.5 (row 1's first decision lasted two steps: 0.25).

    row 0: padding | prompt, a, tool output, b (terminated) | prompt, c, d (truncated) | prompt, e (row ends)
    row 1: f, g (row ends) | padding
    Masked columns hold 99s: rewards, values and bootstraps that must not be read.
    """
    x = 99.0
    return make_rollout(
        #     .  p  a    t  b    p  c     d    p  e
        [[x, x, 1.0, x, 2.0, x, 0.0, 4.0, x, 1.0], [1.0, 2.0, x, x, x, x, x, x, x, x]],
        values=[[x, x, 2.0, x, 4.0, x, 8.0, 2.0, x, 3.0], [1.0, 2.0, x, x, x, x, x, x, x, x]],
        next_values=[[x, x, 4.0, x, x, x, 2.0, 6.0, x, 10.0], [2.0, 4.0, x, x, x, x, x, x, x, x]],
        mask=flags("0010101101", "1100000000"),
        terminated=flags("0000100000", "0000000000"),
        truncated=flags("0000000100", "0000000000"),
        episode=[[-1, 0, 0, 0, 0, 1, 1, 1, 2, 2], [0, 0, -1, -1, -1, -1, -1, -1, -1, -1]],
        discount=torch.tensor([[0.5] * 10, [0.25] + [0.5] * 9]),
    )


# lambda 0.5, so an uncut decision passes back 0.5 * 0.5 = 0.25 of the next advantage (f: 0.125)
#   e: 1 + 0.5 * 10 - 3 = 3                          the end of the row bootstraps, nothing is passed back to it
#   d: 4 + 0.5 * 6 - 2 = 5                           truncated: bootstraps, lambda stops
#   c: 0 + 0.5 * 2 - 8 = -7;  -7 + 0.25 * 5 = -5.75
#   b: 2 - 4 = -2                                    terminated: no bootstrap, lambda stops
#   a: 1 + 0.5 * 4 - 2 = 1;   1 + 0.25 * -2 = 0.5    through the tool output: no discount, no lambda there
#   g: 2 + 0.5 * 4 - 2 = 2
#   f: 1 + 0.25 * 2 - 1 = 0.5;  0.5 + 0.125 * 2 = 0.75
ADVANTAGES = [[0, 0, 0.5, 0, -2, 0, -5.75, 5, 0, 3], [0.75, 2, 0, 0, 0, 0, 0, 0, 0, 0]]
RETURNS = [[0, 0, 2.5, 0, 2, 0, 2.25, 7, 0, 6], [1.75, 4, 0, 0, 0, 0, 0, 0, 0, 0]]


def test_gae_of_the_table() -> None:
    table().validate()
    advantages, returns = gae(table(), gae_lambda=0.5)
    close(advantages, ADVANTAGES)
    close(returns, RETURNS)


def test_gae_with_lambda_0_is_the_td_error() -> None:
    advantages, _ = gae(table(), gae_lambda=0.0)
    close(advantages, [[0, 0, 1, 0, -2, 0, -7, 5, 0, 3], [0.5, 2, 0, 0, 0, 0, 0, 0, 0, 0]])


def test_gae_with_lambda_1_returns_the_discounted_sum() -> None:
    # e: 1 + 5 = 6; d: 4 + 3 = 7; c: 0 + 0.5 * 7; b: 2; a: 1 + 0.5 * 2; g: 2 + 2; f: 1 + 0.25 * 4
    _, returns = gae(table(), gae_lambda=1.0)
    close(returns, [[0, 0, 2, 0, 2, 0, 3.5, 7, 0, 6], [2, 4, 0, 0, 0, 0, 0, 0, 0, 0]])


def test_gae_reads_nothing_under_the_mask_nor_the_bootstrap_of_the_terminated() -> None:
    rollout = table()
    mask, nan = rollout.mask, torch.tensor(NAN)
    assert rollout.values is not None
    assert rollout.next_values is not None
    spoiled = replace(
        rollout,
        rewards=torch.where(mask, rollout.rewards, nan),
        values=torch.where(mask, rollout.values, nan),
        next_values=torch.where(mask & ~rollout.terminated, rollout.next_values, nan),
        discount=torch.where(mask, rollout.discount, nan),
    )
    advantages, returns = gae(spoiled, gae_lambda=0.5)
    close(advantages, ADVANTAGES)
    close(returns, RETURNS)


def test_gae_with_gamma_and_lambda_1_is_reward_to_go_less_value() -> None:
    rollout = make_rollout(
        [[1.0, 2.0, 4.0]], values=[[0.5, 0.25, 0.125]], next_values=[[0.25, 0.125, NAN]], terminated=flags("001")
    )
    advantages, returns = gae(rollout, gae_lambda=1.0)
    close(returns, [[7.0, 6.0, 4.0]])
    close(advantages, [[6.5, 5.75, 3.875]])


def test_terminated_wins_over_truncated() -> None:
    rollout = make_rollout(
        [[1.0]], values=[[0.5]], next_values=[[100.0]], terminated=flags("1"), truncated=flags("1")
    )
    close(gae(rollout, gae_lambda=0.9)[0], [[0.5]])


@pytest.mark.parametrize("missing", ["values", "next_values"])
def test_gae_needs_values(missing: str) -> None:
    without: dict[str, Any] = {missing: None}
    with pytest.raises(ValueError, match=r"^gae needs values and next_values; use group advantages"):
        gae(replace(table(), **without), gae_lambda=0.5)


def random_episodes(rows: int, width: int) -> dict[str, Tensor]:
    """Steps with frequent ends of both kinds, and values at the true next observations."""
    terminated = torch.rand(rows, width) < 0.15
    truncated = torch.rand(rows, width) < 0.15
    return {
        "rewards": torch.randn(rows, width),
        "values": torch.randn(rows, width),
        "terminated": terminated,
        "truncated": truncated,
        "final_values": torch.randn(rows, width),
    }


@pytest.mark.parametrize("gamma, gae_lambda", [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0), (0.5, 1.0)])
def test_gae_equals_stable_baselines3(gamma: float, gae_lambda: float) -> None:
    steps = random_episodes(7, 40)
    expected = sb3_gae(**steps, gamma=gamma, gae_lambda=gae_lambda)
    cut = steps["terminated"] | steps["truncated"]
    episode = cut.long().cumsum(1) - cut.long()
    rollout = make_rollout(
        steps["rewards"],
        values=steps["values"],
        terminated=steps["terminated"],
        truncated=steps["truncated"],
        episode=episode,
        discount=torch.full((7, 40), gamma),
        next_values=next_values_of(
            values=steps["values"],
            mask=torch.ones_like(cut),
            episode=episode,
            terminated=steps["terminated"],
            final_values=steps["final_values"],
        ),
    )
    rollout.validate()
    for ours, theirs in zip(gae(rollout, gae_lambda=gae_lambda), expected, strict=True):
        close(ours, theirs)


# ---------------------------------------------------------------- next_values_of


def test_next_values_of_the_table() -> None:
    rollout = table()
    assert rollout.values is not None
    final = torch.full_like(rollout.values, NAN)
    final[0, 7], final[0, 9], final[1, 1] = 6.0, 10.0, 4.0
    next_values = next_values_of(
        values=torch.where(rollout.mask, rollout.values, NAN),
        mask=rollout.mask,
        episode=rollout.episode,
        terminated=rollout.terminated,
        final_values=final,
    )
    # a -> b over the tool output; b terminated: 0; c -> d; d is truncated, e and g end their rows: final values
    counted = [4.0, 0.0, 2.0, 6.0, 10.0, 2.0, 4.0]
    close(next_values[rollout.mask], counted)


def test_next_values_without_final_ones_where_every_episode_terminates() -> None:
    next_values = next_values_of(
        values=torch.tensor([[1.0, 2.0, 3.0]]),
        mask=flags("111"),
        episode=torch.tensor([[0, 1, 1]]),
        terminated=flags("101"),
        final_values=None,
    )
    close(next_values, [[0.0, 3.0, 0.0]])


def test_next_values_say_where_a_final_value_is_missing() -> None:
    with pytest.raises(ValueError, match=r"^row 1, column 1: an episode is cut here and final_values is not"):
        next_values_of(
            values=torch.zeros(2, 3),
            mask=flags("111", "110"),
            episode=torch.zeros(2, 3, dtype=torch.long),
            terminated=flags("001", "000"),
            final_values=None,
        )


# ---------------------------------------------------------------- chunks


def test_fold_chunk_by_hand() -> None:
    # gamma 0.5. Four of four: 1 + 0.5 * 2 + 0.25 * 4 + 0.125 * 8 = 4, 0.5^4. Two of four: 1 + 1 = 2, 0.5^2.
    reward, discount, step_mask = fold_chunk(
        rewards=torch.tensor([[1.0, 2.0, 4.0, 8.0], [1.0, 2.0, NAN, 99.0], [3.0, NAN, NAN, NAN]]),
        executed=torch.tensor([4, 2, 1]),
        gamma=0.5,
    )
    close(reward, [4.0, 2.0, 3.0])
    close(discount, [0.0625, 0.25, 0.5])
    assert step_mask.tolist() == flags("1111", "1100", "1000").tolist()


def test_a_chunk_of_one_step_is_that_step() -> None:
    rewards = torch.randn(3, 4)
    reward, discount, step_mask = fold_chunk(
        rewards=rewards.unsqueeze(-1), executed=torch.ones(3, 4, dtype=torch.long), gamma=0.97
    )
    close(reward, rewards, atol=0.0)
    close(discount, torch.full((3, 4), 0.97), atol=0.0)
    assert step_mask.shape == (3, 4, 1)
    assert bool(step_mask.all())


def test_chunks_and_their_steps_have_the_same_monte_carlo_return() -> None:
    # six steps as chunks of 4 + 2 (the episode ends inside the second) against six decisions
    gamma = 0.9
    rewards = torch.tensor([1.0, -2.0, 3.0, 0.5, 4.0, -1.0])
    steps = make_rollout(
        rewards.unsqueeze(0),
        values=torch.zeros(1, 6),
        next_values=torch.zeros(1, 6),
        terminated=flags("000001"),
        discount=gamma,
    )
    folded, discount, _ = fold_chunk(
        rewards=torch.stack([rewards[:4], torch.cat([rewards[4:], torch.full((2,), NAN)])]),
        executed=torch.tensor([4, 2]),
        gamma=gamma,
    )
    chunks = make_rollout(
        folded.unsqueeze(0),
        values=torch.zeros(1, 2),
        next_values=torch.zeros(1, 2),
        terminated=flags("01"),
        discount=discount.unsqueeze(0),
    )
    close(gae(chunks, gae_lambda=1.0)[1][0], gae(steps, gae_lambda=1.0)[1][0, [0, 4]])


@pytest.mark.parametrize("executed", [[0, 2], [1, 5]])
def test_fold_chunk_refuses_impossible_counts(executed: list[int]) -> None:
    low, high = executed
    with pytest.raises(ValueError, match=rf"^a chunk of 4 steps executed {low}\.\.{high} of them$"):
        fold_chunk(rewards=torch.zeros(2, 4), executed=torch.tensor(executed), gamma=0.9)


# ---------------------------------------------------------------- episodes


def test_episode_returns_of_several_episodes_in_a_row() -> None:
    rollout = make_rollout(
        [[1.0, 2.0, NAN, 4.0], [8.0, NAN, 16.0, 32.0]],
        mask=flags("1101", "1011"),
        truncated=flags("0100", "0000"),
        episode=[[5, 5, 6, 6], [5, 5, 5, 5]],
        group=[[3, 3, 4, 4], [9, 9, 9, 9]],
        discount=0.5,
    )
    returns, index, group = episode_returns(rollout)
    close(returns, [3.0, 4.0, 56.0])
    assert index.tolist() == [[0, 0, -1, 1], [2, -1, 2, 2]]
    assert group.tolist() == [3, 4, 9]
    assert episode_returns(replace(rollout, group=None))[2].tolist() == [0, 0, 0]


def test_explained_variance() -> None:
    returns = torch.tensor([[1.0, 3.0, NAN, 5.0]])
    mask = flags("1101")
    close(explained_variance(returns, returns, mask), 1.0)
    close(explained_variance(torch.full_like(returns, 7.0), returns, mask), 0.0)
    # residuals 0, 0, 3: variance 2; returns: variance 8/3; 1 - 2 / (8/3) = 0.25
    close(explained_variance(torch.tensor([[1.0, 3.0, NAN, 2.0]]), returns, mask), 0.25)
    assert explained_variance(returns, torch.ones_like(returns), mask).isnan()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert explained_variance(returns, returns, torch.zeros_like(mask)).isnan()  # nothing was scored
