"""Writes the episodes of any source as LeRobot v3, Minari or d3rlpy: one at a time, and whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from embodied.datasets.d3rlpy_writer import D3rlpyTarget
from embodied.datasets.lerobot_target import FPS, LeRobotTarget
from embodied.datasets.minari_writer import MinariTarget
from embodied.datasets.recorded import OBSERVATION, RecordedEpisode
from embodied.datasets.source import Source
from embodied.datasets.staging import StagedEpisodes, Staging
from experiment.errors import StorageError, UserError

WRITTEN = ("lerobot", "minari", "d3rlpy")
"""The formats that are written."""


class Target(Protocol):
    """What takes episodes, and has those that an interrupted call left."""

    def __len__(self) -> int: ...

    def append(self, episode: RecordedEpisode) -> None:
        """Add an episode, on the disk when this returns."""

    def finish(self) -> None:
        """Make the data set of the episodes that were added."""

    def close(self) -> None:
        """Let go of what is open."""


@dataclass(frozen=True)
class WriteReport:
    """What was written.

    left_out: what the source has and the format has no place for.
    not_bootstrapped: truncated episodes of which nobody knows what was seen after the last action.
    """

    episodes: int
    steps: int
    left_out: tuple[str, ...]
    not_bootstrapped: int


def write_dataset(
    source: Source,
    target: str | Path,
    to: str,
    *,
    fps: int | None = None,
    on_episode: Callable[[int], None] = lambda done: None,
) -> WriteReport:
    """Write all episodes of a source; the same call goes on where it was killed.

    to: of `WRITTEN`. fps: of LeRobot's frames; the source's, or `lerobot_target.FPS`, by default.
    on_episode: called with how many are finished.

    Raises UserError, one line: the target exists, the disk is full, an episode is damaged or of another shape than
    the first, or lacks what the format needs. What was begun is removed when an episode is at fault.
    """
    target = Path(target)
    if to not in WRITTEN:
        raise UserError(f"there is no writer for {to!r}: choose from {', '.join(WRITTEN)}")
    if not len(source):
        raise UserError(f"{source.path}: has no episodes")
    rate = fps or source.fps or FPS
    images = to != "d3rlpy"
    examples = [part.read(0) for part in source.parts if len(part)]
    plan = {"source": source.identity(), "to": to, "fps": rate, "episodes": len(source)}
    left_out = {"pictures"} if not images and any(one.images for one in examples) else set()
    unknown = 0
    with Staging(target, plan) as staging:
        try:
            sink = _target(to, staging, source, examples, rate)
            try:
                for index in range(len(source)):
                    episode = source.read(index, images=images and index >= len(sink))
                    check_alike(examples[0], episode, images=images and index >= len(sink))
                    left_out |= _without_place(episode, to, examples)
                    unknown += episode.truncated and any(name not in episode.final for name in episode.vectors)
                    if index >= len(sink):
                        sink.append(episode)
                    on_episode(index + 1)
                sink.finish()
            finally:
                sink.close()
        except StorageError:
            raise  # there will be room, and what is finished stays
        except UserError:
            staging.discard()
            raise
        staging.deliver()
    return WriteReport(len(source), sum(source.lengths), tuple(sorted(left_out)), unknown)


def check_alike(first: RecordedEpisode, other: RecordedEpisode, *, images: bool = True) -> None:
    """Raise UserError where two episodes differ in observations, their shapes, actions or in having rewards."""

    def shapes(episode: RecordedEpisode) -> dict[str, tuple[int, ...]]:
        found = {"the action": episode.actions.shape[1:]}
        if episode.rewards is not None:
            found["the reward"] = ()
        found |= {name.removeprefix(OBSERVATION): one.shape[1:] for name, one in episode.vectors.items()}
        return found | ({name: one.shape[1:] for name, one in episode.images.items()} if images else {})

    here, there = shapes(other), shapes(first)
    for name in {**there, **here}:
        if here.get(name) != there.get(name):
            told, expected = (_shape(one.get(name)) for one in (here, there))
            raise UserError(f"{other.name}: {name} is {told}, that of {first.name} {expected}")


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def _target(to: str, staging: Staging, source: Source, examples: Sequence[RecordedEpisode], fps: int) -> Target:
    for other in examples[1:]:
        check_alike(examples[0], other)
    if to == "lerobot":
        return LeRobotTarget(staging.result, source, examples, fps)
    staged = StagedEpisodes(staging.folder / "episodes")
    if to == "minari":
        return MinariTarget(staged, staging.result, staging.target.name, source, examples[0])
    return D3rlpyTarget(staged, staging.result, source, examples[0])


def _without_place(episode: RecordedEpisode, to: str, examples: Sequence[RecordedEpisode]) -> set[str]:
    """What the format cannot hold of an episode; LeRobot's frames all have what every one of the examples has."""
    found = {"the simulator's initial state": episode.initial_state is not None}
    others = {name: one for name, one in episode.others.items() if not name.startswith(OBSERVATION)}
    found["other numbers"], found["the teacher's actions"] = bool(others), episode.expert_actions is not None
    if to == "lerobot":
        everywhere = set.intersection(*(set(one.others) for one in examples))
        found["other numbers"] = any(one.ndim > 2 or name not in everywhere for name, one in others.items())
        found["the teacher's actions"] &= any(one.expert_actions is None for one in examples)
    if to == "d3rlpy":
        found["instructions"] = bool(episode.instruction)
    return {what for what, there in found.items() if there} | set(episode.left_out)
