"""Behaviour cloning of demonstrations in a state policy.

    tandem train configs/embodied/adroit_door_bc.yaml data.path=door.hdf5

The likelihood of the demonstrated actions is maximised; a share of the episodes is held out, and the weights that
explain them best are the run's `best` checkpoint. The environment is played now and then to see what that is worth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from embodied.datasets.episode import Episode
from embodied.evaluate import VALIDATION_SEEDS, seeds, summarize
from embodied.logged.demonstrations import EpisodesConfig, read_demonstrations, stack_steps
from embodied.policies.numpy_actor import StatePolicyConfig
from embodied.policies.state_mlp import StatePolicy
from embodied.rollouts.rollout import Collector, fresh_policy
from embodied.rollouts.workers import EnvironmentConfig, environment_spec
from envs.make import EnvironmentSpec
from experiment.errors import UserError
from experiment.run import Run, RunConfig, RunResult
from policy_core.bc import bc_loss
from policy_core.optimizer import FlatAdam
from policy_core.schedules import Schedule, scheduled, set_learning_rate


@dataclass(frozen=True)
class TrainBCConfig:
    """A run of behaviour cloning.

    data                the demonstrations; they need no rewards
    held_out            share of their episodes kept for validation
    observation_noise   noise added to each observation, in its standard deviations: a clone that has seen only the
                        demonstrators' own states drifts off them and is lost (Adroit door: 0 to 50% success)
    min_log_std         lower bound of the fitted deviation: a policy without noise cannot be improved by PPO
    episodes            played at each evaluation (0 = none); evaluate_every in updates
    """

    run: RunConfig = field(default_factory=RunConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    policy: StatePolicyConfig = field(default_factory=StatePolicyConfig)
    data: EpisodesConfig = field(default_factory=EpisodesConfig)
    held_out: float = 0.1
    updates: int = 5_000
    batch_size: int = 256
    learning_rate: float = 1e-3
    schedule: Schedule = "cosine"
    observation_noise: float = 0.0
    min_log_std: float = -2.0
    evaluate_every: int = 1_000
    episodes: int = 20

    def __post_init__(self) -> None:
        if min(self.updates, self.batch_size, self.evaluate_every) < 1 or self.episodes < 0:
            raise ValueError("updates, batch_size and evaluate_every must be at least 1, episodes not negative")
        if self.learning_rate < 0:
            raise ValueError(f"learning_rate must not be negative, got {self.learning_rate}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must be in [0, 1), got {self.held_out}")
        if self.policy.head in ("squashed", "values"):
            raise ValueError("policy.head must be 'gaussian' or 'bounded': a clone fits one deviation a dimension")


@dataclass(frozen=True)
class Steps:
    """Demonstrated steps as the policy takes them: observations [N, 1, D], actions [N, 1, A]."""

    observations: Tensor
    actions: Tensor

    @classmethod
    def of(cls, episodes: Sequence[Episode], environment: EnvironmentSpec) -> Steps:
        """All steps of `episodes`."""
        observations, actions = stack_steps(episodes, environment)
        return cls(observations.unsqueeze(1), actions.unsqueeze(1))

    def draw(self, size: int, *, noise: float, generator: torch.Generator) -> Steps:
        """A batch of random steps, their observations moved by `noise` of each dimension's standard deviation."""
        rows = torch.randint(len(self.actions), (size,), generator=generator)
        observations = self.observations[rows]
        if noise:
            spread = self.observations.std(0, keepdim=True)
            observations = observations + noise * spread * torch.randn(observations.shape, generator=generator)
        return Steps(observations, self.actions[rows])

    def nll(self, policy: StatePolicy) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean negative log-likelihood, in nats a step."""
        mask = torch.ones(self.actions.shape[:2], dtype=torch.bool)
        return bc_loss(log_probs=policy.evaluate(self.observations, self.actions).log_probs, mask=mask)


def read(config: TrainBCConfig, environment: EnvironmentSpec) -> tuple[Steps, Steps | None]:
    """Training and validation steps, split by episodes with the run's seed."""
    episodes = read_demonstrations(config.data, environment)
    order = torch.randperm(len(episodes), generator=torch.Generator().manual_seed(config.run.seed)).tolist()
    count = min(round(config.held_out * len(episodes)), len(episodes) - 1)
    held_out, kept = order[:count], sorted(order[count:])
    validation = Steps.of([episodes[i] for i in held_out], environment) if held_out else None
    return Steps.of([episodes[i] for i in kept], environment), validation


def train(config: TrainBCConfig, *, resume: Path | None = None) -> RunResult:
    """Clone, or go on with the run folder `resume`. Returns the run folder and the last metrics."""
    environment = environment_spec(config.environment)
    if environment.discrete:
        raise UserError(f"environment.id: {environment.env_id} has discrete actions, cloning needs continuous ones")
    training, validation = read(config, environment)
    with Run.start(config, recipe="embodied/bc", resume=resume) as run:
        checkpoint = run.checkpoint
        if checkpoint is None:
            policy = fresh_policy(environment, config.policy)
            policy.learn_normalization(training.observations.squeeze(1))
        else:
            policy = StatePolicy.from_pretrained(checkpoint.folder / "policy")
        optimizer = FlatAdam([policy.parameters()], learning_rate=config.learning_rate)
        generator = torch.Generator().manual_seed(config.run.seed)
        first = 1
        if checkpoint is not None:
            first = checkpoint.step + 1
            optimizer.load_state_dict(checkpoint.state["optimizer"])
            generator.set_state(checkpoint.state["generator"])
        updates = 1 if config.run.dry_run else config.updates
        with Collector(config.environment, policy, steps=1, seed=config.run.seed) as collector:
            run.begin_loop(updates)
            for update in range(first, updates + 1):
                rate = scheduled(config.learning_rate, schedule=config.schedule, progress=(update - 1) / updates)
                set_learning_rate(optimizer, rate)
                batch = training.draw(config.batch_size, noise=config.observation_noise, generator=generator)
                optimizer.zero_grad()
                loss, metrics = batch.nll(policy)
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    policy.log_std.clamp_(min=config.min_log_std)
                last = update == updates
                judged = last or update % config.evaluate_every == 0
                if judged or update % 100 == 0:
                    logged = {"train/loss": float(metrics["nll"]), "train/learning_rate": rate}
                    logged["samples"] = float(update * config.batch_size)
                    logged["train/std"] = float(policy.log_std.detach().exp().mean())
                    if judged and math.isfinite(logged["train/loss"]):  # logging stops the run where it is not
                        logged |= judge(policy, collector, validation, config)
                    run.log(logged, global_step=update)
                if judged:
                    metric = -logged["eval/loss"] if validation is not None else float(update)
                    state = {"optimizer": optimizer.state_dict(), "generator": generator.get_state()}
                    run.save(state, global_step=update, folders={"policy": policy.save_pretrained}, metric=metric)
        return run.finish()


def judge(
    policy: StatePolicy, collector: Collector, validation: Steps | None, config: TrainBCConfig
) -> dict[str, float]:
    """The held-out likelihood, where episodes are held out, and what the policy earns."""
    figures: dict[str, float] = {}
    if validation is not None:
        with torch.no_grad():
            figures["eval/loss"] = float(validation.nll(policy)[0])
    if config.episodes:
        figures |= summarize(collector.evaluate(policy, seeds(VALIDATION_SEEDS, config.episodes)))
    return figures
