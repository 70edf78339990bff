"""What the recipes that learn from logged data have in common: settings, parts, reports; their loops are theirs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

import torch
from torch import nn

from embodied.datasets.episode import Episode
from embodied.evaluate import VALIDATION_SEEDS, score, seeds, summarize
from embodied.logged.transitions import (
    DataConfig,
    OfflineData,
    read_offline,
    require_next_observations,
    to_transitions,
)
from embodied.policies.numpy_actor import Head, StatePolicyConfig
from embodied.policies.state_mlp import StatePolicy
from embodied.rollouts.rollout import Collector, fresh_policy
from embodied.rollouts.workers import EnvironmentConfig, environment_spec
from envs.make import EnvironmentSpec
from experiment.checkpoint import Checkpoint
from experiment.errors import UserError
from experiment.run import Run, RunConfig
from policy_core.critics import ActorCritic, EnsembleCritic
from policy_core.metrics import Metrics
from policy_core.optimizer import FlatAdam

ADAM_EPSILON = 1e-8
"""torch's own, which d3rlpy and the papers' code use."""


@dataclass(frozen=True)
class CriticConfig:
    """members: how many; hidden: widths; layer_norm: normalise before each activation."""

    members: int = 2
    hidden: tuple[int, ...] = (256, 256)
    layer_norm: bool = False


@dataclass(frozen=True)
class LoggedDataConfig:
    """What every recipe that learns from logged data takes; each adds its algorithm.

    policy          head is the algorithm's; hidden and activation are free
    log_every       updates between lines of metrics
    evaluate_every  updates between evaluations, with a checkpoint each; `best` is of the evaluations
    episodes        played at each (0 = none: then `best` is the last)
    precision       "bf16": matrix products in bfloat16 (autocast); weights, losses and optimizer stay float32
    """

    run: RunConfig = field(default_factory=RunConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    policy: StatePolicyConfig = field(
        default_factory=lambda: StatePolicyConfig(hidden=(256, 256), activation="relu")
    )
    critic: CriticConfig = field(default_factory=CriticConfig)
    batch_size: int = 256
    log_every: int = 1_000
    evaluate_every: int = 10_000
    episodes: int = 20
    precision: Literal["float32", "bf16"] = "float32"

    def __post_init__(self) -> None:
        for name in ("batch_size", "log_every", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for one in fields(self):
            if one.name.endswith("learning_rate") and getattr(self, one.name) < 0:
                raise ValueError(f"{one.name} must not be negative, got {getattr(self, one.name)}")
        if self.episodes < 0:
            raise ValueError(f"episodes must not be negative, got {self.episodes}")


@dataclass(frozen=True)
class OfflineConfig(LoggedDataConfig):
    """updates: gradient steps."""

    updates: int = 100_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.updates < 1:
            raise ValueError(f"updates must be at least 1, got {self.updates}")


class HasData(Protocol):
    """A configuration that names an environment and data."""

    @property
    def environment(self) -> EnvironmentConfig: ...

    @property
    def data(self) -> DataConfig: ...


@dataclass(frozen=True)
class Inputs:
    """What the configuration names, read before the run has a folder: a mistake in it leaves nothing behind."""

    environment: EnvironmentSpec
    episodes: list[Episode]

    @classmethod
    def read(cls, config: HasData, *, discrete: bool = False) -> Inputs:
        """UserError if something is missing, damaged or made for another environment."""
        environment = environment_spec(config.environment)
        episodes = read_offline(config.data, environment, discrete=discrete)
        require_next_observations(episodes, config.data)
        return cls(environment, episodes)


def new_policy(config: LoggedDataConfig, inputs: Inputs, head: Head) -> StatePolicy:
    """A fresh policy with the data's units. UserError if the configuration asks for another head."""
    if config.policy.head not in ("gaussian", head):
        raise UserError(f"policy.head: {config.policy.head!r} is not what this algorithm learns; leave it out")
    values = {name: getattr(config.policy, name) for name in config.policy.__dataclass_fields__}
    policy = fresh_policy(inputs.environment, StatePolicyConfig(**{**values, "head": head}))
    for episode in inputs.episodes:
        policy.learn_normalization(torch.from_numpy(episode.observations))
    return policy


def new_networks(config: LoggedDataConfig, policy: StatePolicy) -> ActorCritic:
    """The policy with fresh critics and their slow copy."""
    spaces, critic = policy.spaces, config.critic
    sizes = (spaces.observation_size, spaces.action_size, critic.hidden)
    return ActorCritic.of(policy, EnsembleCritic(critic.members, *sizes, layer_norm=critic.layer_norm))


def offline_data(config: LoggedDataConfig, inputs: Inputs, policy: StatePolicy) -> OfflineData:
    """Everything logged, in the policy's units."""
    return to_transitions(inputs.episodes, policy, inputs.environment, config.data)


def adam(parameters: Any, learning_rate: float) -> FlatAdam:
    """Adam over one flat tensor."""
    return FlatAdam([list(parameters)], learning_rate=learning_rate, epsilon=ADAM_EPSILON)


@dataclass
class Parts:
    """Everything of a run that changes, by name; a checkpoint keeps it.

    scale   what rewards were multiplied with: who goes on with the critics has to do the same
    """

    modules: Mapping[str, nn.Module]
    optimizers: Mapping[str, torch.optim.Optimizer]
    generator: torch.Generator
    scale: float

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "generator": self.generator.get_state(),
            "scale": self.scale,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
            if isinstance(module, StatePolicy):
                module.normalizer.refresh()
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.generator.set_state(state["generator"])

    def resume(self, checkpoint: Checkpoint | None) -> int:
        """Continue from a checkpoint where there is one; returns the first update to make."""
        if checkpoint is None:
            return 1
        self.load_state_dict(checkpoint.state["parts"])
        return checkpoint.step + 1


def precision(config: LoggedDataConfig) -> contextlib.AbstractContextManager[Any]:
    """The context in which an update is made. Weights stay float32; casts of them are not kept across a step."""
    if config.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


def learned(metrics: Metrics, *, when: str) -> dict[str, float]:
    """An update's metrics for the log. UserError, which says `when`, if one is not finite: then nothing may be
    played, since the policy's actions are no numbers either.
    """
    logged = {f"train/{name}": float(value) for name, value in metrics.items()}
    for name, value in logged.items():
        if not math.isfinite(value):
            raise UserError(f"{when}: {name} is {value}; lower the learning rates, or look at the data")
    return logged


def record(
    run: Run,
    metrics: Metrics,
    parts: Parts,
    policy: StatePolicy,
    collector: Collector,
    config: OfflineConfig,
    *,
    update: int,
) -> None:
    """Where that is due: play the policy's mode, log an update's metrics, and write a checkpoint."""
    last = update == config.updates or config.run.dry_run
    judged = last or update % config.evaluate_every == 0
    if not judged and update != 1 and update % config.log_every:
        return
    logged = learned(metrics, when=f"update {update}")
    played: dict[str, float] = {}
    if judged and config.episodes:
        played = summarize(collector.evaluate(policy, seeds(VALIDATION_SEEDS, config.episodes)))
    run.log({**logged, "samples": float(update * config.batch_size), **played}, global_step=update)
    if judged:
        metric = score(played) if played else float(update)
        folders = {"policy": policy.save_pretrained}
        run.save({"parts": parts.state_dict()}, global_step=update, folders=folders, metric=metric)
