"""Logged data from one's own runs: episodes that a policy, or every checkpoint of a run, plays."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from embodied.datasets.episode import Episode
from embodied.datasets.recorded import RecordedEpisode
from embodied.datasets.source import Source, recorded
from embodied.policies.state_mlp import StatePolicy
from embodied.rollouts.rollout import Collector, Experience
from embodied.rollouts.workers import EnvironmentConfig, environment_spec
from envs.make import EnvironmentSpec, make_environment
from experiment.config import build_from_dict, read_tree
from experiment.errors import UserError, user_errors

HORIZON = 500
"""Steps of every environment between two exchanges with the workers, at most."""


class PlayedSource(Source):
    """Episodes in memory, for `write_dataset`.

    details: as Minari's metadata name them (`told_of`). choices: how many discrete actions there are, or None.
    """

    kind = "played"

    def __init__(
        self, episodes: Sequence[Episode], path: Path, details: Mapping[str, Any], *, choices: int | None = None
    ) -> None:
        self.episodes, self.path, self.details, self.choices = list(episodes), path, details, choices
        self.lengths = tuple(len(episode) for episode in episodes)

    def identity(self) -> Any:
        """The run, and a digest of what was played: of another seed or checkpoint it is another source."""
        digest = hashlib.sha256()
        for one in self.episodes:
            told = (len(one), one.terminated, one.truncated, one.success, one.final_observation is None)
            digest.update(repr(told).encode())
            for values in (one.observations, one.actions, one.rewards, one.final_observation):
                if values is not None:
                    digest.update(values.tobytes())
        return [self.kind, str(self.path.resolve()), len(self), sum(self.lengths), digest.hexdigest()]

    def _read(self, index: int, images: bool) -> RecordedEpisode:
        episode = self.episodes[index]
        final = {} if episode.final_observation is None else {"observation.state": episode.final_observation}
        return recorded(
            vectors={"state": episode.observations},
            images={},
            actions=episode.actions,
            rewards=episode.rewards,
            terminated=episode.terminated,
            truncated=episode.truncated,
            success=episode.success,
            final=final,
            name=episode.name,
        )


def run_to_play(run: Path, which: Literal["last", "best", "all"]) -> tuple[EnvironmentConfig, list[Path]]:
    """A run's environment and the folders of the policies that are asked for, in the order in which they learned.

    Raises UserError if the folder is no robot run from states, or holds no such checkpoint.
    """
    described = read_tree(run / "config.yaml").values.get("environment")
    if not isinstance(described, dict):
        raise UserError(f"{run}: its configuration names no environment: not a robot run")
    environment = build_from_dict(dict(described), EnvironmentConfig, str(run / "config.yaml"))
    checkpoints = run / "checkpoints"
    if which == "all":
        folders = sorted(p for p in checkpoints.glob("[0-9]*") if p.name.isdigit() and not p.is_symlink())
    else:
        folders = [checkpoints / which]
    found = [folder / "policy" for folder in folders if (folder / "policy").is_dir()]
    if not found:
        raise UserError(f"{run}: has no checkpoint {which!r} with a policy")
    return environment, found


def play_policies(
    folders: Sequence[Path], environment: EnvironmentConfig, *, steps: int, seed: int, deterministic: bool = False
) -> list[Episode]:
    """At least `steps` steps, the same number by every policy, at most one more a round and environment than its
    share; the last episodes are cut where the steps are used up. Actions are what the environment was given: within
    its bounds.

    deterministic: the policies' modes instead of samples.
    """
    spec = environment_spec(environment)
    # no more environments side by side than whole episodes fit into a policy's share
    count = min(8, max(1, steps // (len(folders) * (spec.max_episode_steps or 1))))
    environment = replace(environment, count=count, workers=min(2, count, environment.workers))
    share = -(-steps // (len(folders) * count))
    rounds = -(-share // HORIZON)
    horizon = -(-share // rounds)  # rounds of HORIZON would play up to HORIZON - 1 steps too many
    episodes: list[Episode] = []
    for number, folder in enumerate(folders):
        policy = StatePolicy.from_pretrained(folder)
        with Collector(environment, policy, steps=horizon, seed=seed + number) as collector:
            seen = [_as_taken(collector.collect(policy, deterministic=deterministic), spec) for _ in range(rounds)]
        episodes += cut(seen, name=folder.parent.name)
    return episodes


def told_of(environment: EnvironmentConfig) -> dict[str, str]:
    """An environment's action space and how to make it, as Minari's metadata hold them."""
    from minari.serialization import serialize_space

    with user_errors("environment.id"):
        made = make_environment(
            environment.id, max_episode_steps=environment.max_episode_steps, options=environment.options
        )
    told = {"action_space": serialize_space(made.action_space)}
    if made.spec is not None:
        told["env_spec"] = made.spec.to_json()
    made.close()
    return told


def _as_taken(experience: Experience, spec: EnvironmentSpec) -> Experience:
    """The experience with actions as the environment took them, clipped to its bounds."""
    if spec.action_low is None or spec.action_high is None:
        return experience
    low, high = torch.from_numpy(spec.action_low), torch.from_numpy(spec.action_high)
    return replace(experience, actions=torch.clamp(experience.actions, low, high))


def cut(experiences: Sequence[Experience], *, name: str) -> list[Episode]:
    """Consecutive experiences of the same environments as episodes, environment by environment.

    An episode that ended says whether some step of it succeeded, where the environment reports success at all.
    """
    finals: dict[tuple[int, int], np.ndarray] = {}
    successes: dict[tuple[int, int], bool | None] = {}
    width = experiences[0].rewards.shape[1]
    for number, experience in enumerate(experiences):
        for (row, column, seen), record in zip(experience.final_observations, experience.episodes, strict=True):
            finals[row, number * width + column] = seen
            successes[row, number * width + column] = record.success_once
    if any(success is not None for success in successes.values()):
        successes = {end: bool(success) for end, success in successes.items()}
    columns = {
        key: np.concatenate([getattr(e, key).numpy() for e in experiences], axis=1)
        for key in ("observations", "actions", "rewards", "terminated", "truncated")
    }
    rows, length = columns["rewards"].shape
    actions = columns["actions"].reshape(rows, length, -1).astype(np.float32)  # choices are one number each
    last = experiences[-1].next_observations.numpy()
    episodes = []
    for row in range(rows):
        begin = 0
        ends = [*np.flatnonzero(columns["terminated"][row] | columns["truncated"][row]), length - 1]
        for end in dict.fromkeys(int(e) for e in ends):
            span = slice(begin, end + 1)
            terminated = bool(columns["terminated"][row, end])
            episodes.append(
                Episode(
                    observations=columns["observations"][row, span],
                    actions=actions[row, span],
                    rewards=columns["rewards"][row, span],
                    terminated=terminated,
                    truncated=not terminated,
                    final_observation=finals.get((row, end), last[row]),
                    success=successes.get((row, end)),
                    name=f"{name}, environment {row}, step {begin}",
                )
            )
            begin = end + 1
    return episodes
