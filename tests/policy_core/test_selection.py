"""Best of n: its KL by enumeration, its expected reward over every subset."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from policy_core.selection import best_of_n_kl, expected_best_of_k
from tests.policy_core.helpers import NAN, close


def test_kl_by_hand() -> None:
    assert best_of_n_kl(1) == 0.0
    assert best_of_n_kl(4) == math.log(4) - 0.75


@pytest.mark.parametrize("n", [2, 5])
def test_kl_is_that_of_the_distribution_of_the_best(n: int) -> None:
    """Of 20,000 equally likely answers that all score differently, the i-th lowest is best of n with probability
    (i / M)^n - ((i - 1) / M)^n."""
    answers = 20_000
    edges = (torch.arange(answers + 1) / answers) ** n
    best = edges.diff()
    kl = (best * (best.log() + math.log(answers))).sum()
    close(kl, best_of_n_kl(n), atol=1e-4)


def test_kl_is_an_upper_bound_where_scores_tie() -> None:
    """Two answers, the better one of probability 0.3: best of 3 is worse with probability 0.7^3."""
    worse = 0.7**3
    kl = worse * math.log(worse / 0.7) + (1 - worse) * math.log((1 - worse) / 0.3)
    assert 0 < kl < best_of_n_kl(3)


def over_subsets(rewards: list[float], scores: list[float], k: int) -> float:
    """The mean over all subsets of the mean reward of those with the subset's highest score."""
    found = []
    for subset in itertools.combinations(range(len(rewards)), k):
        top = max(scores[i] for i in subset)
        best = [rewards[i] for i in subset if scores[i] == top]
        found.append(sum(best) / len(best))
    return sum(found) / len(found)


@pytest.mark.parametrize("k", [1, 2, 3, 6])
@pytest.mark.parametrize("scores", [[0.3, -1.0, 2.0, 0.1, 5.0, 4.0], [1.0, 0.0, 1.0, 1.0, 0.0, 2.0], [3.0] * 6])
def test_expected_best_is_the_mean_over_all_subsets(k: int, scores: list[float]) -> None:
    rewards = [0.5, 2.0, -1.0, 4.0, 1.0, -3.0]
    by_scores = expected_best_of_k(torch.tensor(rewards), k=k, scores=torch.tensor(scores))
    close(by_scores, over_subsets(rewards, scores, k))


def test_expected_best_by_hand_and_by_row() -> None:
    # of {1, 2, 4}: pairs have best 2, 4, 4
    rewards = torch.tensor([[4.0, 1.0, 2.0], [7.0, 7.0, 7.0]])
    close(expected_best_of_k(rewards, k=2), [10 / 3, 7.0])
    close(expected_best_of_k(rewards, k=1), rewards.mean(-1))
    close(expected_best_of_k(rewards, k=3), rewards.amax(-1))


def test_expected_best_of_many_samples_stays_exact() -> None:
    """C(400, 100) is beyond a float64's integers by far. Of ranks 1..n, E[max of k] = k (n + 1) / (k + 1)."""
    ranks = torch.arange(1.0, 401.0)
    close(expected_best_of_k(ranks, k=100), 100 * 401 / 101, atol=1e-9)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"^best of n needs n of at least 1, got 0$"):
        best_of_n_kl(0)
    with pytest.raises(ValueError, match=r"^best of k needs k from 1 to the 3 samples there are, got 4$"):
        expected_best_of_k(torch.zeros(3), k=4)
    with pytest.raises(ValueError, match=r"^rewards and scores must have one shape, got \(3,\) and \(2,\)$"):
        expected_best_of_k(torch.zeros(3), k=1, scores=torch.zeros(2))
    with pytest.raises(ValueError, match=r"^a sample without a score \(NaN\) cannot be chosen among"):
        expected_best_of_k(torch.tensor([1.0, NAN]), k=1)
