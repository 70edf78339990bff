"""Instructions as numbers: the vocabulary that a policy was trained with, and saved with."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

PADDING, UNKNOWN = 0, 1
FIRST_WORD = 2
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")


def split_words(text: str) -> list[str]:
    """Lower-case words without punctuation: "Pick up the RED cube!" -> pick, up, the, red, cube."""
    return _WORD.findall(text.lower())


class Words:
    """A tokenizer by whole words. 0 is padding, 1 any unknown word, word i of the vocabulary is 2 + i.

    A word that is not in the vocabulary, and an instruction that is too long, are warned of once; the policy still
    gets something to act on.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        """Raises ValueError for a word that comes twice, or that `split_words` would not give back."""
        self.vocabulary = tuple(vocabulary)
        for word in self.vocabulary:
            if split_words(word) != [word]:
                raise ValueError(f"vocabulary: {word!r} is not one lower-case word")
        self._numbers = {word: FIRST_WORD + index for index, word in enumerate(self.vocabulary)}
        if len(self._numbers) != len(self.vocabulary):
            raise ValueError("vocabulary: a word comes twice")
        self._warned: set[str] = set()

    @classmethod
    def of(cls, instructions: Iterable[str]) -> Words:
        """The vocabulary of all words in `instructions`, in alphabetical order."""
        return cls(sorted({word for text in instructions for word in split_words(text)}))

    def __len__(self) -> int:
        """How many numbers there are, padding and unknown included: the rows of an embedding."""
        return FIRST_WORD + len(self.vocabulary)

    def encode(self, text: str, length: int = 16) -> Tensor:
        """int64 [length], as `numbers`; warns of what the policy cannot read."""
        words = split_words(text)
        for word in words:
            if word not in self._numbers:
                self._warn(word, f"unknown word {word!r} in the instruction {text!r}: the policy never met it")
        if len(words) > length:
            self._warn(text, f"only the first {length} words of the instruction {text!r} are used")
        return torch.tensor(self.numbers(text, length), dtype=torch.int64)

    def numbers(self, text: str, length: int = 16) -> list[int]:
        """`length` of them, padded at the end. Words beyond `length` are cut off; nothing is warned of."""
        numbers = [self._numbers.get(word, UNKNOWN) for word in split_words(text)[:length]]
        return numbers + [PADDING] * (length - len(numbers))

    def encode_all(self, texts: Sequence[str], length: int = 16) -> Tensor:
        """int64 [N, length]; each different text is split once."""
        encoded = {text: self.encode(text, length) for text in dict.fromkeys(texts)}
        if not texts:
            return torch.zeros((0, length), dtype=torch.int64)
        return torch.stack([encoded[text] for text in texts])

    def _warn(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, stacklevel=3)
