"""Conservative Q-learning from logged data, or its calibrated form, which goes on online without a dip.

tandem train configs/embodied/half_cheetah_cql.yaml data.path=FILE
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
from policy_core import cql
from policy_core.cql import CQLConfig, Multiplier
from policy_core.sac import Coefficient, Optimizers


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
        policy = new_policy(config, inputs, "squashed")
        networks = new_networks(config, policy)
        temperature, coefficient = Coefficient(config.cql.sac.initial_temperature), Coefficient(1.0)
        movers = {
            "policy": adam(policy.parameters(), config.policy_learning_rate),
            "critic": adam(networks.critic.parameters(), config.critic_learning_rate),
            "temperature": adam(temperature.parameters(), config.policy_learning_rate),
            "multiplier": adam(coefficient.parameters(), config.policy_learning_rate),
        }
        optimizers = Optimizers(movers["policy"], movers["critic"], movers["temperature"])
        multiplier = None if config.cql.threshold is None else Multiplier(coefficient, movers["multiplier"])
        parts = Parts(
            {
                "policy": policy,
                "critic": networks.critic,
                "target": networks.target,
                "temperature": temperature,
                "multiplier": coefficient,
            },
            movers,
            torch.Generator().manual_seed(config.run.seed),
            reward_scale(inputs.episodes, config.data),
        )
        first = parts.resume(run.checkpoint)
        data = offline_data(config, inputs, policy)
        with Collector(config.environment, policy, steps=1, seed=config.run.seed) as collector:
            run.begin_loop(updates)
            for update in range(first, updates + 1):
                batch, returns, _ = data.draw(config.batch_size, parts.generator)
                with precision(config):
                    metrics = cql.update(
                        networks,
                        temperature,
                        optimizers,
                        batch,
                        config.cql,
                        multiplier=multiplier,
                        returns=returns if config.calibrated else None,
                        generator=parts.generator,
                    )
                record(run, metrics, parts, policy, collector, config, update=update)
        return run.finish()
