"""Episodes of any source as a LeRobot v3 data set.

Besides what `demonstration_features` lists: every other observation under its name, `next.observation.NAME` and
`next.observed` where what was seen after an episode's last action is known (see `lerobot_source`),
`next.success_if_known` where only some episodes say whether they succeeded, and other numbers of the source that
have at most one dimension a frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embodied.datasets.lerobot_layout import (
    ACTION,
    CAMERA,
    CHOICES,
    DONE,
    EXPERT_ACTION,
    INFERRED,
    NEXT,
    OBSERVED,
    REWARD,
    SUCCESS,
    SUCCESS_IF_KNOWN,
    TRUNCATED,
    Feature,
    camera_feature,
)
from embodied.datasets.lerobot_writer import LeRobotWriter
from embodied.datasets.recorded import OBSERVATION, RecordedEpisode
from embodied.datasets.source import Source, final_row
from experiment.errors import UserError

FPS = 20
"""Steps a second where a source does not say: the rate of robosuite, whose data robomimic and LIBERO hold."""


class LeRobotTarget:
    """A folder that grows episode by episode. examples: an episode of every data set that goes into it."""

    def __init__(self, folder: Path, source: Source, examples: Sequence[RecordedEpisode], fps: int) -> None:
        self._discrete = source.choices is not None
        self._features = features_of(examples, fps, source)
        self._writer = LeRobotWriter(folder, fps=fps, features=self._features, robot_type=source.robot_type)

    def __len__(self) -> int:
        return len(self._writer)

    def append(self, episode: RecordedEpisode) -> None:
        """Add an episode, on the disk when this returns. Raises UserError when it does not fit the others."""
        columns = columns_of(episode, self._discrete)
        if missing := [name for name in self._features if name not in columns]:
            raise UserError(f"{episode.name}: does not say {missing[0]}, as the first episode does")
        with self._writer.episode(episode.instruction) as opened:
            for step in range(len(episode)):
                opened.add({name: columns[name][step] for name in self._features})
            opened.save()

    def finish(self) -> None:
        """Let go of the folder."""
        self.close()

    def close(self) -> None:
        """Let go of the folder."""
        self._writer.close()


def features_of(examples: Sequence[RecordedEpisode], fps: int, source: Source) -> dict[str, Feature]:
    """What is written: what all examples have, and what comes after the last action where any episode knows it.

    Every episode is read to see who says whether it succeeded and what was seen last: LeRobot's `next.success`
    cannot be unknown, and the features are fixed before the first episode is written. Raises UserError when one is
    damaged.
    """
    found: dict[str, Feature] = {}
    discrete = source.choices is not None
    first, columns = examples[0], [columns_of(example, discrete) for example in examples]
    says, known_last = set(), False
    for index in range(len(source)):
        episode = source.read(index, images=False)
        says.add(episode.success is not None)
        known_last |= bool(episode.final)
    success = {SUCCESS: says == {True}, SUCCESS_IF_KNOWN: says == {True, False}}
    for camera, pictures in first.images.items():
        height, width = pictures.shape[1:3]
        feature = camera_feature(height, width, fps)
        if feature.dtype == "video" and (height % 2 or width % 2):  # which h264 cannot have
            feature = Feature("image", feature.shape, feature.names)
        found[CAMERA + camera] = feature
    for name, values in columns[0].items():
        ahead = name.startswith(NEXT + OBSERVATION) or name == OBSERVED
        known = known_last if ahead else all(name in one for one in columns)
        if success.get(name, known) and name not in found:
            info: dict[str, Any] = {}
            if name == ACTION and discrete:
                info = {CHOICES: source.choices, INFERRED: source.choices_inferred}
            found[name] = Feature(str(values.dtype), values.shape[1:] or (1,), source.names.get(name), info)
    return found


def columns_of(episode: RecordedEpisode, discrete: bool) -> dict[str, Any]:
    """Feature -> [T, ...], everything that LeRobot's frames can hold of the episode.

    discrete: actions are whole numbers. `next.success` is False also where nobody knows.
    """
    length = len(episode)
    vectors = {name: values.astype(np.float32) for name, values in episode.vectors.items()}
    columns: dict[str, Any] = {CAMERA + name: pictures for name, pictures in episode.images.items()}
    columns |= vectors
    columns[ACTION] = episode.actions.astype(np.int64) if discrete else episode.actions
    if episode.expert_actions is not None:
        columns[EXPERT_ACTION] = episode.expert_actions
    last = np.arange(length) == length - 1
    if episode.rewards is not None:
        columns[REWARD] = episode.rewards
    columns[DONE] = last
    columns[SUCCESS] = last & bool(episode.success)
    columns[SUCCESS_IF_KNOWN] = np.full(length, -1 if episode.success is None else episode.success, np.int8)
    columns[TRUNCATED] = last & episode.truncated
    for name, values in vectors.items():
        after = final_row(episode, name) if name in episode.final else values[-1]
        columns[NEXT + name] = np.concatenate([values[1:], after[None]])
    columns[OBSERVED] = ~last | all(name in episode.final for name in vectors)
    return columns | {name: values for name, values in _numbers(episode.others).items() if name not in columns}


def _numbers(others: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: one for name, one in others.items() if one.ndim <= 2 and not name.startswith(OBSERVATION)}
