"""Behaviour cloning of recorded demonstrations in a vision-language-action policy.

    tandem train configs/embodied/table_bc.yaml dataset=PATH

Every control step is a decision: from what was seen there, the labels of the next `policy.chunk` steps (fewer at an
episode's end). The hand learns their negative log-likelihood; its deviation stays as configured unless `learn_std`,
so the likelihood is a squared error weighted by 1 / (2 std^2), and PPO starts exploring with that deviation. The
eyes learn where the named things were. A share of the episodes is held out; the weights that explain them best are
the run's `best` checkpoint.

With `grounding.scenes`, every update also teaches the eyes where words point to in simulated scenes that nobody
demonstrated anything in, so that few demonstrations do not make the policy know their scenes by heart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from embodied.control_steps import Chunks, ControlSteps, Shuffled, disturb
from embodied.datasets.lerobot import LeRobotDataset
from embodied.datasets.recorded import RecordedEpisode
from embodied.grounding import GroundingConfig, GroundingScenes
from embodied.perceiving import percept_loss
from embodied.policies.augment import AugmentConfig
from embodied.policies.vla import VLAConfig, VLAPolicy
from embodied.policies.words import Words
from envs.table.language import TRAINING_WORDS
from experiment.errors import UserError
from experiment.run import Run, RunConfig, RunResult
from policy_core.bc import bc_loss
from policy_core.optimizer import FlatAdam
from policy_core.schedules import Schedule, scheduled, set_learning_rate

LOG_EVERY = 50
"""Updates."""


@dataclass(frozen=True)
class TrainVLABCConfig:
    """A run of behaviour cloning from images.

    dataset             folder of a LeRobot data set
    cameras             whose images the policy sees
    successes           use only the episodes that succeeded (those that do not say, too)
    episodes            use only the first so many; None = all
    held_out            share of the episodes kept for validation
    init                folder of a policy to start from; it brings its own `policy`, vocabulary and normalisers
    learn_std           fit the deviation too
    word_dropout        probability with which a word becomes the unknown one
    evaluate_every      updates between validations, each of which keeps a checkpoint
    """

    run: RunConfig = field(default_factory=RunConfig)
    policy: VLAConfig = field(default_factory=VLAConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    grounding: GroundingConfig = field(default_factory=GroundingConfig)
    dataset: str = ""
    cameras: tuple[str, ...] = ("front",)
    successes: bool = True
    episodes: int | None = None
    held_out: float = 0.05
    init: str | None = None
    updates: int = 5_000
    batch_size: int = 128
    learning_rate: float = 2e-3
    schedule: Schedule = "cosine"
    warmup: float = 0.02
    learn_std: bool = False
    word_dropout: float = 0.03
    evaluate_every: int = 500

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1 or not 0 <= self.word_dropout < 1:
            raise ValueError("held_out and word_dropout must be in [0, 1)")
        if min(self.updates, self.batch_size, self.evaluate_every) < 1:
            raise ValueError("updates, batch_size and evaluate_every must be at least 1")


def read(config: TrainVLABCConfig) -> list[RecordedEpisode]:
    """The episodes that the configuration asks for. UserError if there is none or the folder is no data set."""
    if not config.dataset:
        raise UserError("dataset is not set: give the folder of a LeRobot data set, dataset=PATH")
    dataset = LeRobotDataset(Path(config.dataset))
    count = len(dataset) if config.episodes is None else min(config.episodes, len(dataset))
    episodes = [dataset.read(index) for index in range(count)]
    if config.successes:
        episodes = [episode for episode in episodes if episode.success is not False]
    if not episodes:
        raise UserError(f"{config.dataset}: no {'successful ' if config.successes else ''}episodes")
    missing = set(config.cameras) - set(episodes[0].images)
    if missing:
        known = ", ".join(episodes[0].images) or "none"
        raise UserError(f"{config.dataset}: no camera {min(missing)!r}; the cameras are {known}")
    return episodes


def divide(
    episodes: Sequence[RecordedEpisode], config: TrainVLABCConfig
) -> tuple[list[RecordedEpisode], list[RecordedEpisode]]:
    """Training and validation episodes, split with the run's seed; training has one at least."""
    order = torch.randperm(len(episodes), generator=torch.Generator().manual_seed(config.run.seed)).tolist()
    count = min(round(config.held_out * len(episodes)), len(episodes) - 1)
    return [episodes[i] for i in sorted(order[count:])], [episodes[i] for i in sorted(order[:count])]


def loss_of(policy: VLAPolicy, chunks: Chunks) -> tuple[Tensor, dict[str, Tensor]]:
    """The hand's and the eyes' loss, means over decisions; neither has a gradient for the other.

    Metrics: nll (nats per decision), percept_loss (squared, in the state's units).
    """
    percept = policy.perceive(chunks.observations)
    evaluation = policy.evaluate({**chunks.observations, "percept": percept}, chunks.actions)
    imitation, metrics = bc_loss(
        log_probs=evaluation.log_probs.unsqueeze(1),
        mask=chunks.executed[:, :1],
        factor_mask=chunks.executed.unsqueeze(1),
    )
    seeing = percept_loss(percept, chunks.observations["state"])
    return imitation + seeing, {**metrics, "percept_loss": seeing.detach()}


def train(config: TrainVLABCConfig, *, resume: Path | None = None) -> RunResult:
    """Clone, or go on with the run folder `resume`. Returns the run folder and the last metrics."""
    episodes, held_out = divide(read(config), config)
    with Run.start(config, recipe="embodied/vla_bc", resume=resume) as run:
        policy, steps, validation = prepare(config, run, episodes, held_out)
        del episodes, held_out
        policy.log_std.requires_grad_(config.learn_std)
        scenes = ground(policy, config)
        # PPO's customary epsilon of 1e-5 is above most of these gradients: nothing would be found in the images.
        optimizer = FlatAdam(
            [policy.actor_parameters(), policy.perception.parameters()],
            learning_rate=config.learning_rate,
            epsilon=1e-8,
        )
        generator = torch.Generator().manual_seed(config.run.seed)
        change = partial(disturb, config=config.augment, word_dropout=config.word_dropout, generator=generator)
        shuffled = Shuffled(len(steps), config.batch_size, config.run.seed)
        first = 1
        if run.checkpoint is not None:
            first = run.checkpoint.step + 1
            optimizer.load_state_dict(run.checkpoint.state["optimizer"])
            generator.set_state(run.checkpoint.state["generator"])
        updates = 1 if config.run.dry_run else config.updates
        run.begin_loop(updates)
        for update in range(first, updates + 1):
            progress = (update - 1) / updates
            rate = scheduled(
                config.learning_rate, schedule=config.schedule, progress=progress, warmup=config.warmup
            )
            set_learning_rate(optimizer, rate)
            chunks = steps.chunks(shuffled.batch(update - 1), policy.config.chunk)
            chunks = replace(chunks, observations=change(chunks.observations))
            optimizer.zero_grad()
            loss, metrics = loss_of(policy, chunks)
            if scenes is not None:
                grounding = scenes.loss(policy, scenes.batch(update - 1), change)
                loss, metrics = loss + grounding, metrics | {"grounding_loss": grounding.detach()}
            loss.backward()
            optimizer.step()
            last = update == updates
            if last or update % LOG_EVERY == 0:
                logged = {f"train/{name}": float(value) for name, value in metrics.items()}
                logged |= {"train/loss": float(loss.detach()), "train/learning_rate": rate}
                run.log({**logged, "samples": float(update * shuffled.size)}, global_step=update)
            if last or update % config.evaluate_every == 0:
                metric = look(run, policy, validation, scenes, config, global_step=update)
                state = {"optimizer": optimizer.state_dict(), "generator": generator.get_state()}
                run.save(state, global_step=update, folders={"policy": policy.save_pretrained}, metric=metric)
        return run.finish()


def prepare(
    config: TrainVLABCConfig, run: Run, episodes: Sequence[RecordedEpisode], held_out: Sequence[RecordedEpisode]
) -> tuple[VLAPolicy, ControlSteps, ControlSteps | None]:
    """The policy (new, from `init` or from the checkpoint), the training and the validation steps."""
    folder = config.init if run.checkpoint is None else run.checkpoint.folder / "policy"
    start = None if folder is None else VLAPolicy.from_pretrained(folder)
    texts = [episode.instruction for episode in episodes] + [*TRAINING_WORDS] * bool(config.grounding.scenes)
    words = Words.of(texts) if start is None else start.words
    length = config.policy.length if start is None else start.config.length
    steps = ControlSteps.of(episodes, config.cameras, words, length)
    validation = ControlSteps.of(held_out, config.cameras, words, length) if held_out else None
    if start is None:
        policy = VLAPolicy(steps.spaces(), config.policy, words)
        policy.learn_normalization(proprio=steps.proprio, state=steps.state)
        return policy, steps, validation
    if start.spaces != steps.spaces():
        raise UserError(f"{folder}: a policy for {start.spaces}, but the data set has {steps.spaces()}")
    return start, steps, validation


def ground(policy: VLAPolicy, config: TrainVLABCConfig) -> GroundingScenes | None:
    """The scenes that the configuration asks for, the same ones after a resume."""
    if not config.grounding.scenes:
        return None
    return GroundingScenes.collect(
        config.grounding, policy, seed=config.run.seed, source=config.dataset, dry_run=config.run.dry_run
    )


def look(
    run: Run,
    policy: VLAPolicy,
    validation: ControlSteps | None,
    scenes: GroundingScenes | None,
    config: TrainVLABCConfig,
    *,
    global_step: int,
) -> float:
    """Log the loss on held-out episodes and what is found in held-out scenes; returns what `best` is chosen by
    (higher is better)."""
    logged: dict[str, float] = {}
    if validation is not None:
        logged |= validate(policy, validation, config.batch_size)
    if scenes is not None:
        logged |= {f"eval/{name}": value for name, value in scenes.judge(policy).items()}
    if logged:
        run.log(logged, global_step=global_step)
    return -logged["eval/nll"] if validation is not None else float(global_step)


@torch.no_grad()
def validate(policy: VLAPolicy, steps: ControlSteps, batch_size: int) -> dict[str, float]:
    """Means over all steps. eval/percept_error: root mean square, in the state's units (0.1 m at the table)."""
    totals = {"nll": 0.0, "percept_loss": 0.0}
    for rows in torch.arange(len(steps)).split(batch_size):
        for name, value in loss_of(policy, steps.chunks(rows, policy.config.chunk))[1].items():
            totals[name] += float(value) * len(rows) / len(steps)
    return {"eval/nll": totals["nll"], "eval/percept_error": totals["percept_loss"] ** 0.5}
