"""Off-policy learning online with prior data: half of every batch from the data set, half from one's own replay.

    tandem train configs/embodied/adroit_door_rlpd.yaml data.path=door_human.hdf5
    tandem train configs/embodied/adroit_door_rlpd.yaml data.path=door_human.hdf5 init=runs/door-cal-ql

RLPD (Ball 2023, 2302.02948): soft actor-critic with many normalised critics; prior data is never evicted. With
`conservative` the critics are Cal-QL's, for going on from an offline Cal-QL run without a dip (2303.05479).
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embodied.evaluate import VALIDATION_SEEDS, score, seeds, summarize
from embodied.learning import continue_environments, episode_metrics
from embodied.logged.off_policy import OpenEpisodes, experienced
from embodied.logged.offline import (
    CriticConfig,
    Inputs,
    LoggedDataConfig,
    Parts,
    adam,
    new_networks,
    new_policy,
    precision,
)
from embodied.logged.transitions import OfflineData, mixed, reward_scale, to_transitions
from embodied.policies.state_mlp import StatePolicy
from embodied.rollouts.rollout import Collector, Experience
from envs.stepper import EpisodeRecord
from experiment.checkpoint import load_checkpoint
from experiment.config import read_tree
from experiment.errors import UserError
from experiment.run import Run, RunResult
from policy_core import cql, sac
from policy_core.cql import CQLConfig
from policy_core.critics import ActorCritic
from policy_core.metrics import Metrics
from policy_core.replay import Replay
from policy_core.rollout import Transitions
from policy_core.sac import Coefficient, Optimizers, SACConfig

SATURATED = 0.2
"""The share of observed numbers at the normaliser's limit that only other units explain."""


@dataclass(frozen=True)
class TrainRLPDConfig(LoggedDataConfig):
    """sac                  entropy and slow critics
    conservative         Cal-QL's term in the critics' loss (null: none); `sac` above counts, not its own
    init                 run folder of embodied/cql to go on from: policy, critics and temperature
    total_steps          environment steps over all environments
    horizon              steps of each environment in a round; log_every and evaluate_every count rounds
    updates_per_step     gradient steps for each environment step
    prior                share of each batch from the data set
    replay_size          own transitions that are kept
    random_steps         environment steps before the first gradient step
    """

    critic: CriticConfig = field(default_factory=lambda: CriticConfig(members=10, layer_norm=True))
    sac: SACConfig = field(default_factory=lambda: SACConfig(target_critics=2))
    conservative: CQLConfig | None = None
    init: str | None = None
    total_steps: int = 300_000
    horizon: int = 32
    updates_per_step: float = 1.0
    prior: float = 0.5
    replay_size: int = 1_000_000
    random_steps: int = 5_000
    policy_learning_rate: float = 3e-4
    critic_learning_rate: float = 3e-4
    log_every: int = 10
    evaluate_every: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.prior < 1:
            raise ValueError(f"prior must be in [0, 1), got {self.prior}")
        if self.horizon < 1 or self.updates_per_step <= 0 or self.random_steps < 0:
            raise ValueError("horizon and updates_per_step must be positive, random_steps not negative")
        if self.replay_size < self.environment.count * max(self.horizon, 1_000):
            raise ValueError("replay_size must hold 1,000 steps of every environment at least")
        if self.data.n_steps != 1:
            raise ValueError("data.n_steps: own episodes are learned from step by step; leave it out")


@dataclass
class Learner:
    """Everything that learns or remembers in a run."""

    policy: StatePolicy
    networks: ActorCritic
    temperature: Coefficient
    optimizers: Optimizers
    parts: Parts
    prior: OfflineData
    replay: Replay
    open: OpenEpisodes
    scale: float
    recent: deque[EpisodeRecord] = field(default_factory=lambda: deque(maxlen=100))
    episodes: int = 0

    @classmethod
    def build(cls, config: TrainRLPDConfig, inputs: Inputs, saved: Mapping[str, Any] | None = None) -> Learner:
        """Fresh, from the run that `config.init` names, or from a checkpoint's state. UserError if the run does not
        fit.
        """
        policy = new_policy(config, inputs, "squashed")
        networks = new_networks(config, policy)
        temperature = Coefficient(config.sac.initial_temperature)
        if saved is None and config.init is not None:
            begin_from(Path(config.init), config, policy, networks, temperature)
        if saved is not None:  # the data are kept in the units of the policy that the run began with
            policy.load_state_dict(saved["parts"]["modules"]["policy"])
            policy.normalizer.refresh()
        movers = {
            "policy": adam(policy.parameters(), config.policy_learning_rate),
            "critic": adam(networks.critic.parameters(), config.critic_learning_rate),
            "temperature": adam(temperature.parameters(), config.policy_learning_rate),
        }
        modules = {
            "policy": policy,
            "critic": networks.critic,
            "target": networks.target,
            "temperature": temperature,
        }
        prior = to_transitions(inputs.episodes, policy, inputs.environment, config.data)
        learner = cls(
            policy=policy,
            networks=networks,
            temperature=temperature,
            optimizers=Optimizers(movers["policy"], movers["critic"], movers["temperature"]),
            parts=Parts(modules, movers, torch.Generator().manual_seed(config.run.seed)),
            prior=prior,
            replay=Replay(config.replay_size),
            open=OpenEpisodes(config.environment.count, config.data.gamma, worst=prior.worst),
            scale=reward_scale(inputs.episodes, config.data),
        )
        if saved is not None:
            learner.load_state_dict(saved)
        elif config.init is not None:
            check_units(Path(config.init), config, learner)
        return learner

    def remember(self, experience: Experience, config: TrainRLPDConfig) -> None:
        """Into the replay, in the units of the prior data."""
        settings = {"gamma": config.data.gamma, "scale": self.scale, "shift": config.data.shift}
        transitions = experienced(experience, self.policy, **settings)
        shape = experience.rewards.shape
        where = self.replay.add(transitions).view(shape)
        ends = {"terminated": experience.terminated, "truncated": experience.truncated}
        self.open.add(self.replay, where, transitions.rewards.view(shape), **ends)
        self.recent.extend(experience.episodes)
        self.episodes += len(experience.episodes)

    def draw(self, config: TrainRLPDConfig) -> tuple[Transitions, Tensor]:
        """A batch of both kinds, and its returns."""
        count = round(config.prior * config.batch_size)
        own, own_returns = self.replay.draw(config.batch_size - count, self.parts.generator)
        if count == 0:
            return own, own_returns
        prior, prior_returns, _ = self.prior.draw(count, self.parts.generator)
        return mixed(prior, own), torch.cat([prior_returns, own_returns])

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; the policy has a folder of its own there."""
        return {
            "parts": self.parts.state_dict(),
            "replay": self.replay.state_dict(),
            "open": self.open.state_dict(),
            "recent": [tuple(record) for record in self.recent],
            "episodes": self.episodes,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.parts.load_state_dict(state["parts"])
        self.replay.load_state_dict(state["replay"])
        self.open.load_state_dict(state["open"])
        self.recent.extend(EpisodeRecord(*record) for record in state["recent"])
        self.episodes = state["episodes"]


def begin_from(
    run: Path, config: TrainRLPDConfig, policy: StatePolicy, networks: ActorCritic, temperature: Coefficient
) -> None:
    """Take over what an offline run learned. UserError if the run is not one of embodied/cql or has other sizes."""
    state = load_checkpoint(run / "checkpoints" / "last").state
    modules = state.get("parts", {}).get("modules", {})
    targets = {"policy": policy, "critic": networks.critic, "target": networks.target, "temperature": temperature}
    if missing := targets.keys() - modules.keys():
        raise UserError(f"init: {run} has no {', '.join(sorted(missing))}: give a run of embodied/cql")
    try:
        for name, module in targets.items():
            assert isinstance(module, torch.nn.Module)
            module.load_state_dict(modules[name])
        policy.normalizer.refresh()
    except RuntimeError as error:
        theirs = read_tree(run / "config.yaml").values
        ours = {"policy": asdict(config.policy), "critic": asdict(config.critic)}
        said = [
            f"{part}.{name}={json.dumps(theirs[part][name], separators=(',', ':'))}"
            for part, fields in ours.items()
            for name, value in fields.items()
            if name in theirs.get(part, {}) and _listed(theirs[part][name]) != _listed(value)
        ]
        reason = f"it has {' '.join(said)}; say so here" if said else " ".join(str(error).split())
        raise UserError(f"init: {run} does not fit policy and critic of this configuration: {reason}") from error


def check_units(run: Path, config: TrainRLPDConfig, learner: Learner) -> None:
    """UserError if the run's values or its policy's observations are in other units than this run's."""
    theirs = read_tree(run / "config.yaml").values.get("data") or {}
    ours = asdict(config.data)
    for name in ("gamma", "rewards", "shift"):
        if theirs.get(name, ours[name]) != ours[name]:
            raise UserError(
                f"init: the values of {run} were learned with data.{name}={theirs[name]}, here it is {ours[name]}: "
                f"say data.{name}={theirs[name]}"
            )
    limit = learner.policy.normalizer.limit
    seen = learner.prior.transitions.observations
    assert isinstance(seen, Tensor)
    saturated = float((seen.abs() >= limit).float().mean())
    if saturated > SATURATED:
        raise UserError(
            f"init: the policy of {run} was trained in other units: {saturated:.0%} of the numbers observed in "
            f"{config.data.path} lie more than {limit:g} of its standard deviations away"
        )


def _listed(value: Any) -> Any:
    """YAML has no tuples."""
    return list(value) if isinstance(value, tuple) else value


def train(config: TrainRLPDConfig, *, resume: Path | None = None) -> RunResult:
    """Train, or go on with the run folder `resume`. Returns the run folder and the last metrics."""
    steps = config.environment.count * config.horizon
    rounds = 1 if config.run.dry_run else max(1, -(-config.total_steps // steps))
    inputs = Inputs.read(config)
    if config.init is not None and resume is None:
        Learner.build(config, inputs)  # what does not fit is told before there is a folder
    with Run.start(config, recipe="embodied/rlpd", resume=resume) as run:
        saved = None if run.checkpoint is None else run.checkpoint.state["learner"]
        learner = Learner.build(config, inputs, saved)
        policy = learner.policy
        with Collector(config.environment, policy, steps=config.horizon, seed=config.run.seed) as collector:
            first = 1
            if run.checkpoint is not None:
                first = run.checkpoint.step + 1
                if not continue_environments(collector.workers, run.checkpoint.state["environments"]):
                    learner.open.forget()
            run.begin_loop(rounds)
            for number in range(first, rounds + 1):
                started = time.perf_counter()
                learner.remember(collector.collect(policy), config)
                collected = time.perf_counter()
                metrics = improve(learner, config, steps) if number * steps >= config.random_steps else {}
                finished = time.perf_counter()
                judged = number == rounds or number % config.evaluate_every == 0
                if not judged and number % config.log_every:
                    continue
                logged = {f"train/{name}": float(value) for name, value in metrics.items()}
                logged |= episode_metrics(learner.recent, learner.episodes)
                logged |= {"time/rollout": collected - started, "time/update": finished - collected}
                played: dict[str, float] = {}
                if judged and config.episodes:
                    played = summarize(collector.evaluate(policy, seeds(VALIDATION_SEEDS, config.episodes)))
                run.log({**logged, "env_steps": float(number * steps), **played}, global_step=number)
                if judged:
                    state = {"learner": learner.state_dict(), "environments": collector.workers.state()}
                    metric = score(played) if played else float(number)
                    run.save(state, global_step=number, folders={"policy": policy.save_pretrained}, metric=metric)
        return run.finish()


def improve(learner: Learner, config: TrainRLPDConfig, steps: int) -> Metrics:
    """The gradient steps that belong to `steps` environment steps; the last one's metrics."""
    metrics: Metrics = {}
    common = (learner.networks, learner.temperature, learner.optimizers)
    for _ in range(max(1, round(steps * config.updates_per_step))):
        batch, returns = learner.draw(config)
        with precision(config):
            if config.conservative is None:
                metrics = sac.update(*common, batch, config.sac, generator=learner.parts.generator)
            else:
                calibrated = replace(config.conservative, sac=config.sac)
                metrics = cql.update(*common, batch, calibrated, returns=returns, generator=learner.parts.generator)
    return metrics
