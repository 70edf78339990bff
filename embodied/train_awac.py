"""Advantage-weighted actor-critic from logged data.

tandem train configs/embodied/half_cheetah_awac.yaml data.path=FILE
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from embodied.logged.offline import (
    Inputs,
    OfflineConfig,
    Parts,
    adam,
    new_networks,
    new_policy,
    offline_data,
    precision,
    record,
)
from embodied.logged.transitions import reward_scale
from embodied.rollouts.rollout import Collector
from experiment.run import Run, RunResult
from policy_core import awac
from policy_core.awac import AWACConfig


@dataclass(frozen=True)
class TrainAWACConfig(OfflineConfig):
    """log_std_bounds: of the policy's deviation, kept at every step."""

    awac: AWACConfig = field(default_factory=AWACConfig)
    policy_learning_rate: float = 3e-4
    critic_learning_rate: float = 3e-4
    log_std_bounds: tuple[float, float] = (-5.0, 2.0)


def train(config: TrainAWACConfig, *, resume: Path | None = None) -> RunResult:
    """Train, or go on with the run folder `resume`. Returns the run folder and the last metrics."""
    updates = 1 if config.run.dry_run else config.updates
    inputs = Inputs.read(config)
    with Run.start(config, recipe="embodied/awac", resume=resume) as run:
        policy = new_policy(config, inputs, "bounded")
        networks = new_networks(config, policy)
        of_policy = adam(policy.parameters(), config.policy_learning_rate)
        of_critic = adam(networks.critic.parameters(), config.critic_learning_rate)
        parts = Parts(
            {"policy": policy, "critic": networks.critic, "target": networks.target},
            {"policy": of_policy, "critic": of_critic},
            torch.Generator().manual_seed(config.run.seed),
            reward_scale(inputs.episodes, config.data),
        )
        first = parts.resume(run.checkpoint)
        data = offline_data(config, inputs, policy)
        with Collector(config.environment, policy, steps=1, seed=config.run.seed) as collector:
            run.begin_loop(updates)
            for update in range(first, updates + 1):
                batch, _, _ = data.draw(config.batch_size, parts.generator)
                with precision(config):
                    metrics = awac.update(
                        networks, of_policy, of_critic, batch, config.awac, generator=parts.generator
                    )
                with torch.no_grad():
                    policy.log_std.clamp_(*config.log_std_bounds)
                record(run, metrics, parts, policy, collector, config, update=update)
        return run.finish()
