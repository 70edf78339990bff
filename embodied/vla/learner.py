"""What the recipes that fine-tune a vision-language-action policy by its own episodes have in common."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embodied.evaluate import VALIDATION_SEEDS, summarize
from embodied.learning import continue_environments, episode_metrics
from embodied.policies.vla import VLAPolicy, image_key
from embodied.vla.chunk_rollout import ChunkCollector, ChunkExperience, log_probs_of
from embodied.vla.grounding import GroundingScenes
from embodied.vla.judge import check_policy, unknown_words
from embodied.vla.perceiving import PerceptionConfig, fit_perception
from embodied.vla.seats import Play, TableConfig, TableEpisode, make_table
from envs.stepper import EpisodeRecord
from experiment.checkpoint import Checkpoint
from experiment.device import find_device
from experiment.errors import UserError, user_errors
from experiment.run import Run
from policy_core.kl import KLConfig, KLController
from policy_core.schedules import set_learning_rate

CLONE = "clone"
"""Folder of a checkpoint: what the run started from, so that it can go on without the run that made it."""
LARGEST_GAP = 0.01
"""Nats by which a log-probability may differ between a worker and the update."""


@dataclass(frozen=True)
class TableEvaluationConfig:
    """every: updates between evaluations (0 = none); episodes: of each, with the policy's mode, dealt evenly among
    the tasks."""

    every: int = 0
    episodes: int = 100

    def __post_init__(self) -> None:
        if self.every < 0 or self.episodes < 1:
            raise ValueError("evaluation: every must not be negative, episodes at least 1")


@dataclass
class VLALearner:
    """Everything that learns or remembers in a run; its state is what a checkpoint keeps.

    clone       what it started from, which never changes; `reference` is the same where a KL term asks for it
    unread      words of instructions that the policy does not know and that the user was told of
    """

    policy: VLAPolicy
    clone: VLAPolicy
    reference: VLAPolicy | None
    optimizer: torch.optim.Optimizer
    eyes: torch.optim.Optimizer | None
    scenes: GroundingScenes | None
    controller: KLController
    generator: torch.Generator
    recent: deque[TableEpisode] = field(default_factory=lambda: deque(maxlen=200))
    episodes: int = 0
    control_steps: int = 0
    unread: set[str] = field(default_factory=set)

    @classmethod
    def build(
        cls,
        clone: VLAPolicy,
        checkpoint: Checkpoint | None,
        *,
        log_std: float | None,
        learn_std: bool,
        critic: bool,
        perception: PerceptionConfig,
        kl: KLConfig,
        seed: int,
        dry_run: bool = False,
    ) -> VLALearner:
        """From a clone, which becomes the KL's reference, with the policy of a checkpoint where there is one.

        log_std     of both at the start; None keeps the clone's
        critic      whether one is trained
        perception  how the eyes learn; they have an optimizer of their own
        dry_run     draw few scenes for them

        The optimizer's groups: what acts, and the critic if there is one.
        """
        if log_std is not None:
            torch.nn.init.constant_(clone.log_std, log_std)
        if checkpoint is None:
            policy = copy.deepcopy(clone)
        else:
            policy = VLAPolicy.from_pretrained(checkpoint.folder / "policy")
        policy.log_std.requires_grad_(learn_std)
        groups = [[p for p in policy.actor_parameters() if p.requires_grad]]
        if critic:
            groups.append(list(policy.critic_parameters()))
        eyes, scenes = None, None
        if perception.learning_rate:
            policy.perception.to(find_device(perception.device, setting="perception.device"))
            eyes = torch.optim.Adam(policy.perception.parameters(), lr=perception.learning_rate, fused=True)
            if perception.grounding.scenes:
                scenes = GroundingScenes.collect(
                    perception.grounding, policy, seed=seed, source="init", dry_run=dry_run
                )
        clone.requires_grad_(False)
        return cls(
            policy=policy,
            clone=clone,
            reference=clone if kl.coef > 0 else None,
            optimizer=torch.optim.Adam([{"params": group} for group in groups], fused=True),
            eyes=eyes,
            scenes=scenes,
            controller=KLController(kl),
            generator=torch.Generator().manual_seed(seed),
        )

    def remember(self, experience: ChunkExperience) -> dict[str, float]:
        """Count what was played; returns how the latest episodes went, over all and by task."""
        self.recent.extend(experience.episodes)
        self.episodes += len(experience.episodes)
        self.control_steps += experience.control_steps
        unread = set(unknown_words(self.policy, [episode.instruction for episode in experience.episodes]))
        if unread - self.unread:
            words = ", ".join(map(repr, sorted(unread - self.unread)))
            print(f"the policy never met {words}: it reads unknown words alike", file=sys.stderr, flush=True)
            self.unread |= unread
        metrics = episode_metrics([episode.record for episode in self.recent], self.episodes)
        return metrics | success_by_task(self.recent, "env") | {"env_steps": float(self.control_steps)}

    def look(self, experience: ChunkExperience, config: PerceptionConfig, *, rate: float) -> dict[str, float]:
        """Teach the eyes what was to be seen while playing, where they learn; returns their errors."""
        if self.eyes is None:
            return {}
        set_learning_rate(self.eyes, rate)
        return fit_perception(self.policy, self.eyes, experience, self.scenes, config, self.generator)

    def steer(
        self, kl_metrics: Mapping[str, float], experience: ChunkExperience, *, train_policy: bool = True
    ) -> dict[str, float]:
        """Feed the KL that `charge_kl` measured to the controller, where the policy learned; returns it, and the
        deviation of the actions."""
        if kl_metrics and train_policy:
            self.controller.update(kl_metrics["objective/kl"], episodes=max(1, len(experience.episodes)))
        return {**kl_metrics, "train/std": float(self.policy.bounded_log_std().detach().exp().mean())}

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; the policy has a folder of its own there."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "eyes": None if self.eyes is None else self.eyes.state_dict(),
            "controller": self.controller.state_dict(),
            "generator": self.generator.get_state(),
            "recent": [[tuple(episode.record), *episode[1:]] for episode in self.recent],
            "episodes": self.episodes,
            "control_steps": self.control_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.eyes is not None and state["eyes"] is not None:  # they may learn from now on
            self.eyes.load_state_dict(state["eyes"])
        self.controller.load_state_dict(state["controller"])
        self.generator.set_state(state["generator"])
        self.recent.extend(TableEpisode(EpisodeRecord(*record), *rest) for record, *rest in state["recent"])
        self.episodes, self.control_steps = state["episodes"], state["control_steps"]


def read_clone(
    init: str | None, environment: TableConfig, log_std: float | None, *, resume: Path | None
) -> VLAPolicy:
    """The policy to start from, or that the run folder `resume` has started from.

    UserError if there is none, it was made for another table, or the table cannot be played at: told before a run
    has a folder.
    """
    kept = None if resume is None else resume / "checkpoints" / "last" / CLONE
    source = str(kept) if kept is not None and kept.is_dir() else init
    if source is None:
        raise UserError("there is no policy to start from: give init=CLONE_RUN/checkpoints/best/policy")
    clone = VLAPolicy.from_pretrained(source)
    check_policy(clone, f"init: {source}")
    with contextlib.closing(make_table(environment, clone.spaces.image_size)) as table, user_errors("environment"):
        table.reset(seed=0)
        table.observe(tuple(map(image_key, clone.spaces.cameras)))
    limits = clone.config
    if log_std is not None and not limits.min_log_std <= log_std <= limits.max_log_std:
        raise UserError(f"log_std {log_std} is outside the policy's {limits.min_log_std}..{limits.max_log_std}")
    return clone


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Within it torch computes with `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def settle_log_probs(
    experience: ChunkExperience, policy: VLAPolicy, *, recompute: bool, check: bool
) -> tuple[ChunkExperience, dict[str, float]]:
    """The experience with the log-probs that the update starts from; and train/rollout_logprob_gap where known.

    recompute   take this process's, at the cost of a forward pass, instead of the workers'
    check       compare them. UserError if they differ so much that the first ratios would not be 1
    """
    if not recompute and not check:
        return experience, {}
    own = log_probs_of(policy, experience)
    gap = float((own - experience.log_probs)[experience.executed > 0].abs().max())
    if gap > LARGEST_GAP and not recompute:
        raise UserError(
            f"on this machine the workers' log-probs differ from the update's by up to {gap:.2g} nats (another size"
            " of batch, another kernel): set recompute_log_probs=true"
        )
    settled = replace(experience, log_probs=own) if recompute else experience
    return settled, {"train/rollout_logprob_gap": gap}


def success_by_task(episodes: Sequence[TableEpisode], prefix: str) -> dict[str, float]:
    """PREFIX/success_once/TASK of every task that was played."""
    by_task: dict[str, list[bool]] = {}
    for episode in episodes:
        by_task.setdefault(episode.task, []).append(bool(episode.record.success_once))
    return {f"{prefix}/success_once/{task}": float(np.mean(won)) for task, won in sorted(by_task.items())}


def validation_plays(tasks: Sequence[str], episodes: int) -> list[Play]:
    """The episodes that are played during training, the same at every evaluation; the tasks take turns, also those
    that training plays more often."""
    tasks = tuple(dict.fromkeys(tasks))
    return [(VALIDATION_SEEDS + index, {"task": tasks[index % len(tasks)]}) for index in range(episodes)]


def timing(started: float, collected: float, finished: float, control_steps: int) -> dict[str, float]:
    """Seconds of collecting and updating, collecting's share, and control steps a second."""
    total = finished - started
    return {
        "time/rollout": collected - started,
        "time/update": finished - collected,
        "time/rollout_share": (collected - started) / total,
        "time/fps": control_steps / total,
    }


def begin(run: Run, learner: VLALearner, collector: ChunkCollector, updates: int) -> int:
    """Continue from the run's checkpoint, or keep a first one; returns the update to go on with."""
    checkpoint = run.checkpoint
    if checkpoint is not None:
        learner.load_state_dict(checkpoint.state["learner"])
        continue_environments(collector.workers, checkpoint.state["environments"])
    run.begin_loop(updates)
    if checkpoint is not None:
        return checkpoint.step + 1
    save(run, learner, collector, global_step=0)
    return 1


def record(
    run: Run,
    learner: VLALearner,
    collector: ChunkCollector,
    metrics: dict[str, float],
    *,
    tasks: Sequence[str],
    evaluation: TableEvaluationConfig,
    update: int,
    last: bool,
) -> None:
    """Evaluate where it is due, log, and keep a checkpoint where it is due."""
    metric = None
    if evaluation.every and update % evaluation.every == 0:
        played = collector.evaluate(learner.policy, validation_plays(tasks, evaluation.episodes))
        metrics = metrics | summarize([episode.record for episode in played]) | success_by_task(played, "eval")
        metric = metrics["eval/success_once"]
    run.log(metrics, global_step=update)
    if metric is not None or run.should_save(update) or last:
        save(run, learner, collector, global_step=update, metric=metric)


def save(
    run: Run,
    learner: VLALearner,
    collector: ChunkCollector,
    *,
    global_step: int,
    metric: float | None = None,
) -> None:
    """A checkpoint: the policy and the clone that it was, as folders that load by themselves; the rest as state."""
    state = {"learner": learner.state_dict(), "environments": collector.workers.state()}
    folders = {"policy": learner.policy.save_pretrained, CLONE: learner.clone.save_pretrained}
    run.save(state, global_step=global_step, folders=folders, metric=metric)
