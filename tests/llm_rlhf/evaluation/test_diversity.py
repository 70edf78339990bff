"""Diversity by hand."""

import math

import pytest

from llm_rlhf.evaluation.diversity import bleu, distinct_n, diversity, pieces, repetition_share, self_bleu


def words(*texts: str) -> list[list[str]]:
    return [text.split() for text in texts]


def test_distinct_by_hand() -> None:
    texts = words("a b a b", "b c")
    assert distinct_n(texts, 1) == 3 / 6
    assert distinct_n(texts, 2) == 3 / 4  # ab, ba, bc of ab ba ab bc
    assert distinct_n(texts, 4) == 1.0
    assert math.isnan(distinct_n(texts, 5))


@pytest.mark.parametrize(
    ("hypothesis", "references", "order", "expected"),
    [
        ("a b c d e", ["a b c d f"], 4, (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25),
        ("the the the the", ["the cat", "the the"], 1, 2 / 4),  # clipped at the most that one reference has
        ("a b", ["a b c"], 2, math.exp(1 - 3 / 2)),
        ("a b c", ["a b", "a b c d"], 1, 1.0),  # 2 and 4 are as near to 3: the shorter counts, no penalty
        ("a b", ["a b"], 4, 1.0),  # orders above its length are left out
        ("a b c d", ["d c b a"], 4, 0.0),  # no bigram: unsmoothed
        ("", ["a"], 4, 0.0),
    ],
)
def test_bleu_by_hand(hypothesis: str, references: list[str], order: int, expected: float) -> None:
    assert bleu(hypothesis.split(), words(*references), order=order) == pytest.approx(expected, abs=1e-12)


def test_self_bleu_leaves_the_text_itself_out() -> None:
    texts = words("a b c d e", "a b c d f", "a b c d f", "x y z a b c")
    expected = [bleu(text, texts[:i] + texts[i + 1 :]) for i, text in enumerate(texts)]
    assert self_bleu(texts) == pytest.approx(expected, abs=1e-12)
    assert expected[1] == pytest.approx(1.0)
    assert expected[0] < 1.0
    with pytest.raises(ValueError, match="at least two"):
        self_bleu(texts[:1])


def test_repetition_by_hand() -> None:
    assert repetition_share(list("ababab"), 2) == pytest.approx(1 - 2 / 5)
    assert repetition_share(list("abc"), 2) == 0.0
    assert repetition_share(["a"], 2) == 0.0
    assert repetition_share(pieces("!!!!!!!!!!", "character"), 8) == pytest.approx(1 - 1 / 3)


def test_a_collapse_is_seen() -> None:
    varied = ["one two three four five", "six seven eight nine", "red green blue and more", ""]
    same = ["one two three four five"] * 4
    healthy, collapsed = diversity(varied), diversity(same)
    assert healthy["distinct_1"] == 1.0
    assert collapsed["distinct_1"] == 5 / 20
    assert (healthy["self_bleu"], collapsed["self_bleu"]) == (0.0, pytest.approx(1.0))
    assert (healthy["duplicates"], collapsed["duplicates"]) == (0.0, 1.0)
    assert healthy["empty"] == 0.25
    assert healthy["length"] == pytest.approx((5 + 4 + 5 + 0) / 4)
    assert healthy["length_median"] == 4.5
    assert healthy["texts"] == 4


def test_samples_are_compared_within_their_prompt() -> None:
    """Each prompt has one answer, given twice; across prompts all differ."""
    completions = ["a b c d", "a b c d", "e f g h", "e f g h"]
    grouped = diversity(completions, prompts=["p", "p", "q", "q"])
    assert grouped["duplicates"] == grouped["self_bleu"] == 1.0
    crossed = diversity(completions, prompts=["p", "q", "p", "q"])
    assert crossed["duplicates"] == crossed["self_bleu"] == 0.0
    alone = diversity(completions, prompts=["p", "q", "r", "s"])
    assert alone["duplicates"] == 1.0  # one a prompt: all are compared


def test_short_and_single_texts() -> None:
    figures = diversity(["ab"], unit="character")
    assert "distinct_3" not in figures
    assert "self_bleu" not in figures
    assert figures["length"] == 2.0
    with pytest.raises(ValueError, match="no completions"):
        diversity([])
    with pytest.raises(ValueError, match="1 prompts for 2"):
        diversity(["a", "b"], prompts=["p"])
