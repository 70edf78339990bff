"""TD3+BC from logged data; with a critic penalty, ReBRAC.

tandem train configs/embodied/half_cheetah_td3_bc.yaml data.path=FILE
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

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
from policy_core import td3_bc
from policy_core.td3_bc import TD3BCConfig, TD3Networks


@dataclass(frozen=True)
class TrainTD3BCConfig(OfflineConfig):
    """exploration: the saved policy's deviation, for whoever goes on from it online; learning needs none."""

    td3_bc: TD3BCConfig = field(default_factory=TD3BCConfig)
    policy_learning_rate: float = 3e-4
    critic_learning_rate: float = 3e-4
    exploration: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exploration <= 0:
            raise ValueError(f"exploration must be positive, got {self.exploration}")


def train(config: TrainTD3BCConfig, *, resume: Path | None = None) -> RunResult:
    """Train, or go on with the run folder `resume`. Returns the run folder and the last metrics."""
    updates = 1 if config.run.dry_run else config.updates
    inputs = Inputs.read(config)
    with Run.start(config, recipe="embodied/td3_bc", resume=resume) as run:
        policy = new_policy(config, inputs, "bounded")
        nn.init.constant_(policy.log_std, math.log(config.exploration))
        networks = TD3Networks.copying(new_networks(config, policy))
        of_policy = adam(policy.parameters(), config.policy_learning_rate)
        of_critic = adam(networks.critic.parameters(), config.critic_learning_rate)
        assert isinstance(networks.target_policy, nn.Module)
        parts = Parts(
            {
                "policy": policy,
                "critic": networks.critic,
                "target": networks.target,
                "target_policy": networks.target_policy,
            },
            {"policy": of_policy, "critic": of_critic},
            torch.Generator().manual_seed(config.run.seed),
            reward_scale(inputs.episodes, config.data),
        )
        first = parts.resume(run.checkpoint)
        data = offline_data(config, inputs, policy)
        with Collector(config.environment, policy, steps=1, seed=config.run.seed) as collector:
            run.begin_loop(updates)
            for update in range(first, updates + 1):
                batch, _, next_actions = data.draw(config.batch_size, parts.generator)
                with precision(config):
                    metrics = td3_bc.update(
                        networks,
                        of_policy,
                        of_critic,
                        batch,
                        config.td3_bc,
                        number=update,
                        next_actions=next_actions,
                        generator=parts.generator,
                    )
                record(run, metrics, parts, policy, collector, config, update=update)
        return run.finish()
