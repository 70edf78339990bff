"""Parts of a source, and several sources as one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from embodied.datasets.recorded import RecordedEpisode
from embodied.datasets.source import Source
from experiment.errors import UserError


class Selection(Source):
    """Some episodes of a source, in the given order."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        """Raises UserError when one is not there."""
        if beyond := [index for index in indices if not 0 <= index < len(source)]:
            raise UserError(f"{source.path}: has no episode {beyond[0]}; it has {len(source)}")
        self.source, self.indices = source, tuple(indices)
        self.kind, self.path, self.fps, self.choices = source.kind, source.path, source.fps, source.choices
        self.choices_inferred = source.choices_inferred
        self.robot_type, self.names, self.details = source.robot_type, source.names, source.details
        self.lengths = tuple(source.lengths[index] for index in self.indices)

    def identity(self) -> Any:
        """The source's identity, and which episodes."""
        return {"of": self.source.identity(), "episodes": list(self.indices)}

    def _read(self, index: int, images: bool) -> RecordedEpisode:
        return self.source.read(self.indices[index], images=images)


class Joined(Source):
    """Several sources, one after the other. What they say of the whole is kept where they agree on it."""

    def __init__(self, sources: Sequence[Source]) -> None:
        """Raises UserError when there is none, or their actions or frame rates differ."""
        if not sources:
            raise UserError("there is nothing to merge: name at least one data set")
        first, self.sources = sources[0], tuple(sources)
        for other in sources[1:]:
            if other.fps != first.fps and None not in (other.fps, first.fps):
                raise UserError(f"{other.path}: has {other.fps} steps a second, {first.path} {first.fps}")
        self.kind, self.path = first.kind, first.path
        self.choices, self.choices_inferred = _choices_of_all(sources)
        self.fps = next((one.fps for one in sources if one.fps is not None), None)
        self.lengths = tuple(length for one in sources for length in one.lengths)
        if all(one.robot_type == first.robot_type for one in sources):
            self.robot_type = first.robot_type
        if all(one.names == first.names for one in sources):
            self.names = first.names
        self.details = {
            name: value
            for name, value in first.details.items()
            if all(one.details.get(name) == value for one in sources)
        }

    @property
    def parts(self) -> tuple[Source, ...]:
        """The sources, and what they are made of."""
        return tuple(part for one in self.sources for part in one.parts)

    def identity(self) -> Any:
        """The identities of the sources."""
        return [one.identity() for one in self.sources]

    def _read(self, index: int, images: bool) -> RecordedEpisode:
        for one in self.sources:
            if index < len(one):
                return one.read(index, images=images)
            index -= len(one)
        raise IndexError(index)


def _choices_of_all(sources: Sequence[Source]) -> tuple[int | None, bool]:
    """How many discrete actions there are, and whether that is inferred. UserError where the sources disagree.

    Where a source was told the number, it holds for those that could only infer one that is not larger; otherwise
    the largest of those that were inferred.
    """
    told = next((one for one in sources if not one.choices_inferred), None)
    if told is None:
        return max(one.choices or 0 for one in sources), True
    for other in sources:
        within = other.choices_inferred and (other.choices or 0) <= (told.choices or 0)
        if other.choices != told.choices and not within:
            raise UserError(
                f"{other.path}: has {other.choices or 'no'} discrete actions, {told.path} {told.choices or 'no'}"
            )
    return told.choices, False


def split_indices(episodes: int, fractions: Sequence[float], seed: int) -> list[list[int]]:
    """Episodes drawn without replacement: for every fraction the sorted indices of its part.

    The parts' sizes are the fractions of all episodes, rounded so that they add up. Raises UserError when a
    fraction is not positive, they add up to more than 1, or a part would have no episode.
    """
    if any(not fraction > 0 for fraction in fractions) or sum(fractions) > 1 + 1e-9:
        raise UserError(f"fractions must be positive and add up to at most 1, got {' '.join(map(str, fractions))}")
    if seed < 0:
        raise UserError(f"--seed must not be negative, got {seed}")
    bounds = [0, *np.rint(np.cumsum(fractions) * episodes).astype(int).tolist()]
    parts = list(itertools.pairwise(bounds))
    if any(begin == end for begin, end in parts):
        sizes = ", ".join(str(end - begin) for begin, end in parts)
        raise UserError(f"{episodes} episodes cannot be split so that every part has one (they would have {sizes})")
    drawn = np.random.default_rng(seed).permutation(episodes)
    return [sorted(drawn[begin:end].tolist()) for begin, end in parts]
