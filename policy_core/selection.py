"""Best of n: how far it takes a policy from where it was, and what it earns.

Best of n draws n samples and keeps the one with the highest score. It needs no gradient, its KL is known in closed
form, and one set of n samples says what every k <= n would have earned: the frontier to draw any trainer beside.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def best_of_n_kl(n: int) -> float:
    """KL(best of n || policy) = log n - (n - 1) / n nats per sample (Stiennon 2020, 2009.01325 appendix G.3).

    Exact where no two samples score alike, an upper bound otherwise (Beirami 2024, 2401.01879). Raises ValueError
    for n < 1.
    """
    if n < 1:
        raise ValueError(f"best of n needs n of at least 1, got {n}")
    return math.log(n) - (n - 1) / n


def expected_best_of_k(rewards: Tensor, *, k: int, scores: Tensor | None = None) -> Tensor:
    """What the best of k samples earns in expectation, without bias, from n >= k samples (Nakano 2021, 2112.09332
    appendix I): the mean over all subsets of size k of the reward of the subset's best.

    rewards     [..., n] what is reported (say the gold reward)
    scores      [..., n] what the choice is made by (say a reward model's); None = the rewards themselves

    The i-th lowest score is the best of a subset with probability C(i - 1, k - 1) / C(n, k). Samples that score
    alike share theirs: the choice among them is by lot. Returns [...] float64. Raises ValueError for k outside
    1..n, shapes that differ, or a score that is NaN.
    """
    scores = rewards if scores is None else scores
    if scores.shape != rewards.shape:
        raise ValueError(
            f"rewards and scores must have one shape, got {tuple(rewards.shape)} and {tuple(scores.shape)}"
        )
    n = rewards.shape[-1]
    if not 1 <= k <= n:
        raise ValueError(f"best of k needs k from 1 to the {n} samples there are, got {k}")
    if torch.isnan(scores).any():
        raise ValueError("a sample without a score (NaN) cannot be chosen among: leave it out first")
    # at most i samples score no higher: all k of the subset lie among them with probability C(i, k) / C(n, k)
    within = torch.tensor([math.comb(i, k) / math.comb(n, k) for i in range(n + 1)], dtype=torch.float64)
    within = within.to(rewards.device)
    ordered, _ = scores.sort(dim=-1)
    ordered, scores = ordered.contiguous(), scores.contiguous()
    not_above = torch.searchsorted(ordered, scores, right=True)
    below = torch.searchsorted(ordered, scores, right=False)
    share = (within[not_above] - within[below]) / (not_above - below)
    return (share * rewards.double()).sum(-1)
