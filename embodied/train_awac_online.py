"""Advantage-weighted actor-critic going on online, with prior data in every batch: what it was made for.

    tandem train configs/embodied/half_cheetah_awac_online.yaml data.path=FILE init=runs/half-cheetah-awac

Nair 2020 (2006.09359): the critics judge the policy itself, which imitates what was done, by it and by others, in
proportion to how good it was; so it stays near what it has seen, and goes beyond it as its own episodes do.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from embodied.logged.offline import Inputs, Parts, adam, new_networks, new_policy, precision
from embodied.logged.practice import Practice, PracticeConfig, report
from embodied.logged.transitions import reward_scale
from embodied.rollouts.rollout import Collector
from experiment.checkpoint import Checkpoint
from experiment.run import Run, RunResult
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
    inputs = Inputs.read(config)
    if config.init is not None and resume is None:
        build(config, inputs)  # what does not fit is told before there is a folder
    with Run.start(config, recipe="embodied/awac_online", resume=resume) as run:
        networks, practice = build(config, inputs, run.checkpoint)
        policy = practice.policy
        with Collector(config.environment, policy, steps=config.horizon, seed=config.run.seed) as collector:
            first = practice.go_on(run.checkpoint, collector)
            run.begin_loop(config.rounds)
            for number in range(first, config.rounds + 1):
                started = time.perf_counter()
                practice.remember(collector.collect(policy), config)
                collected = time.perf_counter()
                metrics = improve(networks, practice, config, updates=config.updates_of(number))
                seconds = {"rollout": collected - started, "update": time.perf_counter() - collected}
                report(run, metrics, practice, collector, config, number=number, seconds=seconds)
        return run.finish()


def build(
    config: TrainAWACOnlineConfig, inputs: Inputs, checkpoint: Checkpoint | None = None
) -> tuple[ActorCritic, Practice]:
    """Fresh, from the run that `config.init` names, or from a checkpoint. UserError if the run does not fit."""
    policy = new_policy(config, inputs, "bounded")
    networks = new_networks(config, policy)
    movers = {
        "policy": adam(policy.parameters(), config.policy_learning_rate),
        "critic": adam(networks.critic.parameters(), config.critic_learning_rate),
    }
    modules = {"policy": policy, "critic": networks.critic, "target": networks.target}
    scale = reward_scale(inputs.episodes, config.data)
    parts = Parts(modules, movers, torch.Generator().manual_seed(config.run.seed), scale)
    return networks, Practice.begin(config, inputs, policy, parts, checkpoint, offline="embodied/awac")


def improve(networks: ActorCritic, practice: Practice, config: TrainAWACOnlineConfig, *, updates: int) -> Metrics:
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
