"""From recorded episodes to the core's `Transitions`, in learner's units, and batches drawn from them.

Learner's units: observations normalised by the data's moments, actions of which +-1 are the environment's bounds,
rewards as the configuration scales them. The statistics travel with the policy (`normalizer`, action bounds), so
that it takes raw observations and gives raw actions wherever it is loaded.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from embodied.datasets.episode import Episode
from embodied.datasets.robomimic import DoneMeaning
from embodied.logged.demonstrations import EpisodesConfig, read_demonstrations
from embodied.policies.state_mlp import StatePolicy
from envs.make import EnvironmentSpec
from experiment.errors import UserError
from policy_core.rollout import Transitions

CLIPPED = 0.05
"""The share of actions' numbers beyond the bounds that is worth a line."""


@dataclass(frozen=True)
class DataConfig(EpisodesConfig):
    """What is learned from, and in which units.

    done_means  what robomimic's `dones` say of an episode's last step: terminated, or (None) truncated
    gamma       discount of a step
    n_steps     rewards summed before the value takes over (n-step returns; 1: none)
    rewards     "raw"; "returns": divided by the range of the episodes' returns, times 1,000 (IQL's custom for
                locomotion, 2110.06169 sec. 5.2); shift is added to every reward afterwards
    """

    done_means: DoneMeaning | None = None
    gamma: float = 0.99
    n_steps: int = 1
    rewards: Literal["raw", "returns"] = "raw"
    shift: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.gamma <= 1 or self.n_steps < 1:
            raise ValueError("gamma must be in [0, 1] and n_steps at least 1")


@dataclass(frozen=True)
class OfflineData:
    """Everything that was logged, in memory: transitions [N], and what some algorithms need besides.

    returns         [N] discounted, from each decision to its episode's end (Cal-QL): lower bounds of what followed;
                    where an episode was cut, the rest counts as `worst`
    next_actions    [N, A], choices [N], done at the next observation (ReBRAC); the last one at an episode's end
    worst           what is left of a cut episode is worth this at least: the worst reward of all, or 0, for ever
    """

    transitions: Transitions
    returns: Tensor
    next_actions: Tensor
    worst: float

    def __len__(self) -> int:
        return len(self.transitions)

    def draw(self, size: int, generator: torch.Generator) -> tuple[Transitions, Tensor, Tensor]:
        """Transitions [size] at random, with replacement, their returns [size] and next actions [size, A]."""
        rows = torch.randint(len(self), (size,), generator=generator)
        return (
            self.transitions.select(rows),
            self.returns.index_select(0, rows),
            self.next_actions.index_select(0, rows),
        )


def read_offline(config: DataConfig, environment: EnvironmentSpec, *, discrete: bool = False) -> list[Episode]:
    """The episodes that `config` names, the best of them where it says so.

    Raises:
        UserError: nothing is named, the data are damaged or another environment's, or the actions are not of the
            kind that is asked for.
    """
    config.required_path()  # its absence is told before what is wrong with the environment
    if environment.discrete != discrete:
        has, needs = ("discrete", "continuous") if environment.discrete else ("continuous", "discrete")
        other = "embodied/discrete_cql" if environment.discrete else "embodied/cql"
        raise UserError(
            f"environment.id: {environment.env_id} has {has} actions; this recipe needs {needs} ones (see {other})"
        )
    return read_demonstrations(
        config, environment, need_rewards=True, done_means=config.done_means, discrete=discrete
    )


def require_next_observations(episodes: Sequence[Episode], config: DataConfig) -> None:
    """UserError where no decision has an outcome to learn from."""
    for episode in episodes:
        if episode.terminated or episode.final_observation is not None or len(episode) > config.n_steps:
            return
    what = "one cut step" if config.n_steps == 1 else f"at most {config.n_steps} steps (data.n_steps), then cut"
    raise UserError(f"{config.path}: no decision has a next observation: every episode is {what}")


def reward_scale(episodes: Sequence[Episode], config: DataConfig) -> float:
    """What every reward is multiplied with."""
    if config.rewards == "raw":
        return 1.0
    returns = [float(episode.rewards.sum(dtype=np.float64)) for episode in episodes]
    spread = max(returns) - min(returns)
    if spread <= 0:
        raise UserError(f"data.rewards: returns: all {len(episodes)} episodes have the same return; take 'raw'")
    return 1000.0 / spread


@torch.no_grad()
def to_transitions(
    episodes: Sequence[Episode], policy: StatePolicy, environment: EnvironmentSpec, config: DataConfig
) -> OfflineData:
    """All decisions in the policy's units.

    The last decision of an episode that was cut, where the recording lacks the final observation, has nothing to
    bootstrap from and is left out. Says how many those are, and where actions lie beyond the environment's bounds,
    to which they are clipped. Raises UserError if nothing is left, or no reward.
    """
    scale = reward_scale(episodes, config)
    worst = worst_rest(episodes, scale, config)
    require_next_observations(episodes, config)
    _say_what_is_left_out(episodes, config)
    pieces = [piece for episode in episodes if (piece := _pieces(episode, scale, worst, config)) is not None]
    columns = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    if environment.discrete:
        actions, next_actions = (columns[name].squeeze(-1).long() for name in ("actions", "next_actions"))
    else:
        low, high = torch.from_numpy(environment.action_low), torch.from_numpy(environment.action_high)
        _say_what_is_clipped(columns["actions"], low, high, config)
        actions, next_actions = (
            policy.to_learner(torch.clamp(columns[name], low, high)).contiguous()
            for name in ("actions", "next_actions")
        )
    transitions = Transitions(
        observations=policy.normalizer(columns["observations"]),
        actions=actions,
        rewards=columns["rewards"],
        next_observations=policy.normalizer(columns["next_observations"]),
        terminated=columns["terminated"],
        discount=columns["discount"],
        mask=torch.ones(len(columns["rewards"]), dtype=torch.bool),
    )
    transitions.validate()
    return OfflineData(transitions, columns["returns"], next_actions, worst)


def _say_what_is_left_out(episodes: Sequence[Episode], config: DataConfig) -> None:
    """Many tasks pay at the very end only: without the last steps, nothing is to be learned from."""
    cut = [one for one in episodes if one.final_observation is None and not one.terminated]
    if not cut:
        return
    steps = sum(min(config.n_steps, len(one)) for one in cut)
    lost = sum(float(np.abs(one.rewards[-1])) for one in cut)  # those before are in the sums of earlier steps
    paid = sum(float(np.abs(one.rewards).sum()) for one in episodes)
    what = f"the last steps of {len(cut)} episodes that were cut, without the observation behind them"
    if paid > 0 and lost >= paid * (1 - 1e-6):
        raise UserError(
            f"{config.path}: every reward lies on {what}: such steps are left out; if those episodes ended "
            "there for good, say so (data.done_means=terminated for robomimic)"
        )
    print(
        f"{config.path}: left out: {what} ({steps} of {sum(map(len, episodes))} steps, "
        f"{lost / paid if paid else 0.0:.0%} of the rewards' size)",
        file=sys.stderr,
        flush=True,
    )


def _say_what_is_clipped(actions: Tensor, low: Tensor, high: Tensor, config: DataConfig) -> None:
    """Noise of an exploring policy passes the bounds here and there; actions in other units do so all the time."""
    slack = 0.01 * (high - low)
    beyond = float(((actions < low - slack) | (actions > high + slack)).float().mean())
    if beyond > CLIPPED:
        print(
            f"{config.path}: {beyond:.0%} of the actions' numbers lie beyond the environment's bounds and are "
            "clipped to them; are they in other units?",
            file=sys.stderr,
            flush=True,
        )


def worst_rest(episodes: Sequence[Episode], scale: float, config: DataConfig) -> float:
    """What follows a cut is worth at least this, in learner's units; -inf without a discount."""
    lowest = min(float(episode.rewards.min()) for episode in episodes) * scale + config.shift
    if lowest >= 0:
        return 0.0
    return lowest / (1 - config.gamma) if config.gamma < 1 else -math.inf


def _pieces(episode: Episode, scale: float, worst: float, config: DataConfig) -> dict[str, Tensor] | None:
    """One episode's columns, raw but for the rewards; None where nothing is left."""
    observations = torch.from_numpy(episode.observations)
    actions = torch.from_numpy(episode.actions)
    rewards = torch.from_numpy(episode.rewards) * scale + config.shift
    final = (
        observations[-1:]
        if episode.final_observation is None
        else torch.from_numpy(episode.final_observation)[None]
    )
    seen = torch.cat([observations, final])
    count = len(episode)
    steps = torch.arange(count)
    ends = (steps + config.n_steps).clamp(max=count)
    powers = config.gamma ** torch.arange(config.n_steps, dtype=torch.float64)
    padded = torch.cat([rewards.double(), rewards.new_zeros(config.n_steps, dtype=torch.float64)])
    summed = (padded.unfold(0, config.n_steps, 1)[:count] * powers).sum(-1)
    columns = {
        "observations": observations,
        "actions": actions,
        "rewards": summed.float(),
        "next_observations": seen[ends],
        "terminated": (ends == count) & episode.terminated,
        "discount": (config.gamma ** (ends - steps).double()).float(),
        "returns": discounted(rewards, config.gamma, rest=0.0 if episode.terminated else worst),
        "next_actions": actions[ends.clamp(max=count - 1)],
    }
    if episode.final_observation is None and not episode.terminated:
        known = ends < count
        if not bool(known.any()):
            return None
        columns = {name: column[known] for name, column in columns.items()}
    return columns


def discounted(rewards: Tensor, gamma: float, *, rest: float = 0.0) -> Tensor:
    """Discounted sum from each step to the end, [T] -> [T]. rest: what all that comes after the end is worth."""
    values = rewards.double().numpy()
    total, sums = rest, np.empty_like(values)
    for step in range(len(values) - 1, -1, -1):
        total = values[step] + gamma * total
        sums[step] = total
    return torch.from_numpy(sums).float()


def mixed(prior: Transitions, online: Transitions) -> Transitions:
    """One batch of both, prior first."""
    joined: dict[str, Any] = {
        name: torch.cat([getattr(prior, name), getattr(online, name)]) for name in prior.__dataclass_fields__
    }
    return replace(prior, **joined)
