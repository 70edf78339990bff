"""Playing a policy to judge it: success with Wilson intervals, return with a bootstrap interval, videos."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from embodied.policies.numpy_actor import NumpyActor
from embodied.policies.state_mlp import StatePolicy
from embodied.rollouts.rollout import Collector, spaces_of
from embodied.rollouts.workers import EnvironmentConfig, environment_spec
from envs.rendering import render_episode_frames
from envs.stepper import EpisodeRecord
from experiment.checkpoint import Which, find_checkpoint, write_atomically
from experiment.config import build_from_dict, read_tree
from experiment.errors import UserError, user_errors
from experiment.run import Metric
from experiment.statistics import bootstrap_interval, wilson_interval
from experiment.video import write_mp4

VALIDATION_SEEDS = 10_000_000
"""Episodes played during training, to watch it and to choose its best checkpoint, are reset from here on."""
TEST_SEEDS = 20_000_000
"""Episodes that are reported are reset from here on; training's own seeds stay below 10 million."""


@dataclass(frozen=True)
class EvaluateConfig:
    """What `tandem eval RUN` plays.

    checkpoint          "best", "last" or "auto": the best, or the last where the run judged none of its own
    episodes            from consecutive test seeds, disjoint from training's and validation's
    deterministic       the mode of the policy instead of samples
    environment_id      another environment than the run's (the stock version of a wrapped one, say)
    max_episode_steps   another time limit than the run's
    options             arguments of the environment that replace the run's (reward=stock, say)
    videos              episodes to film to RUN/videos
    workers             processes
    """

    checkpoint: Which = "auto"
    episodes: int = 200
    deterministic: bool = True
    environment_id: str | None = None
    max_episode_steps: int | None = None
    options: dict[str, str | bool | int | float] = field(default_factory=dict)
    videos: int = 0
    workers: int = 2

    def __post_init__(self) -> None:
        if self.episodes < 1 or self.videos < 0 or self.workers < 0:
            raise ValueError("episodes must be at least 1, videos and workers not negative")


def seeds(first: int, count: int) -> list[int]:
    """`count` consecutive episode seeds."""
    return list(range(first, first + count))


def summarize(records: Sequence[EpisodeRecord], *, prefix: str = "eval") -> dict[str, float]:
    """Means over episodes with 95% intervals (`_low`, `_high`); success only where the environment reports it.

    Where it reports success of some episodes only, those of which it says nothing have failed.
    """
    returns = np.array([record.episode_return for record in records], dtype=np.float64)
    low, high = bootstrap_interval(returns)
    summary = {
        "episodes": float(len(records)),
        "mean_reward": float(returns.mean()),
        "mean_reward_low": low,
        "mean_reward_high": high,
        "ep_len_mean": float(np.mean([record.length for record in records])),
    }
    for name in ("success_once", "success_at_end"):
        outcomes = [getattr(record, name) for record in records]
        if any(outcome is not None for outcome in outcomes):
            successes = sum(map(bool, outcomes))
            low, high = wilson_interval(successes, len(outcomes))
            summary |= {name: successes / len(outcomes), f"{name}_low": low, f"{name}_high": high}
    return {f"{prefix}/{name}": value for name, value in summary.items()}


def score(summary: Mapping[str, float]) -> Metric:
    """What `best` is chosen by, of figures that `summarize` gave: success where there is one, else the return.

    An environment that reports nothing but successes is known to report them from the first one on: whatever was
    judged by its return before is worse, and whatever has none after it, too.
    """
    if "eval/success_once" in summary:
        return Metric(summary["eval/success_once"], rank=1)
    return Metric(summary["eval/mean_reward"])


def evaluate_policy(
    policy: StatePolicy, environment: EnvironmentConfig, config: EvaluateConfig
) -> dict[str, float]:
    """Play `config.episodes` test episodes. UserError if the policy is not one for this environment."""
    spaces = spaces_of(environment_spec(environment))
    if policy.spaces != spaces:
        raise UserError(f"{environment.id}: the policy was made for {policy.spaces}, the environment has {spaces}")
    workers = min(config.workers, environment.count)
    with Collector(replace(environment, workers=workers), policy, steps=1, seed=0) as collector:
        played = collector.evaluate(policy, seeds(TEST_SEEDS, config.episodes), deterministic=config.deterministic)
    return summarize(played)


def film(policy: StatePolicy, environment: EnvironmentConfig, path: Path, *, seed: int) -> Path:
    """One episode as mp4. UserError where nothing can be drawn."""
    actor = NumpyActor(policy.spaces, policy.config)
    weights = np.zeros(actor.size, np.float32)
    policy.export_actor(weights)
    actor.load(weights)

    def act(observation: np.ndarray) -> np.ndarray:
        chosen: np.ndarray = actor.act(observation[None], None)[0]
        return chosen

    with user_errors("videos"):
        episode = render_episode_frames(
            environment.id,
            act,
            seed=seed,
            max_episode_steps=environment.max_episode_steps,
            options=environment.options,
        )
    return write_mp4(episode.frames, path, fps=episode.fps)


def evaluate_run(run_folder: Path, config: EvaluateConfig) -> dict[str, float]:
    """Evaluate a run's checkpoint, write RUN/eval.json and RUN/videos; returns the figures.

    UserError if the folder is no robot run, or holds no checkpoint yet.
    """
    run_folder = Path(run_folder)
    source = run_folder / "config.yaml"
    described: Mapping[str, Any] = read_tree(source).values.get("environment") or {}
    environment = asked_for(config, build_from_dict(dict(described), EnvironmentConfig, str(source)))
    folder = find_checkpoint(run_folder, config.checkpoint)
    policy = StatePolicy.from_pretrained(folder / "policy")
    figures = evaluate_policy(policy, environment, config)
    write_report(run_folder, folder, environment, config, figures)
    for index in range(config.videos):  # last: where nothing can be drawn, the figures are kept
        film(policy, environment, run_folder / "videos" / f"eval-{index}.mp4", seed=TEST_SEEDS + index)
    return figures


def asked_for(config: EvaluateConfig, trained: EnvironmentConfig) -> EnvironmentConfig:
    """The environment to evaluate in: the one of training, but for what the evaluation changes."""
    return replace(
        trained,
        id=config.environment_id or trained.id,
        max_episode_steps=config.max_episode_steps or trained.max_episode_steps,
        options={**trained.options, **config.options} if config.environment_id is None else config.options,
    )


def require_plain(config: EvaluateConfig, whose: str) -> None:
    """Raise UserError where the evaluation asks for a film or sampled actions, which `whose` policy cannot give."""
    if config.videos:
        raise UserError(f"videos: not of {whose}")
    if not config.deterministic:
        raise UserError(f"deterministic=false: {whose} is played by its best actions")


def write_report(
    run_folder: Path,
    checkpoint: Path,
    environment: EnvironmentConfig,
    config: EvaluateConfig,
    figures: Mapping[str, float],
) -> None:
    """RUN/eval.json: the figures and what they are of."""
    report = {
        "checkpoint": checkpoint.resolve().name,
        "environment": asdict(environment),
        "first_seed": TEST_SEEDS,
        "config": asdict(config),
        "figures": dict(figures),
    }
    write_atomically(run_folder / "eval.json", json.dumps(report, indent=2) + "\n")
