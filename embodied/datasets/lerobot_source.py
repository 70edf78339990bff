"""A LeRobot data set, of version 3 or 2.1, as a source of episodes.

LeRobot has no place for what was seen after an episode's last action. Tandem's writer keeps it, where it is known,
in features of its own: `next.observation.NAME` beside every `observation.NAME` that is a vector, and
`next.observed`, which is False at a frame whose next observation was not recorded.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from embodied.datasets.lerobot import LeRobotDataset
from embodied.datasets.lerobot_layout import ACTION, AHEAD, CHOICES, INFERRED, INFO, NEXT, OBSERVED, read_told
from embodied.datasets.lerobot_v21 import LeRobotV21Dataset
from embodied.datasets.recorded import RecordedEpisode
from embodied.datasets.source import Source
from experiment.errors import UserError


def open_lerobot(folder: Path) -> LeRobotDataset:
    """The data set, of whichever version it is. Raises UserError as `LeRobotDataset`."""
    old = read_told(folder)[0].lstrip("v").startswith("2.")
    return LeRobotV21Dataset(folder) if old else LeRobotDataset(folder)


class LeRobotSource(Source):
    """A folder. `dataset` is what it holds, as LeRobot describes it."""

    kind = "lerobot"

    def __init__(self, path: str | Path, subset: str | None = None) -> None:
        """subset: a name among `splits` of `meta/info.json`. Raises UserError as `LeRobotDataset` does."""
        self.path, self._subset = Path(path), subset
        self.dataset = open_lerobot(self.path)
        self._indices = range(len(self.dataset)) if subset is None else self._split(subset)
        self.lengths = tuple(self.dataset.episodes[index].length for index in self._indices)
        self.fps, self.robot_type = self.dataset.fps, self.dataset.robot_type
        features = self.dataset.features
        self.names = {name: one.names for name, one in features.items() if one.names is not None}
        action, stats = features.get(ACTION), self.dataset.stats.get(ACTION, {})
        if action is not None and action.dtype == "int64" and action.shape == (1,):
            if isinstance(action.info.get(CHOICES), int):
                self.choices, self.choices_inferred = action.info[CHOICES], bool(action.info.get(INFERRED))
            elif "max" in stats:
                self.choices, self.choices_inferred = 1 + int(stats["max"].max()), True

    @property
    def places(self) -> tuple[Path, ...]:
        """The folders of the layout: others may lie beside them."""
        return tuple(self.path / name for name in ("meta", "data", "videos"))

    def identity(self) -> Any:
        """The identity of any source, with the split."""
        return [*super().identity(), self._subset]

    def _split(self, subset: str) -> range:
        splits = self.dataset.info.others.get("splits") or {}
        if subset not in splits:
            raise UserError(f"{self.path}: has no subset {subset!r}; it has {', '.join(splits) or 'none'}")
        begin, _, end = str(splits[subset]).partition(":")
        if not (begin.isdecimal() and end.isdecimal()):
            raise UserError(f"{self.path / INFO}: the split {subset} is {splits[subset]!r}, not 'FIRST:END'")
        return range(int(begin), min(int(end), len(self.dataset)))

    def _read(self, index: int, images: bool) -> RecordedEpisode:
        episode = self.dataset.read(self._indices[index], images=images)
        ahead = {name.removeprefix(NEXT): one for name, one in episode.others.items() if name.startswith(AHEAD)}
        observed = bool(np.all(episode.others.get(OBSERVED, np.ones(1))[-1]))
        kept = {
            name: one for name, one in episode.others.items() if not name.startswith(AHEAD) and name != OBSERVED
        }
        final = {name: np.atleast_1d(one[-1]).astype(np.float32) for name, one in ahead.items()} if observed else {}
        return dataclasses.replace(episode, others=kept, final=final)
