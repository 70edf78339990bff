"""Advantages over groups of episodes, by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import pytest
import torch

from policy_core.grpo import ADVANTAGES, GRPOConfig, dr_grpo, group_advantages, grpo, rloo, with_signal
from policy_core.rollout import Rollout
from tests.policy_core.helpers import NAN, close, flags, make_rollout

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


@pytest.mark.parametrize("name", list(ADVANTAGES))
def test_a_better_return_has_a_better_advantage_and_a_common_shift_does_not_matter(name: str) -> None:
    returns, group = torch.tensor([1.0, 2.0, 5.0]), torch.zeros(3, dtype=torch.long)
    advantages = ADVANTAGES[name](returns, group)
    assert advantages[0] < advantages[1] < advantages[2]
    close(ADVANTAGES[name](returns + 100.0, group), advantages, atol=1e-11)
    close(advantages.sum(), 0.0, atol=1e-12)


@pytest.mark.parametrize("name", list(ADVANTAGES))
def test_no_episodes_are_no_advantages(name: str) -> None:
    assert ADVANTAGES[name](torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)


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


def test_rows_without_signal_are_left_out() -> None:
    rollout = make_rollout([[2.0, 3.0], [4.0, 5.0], [6.0, 7.0], [8.0, 9.0]])
    trained, left = with_signal(rollout, torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [-1.0, 0.0]]))
    close(trained.rewards, [[4.0, 5.0], [8.0, 9.0]])
    close(left, [[1.0, 1.0], [-1.0, 0.0]])
    everything, nothing = with_signal(rollout, torch.zeros(4, 2))  # an empty update would be none at all
    assert everything is rollout
    close(nothing, torch.zeros(4, 2))


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"^group advantages need rollout\.group$"):
        group_advantages(make_rollout([[1.0]]), config=GRPOConfig())
    with pytest.raises(ValueError, match=r"^grpo\.group_size must be at least 2, got 1: one answer has no peer$"):
        GRPOConfig(group_size=1)
