"""Which recorded episodes are learned from, and the likelihood term of demonstrations that PPO may carry along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embodied.datasets.episode import Episode, check_against, check_choices
from embodied.datasets.formats import read_dataset
from embodied.datasets.robomimic import DoneMeaning
from embodied.policies.state_mlp import StatePolicy
from envs.make import EnvironmentSpec
from experiment.errors import UserError
from policy_core.bc import bc_loss
from policy_core.metrics import Metrics
from policy_core.ppo import AuxiliaryLoss


@dataclass(frozen=True)
class EpisodesConfig:
    """Which recorded episodes are learned from.

    path                a data set in any format that `tandem data inspect` reads
    observation_keys    which of its vectors make the observation, in which order; None: all of them
    subset              only the episodes of this filter key (robomimic's mask) or split (LeRobot)
    best                share of these that is kept, those of the highest return (filtered cloning), of equal
                        returns the successful; 1: all
    """

    path: str | None = None
    observation_keys: tuple[str, ...] | None = None
    subset: str | None = None
    best: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.best <= 1:
            raise ValueError(f"best must be in (0, 1], got {self.best}")

    def required_path(self) -> str:
        """The path. Raises UserError where none is given."""
        if not self.path:
            raise UserError("data.path is not set: give a data set, data.path=PATH")
        return self.path


@dataclass(frozen=True)
class DemonstrationTerm(EpisodesConfig):
    """A likelihood term beside PPO's loss, after DAPG's demonstration weight (1709.10087 eq. 8).

    coef * decay**update * (mean negative log-likelihood of a batch); path None switches it off.
    """

    coef: float = 0.1
    decay: float = 0.99
    batch_size: int = 256


def read_demonstrations(
    config: EpisodesConfig,
    environment: EnvironmentSpec,
    *,
    need_rewards: bool = False,
    done_means: DoneMeaning | None = None,
    discrete: bool = False,
) -> list[Episode]:
    """The episodes that `config` names; unless they are needed, rewards are 0 where there are none.

    done_means: as in `read_dataset`. discrete: actions are to be choices.

    UserError if nothing is named, or what is named is damaged or was recorded in another environment.
    """
    path = config.required_path()
    episodes = read_dataset(
        path,
        observation_keys=config.observation_keys,
        subset=config.subset,
        done_means=done_means,
        need_rewards=need_rewards,
    )
    (check_choices if discrete else check_against)(episodes, environment, path)
    return best_episodes(episodes, config.best)


def best_episodes(episodes: Sequence[Episode], share: float) -> list[Episode]:
    """The share of the episodes that earned most, at least one, in their order.

    Of equal returns, as where no rewards were recorded, the successful come first. Raises UserError where nothing
    tells the episodes apart: the first of the file are not the best.
    """
    count = max(1, round(share * len(episodes)))
    if count == len(episodes):
        return list(episodes)
    worth = [(float(e.rewards.sum(dtype=np.float64)), e.success is True) for e in episodes]
    if len(set(worth)) == 1:
        raise UserError(
            f"best={share:g}: all {len(episodes)} episodes have the same return and none is marked as more "
            "successful; learn from all of them (best=1)"
        )
    order = sorted(range(len(episodes)), key=lambda i: worth[i], reverse=True)
    return [episodes[i] for i in sorted(order[:count])]


def stack_steps(episodes: Sequence[Episode], environment: EnvironmentSpec) -> tuple[Tensor, Tensor]:
    """The steps of all episodes: observations [N, D] and actions [N, A], clipped as the environment clips them."""
    observations = torch.from_numpy(np.concatenate([episode.observations for episode in episodes]))
    actions = torch.from_numpy(np.concatenate([episode.actions for episode in episodes]))
    assert environment.action_low is not None
    assert environment.action_high is not None
    low, high = torch.from_numpy(environment.action_low), torch.from_numpy(environment.action_high)
    return observations, actions.clamp(low, high)


class DemonstrationBatches:
    """Draws batches of demonstrated steps, with a generator that a checkpoint keeps."""

    def __init__(self, observations: Tensor, actions: Tensor, config: DemonstrationTerm, seed: int) -> None:
        self.observations, self.actions, self.config = observations, actions, config
        self.generator = torch.Generator().manual_seed(seed + 1)

    @classmethod
    def load(
        cls, config: DemonstrationTerm, environment: EnvironmentSpec, seed: int
    ) -> DemonstrationBatches | None:
        """Read the file that `config` names; None without one. UserError if it does not fit."""
        if not config.path:
            return None
        return cls(*stack_steps(read_demonstrations(config, environment), environment), config, seed)

    def auxiliary_loss(self, policy: StatePolicy, update: int) -> AuxiliaryLoss:
        """The term of the `update`-th update (from 1), to be called once an optimizer step."""
        coef = self.config.coef * self.config.decay ** max(0, update - 1)

        def loss() -> tuple[Tensor, Metrics]:
            rows = torch.randint(len(self.actions), (self.config.batch_size,), generator=self.generator)
            log_probs = policy.evaluate(self.observations[rows, None], self.actions[rows, None]).log_probs
            value, metrics = bc_loss(log_probs=log_probs, mask=torch.ones(len(rows), 1, dtype=torch.bool))
            return coef * value, {"demonstration_nll": metrics["nll"]}

        return loss

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.generator.set_state(state["generator"])
