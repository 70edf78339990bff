"""What can be said of a whole data set, from one pass over its episodes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from embodied.datasets.lerobot_layout import ACTION, CAMERA, REWARD
from embodied.datasets.lerobot_stats import Stats, fold, vector_stats
from embodied.datasets.source import Source
from embodied.datasets.writing import check_alike


@dataclass
class Overview:
    """Counts and statistics.

    features: name, type and shape of what the first episode has, cameras included.
    stats: feature -> statistic -> array, over all steps, of everything but pictures.
    terminated, truncated: episodes; final: how many of the truncated ones have their final observation.
    returns: of the episodes with rewards; successes, instructions: of every episode.
    """

    features: list[tuple[str, str, tuple[int, ...]]] = field(default_factory=list)
    stats: Stats = field(default_factory=dict)
    terminated: int = 0
    truncated: int = 0
    final: int = 0
    returns: list[float] = field(default_factory=list)
    successes: list[bool | None] = field(default_factory=list)
    instructions: list[str] = field(default_factory=list)


def overview(source: Source) -> Overview:
    """Read every episode once, without pictures but for the first. Raises UserError when one is damaged."""
    found = Overview()
    together: Stats | None = None
    for index in range(len(source)):
        episode = source.read(index, images=not index)
        columns = episode.vectors | {ACTION: episode.actions}
        if episode.rewards is not None:
            columns[REWARD] = episode.rewards[:, None]
            found.returns.append(float(episode.rewards.sum(dtype=np.float64)))
        if not index:
            cameras = [(CAMERA + name, "image", one.shape[1:]) for name, one in episode.images.items()]
            found.features = cameras + [(name, str(one.dtype), one.shape[1:]) for name, one in columns.items()]
            first = episode
        check_alike(first, episode, images=False)
        together = fold(together, {name: vector_stats(values) for name, values in columns.items()})
        found.terminated += episode.terminated
        found.truncated += episode.truncated
        found.final += episode.truncated and all(name in episode.final for name in episode.vectors)
        found.successes.append(episode.success)
        found.instructions.append(episode.instruction)
    found.stats = together or {}
    return found
