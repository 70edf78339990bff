"""Conservative Q-learning from logged choices; the policy's scores of the choices are their values.

tandem train configs/embodied/cart_pole_cql.yaml data.path=DATASET
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from embodied.logged.offline import (
    CriticConfig,
    Inputs,
    OfflineConfig,
    Parts,
    adam,
    new_policy,
    offline_data,
    precision,
    record,
)
from embodied.logged.transitions import reward_scale
from embodied.policies.state_mlp import StatePolicy
from embodied.rollouts.rollout import Collector
from experiment.run import Run, RunResult
from policy_core import discrete_cql
from policy_core.discrete_cql import ActionValues, DiscreteCQLConfig
from policy_core.distributions import Categorical


@dataclass(frozen=True)
class TrainDiscreteCQLConfig(OfflineConfig):
    """The critic is the policy: `policy.hidden` are its widths, and there is no section `critic`."""

    cql: DiscreteCQLConfig = field(default_factory=DiscreteCQLConfig)
    learning_rate: float = 3e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.critic != CriticConfig():
            raise ValueError("critic: the policy is the critic here; set policy.hidden instead")


def train(config: TrainDiscreteCQLConfig, *, resume: Path | None = None) -> RunResult:
    """Train, or go on with the run folder `resume`. Returns the run folder and the last metrics."""
    updates = 1 if config.run.dry_run else config.updates
    inputs = Inputs.read(config, discrete=True)
    with Run.start(config, recipe="embodied/discrete_cql", resume=resume) as run:
        policy = new_policy(config, inputs, "values")
        target = copy.deepcopy(policy).requires_grad_(False)
        optimizer = adam(policy.actor_parameters(), config.learning_rate)
        modules = {"policy": policy, "target": target}
        scale = reward_scale(inputs.episodes, config.data)
        parts = Parts(modules, {"all": optimizer}, torch.Generator().manual_seed(config.run.seed), scale)
        first = parts.resume(run.checkpoint)
        data = offline_data(config, inputs, policy)
        with Collector(config.environment, policy, steps=1, seed=config.run.seed) as collector:
            run.begin_loop(updates)
            for update in range(first, updates + 1):
                batch, _, _ = data.draw(config.batch_size, parts.generator)
                with precision(config):
                    metrics = discrete_cql.update(policy, target, values_of, optimizer, batch, config.cql)
                record(run, metrics, parts, policy, collector, config, update=update)
        return run.finish()


def values_of(policy: nn.Module) -> ActionValues:
    """Normalised observations [N, D] -> values [N, K]: what the policy's choices are scored by."""
    assert isinstance(policy, StatePolicy)

    def values(features: torch.Tensor) -> torch.Tensor:
        distribution = policy.distribution_of(features)
        assert isinstance(distribution, Categorical)
        return distribution.logits

    return values
