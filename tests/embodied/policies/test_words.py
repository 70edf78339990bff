"""Instructions as numbers, by hand."""

from __future__ import annotations

import warnings

import pytest
import torch

from embodied.policies.words import Words, split_words


def test_the_vocabulary_is_the_sorted_words_of_the_instructions() -> None:
    words = Words.of(["push the red cube", "pick up the red bar"])
    assert words.vocabulary == ("bar", "cube", "pick", "push", "red", "the", "up")
    assert len(words) == 9  # padding and the unknown word too


def test_words_are_numbered_from_two_and_padded_with_zeros() -> None:
    words = Words(["red", "cube"])
    encoded = words.encode("cube red cube", length=5)
    assert encoded.dtype == torch.int64
    assert encoded.tolist() == [3, 2, 3, 0, 0]
    assert words.encode("", length=3).tolist() == [0, 0, 0]


def test_case_and_punctuation_do_not_matter() -> None:
    assert split_words("Please, pick-up the RED cube's twin!") == [
        "please",
        "pick",
        "up",
        "the",
        "red",
        "cube's",
        "twin",
    ]
    words = Words(["red", "cube"])
    assert words.encode("  RED... Cube?", length=4).equal(words.encode("red cube", length=4))


def test_an_unknown_word_is_one_and_warned_of_once() -> None:
    words = Words(["red", "cube"])
    with pytest.warns(UserWarning, match="unknown word 'shiny' in the instruction 'shiny red cube'"):
        assert words.encode("shiny red cube", length=4).tolist() == [1, 2, 3, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert words.encode("shiny cube", length=3).tolist() == [1, 3, 0]
    with pytest.warns(UserWarning, match="unknown word 'dull'"):
        words.encode("dull cube")


def test_a_long_instruction_is_cut_and_warned_of() -> None:
    words = Words(["red", "cube"])
    with pytest.warns(UserWarning, match="only the first 2 words of the instruction 'red cube red'"):
        assert words.encode("red cube red", length=2).tolist() == [2, 3]


def test_many_instructions_at_once() -> None:
    words = Words(["red", "cube"])
    assert words.encode_all(["cube", "red", "cube"], length=2).tolist() == [[3, 0], [2, 0], [3, 0]]
    assert words.encode_all([], length=2).shape == (0, 2)


@pytest.mark.parametrize("vocabulary", [["red", "red"], ["red cube"], ["Red"], [""]])
def test_a_vocabulary_that_could_not_be_met_is_refused(vocabulary: list[str]) -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        Words(vocabulary)
