"""Decision Transformer from logged data: a clone that is told how much it is to earn.

tandem train configs/embodied/half_cheetah_dt.yaml data.path=FILE target_return=6000
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from embodied.datasets.episode import Episode
from embodied.evaluate import VALIDATION_SEEDS, score, seeds, summarize
from embodied.learning import stopping_on_nan
from embodied.logged.demonstrations import EpisodesConfig, read_demonstrations
from embodied.logged.offline import Inputs
from embodied.policies.decision_transformer import Conditioned, DecisionTransformer, DecisionTransformerConfig
from embodied.rollouts.rollout import spaces_of
from embodied.rollouts.workers import EnvironmentConfig, environment_spec
from envs.make import EnvironmentSpec
from envs.stepper import EpisodeRecord, Stepper
from experiment.errors import UserError
from experiment.run import Run, RunConfig, RunResult
from policy_core.bc import bc_loss
from policy_core.optimizer import clipped_step
from policy_core.schedules import scheduled, set_learning_rate


@dataclass(frozen=True)
class TrainDTConfig:
    """A run of the Decision Transformer.

    data            returns to go are undiscounted sums of its raw rewards
    target_return   asked for when it plays (undiscounted); None: the best episode's
    """

    run: RunConfig = field(default_factory=RunConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    data: EpisodesConfig = field(default_factory=EpisodesConfig)
    policy: DecisionTransformerConfig = field(default_factory=DecisionTransformerConfig)
    target_return: float | None = None
    updates: int = 10_000
    batch_size: int = 64
    learning_rate: float = 1e-4
    warmup: float = 0.1
    weight_decay: float = 1e-4
    max_grad_norm: float = 0.25
    log_every: int = 100
    evaluate_every: int = 2_000
    episodes: int = 10

    def __post_init__(self) -> None:
        if min(self.updates, self.batch_size, self.log_every, self.evaluate_every) < 1 or self.episodes < 0:
            raise ValueError(
                "updates, batch_size, log_every, evaluate_every must be positive, episodes not negative"
            )
        if min(self.learning_rate, self.weight_decay) < 0:
            raise ValueError("learning_rate and weight_decay must not be negative")


@dataclass(frozen=True)
class Windows:
    """All steps one after the other, from which windows that end at a step are cut.

    first [N] int: where the step's episode begins.
    """

    observations: Tensor
    actions: Tensor
    returns: Tensor
    first: Tensor

    @classmethod
    def of(cls, episodes: Sequence[Episode], environment: EnvironmentSpec) -> Windows:
        """Of episodes; actions are clipped as the environment clips them."""
        lengths = np.array([len(episode) for episode in episodes])
        begins = np.concatenate([[0], lengths.cumsum()[:-1]])
        to_go = [episode.rewards[::-1].cumsum(dtype=np.float64)[::-1] for episode in episodes]
        actions = np.clip(
            np.concatenate([episode.actions for episode in episodes]),
            environment.action_low,
            environment.action_high,
        )
        return cls(
            torch.from_numpy(np.concatenate([episode.observations for episode in episodes])),
            torch.from_numpy(actions),
            torch.from_numpy(np.concatenate(to_go).astype(np.float32)),
            torch.from_numpy(np.repeat(begins, lengths)),
        )

    def draw(self, size: int, context: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        """Windows [size, context] that end at random steps, padded in front, as the policy takes them."""
        ends = torch.randint(len(self.first), (size,), generator=generator)
        rows = ends.unsqueeze(1) + torch.arange(1 - context, 1)
        present = rows >= self.first[ends].unsqueeze(1)
        rows = torch.where(present, rows, ends.unsqueeze(1))
        observations = {
            "observations": self.observations[rows],
            "returns": self.returns[rows],
            "steps": (rows - self.first[rows]),
            "present": present,
        }
        return observations, self.actions[rows]


def build(config: TrainDTConfig, inputs: Inputs) -> DecisionTransformer:
    """A fresh policy with the data's units. UserError where actions have no bounds."""
    low, high = (
        torch.from_numpy(np.asarray(b)) for b in (inputs.environment.action_low, inputs.environment.action_high)
    )
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise UserError(f"{inputs.environment.env_id}: the decision transformer needs actions with bounds")
    policy = DecisionTransformer(spaces_of(inputs.environment), config.policy)
    for episode in inputs.episodes:
        policy.normalizer.update(torch.from_numpy(episode.observations))
    largest = max(float(np.abs(episode.rewards.sum(dtype=np.float64))) for episode in inputs.episodes)
    policy.return_scale.fill_(max(largest, 1e-6))
    policy.action_reach.copy_((high - low) / 2)
    policy.action_centre.copy_((high + low) / 2)
    return policy


def train(config: TrainDTConfig, *, resume: Path | None = None) -> RunResult:
    """Train, or go on with the run folder `resume`. Returns the run folder and the last metrics."""
    updates = 1 if config.run.dry_run else config.updates
    environment = environment_spec(config.environment)
    inputs = Inputs(environment, read_demonstrations(config.data, environment, need_rewards=True))
    best = max(float(episode.rewards.sum(dtype=np.float64)) for episode in inputs.episodes)
    target = best if config.target_return is None else config.target_return
    with Run.start(config, recipe="embodied/dt", resume=resume) as run:
        policy = build(config, inputs)
        optimizer = torch.optim.AdamW(
            policy.parameters(), config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        generator, first = torch.Generator().manual_seed(config.run.seed), 1
        if run.checkpoint is not None:
            first = run.checkpoint.step + 1
            policy.load_state_dict(run.checkpoint.state["policy"])
            policy.normalizer.refresh()
            optimizer.load_state_dict(run.checkpoint.state["optimizer"])
            generator.set_state(run.checkpoint.state["generator"])
        windows = Windows.of(inputs.episodes, inputs.environment)
        run.begin_loop(updates)
        for update in range(first, updates + 1):
            progress = (update - 1) / updates
            rate = scheduled(config.learning_rate, schedule="constant", progress=progress, warmup=config.warmup)
            set_learning_rate(optimizer, rate)
            observations, actions = windows.draw(config.batch_size, config.policy.context, generator)
            log_probs = policy.train().evaluate(observations, actions).log_probs
            loss, metrics = bc_loss(log_probs=log_probs, mask=observations["present"])
            optimizer.zero_grad()
            loss.backward()
            with stopping_on_nan(update, setting="learning_rate"):
                norm = clipped_step(optimizer, max_grad_norm=config.max_grad_norm, losses=metrics)
            judged = update == updates or update % config.evaluate_every == 0
            if not judged and update % config.log_every:
                continue
            logged = {"train/loss": float(metrics["nll"]), "train/grad_norm": float(norm)}
            played = look(policy, config, target) if judged and config.episodes else {}
            run.log({**logged, "samples": float(update * config.batch_size), **played}, global_step=update)
            if judged:
                state = {
                    "policy": policy.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "generator": generator.get_state(),
                }
                metric = score(played) if played else float(update)
                run.save(state, global_step=update, folders={"policy": policy.save_pretrained}, metric=metric)
        return run.finish()


def look(policy: DecisionTransformer, config: TrainDTConfig, target: float) -> dict[str, float]:
    """Play validation episodes with the target return."""
    played = play(policy.eval(), config.environment, seeds(VALIDATION_SEEDS, config.episodes), target)
    return {**summarize(played), "eval/target_return": target}


def play(
    policy: DecisionTransformer, environment: EnvironmentConfig, chosen: Sequence[int], target: float
) -> list[EpisodeRecord]:
    """One episode from each seed, all side by side, in the order of the seeds."""
    stepper = Stepper(environment.id, list(chosen), environment.max_episode_steps, options=environment.options)
    stepper.reset()
    actor = Conditioned(policy, len(chosen), target)
    records: dict[int, EpisodeRecord] = {}
    while len(records) < len(chosen):
        actions = actor.act(torch.from_numpy(stepper.observations))
        result = stepper.step(actions.numpy())
        actor.observe(
            torch.from_numpy(result.rewards).float(), torch.from_numpy(result.terminated | result.truncated)
        )
        for index, record in result.episodes.items():
            records.setdefault(index, record)
    stepper.close()
    return [records[index] for index in range(len(chosen))]
