"""One demonstration that was recorded with cameras, words and labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

OBSERVATION = "observation."
PROPRIO, STATE = "observation.state", "observation.environment_state"


OTHER_INSTRUCTIONS = "instructions after an episode's first"
"""What is left out of an episode in which the robot is told something else on the way."""


@dataclass(frozen=True)
class RecordedEpisode:
    """T control steps in the order in which they were made; row t was seen before action t.

    images: camera -> [T, H, W, 3] uint8; empty where they were not asked for.
    proprio: [T, P] float32, what the robot feels of itself; P is 0 where the recording has none.
    actions: [T, A] float32, as executed.
    terminated, truncated: how the episode ended; one of them is True, never both.
    instruction: what the robot was told, "" where nothing was.
    state: [T, S] float32, privileged (what only a simulator knows); None where it was not recorded.
    expert_actions: [T, A] float32, what a teacher would have done at row t; None where nobody says, so that
        `actions` are the label.
    rewards: [T] float32, what action t earned; None where they were not recorded.
    success: whether the task was done at any time, None where the recording does not say.
    timestamps: [T] float32, seconds since the episode's first frame.
    others: name -> [T, ...], every other feature that is a number; those that were observed are called
        `observation.NAME`.
    final: name -> [d], what was seen after the last action, of the vectors of which it was recorded.
    initial_state: what a simulator needs to begin here, None where it was not recorded.
    left_out: what the recording holds and this has no place for, in words.
    name: where the episode comes from.
    """

    images: Mapping[str, np.ndarray]
    proprio: np.ndarray
    actions: np.ndarray
    terminated: bool
    truncated: bool
    instruction: str = ""
    state: np.ndarray | None = None
    expert_actions: np.ndarray | None = None
    rewards: np.ndarray | None = None
    success: bool | None = None
    timestamps: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    others: Mapping[str, np.ndarray] = field(default_factory=dict)
    final: Mapping[str, np.ndarray] = field(default_factory=dict)
    initial_state: Mapping[str, np.ndarray] | None = None
    left_out: tuple[str, ...] = ()
    name: str = ""

    def __len__(self) -> int:
        """T."""
        return len(self.actions)

    @property
    def labels(self) -> np.ndarray:
        """[T, A]: what a student should do, the teacher's actions where there are any."""
        return self.actions if self.expert_actions is None else self.expert_actions

    @property
    def vectors(self) -> dict[str, np.ndarray]:
        """Name -> [T, d], everything observed that is no picture.

        `observation.state` (`proprio`) and `observation.environment_state` (`state`) come first, then the others in
        the order in which the recording has them.
        """
        found = {PROPRIO: self.proprio} if self.proprio.shape[1] else {}
        if self.state is not None:
            found[STATE] = self.state
        others = {name: values for name, values in self.others.items() if name.startswith(OBSERVATION)}
        return found | {name: values.reshape(len(values), -1) for name, values in others.items()}
