"""From environments to the core's `Rollout`: collect with the workers, then judge with the policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from embodied.policies.numpy_actor import NumpyActor, Spaces, StatePolicyConfig
from embodied.policies.state_mlp import StatePolicy
from embodied.rollouts.processes import SharedArrays, Workers
from embodied.rollouts.workers import Collected, EnvironmentConfig, RolloutWorker, layout_of
from envs.make import EnvironmentSpec
from envs.stepper import EpisodeRecord
from experiment.errors import user_errors
from policy_core.returns import next_values_of
from policy_core.rollout import Rollout


def spaces_of(spec: EnvironmentSpec) -> Spaces:
    """The sizes that a policy needs."""
    return Spaces(spec.observation_dim, spec.action_dim, spec.discrete)


def fresh_policy(spec: EnvironmentSpec, config: StatePolicyConfig) -> StatePolicy:
    """A new policy that knows the environment's sizes and action bounds.

    Raises UserError where its head needs bounds and there are none.
    """
    policy = StatePolicy(spaces_of(spec), config)
    if spec.action_low is not None and spec.action_high is not None:
        with user_errors(spec.env_id):
            policy.set_action_bounds(torch.from_numpy(spec.action_low), torch.from_numpy(spec.action_high))
    return policy


@dataclass(frozen=True)
class Experience:
    """A rollout as the environments gave it; [B, T] = environments, steps.

    next_observations [B, D] follow the last column; final_observations are (row, column, [D]) at episode ends, and
    episodes what came of them, in the same order.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    next_observations: Tensor
    final_observations: list[tuple[int, int, np.ndarray]]
    episodes: list[EpisodeRecord]


class Collector:
    """Owns the environments of a run, here or in worker processes: `workers` has their state."""

    def __init__(self, environment: EnvironmentConfig, policy: StatePolicy, *, steps: int, seed: int) -> None:
        spaces = policy.spaces
        size = NumpyActor(spaces, policy.config).size
        self._arrays = SharedArrays(layout_of(environment.count, steps, spaces, size))
        self._weights = self._arrays.view("weights")
        work = (environment, spaces, policy.config, self._arrays, seed)
        self.workers = Workers(RolloutWorker, environment.count, environment.workers, *work)

    def collect(self, policy: StatePolicy, *, deterministic: bool = False) -> Experience:
        """One horizon of every environment. The tensors are the caller's.

        deterministic: the policy's modes instead of samples.
        """
        policy.export_actor(self._weights)
        reports: list[Collected] = self.workers.ask("collect", deterministic)
        arrays = {
            name: torch.from_numpy(self._arrays.view(name).copy())
            for name in ("observations", "actions", "rewards", "terminated", "truncated")
        }
        return Experience(
            **arrays,
            next_observations=torch.from_numpy(np.concatenate([report.next_observations for report in reports])),
            final_observations=[final for report in reports for final in report.final_observations],
            episodes=[episode for report in reports for episode in report.episodes],
        )

    def evaluate(
        self, policy: StatePolicy, seeds: Sequence[int], *, deterministic: bool = True
    ) -> list[EpisodeRecord]:
        """One episode from each seed, shared among the workers; in the order of the seeds."""
        policy.export_actor(self._weights)
        return self.workers.deal("evaluate", seeds, deterministic)

    def __enter__(self) -> Collector:
        return self

    def __exit__(self, *exception: object) -> None:
        self.workers.close()


@torch.no_grad()
def judge(
    experience: Experience,
    policy: StatePolicy,
    *,
    gamma: float,
    rewards: Tensor,
    reference: StatePolicy | None = None,
) -> Rollout:
    """The core's view of an experience: log-probs, values and bootstraps under the policy that acted.

    rewards [B, T] replace the raw ones (scaled, say). The log-probs come from the same forward pass that the update
    differentiates, so the first ratio is 1.
    """
    observations, actions = experience.observations, experience.actions
    evaluation = policy.evaluate(observations, actions)
    assert evaluation.values is not None
    final_values = torch.zeros_like(rewards)
    final_values[:, -1] = policy.values(experience.next_observations)
    if experience.final_observations:
        rows, columns, finals = zip(*experience.final_observations, strict=True)
        final_values[list(rows), list(columns)] = policy.values(torch.from_numpy(np.stack(finals)))
    ended = experience.terminated | experience.truncated
    episode = ended.long().cumsum(1) - ended.long()
    mask = torch.ones_like(ended)
    ref_log_probs = None if reference is None else reference.evaluate(observations, actions).log_probs
    return Rollout(
        observations=observations,
        actions=actions,
        rewards=rewards,
        terminated=experience.terminated,
        truncated=experience.truncated,
        mask=mask,
        discount=torch.full_like(rewards, gamma),
        old_log_probs=evaluation.log_probs,
        ref_log_probs=ref_log_probs,
        episode=episode,
        values=evaluation.values,
        next_values=next_values_of(
            values=evaluation.values,
            mask=mask,
            episode=episode,
            terminated=experience.terminated,
            final_values=final_values,
        ),
    )
