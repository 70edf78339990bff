"""Advantage-weighted actor-critic from logged data.

tandem train configs/embodied/half_cheetah_awac.yaml data.path=FILE
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from embodied.logged.offline import (
    Inputs,
    LoggedDataConfig,
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
from embodied.policies.state_mlp import StatePolicy
from embodied.rollouts.rollout import Collector
from experiment.run import Run, RunResult
from policy_core import awac
from policy_core.awac import AWACConfig
from policy_core.critics import ActorCritic


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
        rates = (config.policy_learning_rate, config.critic_learning_rate)
        policy, networks, parts = new_parts(config, inputs, rates=rates)
        movers = (parts.optimizers["policy"], parts.optimizers["critic"])
        first = parts.resume(run.checkpoint)
        data = offline_data(config, inputs, policy)
        with Collector(config.environment, policy, steps=1, seed=config.run.seed) as collector:
            run.begin_loop(updates)
            for update in range(first, updates + 1):
                batch, _, _ = data.draw(config.batch_size, parts.generator)
                with precision(config):
                    metrics = awac.update(networks, *movers, batch, config.awac, generator=parts.generator)
                with torch.no_grad():
                    policy.log_std.clamp_(*config.log_std_bounds)
                record(run, metrics, parts, policy, collector, config, update=update)
        return run.finish()


def new_parts(
    config: LoggedDataConfig, inputs: Inputs, *, rates: tuple[float, float]
) -> tuple[StatePolicy, ActorCritic, Parts]:
    """What AWAC moves, offline and on: the policy, critics and their slow copy. rates: of policy and critics."""
    policy = new_policy(config, inputs, "bounded")
    networks = new_networks(config, policy)
    movers = {"policy": adam(policy.parameters(), rates[0]), "critic": adam(networks.critic.parameters(), rates[1])}
    modules = {"policy": policy, "critic": networks.critic, "target": networks.target}
    scale = reward_scale(inputs.episodes, config.data)
    return policy, networks, Parts(modules, movers, torch.Generator().manual_seed(config.run.seed), scale)
