"""What the recipes have in common that learn online, off policy, with prior data in every batch.

Prior data is never evicted; one's own transitions lie in a ring. The loop is `practise`; what learns is theirs.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from embodied.evaluate import VALIDATION_SEEDS, score, seeds, summarize
from embodied.learning import continue_environments, episode_metrics
from embodied.logged.off_policy import OpenEpisodes, experienced
from embodied.logged.offline import Inputs, LoggedDataConfig, Parts, learned
from embodied.logged.transitions import OfflineData, mixed, to_transitions
from embodied.policies.state_mlp import StatePolicy
from embodied.rollouts.rollout import Collector, Experience
from envs.stepper import EpisodeRecord
from experiment.checkpoint import Checkpoint, load_checkpoint
from experiment.config import read_tree
from experiment.errors import UserError
from experiment.run import Run, RunResult
from policy_core.metrics import Metrics
from policy_core.replay import Replay
from policy_core.rollout import Transitions

SATURATED = 0.2
"""The share of observed numbers at the normaliser's limit that only other units explain."""


@dataclass(frozen=True)
class PracticeConfig(LoggedDataConfig):
    """init                 run folder of the offline recipe to go on from: policy, critics and what else it learned
    total_steps          environment steps over all environments
    horizon              steps of each environment in a round; log_every and evaluate_every count rounds
    updates_per_step     gradient steps for each environment step
    prior                share of each batch from the data set
    replay_size          own transitions that are kept
    random_steps         environment steps before the first gradient step
    """

    init: str | None = None
    total_steps: int = 300_000
    horizon: int = 32
    updates_per_step: float = 1.0
    prior: float = 0.5
    replay_size: int = 1_000_000
    random_steps: int = 5_000
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

    @property
    def steps(self) -> int:
        """Environment steps of a round."""
        return self.environment.count * self.horizon

    @property
    def rounds(self) -> int:
        """Rounds of the whole run."""
        return 1 if self.run.dry_run else max(1, -(-self.total_steps // self.steps))

    def updates_of(self, number: int) -> int:
        """Gradient steps after round `number`; a dry run does not wait for `random_steps`."""
        if self.run.dry_run:
            return 1
        return max(1, round(self.steps * self.updates_per_step)) if number * self.steps >= self.random_steps else 0


@dataclass
class Memory:
    """The prior data, one's own transitions in the same units, and what their episodes earned."""

    prior: OfflineData
    replay: Replay
    open: OpenEpisodes
    recent: deque[EpisodeRecord] = field(default_factory=lambda: deque(maxlen=100))
    episodes: int = 0

    @classmethod
    def of(cls, config: PracticeConfig, inputs: Inputs, policy: StatePolicy) -> Memory:
        """A memory of prior data alone, in the policy's units."""
        prior = to_transitions(inputs.episodes, policy, inputs.environment, config.data)
        return cls(
            prior=prior,
            replay=Replay(config.replay_size),
            open=OpenEpisodes(config.environment.count, config.data.gamma, worst=prior.worst),
        )

    def add(self, transitions: Transitions, experience: Experience) -> None:
        """Add what was just experienced, as transitions [B * T] in the units of the prior data."""
        shape = experience.rewards.shape
        where = self.replay.add(transitions).view(shape)
        ends = {"terminated": experience.terminated, "truncated": experience.truncated}
        self.open.add(self.replay, where, transitions.rewards.view(shape), **ends)
        self.recent.extend(experience.episodes)
        self.episodes += len(experience.episodes)

    def draw(self, config: PracticeConfig, generator: torch.Generator) -> tuple[Transitions, Tensor]:
        """A batch of both kinds, and its returns."""
        count = round(config.prior * config.batch_size)
        own, own_returns = self.replay.draw(config.batch_size - count, generator)
        if count == 0:
            return own, own_returns
        prior, prior_returns, _ = self.prior.draw(count, generator)
        return mixed(prior, own), torch.cat([prior_returns, own_returns])

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; the prior data stay in their file."""
        return {
            "replay": self.replay.state_dict(),
            "open": self.open.state_dict(),
            "recent": [tuple(record) for record in self.recent],
            "episodes": self.episodes,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.replay.load_state_dict(state["replay"])
        self.open.load_state_dict(state["open"])
        self.recent.extend(EpisodeRecord(*record) for record in state["recent"])
        self.episodes = state["episodes"]


@dataclass
class Practice:
    """Everything that learns or remembers in a run; the policy is one of `parts.modules`."""

    policy: StatePolicy
    parts: Parts
    memory: Memory

    @classmethod
    def begin(
        cls,
        config: PracticeConfig,
        inputs: Inputs,
        policy: StatePolicy,
        parts: Parts,
        checkpoint: Checkpoint | None,
        *,
        offline: str,
    ) -> Practice:
        """Let fresh parts go on from a checkpoint, or from the run that `config.init` names; then make
        the memory, in the units of their policy.

        offline     the recipe whose runs `config.init` may name

        Raises UserError if that run is not one of these, or its sizes or units are others.
        """
        run = None if config.init is None or checkpoint is not None else Path(config.init)
        if run is not None:
            _check_rewards(run, config, _take_over(run, config, policy, parts, offline=offline), parts.scale)
        if checkpoint is not None:  # the data are kept in the units of the policy that the run began with
            parts.load_state_dict(checkpoint.state["learner"]["parts"])
        memory = Memory.of(config, inputs, policy)
        if checkpoint is not None:
            memory.load_state_dict(checkpoint.state["learner"])
        if run is not None:
            _check_observations(run, config, policy, memory)
        return cls(policy, parts, memory)

    def go_on(self, checkpoint: Checkpoint | None, collector: Collector) -> int:
        """Put a checkpoint's environments back; returns the round to begin with."""
        if checkpoint is None:
            return 1
        if not continue_environments(collector.workers, checkpoint.state["environments"]):
            self.memory.open.forget()
        return checkpoint.step + 1

    def remember(self, experience: Experience, config: PracticeConfig) -> None:
        """Add an experience to the memory, in its units."""
        settings = {"gamma": config.data.gamma, "scale": self.parts.scale, "shift": config.data.shift}
        self.memory.add(experienced(experience, self.policy, **settings), experience)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; the policy has a folder of its own there besides."""
        return {"parts": self.parts.state_dict(), **self.memory.state_dict()}


Configuration = TypeVar("Configuration", bound=PracticeConfig)
Build = Callable[[Configuration, Inputs, Checkpoint | None], tuple[Practice, Callable[[int], Metrics]]]


def _take_over(
    run: Path, config: PracticeConfig, policy: StatePolicy, parts: Parts, *, offline: str
) -> float | None:
    """What an offline run learned, its optimizers left alone; returns the scale of its rewards where it says so."""
    if not (run / "config.yaml").is_file():
        raise UserError(f"init: {run} is not a run's folder: give that of a run of {offline}")
    state = load_checkpoint(run / "checkpoints" / "last").state.get("parts", {})
    theirs = read_tree(run / "config.yaml").values
    if theirs.get("recipe") != offline:
        raise UserError(f"init: {run} is a run of {theirs.get('recipe')}: give a run of {offline}")
    try:
        for name, module in parts.modules.items():
            module.load_state_dict(state["modules"][name])
    except RuntimeError as error:
        ours = {"policy": asdict(config.policy), "critic": asdict(config.critic)}
        said = [
            f"{part}.{name}={json.dumps(theirs[part][name], separators=(',', ':'))}"
            for part, fields in ours.items()
            for name, value in fields.items()
            if name in theirs.get(part, {}) and _listed(theirs[part][name]) != _listed(value)
        ]
        reason = f"it has {' '.join(said)}; say so here" if said else " ".join(str(error).split())
        raise UserError(f"init: {run} does not fit policy and critic of this configuration: {reason}") from error
    policy.normalizer.refresh()
    scale: float | None = state.get("scale")
    return scale


def _check_rewards(run: Path, config: PracticeConfig, their_scale: float | None, scale: float) -> None:
    """UserError if the run's values are sums of other rewards than this run's."""
    theirs = read_tree(run / "config.yaml").values.get("data") or {}
    ours = asdict(config.data)
    for name in ("gamma", "rewards", "shift"):
        if theirs.get(name, ours[name]) != ours[name]:
            raise UserError(
                f"init: the values of {run} were learned with data.{name}={theirs[name]}, here it is {ours[name]}: "
                f"say data.{name}={theirs[name]}"
            )
    if their_scale not in (None, scale):
        raise UserError(
            f"init: the values of {run} are of rewards times {their_scale:g}, those of {config.data.path} times "
            f"{scale:g}: both have to be learned from the same episodes, or from data.rewards=raw"
        )


def _check_observations(run: Path, config: PracticeConfig, policy: StatePolicy, memory: Memory) -> None:
    """UserError if the run's policy observed in other units than the data do."""
    limit = policy.normalizer.limit
    seen = memory.prior.transitions.observations
    assert isinstance(seen, Tensor)
    saturated = float((seen.abs() >= limit).float().mean())
    if saturated > SATURATED:
        raise UserError(
            f"init: the policy of {run} was trained in other units: {saturated:.0%} of the numbers observed in "
            f"{config.data.path} lie more than {limit:g} of its standard deviations away"
        )


def _listed(value: Any) -> Any:
    """The same value as YAML gives it, which has no tuples."""
    return list(value) if isinstance(value, tuple) else value


def report(
    run: Run,
    metrics: Metrics,
    practice: Practice,
    collector: Collector,
    config: PracticeConfig,
    *,
    number: int,
    seconds: Mapping[str, float],
) -> None:
    """Where that is due: play the policy's mode, log a round's metrics, and write a checkpoint.

    UserError if what was learned is not finite, after whichever round.
    """
    policy, memory = practice.policy, practice.memory
    logged = learned(metrics, when=f"round {number}")
    judged = number == config.rounds or number % config.evaluate_every == 0
    if not judged and number % config.log_every:
        return
    logged |= episode_metrics(memory.recent, memory.episodes)
    logged |= {f"time/{name}": value for name, value in seconds.items()}
    played: dict[str, float] = {}
    if judged and config.episodes:
        played = summarize(collector.evaluate(policy, seeds(VALIDATION_SEEDS, config.episodes)))
    run.log({**logged, "env_steps": float(number * config.steps), **played}, global_step=number)
    if judged:
        state = {"learner": practice.state_dict(), "environments": collector.workers.state()}
        metric = score(played) if played else float(number)
        run.save(state, global_step=number, folders={"policy": policy.save_pretrained}, metric=metric)


def practise(
    config: Configuration, *, recipe: str, build: Build[Configuration], resume: Path | None = None
) -> RunResult:
    """Collect a round, learn from it, report: until `config.total_steps`, or on from the run folder `resume`.

    build   everything that learns, fresh, from the run that `config.init` names or from a checkpoint; and what
            makes so many gradient steps of it
    """
    inputs = Inputs.read(config)
    if config.init is not None and resume is None:
        build(config, inputs, None)  # what does not fit is told before there is a folder
    with Run.start(config, recipe=recipe, resume=resume) as run:
        practice, improve = build(config, inputs, run.checkpoint)
        policy = practice.policy
        with Collector(config.environment, policy, steps=config.horizon, seed=config.run.seed) as collector:
            first = practice.go_on(run.checkpoint, collector)
            run.begin_loop(config.rounds)
            for number in range(first, config.rounds + 1):
                started = time.perf_counter()
                practice.remember(collector.collect(policy), config)
                collected = time.perf_counter()
                metrics = improve(config.updates_of(number))
                seconds = {"rollout": collected - started, "update": time.perf_counter() - collected}
                report(run, metrics, practice, collector, config, number=number, seconds=seconds)
        return run.finish()
