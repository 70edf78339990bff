"""One recorded episode, and what can be said of a list of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from envs.make import EnvironmentSpec
from experiment.errors import UserError


@dataclass(frozen=True)
class Episode:
    """T decisions in the order in which they were made.

    observations: [T, D] float32; row t is what was seen before action t.
    actions: [T, A] float32, as recorded: they may exceed the bounds of the environment.
    rewards: [T] float32; row t is what action t earned.
    terminated, truncated: how the episode ended; at most one of them is True.
    final_observation: [D] float32, seen after the last action; None where it was not recorded, so that a
        truncated episode's last decision cannot be bootstrapped.
    success: whether the task was done at any time, None where the recording does not say.
    initial_state: what the simulator needs to begin here, None where it was not recorded.
    name: where the episode comes from.
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool
    truncated: bool
    final_observation: np.ndarray | None = None
    success: bool | None = None
    initial_state: Mapping[str, np.ndarray] | None = None
    name: str = ""

    def __len__(self) -> int:
        """T."""
        return len(self.actions)


@dataclass(frozen=True)
class DatasetStatistics:
    """Moments over all steps of a list of episodes; a dimension that never changes has std 0.

    observation_*: [D] float64; action_*: [A] float64.
    """

    observation_mean: np.ndarray
    observation_std: np.ndarray
    action_mean: np.ndarray
    action_std: np.ndarray


def dataset_statistics(episodes: Sequence[Episode]) -> DatasetStatistics:
    """The moments of observations and actions. Raises UserError when there is no episode."""
    if not episodes:
        raise UserError("there is no episode to describe: the data set is empty")
    observations = np.concatenate([episode.observations for episode in episodes]).astype(np.float64)
    actions = np.concatenate([episode.actions for episode in episodes]).astype(np.float64)
    return DatasetStatistics(
        observation_mean=observations.mean(axis=0),
        observation_std=observations.std(axis=0),
        action_mean=actions.mean(axis=0),
        action_std=actions.std(axis=0),
    )


def check_choices(episodes: Sequence[Episode], spec: EnvironmentSpec, source: str) -> None:
    """Raise UserError when the episodes are not of this environment with discrete actions.

    source: what the message calls the data, usually its path.
    """
    for episode in episodes:
        found = (episode.observations.shape[1], episode.actions.shape[1])
        if found != (spec.observation_dim, 1):
            raise UserError(
                f"{source}: observations have {found[0]} dimensions and actions {found[1]}, but {spec.env_id} has "
                f"{spec.observation_dim} and one choice of {spec.action_dim}"
            )
        chosen = episode.actions
        if not bool(((chosen == chosen.round()) & (chosen >= 0) & (chosen < spec.action_dim)).all()):
            raise UserError(
                f"{episode.name or source}: actions from {chosen.min():g} to {chosen.max():g} are not the choices "
                f"0 to {spec.action_dim - 1} of {spec.env_id}"
            )


def check_against(episodes: Sequence[Episode], spec: EnvironmentSpec, source: str = "the data set") -> None:
    """Raise UserError when the episodes' dimensions are not those of the environment.

    source: what the message calls the data, usually its path.
    """
    if not episodes:
        raise UserError(f"{source}: no episodes")
    found = (episodes[0].observations.shape[1], episodes[0].actions.shape[1])
    if spec.discrete:
        raise UserError(
            f"{source}: actions have {found[1]} dimensions, but those of {spec.env_id} are "
            f"{spec.action_dim} discrete choices"
        )
    if found != (spec.observation_dim, spec.action_dim):
        raise UserError(
            f"{source}: observations have {found[0]} dimensions and actions {found[1]}, but {spec.env_id} has "
            f"{spec.observation_dim} and {spec.action_dim}: choose the environment that the data came from, "
            "or other observation keys"
        )
