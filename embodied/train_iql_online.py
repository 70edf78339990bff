"""Implicit Q-learning going on online: half of every batch from the data set, half from one's own replay.

    tandem train configs/embodied/adroit_door_iql_online.yaml data.path=door_human.hdf5 init=runs/door-iql

The losses are those of the offline run (Kostrikov 2021, 2110.06169, sec. 5.3): values never ask for actions that
nobody took, so nothing needs to be warmed up at the switch. The policy explores by its own deviation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from embodied.logged.offline import Inputs, precision
from embodied.logged.practice import Practice, PracticeConfig, practise
from embodied.train_iql import new_parts
from experiment.checkpoint import Checkpoint
from experiment.run import RunResult
from policy_core import iql
from policy_core.critics import ActorCritic
from policy_core.iql import IQLConfig
from policy_core.metrics import Metrics
from policy_core.traced import TracedGradient


@dataclass(frozen=True)
class TrainIQLOnlineConfig(PracticeConfig):
    """init: a run of embodied/iql. learning_rate: of policy, value and critics.

    log_std_bounds   of the policy's deviation, kept at every step
    """

    iql: IQLConfig = field(default_factory=IQLConfig)
    learning_rate: float = 3e-4
    log_std_bounds: tuple[float, float] = (-5.0, 2.0)


def train(config: TrainIQLOnlineConfig, *, resume: Path | None = None) -> RunResult:
    """Train, or go on with the run folder `resume`. Returns the run folder and the last metrics."""
    return practise(config, recipe="embodied/iql_online", build=build, resume=resume)


def build(
    config: TrainIQLOnlineConfig, inputs: Inputs, checkpoint: Checkpoint | None = None
) -> tuple[Practice, Callable[[int], Metrics]]:
    """What learns (fresh, from the run that `config.init` names, or from a checkpoint), and how it does.

    UserError if that run does not fit.
    """
    policy, networks, parts = new_parts(config, inputs, learning_rate=config.learning_rate)
    practice = Practice.begin(config, inputs, policy, parts, checkpoint, offline="embodied/iql")
    return practice, partial(improve, networks, practice, config, iql.traced_gradient(networks))


def improve(
    networks: ActorCritic,
    practice: Practice,
    config: TrainIQLOnlineConfig,
    traced: TracedGradient,
    updates: int,
) -> Metrics:
    """Gradient steps of policy, value and critics; the last one's metrics."""
    metrics: Metrics = {}
    parts = practice.parts
    for _ in range(updates):
        batch, _ = practice.memory.draw(config, parts.generator)
        with precision(config):
            metrics = iql.update(networks, parts.optimizers["all"], batch, config.iql, traced=traced)
        with torch.no_grad():
            practice.policy.log_std.clamp_(*config.log_std_bounds)
    return metrics
