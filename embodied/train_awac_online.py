"""Advantage-weighted actor-critic going on online, with prior data in every batch: what it was made for.

    tandem train configs/embodied/half_cheetah_awac_online.yaml data.path=FILE init=runs/half-cheetah-awac

Nair 2020 (2006.09359): the critics judge the policy itself, which imitates what was done, by it and by others, in
proportion to how good it was; so it stays near what it has seen, and goes beyond it as its own episodes do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from embodied.logged.offline import Inputs, precision
from embodied.logged.practice import Practice, PracticeConfig, practise
from embodied.train_awac import new_parts
from experiment.checkpoint import Checkpoint
from experiment.run import RunResult
from policy_core import awac
from policy_core.awac import AWACConfig
from policy_core.critics import ActorCritic
from policy_core.metrics import Metrics


@dataclass(frozen=True)
class TrainAWACOnlineConfig(PracticeConfig):
    """init: a run of embodied/awac. log_std_bounds: of the policy's deviation, kept at every step."""

    awac: AWACConfig = field(default_factory=AWACConfig)
    policy_learning_rate: float = 3e-4
    critic_learning_rate: float = 3e-4
    log_std_bounds: tuple[float, float] = (-5.0, 2.0)


def train(config: TrainAWACOnlineConfig, *, resume: Path | None = None) -> RunResult:
    """Train, or go on with the run folder `resume`. Returns the run folder and the last metrics."""
    return practise(config, recipe="embodied/awac_online", build=build, resume=resume)


def build(
    config: TrainAWACOnlineConfig, inputs: Inputs, checkpoint: Checkpoint | None = None
) -> tuple[Practice, Callable[[int], Metrics]]:
    """What learns (fresh, from the run that `config.init` names, or from a checkpoint), and how it does.

    UserError if that run does not fit.
    """
    rates = (config.policy_learning_rate, config.critic_learning_rate)
    policy, networks, parts = new_parts(config, inputs, rates=rates)
    practice = Practice.begin(config, inputs, policy, parts, checkpoint, offline="embodied/awac")
    return practice, partial(improve, networks, practice, config)


def improve(networks: ActorCritic, practice: Practice, config: TrainAWACOnlineConfig, updates: int) -> Metrics:
    """Gradient steps of critics and policy; the last one's metrics."""
    metrics: Metrics = {}
    parts = practice.parts
    movers = (parts.optimizers["policy"], parts.optimizers["critic"])
    for _ in range(updates):
        batch, _ = practice.memory.draw(config, parts.generator)
        with precision(config):
            metrics = awac.update(networks, *movers, batch, config.awac, generator=parts.generator)
        with torch.no_grad():
            practice.policy.log_std.clamp_(*config.log_std_bounds)
    return metrics
