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
        self.robot_type, self.names, self.details = source.robot_type, source.names, source.details
        self.lengths = tuple(source.lengths[index] for index in self.indices)

    def identity(self) -> Any:
        """The source's, and which episodes."""
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
            for what, here, there in (
                ("steps a second", other.fps, first.fps),
                ("discrete actions", other.choices, first.choices),
            ):
                if here != there and (what != "steps a second" or None not in (here, there)):
                    raise UserError(f"{other.path}: has {here or 'no'} {what}, {first.path} {there or 'no'}")
        self.kind, self.path, self.choices = first.kind, first.path, first.choices
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
        """Theirs."""
        return [one.identity() for one in self.sources]

    def _read(self, index: int, images: bool) -> RecordedEpisode:
        for one in self.sources:
            if index < len(one):
                return one.read(index, images=images)
            index -= len(one)
        raise IndexError(index)


def split_indices(episodes: int, fractions: Sequence[float], seed: int) -> list[list[int]]:
    """Episodes drawn without replacement: for every fraction the sorted indices of its part.

    The parts' sizes are the fractions of all episodes, rounded so that they add up. Raises UserError when a
    fraction is not positive, they add up to more than 1, or a part would have no episode.
    """
    if any(not fraction > 0 for fraction in fractions) or sum(fractions) > 1 + 1e-9:
        raise UserError(f"fractions must be positive and add up to at most 1, got {' '.join(map(str, fractions))}")
    bounds = [0, *np.rint(np.cumsum(fractions) * episodes).astype(int).tolist()]
    parts = list(itertools.pairwise(bounds))
    if any(begin == end for begin, end in parts):
        sizes = ", ".join(str(end - begin) for begin, end in parts)
        raise UserError(f"{episodes} episodes cannot be split so that every part has one (they would have {sizes})")
    drawn = np.random.default_rng(seed).permutation(episodes)
    return [sorted(drawn[begin:end].tolist()) for begin, end in parts]
