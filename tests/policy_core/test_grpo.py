"""Advantages over groups of episodes, by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, get_args

import pytest
import torch
from torch import Tensor

from policy_core.grpo import (
    ADVANTAGES,
    Advantage,
    GRPOConfig,
    dr_grpo,
    group_advantages,
    grpo,
    is_flat,
    overlong_punishment,
    reinforce_pp,
    reinforce_pp_baseline,
    rloo,
    with_signal,
)
from policy_core.rollout import Rollout
from tests.policy_core.helpers import NAN, close, flags, make_rollout

NAMES = get_args(Advantage)


def compared(name: str, returns: Tensor, group: Tensor) -> Tensor:
    """Advantages of episodes of one decision each."""
    if name == "reinforce_pp":
        return reinforce_pp(returns.unsqueeze(1), torch.ones(len(returns), 1, dtype=torch.bool)).squeeze(1)
    return ADVANTAGES[name](returns, group)


# group 7: returns 1, 4, 4 (mean 3, deviation sqrt(6 / 2)); group 2: 5, 5 (no spread); group 9: alone with 6
RETURNS = (1.0, 5.0, 4.0, 6.0, 4.0, 5.0)
GROUP = (7, 2, 7, 9, 7, 2)


def test_grpo_by_hand() -> None:
    scale = math.sqrt(3.0) + 1e-4
    expected = [-2 / scale, 0.0, 1 / scale, 0.0, 1 / scale, 0.0]
    close(grpo(torch.tensor(RETURNS), torch.tensor(GROUP)), expected)


def test_rloo_by_hand() -> None:
    # 1 - (4 + 4) / 2;  4 - (1 + 4) / 2, twice
    close(rloo(torch.tensor(RETURNS), torch.tensor(GROUP)), [-3.0, 0.0, 1.5, 0.0, 1.5, 0.0])


def test_dr_grpo_by_hand() -> None:
    close(dr_grpo(torch.tensor(RETURNS), torch.tensor(GROUP)), [-2.0, 0.0, 1.0, 0.0, 1.0, 0.0])


def test_reinforce_pp_by_hand() -> None:
    # over the batch, whatever the group: mean 25 / 6, centred squares 119 - 625 / 6 = 89 / 6, over n - 1 = 5
    scale = math.sqrt(89 / 30)
    close(
        compared("reinforce_pp", torch.tensor(RETURNS), torch.tensor(GROUP)),
        [(r - 25 / 6) / scale for r in RETURNS],
    )


def test_reinforce_pp_charges_a_kl_to_its_own_token_and_those_before() -> None:
    """Of rewards 1, 0.5 and 0, -0.5, 2 there are left 1.5, 0.5 and 1.5, 1.5, 2: mean 1.4, squares 1.2 over 4. That
    both rows earn 1.5 in all does not matter."""
    rewards = [[1.0, 0.5, NAN], [0.0, -0.5, 2.0]]
    rollout = make_rollout(rewards, mask=flags("110", "111"), group=[[0, 0, 0], [1, 1, 1]])
    config = GRPOConfig(advantage="reinforce_pp", group_size=1)
    advantages, _ = group_advantages(rollout, config=config)
    scale = math.sqrt(1.2 / 4)
    close(advantages, [[0.1 / scale, -0.9 / scale, 0.0], [0.1 / scale, 0.1 / scale, 0.6 / scale]])


def test_reinforce_pp_baseline_by_hand() -> None:
    # less the group's mean: -2, 0, 1, 0, 1, 0, whose mean is 0; then sqrt(6 / 5) over the batch
    scale = math.sqrt(6 / 5)
    expected = [-2 / scale, 0.0, 1 / scale, 0.0, 1 / scale, 0.0]
    close(reinforce_pp_baseline(torch.tensor(RETURNS), torch.tensor(GROUP)), expected)


def test_the_batch_as_a_baseline_does_not_know_the_prompt() -> None:
    """An easy prompt (all right) and a hard one (all wrong): only reinforce_pp finds a difference to learn from."""
    returns, group = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0, 0, 1, 1])
    assert compared("reinforce_pp", returns, group).sign().tolist() == [1.0, 1.0, -1.0, -1.0]
    close(reinforce_pp_baseline(returns, group), torch.zeros(4))


def test_nearly_equal_returns_stay_small_but_for_grpo() -> None:
    """One group differs by 1, another by 0.002: dividing by each group's own deviation makes them alike."""
    returns, group = torch.tensor([0.0, 1.0, 0.5, 0.502]), torch.tensor([0, 0, 1, 1])
    large, small = grpo(returns, group).abs()[[1, 3]]
    assert small > 0.9 * large
    large, small = reinforce_pp_baseline(returns, group).abs()[[1, 3]]
    close(small, 0.002 * large)


@pytest.mark.parametrize("name", ["reinforce_pp", "reinforce_pp_baseline"])
def test_a_batch_without_spread_has_no_advantage(name: str) -> None:
    for returns in (torch.full((3,), 0.7), torch.tensor([2.0])):
        advantages = compared(name, returns, torch.zeros(len(returns), dtype=torch.long))
        close(advantages, torch.zeros_like(returns), atol=1e-10)
    # what hardly differs stays small
    nearly = 0.7 + 1e-5 * (torch.arange(1001) % 2)
    assert compared(name, nearly, torch.arange(1001) % 3).abs().max() < 0.1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [3, 7, 8, 1001])
def test_rounding_is_no_advantage(name: str, size: int) -> None:
    """The mean of equal numbers is not quite that number in float32, and sums of equal rewards differ in their last
    bit: nothing of that may be left, whatever an optimizer would scale it up to."""
    group = torch.zeros(size, dtype=torch.long)
    for value in (0.7, -0.1, 1e-9, 1234.7):
        equal = torch.full((size,), value, dtype=torch.float32)
        last_bit = torch.where(torch.arange(size) % 2 == 0, equal, torch.nextafter(equal, 2 * equal))
        for returns in (equal, last_bit):
            assert is_flat(returns, group).all()
            assert not compared(name, returns, group).any()


def test_what_differs_by_more_than_rounding_is_not_flat() -> None:
    returns = torch.tensor([0.7, 0.7 + 2e-6, 5.0, 5.0, -1000.0, -1000.0 + 5e-4, 2.0, 3.0])
    group = torch.tensor([4, 4, 1, 1, 0, 0, 1, 9])
    assert is_flat(returns, group).tolist() == [False] * 4 + [True] * 2 + [False, True]


@pytest.mark.parametrize("name", ["grpo", "rloo", "dr_grpo", "reinforce_pp_baseline"])
def test_flat_groups_are_counted_and_left_out(
    name: Advantage,
) -> None:
    """Eight answers that earn 0.7 each in float32, beside a group that differs."""
    rewards = torch.full((11, 1), 0.7, dtype=torch.float32)
    rewards[8:] = torch.tensor([[0.1], [0.7], [0.2]])
    group = torch.tensor([[3]] * 8 + [[5]] * 3)
    rollout = replace(make_rollout(rewards.tolist(), group=group.tolist()), rewards=rewards)
    advantages, metrics = group_advantages(rollout, config=GRPOConfig(advantage=name))
    assert advantages.dtype == torch.float32
    assert not advantages[:8].any()
    assert float(metrics["frac_reward_zero_std"]) == pytest.approx(8 / 11)
    trained, _ = with_signal(rollout, advantages)
    assert trained.shape == (3, 1)


KL_SCORES = torch.tensor([[1.0], [1.0], [0.0], [2.0]])
KL_TAKEN = torch.tensor([[0.005], [0.015], [0.25], [0.25]])
"""Both answers to prompt 0 earned 1 and differ in what the KL took; those to prompt 1 earned 0 and 2."""


def after_kl(scores: Tensor) -> Rollout:
    """The scores less what the KL took, two answers a prompt."""
    return replace(make_rollout(scores.tolist(), group=[[0], [0], [1], [1]]), rewards=scores - KL_TAKEN)


@pytest.mark.parametrize("name", NAMES)
def test_a_group_is_flat_by_its_scores_not_by_the_kl_that_was_taken_off(name: Advantage) -> None:
    config = GRPOConfig(advantage=name)
    _, metrics = group_advantages(after_kl(KL_SCORES), config=config, scores=KL_SCORES)
    assert float(metrics["frac_reward_zero_std"]) == 0.5
    _, metrics = group_advantages(after_kl(KL_SCORES), config=config)
    assert float(metrics["frac_reward_zero_std"]) == 0.0


def test_no_standard_deviation_scales_a_kl_up() -> None:
    """A hundredth of a nat alone is no advantage of 0.7, in a group, a batch or all groups of one score."""
    ones = torch.ones(4, 1)
    rollout = after_kl(KL_SCORES)
    advantages, _ = group_advantages(rollout, config=GRPOConfig(advantage="grpo"), scores=KL_SCORES)
    assert not advantages[:2].any()
    blind, _ = group_advantages(rollout, config=GRPOConfig(advantage="grpo"))
    close(blind[:2], [[0.005 / (0.01 / math.sqrt(2) + 1e-4)], [-0.005 / (0.01 / math.sqrt(2) + 1e-4)]], atol=1e-4)
    close(blind[2:], advantages[2:])
    names: tuple[Advantage, ...] = ("reinforce_pp", "reinforce_pp_baseline")
    for name in names:
        batch = GRPOConfig(advantage=name)
        assert group_advantages(rollout, config=batch, scores=KL_SCORES)[0][:2].all()
        assert group_advantages(after_kl(ones), config=batch)[0][:2].all()
        assert not group_advantages(after_kl(ones), config=batch, scores=ones)[0].any()


@pytest.mark.parametrize("name", ["rloo", "dr_grpo"])
def test_where_nothing_is_divided_the_kl_pulls_in_flat_groups_too(name: Advantage) -> None:
    """0.01 nats apart: leave-one-out +-0.01, from the mean +-0.005, whatever the scores were."""
    apart = 0.01 if name == "rloo" else 0.005
    advantages, _ = group_advantages(after_kl(KL_SCORES), config=GRPOConfig(advantage=name), scores=KL_SCORES)
    close(advantages[:2], [[apart], [-apart]], atol=1e-7)
    _, kept = with_signal(after_kl(KL_SCORES), advantages)
    assert kept.shape == (4, 1)


def test_overlong_punishment_by_hand() -> None:
    """The last 4 of 12 tokens cost a quarter each; beyond, all costs 1."""
    lengths = torch.tensor([[0, 8, 9], [11, 12, 40]])
    close(overlong_punishment(lengths, max_length=12, cache=4), [[0.0, 0.0, -0.25], [-0.75, -1.0, -1.0]])
    close(overlong_punishment(torch.tensor([0, 6, 12]), max_length=12, cache=12), [0.0, -0.5, -1.0])


@pytest.mark.parametrize("name", NAMES)
def test_a_better_return_has_a_better_advantage_and_a_common_shift_does_not_matter(name: str) -> None:
    returns, group = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    advantages = compared(name, returns, group)
    assert advantages[0] < advantages[1] < advantages[2]
    close(compared(name, returns + 100.0, group), advantages, atol=1e-11)
    close(advantages.sum(), 0.0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_no_episodes_are_no_advantages(name: str) -> None:
    assert compared(name, torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)


def two_rows() -> Rollout:
    """Group 0: episodes of returns 1 (row 0, over an observation column), 3 (row 1). Group 1: 2 and 6 in row 0.

    Row 2 is masked whole; its return must not enter group 0.
    """
    return make_rollout(
        [[1.0, NAN, 0.0, 2.0, 6.0], [0.0, 3.0, NAN, NAN, NAN], [50.0, NAN, 50.0, NAN, NAN]],
        mask=flags("10111", "11000", "00000"),
        truncated=flags("00100", "00000", "00000"),
        terminated=flags("00010", "01000", "00000"),
        episode=[[0, 0, 0, 1, 2], [0, 0, -1, -1, -1], [0, 0, 0, -1, -1]],
        group=[[0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
    )


@pytest.mark.parametrize(
    "advantage, expected",
    [
        ("dr_grpo", [[-1, 0, -1, -2, 2], [1, 1, 0, 0, 0], [0] * 5]),
        ("rloo", [[-2, 0, -2, -4, 4], [2, 2, 0, 0, 0], [0] * 5]),
    ],
)
def test_every_decision_gets_its_episodes_advantage(
    advantage: Literal["dr_grpo", "rloo"], expected: list[list[float]]
) -> None:
    two_rows().validate()
    advantages, _ = group_advantages(two_rows(), config=GRPOConfig(advantage=advantage))
    close(advantages, expected)


def test_group_metrics() -> None:
    # deviations sqrt(2) for the two episodes of group 0, sqrt(8) for those of group 1
    _, metrics = group_advantages(two_rows(), config=GRPOConfig())
    close(metrics["reward_std"], (2 * math.sqrt(2) + 2 * math.sqrt(8)) / 4)
    close(metrics["frac_reward_zero_std"].double(), 0.0)
    # all returns of group 1 equal: half of the episodes carry no signal
    equal = replace(two_rows(), rewards=torch.where(two_rows().rewards == 6.0, 2.0, two_rows().rewards))
    advantages, metrics = group_advantages(equal, config=GRPOConfig())
    close(metrics["frac_reward_zero_std"].double(), 0.5)
    close(advantages[0, 3:], [0.0, 0.0])


def test_groups_without_signal_are_left_out() -> None:
    group = [[5, 5], [5, 5], [7, 7], [7, 7], [9, 9]]
    rollout = make_rollout([[2.0, 3.0], [4.0, 5.0], [6.0, 7.0], [8.0, 9.0], [1.0, 1.0]], group=group)
    # the first row of group 7 earned its group's mean: it has no advantage, but counts in the denominators
    advantages = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    trained, left = with_signal(rollout, advantages)
    close(trained.rewards, [[6.0, 7.0], [8.0, 9.0]])
    close(left, [[0.0, 0.0], [-1.0, 0.0]])
    everything, nothing = with_signal(rollout, torch.zeros(5, 2))  # an empty update would be none at all
    assert everything is rollout
    close(nothing, torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"^groups with signal need rollout\.group$"):
        with_signal(make_rollout([[1.0]]), torch.ones(1, 1))


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"^group advantages need rollout\.group$"):
        group_advantages(make_rollout([[1.0]]), config=GRPOConfig())
    with pytest.raises(ValueError, match=r"^grpo\.group_size must be at least 2, got 1: one answer has no peer$"):
        GRPOConfig(group_size=1)
    assert GRPOConfig(advantage="reinforce_pp", group_size=1).group_size == 1  # its baseline is the batch
    with pytest.raises(ValueError, match=r"^grpo\.group_size must be at least 2, got 1: one answer has no peer$"):
        GRPOConfig(advantage="reinforce_pp_baseline", group_size=1)
    with pytest.raises(ValueError, match=r"^grpo\.group_size must be at least 2, got 0: one answer has no peer$"):
        GRPOConfig(advantage="reinforce_pp", group_size=0)
    for cache in (0, 13):
        with pytest.raises(
            ValueError, match=rf"^overlong punishment needs 0 < cache <= max_length, got {cache} and 12$"
        ):
            overlong_punishment(torch.tensor([1]), max_length=12, cache=cache)
