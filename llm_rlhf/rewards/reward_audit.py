"""What a reward model's scores follow besides quality: length, chance, and what counting words would have said."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from scipy.stats import rankdata
from torch import Tensor

from experiment.statistics import wilson_interval
from llm_rlhf.data.records import Comparison
from llm_rlhf.rewards.reward_data import RewardData

Result = dict[str, Any]
MOST_WORDS, L2_STRENGTHS = 20_000, (1e-4, 1e-3, 1e-2, 1e-1)


def share_right(right: Tensor, name: str = "accuracy") -> Result:
    """right [N] bool -> {NAME, NAME_interval (Wilson)}; nothing where there is nothing to judge."""
    if not len(right):
        return {}
    count = int(right.sum())
    return {name: count / len(right), f"{name}_interval": list(wilson_interval(count, len(right)))}


# ---------------------------------------------------------------- length


def correlation(first: Tensor, second: Tensor, *, ranks: bool = False) -> float | None:
    """Pearson's, or Spearman's with `ranks`, of two vectors [N]; None where one of them does not vary."""
    one, other = (np.asarray(rankdata(x.numpy()) if ranks else x.double().numpy()) for x in (first, second))
    if len(first) < 2 or min(float(np.ptp(one)), float(np.ptp(other))) == 0:
        return None
    return float(np.corrcoef(one, other)[0, 1])


def length_slope(scores: Tensor, lengths: Tensor) -> float:
    """Least-squares slope of scores [N] on lengths [N] in tokens; 0 where all lengths are equal."""
    centred = lengths.double() - lengths.double().mean()
    squares = float((centred**2).sum())
    return 0.0 if squares == 0 else float((centred * scores.double()).sum()) / squares


def length_audit(data: RewardData, scores: Tensor, *, rows: Tensor, difference: Tensor, slope: Tensor) -> Result:
    """How much of what a model prefers is length.

    scores          [U, M] of the texts
    rows            [n] comparisons with a right side
    difference      [n] score of the chosen less that of the rejected
    slope           [M] of scores on length, from other data

    Returns correlations over texts (Pearson, Spearman; objectives apart, then averaged) and within comparisons,
    what "the longer wins" and "the shorter wins" get right (equal lengths are left out), the model's accuracy
    where each of them is right, and its accuracy after the linear effect of length was taken away.
    """
    longer = (data.lengths[data.chosen] - data.lengths[data.rejected])[rows].double()
    right, decided = difference > 0, longer != 0
    names = ("correlation", "rank_correlation")
    found = [[correlation(column, data.lengths, ranks=ranks) for column in scores.T] for ranks in (False, True)]
    result: Result = {
        name: sum(known) / len(known)
        for name, values in zip(names, found, strict=True)
        if (known := [value for value in values if value is not None])
    }
    within = correlation(difference, longer)
    if within is not None:
        result["correlation_within_comparisons"] = within
    corrected = difference.double() - slope.double()[data.objective[rows]] * longer
    return {
        **result,
        "mean_tokens_chosen": float(data.lengths[data.chosen[rows]].double().mean()),
        "mean_tokens_rejected": float(data.lengths[data.rejected[rows]].double().mean()),
        "slope_per_token": float(slope.mean()),
        **share_right(longer[decided] > 0, "longer_wins"),
        **share_right(longer[decided] < 0, "shorter_wins"),
        **share_right(right[longer > 0], "accuracy_where_longer_is_right"),
        **share_right(right[longer < 0], "accuracy_where_shorter_is_right"),
        **share_right(corrected > 0, "accuracy_without_length"),
    }


# ---------------------------------------------------------------- disagreement


def disagreement_audit(spread: Tensor, right: Tensor) -> Result:
    """Whether heads disagree where the model errs. spread [N] std over heads of the difference, right [N] bool.

    error_auroc: probability that an error has more disagreement than a right answer (0.5 = disagreement says
    nothing), ties counting half (Mann and Whitney 1947); accuracy in the half with least and with most of it.
    """
    result: Result = {"mean": float(spread.mean())}
    wrong, count = int((~right).sum()), len(right)
    if 0 < wrong < count:
        ranks = torch.from_numpy(rankdata(spread.numpy()))
        above = float(ranks[~right].sum()) - wrong * (wrong + 1) / 2
        result["error_auroc"] = above / (wrong * (count - wrong))
    order = spread.argsort(stable=True)
    result |= share_right(right[order[: count // 2]], "accuracy_least_disagreement")
    return result | share_right(right[order[count // 2 :]], "accuracy_most_disagreement")


# ---------------------------------------------------------------- objectives against each other


def weight_grid(objectives: int, steps: int) -> Tensor:
    """All weightings of M objectives by multiples of 1 / steps that sum to 1: [W, M]."""
    if objectives < 1 or steps < 1:
        raise ValueError("a grid of weights needs at least one objective and one step")

    def parts(left: int, places: int) -> list[list[int]]:
        if places == 1:
            return [[left]]
        return [[first, *rest] for first in range(left, -1, -1) for rest in parts(left - first, places - 1)]

    return torch.tensor(parts(steps, objectives), dtype=torch.float64) / steps


def efficient(points: Tensor) -> Tensor:
    """Which points [W, M] no other is at least as good as everywhere and better somewhere: [W] bool."""
    other, own = points.unsqueeze(0), points.unsqueeze(1)
    return ~((other >= own).all(-1) & (other > own).any(-1)).any(1)


def best_of_n_sweep(scores: Tensor, prompt: Tensor, weights: Tensor) -> Tensor:
    """Mean score by objective of the candidates that each weighting chooses, one a prompt.

    scores [U, M] of candidates, prompt [U] int of each, weights [W, M] -> [W, M]. The first of equals is chosen.
    """
    number = prompt.unique(return_inverse=True)[1]
    candidates = number.argsort(stable=True).split(torch.bincount(number).tolist())
    points = []
    for weight in weights.double():
        totals = scores.double() @ weight
        chosen = torch.stack([rows[totals[rows].argmax()] for rows in candidates])
        points.append(scores[chosen].double().mean(0))
    return torch.stack(points)


def accuracy_sweep(difference: Tensor, objective: Tensor, weights: Tensor) -> Tensor:
    """Accuracy on each objective's comparisons of the scores that each weighting makes.

    difference [N, M] chosen less rejected by every objective's head, objective [N] int that was asked about,
    weights [W, M] -> [W, M], NaN for an objective without comparisons.
    """
    right = (difference.double() @ weights.T.double()) > 0
    columns = [right[objective == m].double().mean(0) for m in range(weights.shape[1])]
    return torch.stack(columns, dim=1)


def sweep_rows(names: Sequence[str], weights: Tensor, points: Tensor, what: str) -> list[Result]:
    """A sweep as rows {weights, WHAT, efficient}, by objective's name; JSON has no NaN, so those are left out."""
    best = efficient(points.nan_to_num())
    return [
        {
            "weights": dict(zip(names, weight.tolist(), strict=True)),
            what: {n: v for n, v in zip(names, point.tolist(), strict=True) if not math.isnan(v)},
            "efficient": bool(good),
        }
        for weight, point, good in zip(weights, points, best, strict=True)
    ]


# ---------------------------------------------------------------- bag of words


def words_of(text: str) -> list[str]:
    """Lower-case words and single punctuation marks."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def bag_of_words(
    train: Sequence[Comparison], validation: Sequence[Comparison], test: Sequence[Comparison]
) -> Result:
    """Logistic regression on differences of word counts: the floor that a reward model must beat.

    No intercept, so that the order of a comparison says nothing; words of at least two training completions, the
    20,000 most frequent; L2 strength by validation loss. Deterministic. Returns accuracy on `test` with its
    interval, words, l2; nothing where there is nothing to fit or to judge.
    """
    sides = [[c for c in part if not c.tied] for part in (train, validation, test)]
    seen = Counter(word for c in sides[0] for text in (c.chosen, c.rejected) for word in set(words_of(text)))
    kept = sorted((word for word, count in seen.items() if count > 1), key=lambda word: (-seen[word], word))
    index = {word: column for column, word in enumerate(kept[:MOST_WORDS])}
    if not (index and sides[0] and sides[2]):
        return {}
    fitted, chosen_on, judged = (_differences(side, index) for side in sides)
    candidates = [(strength, _logistic(fitted, strength)) for strength in L2_STRENGTHS]
    known = chosen_on if chosen_on.shape[0] else fitted
    strength, weights = min(candidates, key=lambda pair: float(np.logaddexp(0.0, -(known @ pair[1])).mean()))
    right = torch.from_numpy(judged @ weights > 0)
    return {**share_right(right), "words": len(index), "l2": strength}


def _differences(comparisons: Sequence[Comparison], index: dict[str, int]) -> csr_matrix:
    """Counts of words in the chosen less those in the rejected, [N, V]."""
    rows, columns, values = [], [], []
    for row, comparison in enumerate(comparisons):
        counts = Counter(words_of(comparison.chosen))
        counts.subtract(words_of(comparison.rejected))
        for word, count in counts.items():
            if count and word in index:
                rows.append(row)
                columns.append(index[word])
                values.append(float(count))
    return csr_matrix((values, (rows, columns)), shape=(len(comparisons), len(index)))


def _logistic(features: csr_matrix, strength: float) -> np.ndarray:
    """Weights [V] that minimise mean log(1 + exp(-x w)) + strength / 2 |w|^2."""

    def objective(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logits = features @ weights
        loss = np.logaddexp(0.0, -logits).mean() + 0.5 * strength * weights @ weights
        slope = -np.exp(-np.logaddexp(0.0, logits)) / len(logits)
        return float(loss), features.T @ slope + strength * weights

    result = minimize(objective, np.zeros(features.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    weights: np.ndarray = result.x
    return weights
