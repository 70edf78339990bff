"""What counting words and pairs of words says of comparisons: logistic regression on where completions differ.

Stronger than the word counts that `tandem eval RUN bag_of_words=true` asks: bigrams, presence instead of counts
where the training comparisons like it better, and both settings chosen by cross-validation among those.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csr_matrix

from llm_rlhf.data.records import Comparison
from llm_rlhf.rewards.reward_audit import words_of

STRENGTHS = (0.01, 0.03, 0.1, 0.3)
INNER = 4
"""Parts of the cross-validation that chooses."""

Differences = Callable[[Sequence[Comparison]], np.ndarray]


def fit_words(train: Sequence[Comparison], parts: Sequence[int]) -> Differences:
    """A function that gives logits [n] of chosen against rejected for other comparisons.

    parts       [N] of the training comparisons, 0..INNER-1, by prompt; the settings with the lowest loss over the
                held-out parts are fitted again to everything
    """
    losses: dict[tuple[bool, float], float] = {}
    for presence in (True, False):
        for part in range(INNER):
            inner = [c for c, of in zip(train, parts, strict=True) if of != part]
            held_out = [c for c, of in zip(train, parts, strict=True) if of == part]
            index = vocabulary(inner)
            fitted, judged = (differences(side, index, presence=presence) for side in (inner, held_out))
            weights = np.zeros(len(index))
            for strength in reversed(STRENGTHS):  # each begins where the stronger one ended
                weights = logistic(fitted, strength, weights)
                key = (presence, strength)
                losses[key] = losses.get(key, 0.0) + float(np.logaddexp(0.0, -(judged @ weights)).sum())
    presence, strength = min(losses, key=lambda setting: losses[setting])
    index = vocabulary(train)
    weights = logistic(differences(train, index, presence=presence), strength, np.zeros(len(index)))

    def judge(comparisons: Sequence[Comparison]) -> np.ndarray:
        logits: np.ndarray = differences(comparisons, index, presence=presence) @ weights
        return logits

    return judge


def terms_of(text: str) -> list[str]:
    """Words, punctuation marks and neighbours of them."""
    words = words_of(text)
    return words + [f"{first} {second}" for first, second in pairwise(words)]


def vocabulary(comparisons: Sequence[Comparison]) -> dict[str, int]:
    """The columns of the terms that stand in at least two completions."""
    seen = Counter(term for c in comparisons for text in (c.chosen, c.rejected) for term in set(terms_of(text)))
    return {term: column for column, term in enumerate(sorted(t for t, count in seen.items() if count > 1))}


def differences(comparisons: Sequence[Comparison], index: dict[str, int], *, presence: bool) -> csr_matrix:
    """What the chosen has of each term less what the rejected has, [N, V]; presence: once at most."""
    rows, columns, values = [], [], []
    for row, comparison in enumerate(comparisons):
        sides: list[Counter[str]] = []
        for text in (comparison.chosen, comparison.rejected):
            terms: Any = terms_of(text)
            sides.append(Counter(set(terms) if presence else terms))
        sides[0].subtract(sides[1])
        for term, count in sides[0].items():
            if count and term in index:
                rows.append(row)
                columns.append(index[term])
                values.append(float(count))
    return csr_matrix((values, (rows, columns)), shape=(len(comparisons), len(index)))


def logistic(features: csr_matrix, strength: float, start: np.ndarray) -> np.ndarray:
    """Weights [V] that minimise mean log(1 + exp(-x w)) + strength / 2 |w|^2; no intercept: order says nothing."""

    def objective(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logits = features @ weights
        loss = np.logaddexp(0.0, -logits).mean() + 0.5 * strength * weights @ weights
        slope = -np.exp(-np.logaddexp(0.0, logits)) / len(logits)
        return float(loss), features.T @ slope + strength * weights

    result = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 300})
    weights: np.ndarray = result.x
    return weights
