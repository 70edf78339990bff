"""Implicit Q-learning from logged data.

    tandem train configs/embodied/half_cheetah_iql.yaml data.path=FILE

The policy's own value head is IQL's value, so PPO goes on from it with a critic that knows the task.
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
from embodied.policies.state_mlp import StatePolicy, ValueUnits
from embodied.rollouts.rollout import Collector
from experiment.run import Run, RunResult
from policy_core import iql
from policy_core.critics import ActorCritic
from policy_core.iql import IQLConfig


@dataclass(frozen=True)
class TrainIQLConfig(OfflineConfig):
    """learning_rate    of policy, value and critics
    log_std_bounds   of the policy's deviation, kept at every step
    """

    iql: IQLConfig = field(default_factory=IQLConfig)
    learning_rate: float = 3e-4
    log_std_bounds: tuple[float, float] = (-5.0, 2.0)


def train(config: TrainIQLConfig, *, resume: Path | None = None) -> RunResult:
    """Train, or go on with the run folder `resume`. Returns the run folder and the last metrics."""
    updates = 1 if config.run.dry_run else config.updates
    inputs = Inputs.read(config)
    with Run.start(config, recipe="embodied/iql", resume=resume) as run:
        policy, networks, parts = new_parts(config, inputs, learning_rate=config.learning_rate)
        first = parts.resume(run.checkpoint)
        data = offline_data(config, inputs, policy)
        traced = iql.traced_gradient(networks)
        with Collector(config.environment, policy, steps=1, seed=config.run.seed) as collector:
            run.begin_loop(updates)
            for update in range(first, updates + 1):
                batch, _, _ = data.draw(config.batch_size, parts.generator)
                with precision(config):
                    metrics = iql.update(networks, parts.optimizers["all"], batch, config.iql, traced=traced)
                with torch.no_grad():
                    policy.log_std.clamp_(*config.log_std_bounds)
                record(run, metrics, parts, policy, collector, config, update=update)
        return run.finish()


def new_parts(
    config: LoggedDataConfig, inputs: Inputs, *, learning_rate: float
) -> tuple[StatePolicy, ActorCritic, Parts]:
    """What IQL moves, offline and on: the policy with its value, critics and their slow copy; one optimizer."""
    policy = new_policy(config, inputs, "bounded")
    scale = reward_scale(inputs.episodes, config.data)
    policy.value_units = ValueUnits(scale, config.data.shift)
    networks = new_networks(config, policy)
    optimizer = adam([*policy.parameters(), *networks.critic.parameters()], learning_rate)
    modules = {"policy": policy, "critic": networks.critic, "target": networks.target}
    parts = Parts(modules, {"all": optimizer}, torch.Generator().manual_seed(config.run.seed), scale)
    return policy, networks, parts
