"""How alike texts are: distinct n-grams, self-BLEU, lengths, repetition. What mode collapse is seen by.

Texts are taken apart into words (runs of what is no white space) or into characters; a policy of a character-level
task writes texts without spaces, whose words say nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from experiment.statistics import bootstrap_interval

Unit = Literal["word", "character"]
BLEU_ORDER = 4


def pieces(text: str, unit: Unit) -> list[str]:
    """The words or the characters of a text."""
    return text.split() if unit == "word" else list(text)


def ngrams(tokens: Sequence[Hashable], n: int) -> Counter[tuple[Hashable, ...]]:
    """How often each n-gram occurs; empty where there are fewer than n tokens."""
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def distinct_n(texts: Sequence[Sequence[Hashable]], n: int) -> float:
    """Different n-grams over all n-grams of all texts together (Li 2016, 1510.03055, section 5.2).

    texts   token lists

    Returns 0..1; NaN where no text has n tokens.
    """
    counts: Counter[tuple[Hashable, ...]] = Counter()
    for text in texts:
        counts.update(ngrams(text, n))
    return len(counts) / counts.total() if counts else math.nan


def bleu(
    hypothesis: Sequence[Hashable], references: Sequence[Sequence[Hashable]], *, order: int = BLEU_ORDER
) -> float:
    """BLEU of one text, unsmoothed (Papineni 2002, section 2.3): BP * exp(mean over n of log p_n), in 0..1.

    p_n is the share of the hypothesis' n-grams that the references have, each counted at most as often as in the
    reference that has it most; BP = exp(1 - r/h) for a hypothesis of h tokens shorter than r, the length of the
    reference nearest in length (the shorter of two as near). Orders above the hypothesis' length are left out.
    Raises ValueError where there is no reference.
    """
    if not references:
        raise ValueError("BLEU needs at least one reference")
    return _bleu(hypothesis, _Most(references, order), [len(reference) for reference in references], order)


class _Most:
    """Of every n-gram, the counts in the two references that have it most, and which has it most.

    Leaving one reference out then costs nothing, which makes self-BLEU linear in the number of texts.
    """

    def __init__(self, references: Sequence[Sequence[Hashable]], order: int) -> None:
        self.best: dict[tuple[Hashable, ...], tuple[int, int, int]] = {}
        for which, reference in enumerate(references):
            for n in range(1, order + 1):
                for gram, count in ngrams(reference, n).items():
                    first, owner, second = self.best.get(gram, (0, -1, 0))
                    if count > first:
                        self.best[gram] = (count, which, first)
                    elif count > second:
                        self.best[gram] = (first, owner, count)

    def count(self, gram: tuple[Hashable, ...], *, without: int | None = None) -> int:
        """The most often that a reference, but for the one numbered `without`, has the n-gram."""
        first, owner, second = self.best.get(gram, (0, -1, 0))
        return second if owner == without else first


def _bleu(
    hypothesis: Sequence[Hashable], most: _Most, lengths: Sequence[int], order: int, without: int | None = None
) -> float:
    """`bleu` against counted references; lengths are those of the references that count."""
    length = len(hypothesis)
    logs = []
    for n in range(1, min(order, length) + 1):
        found = ngrams(hypothesis, n)
        matched = sum(min(count, most.count(gram, without=without)) for gram, count in found.items())
        if matched == 0:
            return 0.0
        logs.append(math.log(matched / found.total()))
    if not logs:
        return 0.0
    nearest = min(lengths, key=lambda other: (abs(other - length), other))
    penalty = 1.0 if length >= nearest else math.exp(1 - nearest / length)
    return penalty * math.exp(sum(logs) / len(logs))


def self_bleu(texts: Sequence[Sequence[Hashable]], *, order: int = BLEU_ORDER) -> list[float]:
    """BLEU of every text with all the others as references (Zhu 2018, 1802.01886): 1 = somebody said the same.

    Raises ValueError for fewer than two texts.
    """
    if len(texts) < 2:
        raise ValueError("self-BLEU compares texts: give at least two")
    most = _Most(texts, order)
    lengths = Counter(len(text) for text in texts)
    scores = []
    for which, text in enumerate(texts):
        others = [length for length, count in lengths.items() if count > (length == len(text))]
        scores.append(_bleu(text, most, others, order, without=which))
    return scores


def repetition_share(tokens: Sequence[Hashable], n: int) -> float:
    """Share of a text's n-grams that the text had before: 1 - distinct/all (seq-rep-n, Welleck 2019, 1908.04319).

    0 where there are fewer than n tokens.
    """
    counts = ngrams(tokens, n)
    return 1.0 - len(counts) / counts.total() if counts else 0.0


def diversity(
    completions: Sequence[str], *, unit: Unit = "word", prompts: Sequence[str] | None = None
) -> dict[str, Any]:
    """What a set of completions looks like.

    prompts     of each completion. Several completions of a prompt are compared with each other (self_bleu and
                duplicates are means over prompts); without, or with one completion a prompt, all are compared

    Returns texts, length (mean, in `unit`s), length_median, length_std, empty (share), distinct_1 to distinct_4,
    self_bleu, duplicates (share of completions that another one equals), repetition (of 4-grams in a text). Means
    carry NAME_interval, by bootstrap over texts, or over prompts where those are compared.
    Raises ValueError where there are no completions, or not as many prompts.
    """
    if not completions:
        raise ValueError("diversity: there are no completions")
    if prompts is not None and len(prompts) != len(completions):
        raise ValueError(f"diversity: {len(prompts)} prompts for {len(completions)} completions")
    tokens = [pieces(text, unit) for text in completions]
    lengths = [float(len(text)) for text in tokens]
    repetition = [repetition_share(text, BLEU_ORDER) for text in tokens]
    figures: dict[str, Any] = {
        "texts": len(completions),
        "length": float(np.mean(lengths)),
        "length_interval": list(bootstrap_interval(lengths)),
        "length_median": float(np.median(lengths)),
        "length_std": float(np.std(lengths)),
        "empty": sum(not text.strip() for text in completions) / len(completions),
        **{f"distinct_{n}": distinct_n(tokens, n) for n in range(1, BLEU_ORDER + 1)},
        "repetition": float(np.mean(repetition)),
        "repetition_interval": list(bootstrap_interval(repetition)),
    }
    figures = {
        name: value for name, value in figures.items() if not (isinstance(value, float) and math.isnan(value))
    }
    groups = _groups(prompts, len(completions))
    measures: dict[str, Callable[[list[int]], list[float]]] = {
        "self_bleu": lambda rows: self_bleu([tokens[i] for i in rows]),
        "duplicates": lambda rows: _duplicated([completions[i] for i in rows]),
    }
    for name, measure in measures.items():
        found = [measure(rows) for rows in groups]
        scores = (
            [float(np.mean(part)) for part in found] if len(groups) > 1 else [x for part in found for x in part]
        )
        if scores:
            figures[name] = float(np.mean(scores))
            figures[f"{name}_interval"] = list(bootstrap_interval(scores))
    return figures


def _groups(prompts: Sequence[str] | None, count: int) -> list[list[int]]:
    """Rows that are compared with each other, at least two each; empty where there is one row."""
    by_prompt: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts or ()):
        by_prompt.setdefault(prompt, []).append(row)
    groups = [rows for rows in by_prompt.values() if len(rows) > 1]
    return groups or ([list(range(count))] if count > 1 else [])


def _duplicated(texts: Sequence[str]) -> list[float]:
    counts: Mapping[str, int] = Counter(texts)
    return [float(counts[text] > 1) for text in texts]
