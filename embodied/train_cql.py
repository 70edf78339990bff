"""Conservative Q-learning from logged data, or its calibrated form, which goes on online without a dip.

tandem train configs/embodied/half_cheetah_cql.yaml data.path=FILE
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
from policy_core import cql
from policy_core.cql import CQLConfig, Multiplier
from policy_core.critics import ActorCritic
from policy_core.sac import Coefficient, Optimizers, SACConfig


@dataclass(frozen=True)
class TrainCQLConfig(OfflineConfig):
    """calibrated          Cal-QL: values are not pushed below the returns that the data shows
    policy_learning_rate   of the policy, the temperature and the Lagrange multiplier
    """

    cql: CQLConfig = field(default_factory=CQLConfig)
    calibrated: bool = False
    policy_learning_rate: float = 1e-4
    critic_learning_rate: float = 3e-4


def train(config: TrainCQLConfig, *, resume: Path | None = None) -> RunResult:
    """Train, or go on with the run folder `resume`. Returns the run folder and the last metrics."""
    updates = 1 if config.run.dry_run else config.updates
    inputs = Inputs.read(config)
    with Run.start(config, recipe="embodied/cql", resume=resume) as run:
        rates = (config.policy_learning_rate, config.critic_learning_rate)
        policy, moving = new_parts(config, inputs, rates=rates, sac=config.cql.sac)
        parts, multiplier = moving.parts, moving.multiplier if config.cql.threshold is not None else None
        first = parts.resume(run.checkpoint)
        data = offline_data(config, inputs, policy)
        with Collector(config.environment, policy, steps=1, seed=config.run.seed) as collector:
            run.begin_loop(updates)
            for update in range(first, updates + 1):
                batch, returns, _ = data.draw(config.batch_size, parts.generator)
                with precision(config):
                    metrics = cql.update(
                        moving.networks,
                        moving.temperature,
                        moving.optimizers,
                        batch,
                        config.cql,
                        multiplier=multiplier,
                        returns=returns if config.calibrated else None,
                        generator=parts.generator,
                    )
                record(run, metrics, parts, policy, collector, config, update=update)
        return run.finish()


@dataclass(frozen=True)
class Moving:
    """What CQL and soft actor-critic move; parts: the same by name, for checkpoints."""

    networks: ActorCritic
    temperature: Coefficient
    optimizers: Optimizers
    multiplier: Multiplier
    parts: Parts


def new_parts(
    config: LoggedDataConfig, inputs: Inputs, *, rates: tuple[float, float], sac: SACConfig
) -> tuple[StatePolicy, Moving]:
    """The policy and all that learns with it, offline and on. rates: of the policy (and of coefficients) and of the
    critics."""
    policy = new_policy(config, inputs, "squashed")
    networks = new_networks(config, policy)
    temperature, coefficient = Coefficient(sac.initial_temperature), Coefficient(1.0)
    modules = {
        "policy": policy,
        "critic": networks.critic,
        "target": networks.target,
        "temperature": temperature,
        "multiplier": coefficient,
    }
    learned = {name: module for name, module in modules.items() if name != "target"}
    movers = {
        name: adam(module.parameters(), rates[1] if name == "critic" else rates[0])
        for name, module in learned.items()
    }
    scale = reward_scale(inputs.episodes, config.data)
    parts = Parts(modules, movers, torch.Generator().manual_seed(config.run.seed), scale)
    optimizers = Optimizers(movers["policy"], movers["critic"], movers["temperature"])
    return policy, Moving(networks, temperature, optimizers, Multiplier(coefficient, movers["multiplier"]), parts)
