"""Environments at the table, each with the episode that is played in it, and what a policy sees of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from embodied.policies.vla import VLAPolicy, image_key
from envs.stepper import EpisodeRecord
from envs.table.env import TIME_LIMIT, TableEnv
from envs.table.language import TASKS
from experiment.errors import user_errors

Array = NDArray[np.float32]
Play = tuple[int, Mapping[str, Any] | None]
"""An episode to play: the seed and the options of its reset."""


@dataclass(frozen=True)
class TableConfig:
    """The table that is played at; what is seen of it (cameras, picture size) is the policy's affair.

    tasks, combinations, phrasing, reward, end_on_success   as `TableEnv`'s
    randomization   a preset of `envs.table.randomization` or a file.yaml; None for the plain table
    count           environments played together
    workers         processes to share them (0 = this one; at most `count`)
    """

    tasks: tuple[str, ...] = TASKS
    combinations: Literal["train", "held_out", "all"] = "train"
    phrasing: str = "train"
    reward: Literal["dense", "sparse"] = "dense"
    end_on_success: bool = True
    randomization: str | None = None
    count: int = 32
    workers: int = 2

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.workers <= self.count:
            raise ValueError(f"environment.workers must be 0..count, got {self.workers} for {self.count}")


def make_table(config: TableConfig, image_size: int, kind: type[TableEnv] = TableEnv) -> TableEnv:
    """A table that draws nothing unless asked. UserError if the configuration names what is not there."""
    with user_errors("environment"):
        return kind(
            tasks=config.tasks,
            combinations=config.combinations,
            phrasing=config.phrasing,
            reward=config.reward,
            end_on_success=config.end_on_success,
            randomization=config.randomization,
            observe=(),
            image_size=image_size,
        )


class TableEpisode(NamedTuple):
    """A finished episode: its record, what was asked, and whether another goal was met that was not asked for.

    success_of_original is for `swap` resets, None in all others.
    """

    record: EpisodeRecord
    task: str
    goal: str
    instruction: str
    success_of_original: bool | None


def observed(policy: VLAPolicy) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of each entry of an observation that the policy asks for; the state is the critic's."""
    spaces = policy.spaces
    picture = ((spaces.image_size, spaces.image_size, 3), "uint8")
    return {
        **{image_key(camera): picture for camera in spaces.cameras},
        "proprio": ((spaces.proprio_size,), "float32"),
        "words": ((policy.config.length,), "int64"),
        "state": ((spaces.state_size,), "float32"),
    }


class Seat:
    """One environment and the episode that is played in it; chunks are executed open loop."""

    def __init__(self, env: TableEnv) -> None:
        self.env = env
        self.number, self.seed, self.length, self.episode_return = -1, 0, 0, 0.0
        self.success, self.success_once = False, False
        self.success_of_original: bool | None = None

    def begin(self, seed: int, options: Mapping[str, Any] | None = None, *, first: bool = False) -> None:
        """The next episode, from that reset. first: as in an environment that was just made."""
        if first:
            self.number = -1
            if self.env.randomizer is not None:
                self.env.randomizer.forget_start()
        with user_errors("environment"):
            self.env.reset(seed=seed, options=options)
        self.seed, self.number = seed, self.number + 1
        self.length, self.episode_return = 0, 0.0
        self.success = self.success_once = False
        self.success_of_original = None

    def execute(
        self, chunk: NDArray[np.floating], rewards: Array, states: Array | None = None
    ) -> tuple[int, bool, bool]:
        """Up to k actions [k, A], fewer where the episode ends; writes rewards [k], and the states [k, S] before.

        Returns how many were executed, terminated and truncated (at the time limit).
        """
        step, executed, terminated, truncated = self.env.step, 0, False, False
        for action in chunk:
            if states is not None:
                states[executed] = self.env.observe(("state",))["state"]
            with user_errors("environment"):
                _, reward, terminated, truncated, info = step(action)
            rewards[executed] = reward
            executed += 1
            self.episode_return += reward
            self.length += 1
            self.success = bool(info["success"])
            self.success_once |= self.success
            if "success_of_original" in info:
                self.success_of_original = bool(info["success_of_original"] or self.success_of_original)
            truncated = truncated or self.length >= TIME_LIMIT
            if terminated or truncated:
                break
        return executed, terminated, truncated

    def episode(self, terminated: bool, truncated: bool) -> TableEpisode:
        """What was played since `begin`. Success is None where the instruction was not understood."""
        env = self.env
        record = EpisodeRecord(
            episode_return=self.episode_return,
            length=self.length,
            success_once=self.success_once if env.judged else None,
            success_at_end=self.success if env.judged else None,
            terminated=terminated,
            truncated=truncated,
            number=self.number,
            seed=self.seed,
        )
        return TableEpisode(record, env.goal.task, env.goal.key, env.instruction, self.success_of_original)

    def state(self) -> dict[str, Any]:
        """The episode so far, without the environment."""
        return {name: value for name, value in vars(self).items() if name != "env"}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`."""
        vars(self).update(state)


class Seats:
    """Environments that one process plays together, and what it sees in them now.

    `seen` [n, ...] is looked at when an episode begins and after each chunk: contacts that an observation tells are
    those of the last physics step, which cannot be found again later.
    """

    def __init__(self, config: TableConfig, policy: VLAPolicy, count: int) -> None:
        self.policy = policy
        self.seats = [Seat(make_table(config, policy.spaces.image_size)) for _ in range(count)]
        layout = observed(policy)
        self._names = tuple(name for name in layout if name != "words")
        self.seen = {name: np.zeros((count, *shape), kind) for name, (shape, kind) in layout.items()}
        self._tensors = {name: torch.from_numpy(array) for name, array in self.seen.items()}

    def begin(
        self, index: int, seed: int, options: Mapping[str, Any] | None = None, *, first: bool = False
    ) -> None:
        """Begin an episode at one seat, and the first look at it."""
        self.seats[index].begin(seed, options, first=first)
        instruction = self.seats[index].env.instruction
        self.seen["words"][index] = self.policy.words.numbers(instruction, self.policy.config.length)
        self.look(index)

    def look(self, index: int) -> None:
        """Take a look at one seat, as it is now."""
        with user_errors("environment"):
            seen = self.seats[index].env.observe(self._names)
        for name, value in seen.items():
            self.seen[name][index] = value

    def act(self, active: Sequence[int], noise: Sequence[Array] | None) -> tuple[Array, Array, Array]:
        """Decide at the active seats: actions [n, k, A], not clipped yet, their log-probs [n, k], and the percepts
        that they follow from.

        noise: standard normal [k, A] of each, None for the policy's mode.
        """
        observations = self._tensors
        if len(active) < len(self.seats):
            rows = torch.tensor(active)
            observations = {name: tensor[rows] for name, tensor in observations.items()}
        percept = self.policy.perceive(observations)
        actions, log_probs = self.policy.act(
            {**observations, "percept": percept}, None if noise is None else torch.from_numpy(np.stack(noise))
        )
        return actions.numpy(), log_probs.numpy(), percept.numpy()

    def close(self) -> None:
        """Close the environments."""
        for seat in self.seats:
            seat.env.close()
