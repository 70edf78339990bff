"""Masked statistics and aggregation weights against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from policy_core.masking import (
    aggregation_weights,
    episode_index,
    masked_mean,
    masked_std,
    masked_sum,
    normalize,
)
from tests.policy_core.helpers import NAN, close, flags


def test_sum_mean_and_std_read_counted_entries_only() -> None:
    values = torch.tensor([[1.0, NAN, 3.0], [8.0, float("inf"), -NAN]])
    mask = flags("101", "100")
    close(masked_sum(values, mask), 12.0)
    close(masked_mean(values, mask), 4.0)
    # (1-4)^2 + (3-4)^2 + (8-4)^2 = 26, over n - 1 = 2
    close(masked_std(values, mask), math.sqrt(13.0))


def test_nothing_counted_gives_zero() -> None:
    values, mask = torch.full((2, 2), NAN), flags("00", "00")
    for statistic in (masked_sum, masked_mean, masked_std):
        close(statistic(values, mask), 0.0)
    close(normalize(values, mask), torch.zeros(2, 2))


def test_one_entry_has_no_deviation() -> None:
    close(masked_std(torch.tensor([[5.0, 7.0]]), flags("01")), 0.0)
    close(normalize(torch.tensor([[5.0, 7.0]]), flags("01")), [[0.0, 0.0]])


@pytest.mark.parametrize("value", [0.7, 0.1, -1234.7, 1e-9, 0.0])
def test_one_and_the_same_number_is_normalized_to_nothing(value: float) -> None:
    """In float32 the mean of equal numbers is another number, and rounding by its own deviation is of size 1."""
    values = torch.full((64, 40), value, dtype=torch.float32)
    mask = torch.ones(64, 40, dtype=torch.bool)
    assert not normalize(values, mask).any()
    other = values.clone()
    other[3, 5], mask[3, 5] = NAN, False
    assert not normalize(other, mask).any()
    values[0, 0] += 1.0
    assert float(normalize(values, mask)[0, 0]) > 40


def test_normalize_by_hand() -> None:
    # 1, 3, 8: mean 4, deviation sqrt(13)
    normal = normalize(torch.tensor([[1.0, NAN, 3.0, 8.0]]), flags("1011"), epsilon=0.0)
    root = math.sqrt(13.0)
    close(normal, [[-3 / root, 0.0, -1 / root, 4 / root]])
    # 0, 2 with epsilon 1: deviation sqrt(2)
    scale = 1 + math.sqrt(2.0)
    close(normalize(torch.tensor([[0.0, 2.0]]), flags("11"), epsilon=1.0), [[-1 / scale, 1 / scale]])


def test_episodes_are_numbered_by_row_and_id() -> None:
    # the id 3 is in both rows: two episodes; id 5 has no decision: none
    episode = torch.tensor([[3, 3, 5, 7], [-1, 3, 3, 0]])
    index, count = episode_index(flags("1001", "0110"), episode)
    assert count == 3
    assert index.tolist() == [[0, -1, -1, 1], [-1, 2, 2, -1]]


def test_no_decisions_are_no_episodes() -> None:
    index, count = episode_index(flags("00"), torch.tensor([[-1, -1]]))
    assert (count, index.tolist()) == (0, [[-1, -1]])


# ---------------------------------------------------------------- aggregation

MASK = ("1110", "0110")
EPISODE = [[0, 0, 1, -1], [0, 0, 0, 0]]
# episodes: {row 0: columns 0, 1}, {row 0: column 2}, {row 1: columns 1, 2}


def test_decision_weights_are_equal() -> None:
    weights = aggregation_weights(mask=flags(*MASK), episode=torch.tensor(EPISODE), aggregation="decision")
    close(weights, [[0.2, 0.2, 0.2, 0.0], [0.0, 0.2, 0.2, 0.0]])


def test_episode_weights_are_a_mean_within_then_over_three_episodes() -> None:
    weights = aggregation_weights(mask=flags(*MASK), episode=torch.tensor(EPISODE), aggregation="episode")
    close(weights, [[1 / 6, 1 / 6, 1 / 3, 0.0], [0.0, 1 / 6, 1 / 6, 0.0]])


def test_constant_weights_are_a_sum_over_the_constant_then_a_mean_over_three_episodes() -> None:
    weights = aggregation_weights(
        mask=flags(*MASK), episode=torch.tensor(EPISODE), aggregation="constant", constant=8.0
    )
    close(weights, [[1 / 24, 1 / 24, 1 / 24, 0.0], [0.0, 1 / 24, 1 / 24, 0.0]])


def test_constant_needs_its_number() -> None:
    with pytest.raises(ValueError, match=r"^aggregation 'constant' needs aggregation_constant"):
        aggregation_weights(mask=flags(*MASK), episode=torch.tensor(EPISODE), aggregation="constant")


@pytest.mark.parametrize(
    "aggregation, expected",
    [
        # executed factors of counted decisions: 2 + 1 (episode 0) and 1 (episode 1); the masked column's count not
        ("decision", [[[1 / 4, 1 / 4], [1 / 4, 0]], [[0, 0], [0, 1 / 4]]]),
        ("episode", [[[1 / 6, 1 / 6], [1 / 6, 0]], [[0, 0], [0, 1 / 2]]]),
        ("constant", [[[1 / 10, 1 / 10], [1 / 10, 0]], [[0, 0], [0, 1 / 10]]]),
    ],
)
def test_factor_weights_count_executed_factors(aggregation: str, expected: list[list[list[float]]]) -> None:
    weights = aggregation_weights(
        mask=flags("11", "01"),
        episode=torch.zeros(2, 2, dtype=torch.long),
        aggregation=aggregation,  # type: ignore[arg-type]
        constant=5.0,
        factor_mask=torch.tensor([[[True, True], [True, False]], [[True, True], [False, True]]]),
    )
    close(weights, expected)


@pytest.mark.parametrize("aggregation", ["decision", "episode", "constant"])
def test_an_empty_mask_gives_zero_weights(aggregation: str) -> None:
    weights = aggregation_weights(
        mask=flags("00"),
        episode=torch.tensor([[0, -1]]),
        aggregation=aggregation,  # type: ignore[arg-type]
        constant=5.0,
    )
    close(weights, [[0.0, 0.0]])


@pytest.mark.parametrize("aggregation", ["decision", "episode"])
def test_weights_sum_to_one(aggregation: str) -> None:
    mask = torch.rand(5, 7) < 0.6
    episode = torch.randint(0, 3, (5, 7)).sort(dim=1).values
    weights = aggregation_weights(mask=mask, episode=episode, aggregation=aggregation)  # type: ignore[arg-type]
    close(weights.sum(), 1.0)
