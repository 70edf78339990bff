"""From episodes at the table to the core's `Rollout`, where a decision is a chunk of up to k control steps."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from embodied.policies.vla import VLAPolicy
from embodied.rollouts.processes import SharedArrays, Workers
from embodied.vla.chunk_workers import ChunkReport, ChunkWorker, export_weights, layout_of
from embodied.vla.seats import Play, TableConfig, TableEpisode, observed
from policy_core.returns import fold_chunk, next_values_of
from policy_core.rollout import Rollout


@dataclass(frozen=True)
class ChunkExperience:
    """Chunks as they were executed; [B, T] = environments, chunks; k control steps a chunk.

    observations            name -> [B, T, ...] at the start of each chunk, and "percept": what the eyes said
    actions, log_probs      [B, T, k, A] not clipped, and [B, T, k] when they were drawn
    rewards                 [B, T, k] of single control steps
    executed                [B, T] how many control steps there were; 0 = nothing was played
    terminated, truncated   [B, T] the episode ended, or was cut, within this chunk
    final_states            (row, column, [S]) where it did; next_states [B, S] after the last column
    episodes                those that ended
    step_states             [B, T, k, S] before each control step, where the collector was asked for them
    """

    observations: dict[str, Tensor]
    actions: Tensor
    log_probs: Tensor
    rewards: Tensor
    executed: Tensor
    terminated: Tensor
    truncated: Tensor
    final_states: list[tuple[int, int, np.ndarray]]
    next_states: Tensor
    episodes: list[TableEpisode]
    step_states: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def control_steps(self) -> int:
        """The control steps that were executed, over all environments."""
        return int(self.executed.sum())


class ChunkCollector:
    """Owns the tables of a run, here or in worker processes: `workers` has their state.

    chunks      columns of a rollout
    group_size  neighbouring rows that have the same resets and differ in their noise
    step_states whether to look at the privileged state before each control step, not each chunk only
    """

    def __init__(
        self,
        environment: TableConfig,
        policy: VLAPolicy,
        *,
        chunks: int,
        seed: int,
        group_size: int = 1,
        step_states: bool = False,
    ) -> None:
        self._observed = (*observed(policy), "percept")
        self._arrays = SharedArrays(layout_of(policy, environment.count, chunks, step_states=step_states))
        self._weights = self._arrays.view("weights")
        with tempfile.TemporaryDirectory() as folder:  # the workers have read it when they are ready
            policy.save_pretrained(folder)
            work = (environment, Path(folder), self._arrays, seed, group_size)
            self.workers = Workers(ChunkWorker, environment.count, environment.workers, *work)

    def collect(self, policy: VLAPolicy, *, episodes: int | None = None) -> ChunkExperience:
        """Every column, or until `episodes` have ended in each row. The tensors are the caller's."""
        export_weights(policy, self._weights)
        reports: list[ChunkReport] = self.workers.ask("collect", episodes)

        def taken(name: str) -> Tensor:
            return torch.from_numpy(self._arrays.view(name).copy())

        return ChunkExperience(
            observations={name: taken(name) for name in self._observed},
            actions=taken("actions"),
            log_probs=taken("log_probs"),
            rewards=taken("rewards"),
            executed=taken("executed"),
            terminated=taken("terminated"),
            truncated=taken("truncated"),
            final_states=[final for report in reports for final in report.final_states],
            next_states=torch.from_numpy(np.concatenate([report.next_states for report in reports])),
            episodes=[episode for report in reports for episode in report.episodes],
            **({"step_states": taken("step_states")} if "step_states" in self._arrays.names else {}),
        )

    def evaluate(
        self,
        policy: VLAPolicy,
        plays: Sequence[Play],
        *,
        environment: TableConfig | None = None,
        deterministic: bool = True,
    ) -> list[TableEpisode]:
        """One episode of each play, shared among the workers; in the order of the plays.

        environment: another table than training's (held-out combinations, synonyms, ...).
        """
        export_weights(policy, self._weights)
        return self.workers.deal("evaluate", plays, environment, deterministic)

    def __enter__(self) -> ChunkCollector:
        return self

    def __exit__(self, *exception: object) -> None:
        self.workers.close()


@torch.no_grad()
def log_probs_of(policy: VLAPolicy, experience: ChunkExperience, *, at_once: int = 256) -> Tensor:
    """[B, T, k] of the chunks under `policy`, `at_once` of them a forward pass; 0 where nothing was played."""
    played = experience.executed > 0
    observations = {name: tensor[played] for name, tensor in experience.observations.items()}
    actions = experience.actions[played]
    parts = [
        policy.distribution({name: tensor[rows] for name, tensor in observations.items()})
        .log_prob(actions[rows])
        .sum(-1)
        for rows in torch.arange(len(actions)).split(at_once)
    ]
    log_probs = torch.zeros_like(experience.log_probs)
    log_probs[played] = torch.cat(parts)
    return log_probs


def judge_chunks(
    experience: ChunkExperience,
    *,
    gamma: float,
    critic: VLAPolicy | None = None,
    reference: VLAPolicy | None = None,
    group_size: int | None = None,
) -> Rollout:
    """The core's view of an experience: folded rewards, factors, episodes; the log-probs are those of the workers.

    gamma       per control step
    critic      whose values and bootstraps; it reads the simulator's state only
    reference   whose log-probs; it acts on what the policy's eyes said
    group_size  so many neighbouring rows that played the same resets, episode by episode, are a group
    """
    mask = experience.executed > 0
    rewards, discount, factor_mask = fold_chunk(
        rewards=experience.rewards, executed=experience.executed.clamp(min=1), gamma=gamma
    )
    ended = (experience.terminated | experience.truncated).long()
    number = ended.cumsum(1) - ended
    group = None
    if group_size is not None:
        first_row = torch.arange(len(mask)).unsqueeze(1) // group_size * group_size
        group = first_row * mask.shape[1] + number
    seen = {name: tensor for name, tensor in experience.observations.items() if tensor.dtype != torch.uint8}
    rollout = Rollout(
        observations=seen,  # without the images: the eyes have looked at them
        actions=experience.actions,
        rewards=torch.where(mask, rewards, 0.0),
        terminated=experience.terminated,
        truncated=experience.truncated,
        mask=mask,
        discount=discount,
        old_log_probs=experience.log_probs,
        episode=torch.where(mask, number, -1),
        ref_log_probs=None if reference is None else log_probs_of(reference, experience),
        factor_mask=factor_mask & mask.unsqueeze(-1),
        group=group,
    )
    return rollout if critic is None else with_values(rollout, experience, critic)


@torch.no_grad()
def with_values(rollout: Rollout, experience: ChunkExperience, critic: VLAPolicy) -> Rollout:
    """The rollout with the critic's values, bootstrapped from the true next states."""
    values = critic.values(experience.observations)
    final_values = final_values_of(experience, critic)
    next_values = next_values_of(
        values=values,
        mask=rollout.mask,
        episode=rollout.episode,
        terminated=rollout.terminated,
        final_values=final_values,
    )
    return replace(rollout, values=values, next_values=next_values)


@torch.no_grad()
def final_values_of(experience: ChunkExperience, critic: VLAPolicy) -> Tensor:
    """[B, T] of the true states after a chunk in which an episode ended or was cut, and after the last column."""
    values = torch.zeros_like(experience.rewards[..., 0])
    values[:, -1] = critic.values({"state": experience.next_states})
    if experience.final_states:
        rows, columns, finals = zip(*experience.final_states, strict=True)
        values[list(rows), list(columns)] = critic.values({"state": torch.from_numpy(np.stack(finals))})
    return values
