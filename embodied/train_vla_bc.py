"""Behaviour cloning of recorded demonstrations in a vision-language-action policy.

    tandem train configs/embodied/table_bc.yaml data.path=PATH

First the eyes learn where the named things were and what was asked, then the hand learns what was done: it reads
what the finished eyes say of the recorded pictures. Learning both at once cost a seventh of the successes: the hand
learnt by heart what unfinished eyes said.

To the hand every control step is a decision: from what was seen there, the labels of the next `policy.chunk` steps
(fewer at an episode's end). It learns their negative log-likelihood; its deviation stays as configured unless
`learn_std`, so the likelihood is a squared error weighted by 1 / (2 std^2), and PPO starts exploring with that
deviation. A share of the episodes is held out; the hand that explains them best is the run's `best` checkpoint.

With `advantage.critic`, a run of embodied/iql on the same demonstrations' privileged state, the hand imitates a
step in proportion to exp(advantage): offline reinforcement learning for a policy that needs no such state to act.

With `grounding.scenes`, every update of the eyes also teaches them where words point to in simulated scenes that
nobody demonstrated anything in, so that few demonstrations do not make the policy know their scenes by heart.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from embodied.datasets.lerobot import LeRobotDataset
from embodied.datasets.recorded import RecordedEpisode
from embodied.logged.advantages import AdvantageConfig, step_weights
from embodied.policies.augment import AugmentConfig
from embodied.policies.vla import VLAConfig, VLAPolicy
from embodied.policies.words import Words
from embodied.vla.control_steps import Chunks, ControlSteps, Shuffled, disturb
from embodied.vla.grounding import GroundingConfig, GroundingScenes
from embodied.vla.perceiving import percept_loss
from experiment.checkpoint import Checkpoint
from experiment.device import find_device
from experiment.errors import UserError
from experiment.run import Run, RunConfig, RunResult
from policy_core.bc import bc_loss
from policy_core.optimizer import FlatAdam
from policy_core.schedules import Schedule, scheduled, set_learning_rate

LOG_EVERY = 50
"""Updates between two lines of metrics."""
AT_ONCE = 256
"""Pictures of a forward pass where no gradient is asked for."""


@dataclass(frozen=True)
class PartConfig:
    """How the eyes or the hand learn; updates may be 0. batch_size: control steps of an update."""

    updates: int
    batch_size: int
    learning_rate: float

    def __post_init__(self) -> None:
        if self.updates < 0 or self.batch_size < 1:
            raise ValueError("updates must not be negative, batch_size at least 1")
        if self.learning_rate < 0:
            raise ValueError(f"learning_rate must not be negative, got {self.learning_rate}")


@dataclass(frozen=True)
class PicturesConfig:
    """Which recorded episodes are learned from.

    path        folder of a LeRobot data set
    cameras     whose images the policy sees
    successes   only the episodes that succeeded (those that do not say, too)
    episodes    only the first so many of the data set; None: all
    """

    path: str | None = None
    cameras: tuple[str, ...] = ("front",)
    successes: bool = True
    episodes: int | None = None

    def __post_init__(self) -> None:
        if not self.cameras:
            raise ValueError("cameras must name one at least")
        if self.episodes is not None and self.episodes < 1:
            raise ValueError(f"episodes must be at least 1, got {self.episodes}")


@dataclass(frozen=True)
class TrainVLABCConfig:
    """A run of behaviour cloning from images.

    data                the demonstrations
    held_out            share of their episodes kept for validation
    init                folder of a policy to start from; it brings its own `policy`, vocabulary and normalisers
    eyes, hand          how each learns, one after the other, each on the schedule
    advantage           imitate a step in proportion to how good an IQL run on the privileged state finds it
    learn_std           fit the deviation too
    word_dropout        probability with which a word becomes the unknown one
    evaluate_every      updates between validations, each of which keeps a checkpoint
    device              where the eyes learn: "auto" (a CUDA card if there is one), "cpu", "cuda", "cuda:1"; the
                        hand is small and stays in the processor
    """

    run: RunConfig = field(default_factory=RunConfig)
    policy: VLAConfig = field(default_factory=VLAConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    grounding: GroundingConfig = field(default_factory=GroundingConfig)
    data: PicturesConfig = field(default_factory=PicturesConfig)
    held_out: float = 0.05
    init: str | None = None
    eyes: PartConfig = field(default_factory=lambda: PartConfig(updates=5_000, batch_size=64, learning_rate=2e-3))
    hand: PartConfig = field(default_factory=lambda: PartConfig(updates=2_000, batch_size=256, learning_rate=1e-3))
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    schedule: Schedule = "cosine"
    warmup: float = 0.02
    learn_std: bool = False
    word_dropout: float = 0.03
    evaluate_every: int = 500
    device: str = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1 or not 0 <= self.word_dropout < 1:
            raise ValueError("held_out and word_dropout must be in [0, 1)")
        if self.eyes.updates + self.hand.updates < 1 or self.evaluate_every < 1:
            raise ValueError("eyes.updates or hand.updates, and evaluate_every, must be at least 1")


def read(config: PicturesConfig) -> list[RecordedEpisode]:
    """The episodes that the configuration asks for. UserError if there is none or the folder is no data set."""
    if not config.path:
        raise UserError("data.path is not set: give the folder of a LeRobot data set, data.path=PATH")
    dataset = LeRobotDataset(Path(config.path))
    count = len(dataset) if config.episodes is None else min(config.episodes, len(dataset))
    episodes = [dataset.read(index) for index in range(count)]
    if config.successes:
        episodes = [episode for episode in episodes if episode.success is not False]
    if not episodes:
        raise UserError(f"{config.path}: no {'successful ' if config.successes else ''}episodes")
    missing = set(config.cameras) - set(episodes[0].images)
    if missing:
        known = ", ".join(episodes[0].images) or "none"
        raise UserError(f"{config.path}: no camera {min(missing)!r}; the cameras are {known}")
    print(f"{config.path}: {len(episodes)} of {len(dataset)} episodes", file=sys.stderr, flush=True)
    return episodes


def divide(
    episodes: Sequence[RecordedEpisode], config: TrainVLABCConfig
) -> tuple[list[RecordedEpisode], list[RecordedEpisode]]:
    """Training and validation episodes, split with the run's seed; training has one at least."""
    order = torch.randperm(len(episodes), generator=torch.Generator().manual_seed(config.run.seed)).tolist()
    count = min(round(config.held_out * len(episodes)), len(episodes) - 1)
    return [episodes[i] for i in sorted(order[count:])], [episodes[i] for i in sorted(order[:count])]


@dataclass
class Part:
    """The eyes or the hand while they learn: their updates are those after the first `done` ones of the run.

    loss    (update of this part, from 0) -> loss and metrics
    """

    config: PartConfig
    done: int
    parameters: list[Parameter]
    loss: Callable[[int], tuple[Tensor, dict[str, Tensor]]]

    def __post_init__(self) -> None:
        # PPO's customary epsilon of 1e-5 is above most of these gradients: nothing would be found in the images.
        self.optimizer = FlatAdam([self.parameters], learning_rate=self.config.learning_rate, epsilon=1e-8)

    def step(self, update: int, schedule: Schedule, warmup: float) -> dict[str, Tensor | float]:
        """One update of the run; returns the metrics."""
        index = update - self.done - 1
        progress = index / self.config.updates
        rate = scheduled(self.config.learning_rate, schedule=schedule, progress=progress, warmup=warmup)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.zero_grad()
        loss, metrics = self.loss(index)
        loss.backward()
        self.optimizer.step()
        return {**metrics, "loss": loss.detach(), "learning_rate": rate}


def train(config: TrainVLABCConfig, *, resume: Path | None = None) -> RunResult:
    """Clone, or go on with the run folder `resume`. Returns the run folder and the last metrics."""
    device = find_device(config.device, setting="device")
    episodes, held_out = divide(read(config.data), config)
    if config.run.dry_run:
        config = replace(config, eyes=replace(config.eyes, updates=1), hand=replace(config.hand, updates=1))
    with Run.start(config, recipe="embodied/vla_bc", resume=resume) as run:
        policy, steps, validation = prepare(config, run.checkpoint, episodes, held_out)
        del episodes, held_out
        policy.log_std.requires_grad_(config.learn_std)
        policy.perception.to(device)
        scenes = ground(policy, config)
        generator = torch.Generator().manual_seed(config.run.seed)
        eyes = Part(
            config.eyes,
            0,
            list(policy.perception.parameters()),
            eyes_loss(policy, steps, scenes, config, generator),
        )
        hand = Part(
            config.hand, config.eyes.updates, list(policy.actor_parameters()), hand_loss(policy, steps, config)
        )
        first = 1
        if run.checkpoint is not None:
            first = run.checkpoint.step + 1
            for name, part in (("eyes", eyes), ("hand", hand)):
                part.optimizer.load_state_dict(run.checkpoint.state[name])
            generator.set_state(run.checkpoint.state["generator"])
        updates = config.eyes.updates + config.hand.updates
        run.begin_loop(updates)
        for update in range(first, updates + 1):
            part = eyes if update <= hand.done else hand
            metrics = part.step(update, config.schedule, config.warmup)
            last = update in (hand.done, updates)  # the last one of the eyes or of the hand
            if last or update % LOG_EVERY == 0:
                run.log({f"train/{name}": float(value) for name, value in metrics.items()}, global_step=update)
            if last or update % config.evaluate_every == 0:
                judged = look(run, policy, validation, scenes, global_step=update)
                state = {
                    "eyes": eyes.optimizer.state_dict(),
                    "hand": hand.optimizer.state_dict(),
                    "generator": generator.get_state(),
                }
                folders = {"policy": policy.save_pretrained}
                run.save(state, global_step=update, folders=folders, metric=judged if part is hand else None)
        return run.finish()


def eyes_loss(
    policy: VLAPolicy,
    steps: ControlSteps,
    scenes: GroundingScenes | None,
    config: TrainVLABCConfig,
    generator: torch.Generator,
) -> Callable[[int], tuple[Tensor, dict[str, Tensor]]]:
    """The squared error of what the eyes say of recorded pictures, and of grounding's scenes.

    Metrics: percept_loss and grounding_loss, in the state's units, squared.
    """
    shuffled = Shuffled(len(steps), config.eyes.batch_size, config.run.seed)
    change = partial(disturb, config=config.augment, word_dropout=config.word_dropout, generator=generator)

    def loss(update: int) -> tuple[Tensor, dict[str, Tensor]]:
        seen = change(steps.chunks(shuffled.batch(update), 1).observations)
        recorded = percept_loss(policy.perceive(seen), seen["state"])
        metrics = {"percept_loss": recorded.detach()}
        if scenes is None:
            return recorded, metrics
        grounding = scenes.loss(policy, scenes.batch(update), change)
        return recorded + grounding, {**metrics, "grounding_loss": grounding.detach()}

    return loss


def hand_loss(
    policy: VLAPolicy, steps: ControlSteps, config: TrainVLABCConfig
) -> Callable[[int], tuple[Tensor, dict[str, Tensor]]]:
    """The loss of imitation, from what the eyes say when the hand begins. Metrics: nll (nats per decision)."""
    shuffled = Shuffled(len(steps), config.hand.batch_size, config.run.seed)
    blind = replace(steps, images={})
    percepts: list[Tensor] = []  # of all steps, once the eyes are finished

    def loss(update: int) -> tuple[Tensor, dict[str, Tensor]]:
        if not percepts:
            percepts.append(percepts_of(policy, steps))
        rows = shuffled.batch(update)
        return imitation(policy, blind.chunks(rows, policy.config.chunk), percepts[0][rows])

    return loss


def imitation(policy: VLAPolicy, chunks: Chunks, percepts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The hand's loss on decisions with these percepts [N, n]. Metrics: nll (nats per decision; each step's times
    what it counts)."""
    distribution = policy.distribution({**chunks.observations, "percept": percepts})
    log_probs = distribution.log_prob(chunks.actions).sum(-1)
    if chunks.weights is not None:
        log_probs = chunks.weights * log_probs
    return bc_loss(
        log_probs=log_probs.unsqueeze(1),
        mask=chunks.executed[:, :1],
        factor_mask=chunks.executed.unsqueeze(1),
    )


@torch.no_grad()
def percepts_of(policy: VLAPolicy, steps: ControlSteps) -> Tensor:
    """[N, n] what the eyes say of every step."""
    return torch.cat([policy.perceive(steps.chunks(rows, 1).observations) for rows in _in_order(steps)])


def _in_order(steps: ControlSteps) -> Sequence[Tensor]:
    return torch.arange(len(steps)).split(AT_ONCE)


def prepare(
    config: TrainVLABCConfig,
    checkpoint: Checkpoint | None,
    episodes: Sequence[RecordedEpisode],
    held_out: Sequence[RecordedEpisode],
) -> tuple[VLAPolicy, ControlSteps, ControlSteps | None]:
    """The policy (new, from `init` or from the checkpoint), the training and the validation steps."""
    folder = config.init if checkpoint is None else checkpoint.folder / "policy"
    start = None if folder is None else VLAPolicy.from_pretrained(folder)
    texts = [*(episode.instruction for episode in episodes), *config.grounding.texts()]
    words = Words.of(texts) if start is None else start.words
    length = config.policy.length if start is None else start.config.length
    steps = weighted(ControlSteps.of(episodes, config.data.cameras, words, length), config.advantage)
    validation = None
    if held_out:
        validation = weighted(ControlSteps.of(held_out, config.data.cameras, words, length), config.advantage)
    if start is None:
        policy = VLAPolicy(steps.spaces(), config.policy, words)
        policy.learn_normalization(proprio=steps.proprio, state=steps.state)
        return policy, steps, validation
    if start.spaces != steps.spaces():
        raise UserError(f"{folder}: a policy for {start.spaces}, but the data set has {steps.spaces()}")
    return start, steps, validation


def weighted(steps: ControlSteps, config: AdvantageConfig) -> ControlSteps:
    """The steps with what each counts, where an IQL run says so; prints how unevenly they count."""
    weights = step_weights(config, steps.state, steps.labels)
    if weights is None:
        return steps
    share = float(weights.sum().square() / (len(weights) * weights.square().sum()))
    print(
        f"{config.critic}: {len(weights)} steps count {weights.mean():.3g} in the mean, as if {share:.0%} of them "
        "counted alike and the others nothing",
        file=sys.stderr,
        flush=True,
    )
    return replace(steps, weights=weights)


def ground(policy: VLAPolicy, config: TrainVLABCConfig) -> GroundingScenes | None:
    """The scenes that the configuration asks for, the same ones after a resume."""
    if not config.grounding.scenes:
        return None
    return GroundingScenes.collect(
        config.grounding, policy, seed=config.run.seed, source=config.data.path, dry_run=config.run.dry_run
    )


def look(
    run: Run,
    policy: VLAPolicy,
    validation: ControlSteps | None,
    scenes: GroundingScenes | None,
    *,
    global_step: int,
) -> float:
    """Log the losses on held-out episodes and what is found in held-out scenes; returns what the hand's `best` is
    chosen by (higher is better)."""
    logged: dict[str, float] = {}
    if validation is not None:
        logged |= validate(policy, validation)
    if scenes is not None:
        logged |= {f"eval/{name}": value for name, value in scenes.judge(policy).items()}
    if logged:
        run.log(logged, global_step=global_step)
    return -logged["eval/nll"] if validation is not None else float(global_step)


@torch.no_grad()
def validate(policy: VLAPolicy, steps: ControlSteps) -> dict[str, float]:
    """Means over all steps. eval/percept_error: root mean square, in the state's units (0.1 m at the table)."""
    percepts = percepts_of(policy, steps)
    blind = replace(steps, images={})
    nll = sum(
        float(imitation(policy, blind.chunks(rows, policy.config.chunk), percepts[rows])[0]) * len(rows)
        for rows in _in_order(steps)
    )
    error = float(percept_loss(percepts, steps.state)) ** 0.5
    return {"eval/nll": nll / len(steps), "eval/percept_error": error}
