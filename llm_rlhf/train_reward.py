"""A reward model from comparisons: Bradley-Terry with margins and ties, an ensemble of heads, several objectives.

A checkpoint's `reward_model` folder is a plain transformers folder with the heads beside it; `rewards: {RUN: 1.0}`
in any recipe scores with it. `tandem eval RUN` says how far to trust it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from experiment.device import find_device
from experiment.errors import UserError
from experiment.run import Run, RunConfig, RunResult
from experiment.statistics import wilson_interval
from llm_rlhf.data.pairs import PairData, PairsConfig, read_pairs
from llm_rlhf.data.records import Comparison
from llm_rlhf.data.texts import Batches
from llm_rlhf.models.card import with_cards
from llm_rlhf.models.loading import ModelConfig
from llm_rlhf.models.precision import Precision, require_precision
from llm_rlhf.online.learner import stopping_on_nan
from llm_rlhf.online.moved import Counters, progress_of
from llm_rlhf.rewards.reward_data import RewardData, objectives_of, reward_data
from llm_rlhf.rewards.reward_model import (
    FOLDER,
    RewardModel,
    ScoringConfig,
    build_reward_model,
    combine,
    reward_writer,
)
from llm_rlhf.rewards.trunks import lowest, shorten
from policy_core.calibration import both_ways, fit_temperature
from policy_core.comparisons import bradley_terry_loss, centring_loss, davidson_loss, rao_kupper_loss
from policy_core.optimizer import clipped_step
from policy_core.schedules import Schedule, scheduled

RECIPE = "llm/reward"
LOOK = 64  # texts of a forward pass without gradient


@dataclass(frozen=True)
class RewardConfig:
    """heads           of each objective, on one trunk
    bootstrap       with several heads, each sees its own resampling of the prompts (with replacement)
    freeze_trunk    train the heads alone; the trunk then reads every text only once
    layers          of the trunk that are kept, the lowest; heads read the last of them. null = all
    frozen_layers   of those, the lowest, which stay as they are, and its embeddings with them; 0 = all learn
    pooling         what a head reads of a text: the "last" token, the "mean" over all of them or over the
                    "completion"'s; "auto" = last of a causal trunk, mean of an encoder, or a reward model's own
    precision       of the trunk's forward passes while training; weights stay float32
    ties            of tied comparisons: "drop", or a model of them: "rao_kupper", "davidson"
    tie_strength    where the tie model's parameter begins (log theta, nu); it is learned, one for each objective
    label_smoothing share of labels taken to be wrong; Bradley-Terry only
    margin_coef     times the data's margins, which a score difference must exceed; Bradley-Terry only, 0 = ignore
    centring_coef   of the loss that pulls the scores of a comparison to mean 0
    shift           subtract the mean score of `shift_texts` training texts from what is saved, for each head
    objective       the data's column that names what a comparison is about; every objective has heads of its own
    """

    heads: int = 1
    bootstrap: bool = True
    freeze_trunk: bool = False
    layers: int | None = None
    frozen_layers: int = 0
    pooling: Literal["auto", "last", "mean", "completion"] = "auto"
    precision: Precision = "float32"
    ties: Literal["drop", "rao_kupper", "davidson"] = "drop"
    tie_strength: float = 0.5
    label_smoothing: float = 0.0
    margin_coef: float = 1.0
    centring_coef: float = 0.0
    shift: bool = True
    shift_texts: int = 1000
    objective: str = "objective"

    def __post_init__(self) -> None:
        if self.heads < 1 or self.shift_texts < 1:
            raise ValueError("reward: heads and shift_texts must be at least 1")
        if self.frozen_layers < 0 or (self.layers is not None and self.layers < 1):
            raise ValueError("reward: layers must be at least 1 or null, frozen_layers at least 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"reward.label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        if not (self.tie_strength > 0 and self.margin_coef >= 0 and self.centring_coef >= 0):
            raise ValueError("reward: tie_strength must be positive, margin_coef and centring_coef not negative")
        if self.ties != "drop" and self.label_smoothing:
            raise ValueError("reward.label_smoothing is of Bradley-Terry; leave it 0 with a model of ties")


@dataclass(frozen=True)
class RewardLearningConfig:
    """epochs, steps   passes over the prompts, or updates, which go before
    batch_size      prompts of an update; all comparisons of a prompt go together
    micro_batch_size    prompts per backward pass; None = all at once
    learning_rate   of the trunk
    head_learning_rate  of the heads
    max_seconds     stop after this much CPU time of training (a run that uses it cannot be repeated to the bit)
    """

    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 32
    micro_batch_size: int | None = None
    learning_rate: float = 1e-4
    head_learning_rate: float = 1e-3
    schedule: Schedule = "linear"
    warmup: float = 0.05
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        if min(1 if self.steps is None else self.steps, self.batch_size, self.micro_batch_size or 1) < 1:
            raise ValueError("learning: steps, batch_size and micro_batch_size must be at least 1")
        if not (self.epochs > 0 and self.learning_rate > 0 and self.head_learning_rate > 0):
            raise ValueError("learning: epochs, learning_rate and head_learning_rate must be positive")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be in [0, 1), got {self.warmup}")


@dataclass(frozen=True)
class RewardValidationConfig:
    """every: updates between looks at the validation comparisons (0 = never). The lowest loss is the best."""

    every: int = 50

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError("validation.every must be at least 0")


@dataclass(frozen=True)
class TrainRewardConfig:
    """Everything a reward model's run is made of. scoring: how the saved model's scores become one number."""

    run: RunConfig = field(default_factory=lambda: RunConfig(name="reward", checkpoint_every=500))
    pairs: PairsConfig = field(default_factory=PairsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    learning: RewardLearningConfig = field(default_factory=RewardLearningConfig)
    validation: RewardValidationConfig = field(default_factory=RewardValidationConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    log_every: int = 10

    def __post_init__(self) -> None:
        refuse_adapter(self.model)


def refuse_adapter(model: ModelConfig) -> None:
    """Raises ValueError for model.lora."""
    if model.lora is not None:
        raise ValueError(
            "model.lora: a reward model learns all weights or, with reward.freeze_trunk, its heads alone"
        )


def train(config: TrainRewardConfig, *, resume: Path | None = None) -> RunResult:
    """Learn to score completions from comparisons of them; the best checkpoint has the lowest validation loss."""
    require_precision(config.reward.precision, setting="reward.precision")
    pairs = read_pairs(config.pairs)
    with Run.start(config, recipe=RECIPE, resume=resume) as run:
        learner = build_learner(run, pairs, config)
        settings, counters = config.learning, learner.counters
        start = 0 if run.checkpoint is None else run.checkpoint.step
        steps = settings.steps or math.ceil(settings.epochs * learner.data.prompts / settings.batch_size)
        total = 1 if config.run.dry_run else steps
        run.begin_loop(total)
        for step in range(start + 1, total + 1):
            began = time.process_time()
            with stopping_on_nan(run, "learning.learning_rate"):
                losses = update(learner, config, step=step, total=total)
            counters.seconds += time.process_time() - began
            last = step == total or (settings.max_seconds is not None and counters.seconds >= settings.max_seconds)
            due = config.validation.every > 0 and (last or step % config.validation.every == 0)
            looked = validate(learner, config.reward) if due else {}
            if looked or last or step % config.log_every == 0:
                position = {"samples": counters.samples, "tokens": counters.tokens, "epoch": learner.batches.epoch}
                run.log({**losses, **position, **looked}, global_step=step)
            better = looked.get("eval/loss", math.inf) < learner.best
            if last or better or run.should_save(step):
                learner.best = min(learner.best, looked.get("eval/loss", math.inf))
                shift(learner, config)
                run.save(
                    learner.state_dict(),
                    global_step=step,
                    folders=with_cards(run, reward_writer(learner.model, learner.tokenizer)),
                    metric=-looked["eval/loss"] if looked else None,
                )
            if last:
                break
        return run.finish()


@dataclass
class Learner:
    """What a reward model's run moves; `state_dict` is everything but the weights, which have a folder of their
    own.

    resampled   [K, P] how often each head's bootstrap holds a prompt
    features, held_out_features     [U, D] of the texts where the trunk is frozen, else None
    best        lowest validation loss so far
    """

    model: RewardModel
    tokenizer: PreTrainedTokenizerBase
    data: RewardData
    held_out: RewardData | None
    optimizer: torch.optim.Optimizer
    batches: Batches
    counters: Counters
    resampled: Tensor
    features: Tensor | None = None
    held_out_features: Tensor | None = None
    best: float = math.inf

    def state_dict(self) -> dict[str, Any]:
        """Optimizer, position in the data, counters, the best loss."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.state_dict(),
            "counters": self.counters.state_dict(),
            "best": self.best,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        for name in ("optimizer", "batches", "counters"):
            getattr(self, name).load_state_dict(state[name])
        self.best = float(state["best"])


def build_learner(run: Run, pairs: PairData, config: TrainRewardConfig) -> Learner:
    """A learner at the run's start, or as the checkpoint left it; says what the data is.

    Raises UserError for data, a model or objectives that cannot be used.
    """
    settings, learning = config.reward, config.learning
    objectives = objectives_of(pairs.train, settings.objective)
    source = config.model
    if run.checkpoint is not None:
        source = ModelConfig(path=str(run.checkpoint.folder / FOLDER))
    model, tokenizer = build_reward_model(
        source, alphabet=pairs.alphabet, objectives=objectives, heads=settings.heads
    )
    if run.checkpoint is not None and not model.trained:
        raise UserError(
            f"{run.folder}: the run was saved with other objectives or heads than {', '.join(objectives)} "
            f"x {settings.heads}; the data has changed"
        )
    if settings.layers is not None:
        shorten(model.trunk, settings.layers)
    model.place(find_device(config.model.device, setting="model.device"))
    if settings.pooling != "auto":
        model.pooling = settings.pooling
    model.precision, model.scoring, model.max_prompt = settings.precision, config.scoring, config.pairs.max_prompt
    combine(torch.zeros(1, *model.offset.shape), torch.ones(1), objectives=objectives, config=config.scoring)
    if config.model.gradient_checkpointing:
        model.checkpoint_gradients()
    for note in pairs.notes:
        print(note, flush=True)
    data = _laid_out(model, tokenizer, pairs.train, config, named="training")
    model.trunk.requires_grad_(not settings.freeze_trunk)
    for parameter in lowest(model.trunk, settings.frozen_layers):
        parameter.requires_grad_(False)
    groups: list[dict[str, Any]] = [
        {"params": list(model.heads.parameters())},
        {"params": [model.tie_level], "weight_decay": 0.0},
    ]
    if not settings.freeze_trunk:
        groups.append({"params": [parameter for parameter in model.trunk.parameters() if parameter.requires_grad]})
    generator = torch.Generator().manual_seed(config.run.seed + 1)
    resampled = torch.ones(settings.heads, data.prompts)
    if settings.heads > 1 and settings.bootstrap:
        draws = torch.randint(data.prompts, tuple(resampled.shape), generator=generator)
        resampled = torch.stack([torch.bincount(row, minlength=data.prompts) for row in draws]).float()
    learner = Learner(
        model=model,
        tokenizer=tokenizer,
        data=data,
        held_out=_laid_out(model, tokenizer, pairs.validation, config, named="validation")
        if pairs.validation
        else None,
        optimizer=torch.optim.AdamW(
            groups, lr=learning.head_learning_rate, weight_decay=learning.weight_decay, fused=True
        ),
        batches=Batches(data.prompts, learning.batch_size, seed=config.run.seed),
        counters=Counters(),
        resampled=resampled,
        features=features_of(model, data) if settings.freeze_trunk else None,
    )
    if settings.freeze_trunk and learner.held_out is not None:
        learner.held_out_features = features_of(model, learner.held_out)
    if run.checkpoint is not None:
        learner.load_state_dict(run.checkpoint.state)
    else:
        with torch.no_grad():
            model.tie_level.fill_(math.log(settings.tie_strength))
    return learner


def _laid_out(
    model: RewardModel,
    tokenizer: PreTrainedTokenizerBase,
    comparisons: Sequence[Comparison],
    config: TrainRewardConfig,
    *,
    named: str,
) -> RewardData:
    data, counts = reward_data(
        comparisons,
        tokenizer,
        context=model.context,
        objectives=model.objectives,
        column=config.reward.objective,
        with_ties=config.reward.ties != "drop",
        max_prompt=model.max_prompt,
        named=named,
    )
    left = "".join(f"; {reason}: {count}" for reason, count in counts.items())
    about = f" about {', '.join(model.objectives)}" if len(model.objectives) > 1 else ""
    print(f"{named}: {len(data)} comparisons of {data.prompts} prompts{about}{left}", flush=True)
    return data


@torch.no_grad()
def features_of(model: RewardModel, data: RewardData, texts: Tensor | None = None) -> Tensor:
    """What the heads read of the texts [u] (None = all), those of like length together; no gradient. [u, D]"""
    rows = torch.arange(len(data.input_ids)) if texts is None else texts
    order = data.attention_mask[rows].sum(1).argsort(stable=True)
    features = torch.empty(len(rows), model.width)
    for part in order.split(LOOK):
        features[part] = model.features(*data.texts(rows[part]))
    return features


def comparison_loss(
    model: RewardModel,
    data: RewardData,
    rows: Tensor,
    *,
    chosen: Tensor,
    rejected: Tensor,
    weights: Tensor,
    config: RewardConfig,
) -> Tensor:
    """The loss of the comparisons `rows` [n]; chosen, rejected, weights [n, K] are scores and weights by head."""
    if config.ties == "drop":
        margin = None
        if config.margin_coef > 0:
            margin = config.margin_coef * data.margin[rows].unsqueeze(1).expand_as(chosen)
        loss, _ = bradley_terry_loss(
            chosen=chosen,
            rejected=rejected,
            weights=weights,
            margin=margin,
            label_smoothing=config.label_smoothing,
        )
    else:
        tied = data.tied[rows].unsqueeze(1).expand_as(chosen)
        level = model.tie_level.exp()[data.objective[rows]].unsqueeze(1)
        given = {"chosen": chosen, "rejected": rejected, "tied": tied, "weights": weights}
        if config.ties == "rao_kupper":
            loss, _ = rao_kupper_loss(**given, threshold=level)
        else:
            loss, _ = davidson_loss(**given, nu=level)
    if config.centring_coef > 0:
        centring, _ = centring_loss(chosen=chosen, rejected=rejected, weights=weights, coef=config.centring_coef)
        loss = loss + centring
    return loss


def update(learner: Learner, config: TrainRewardConfig, *, step: int, total: int) -> dict[str, float]:
    """One step on the comparisons of the next batch of prompts; returns metrics under TRL's names.

    Raises NonFiniteLoss before a step that would spoil the weights.
    """
    settings, model, data = config.learning, learner.model, learner.data
    progress = progress_of(step, total, learner.counters, settings.max_seconds)
    factor = scheduled(1.0, schedule=settings.schedule, progress=progress, warmup=settings.warmup)
    rates = (settings.head_learning_rate, settings.head_learning_rate, settings.learning_rate)
    for group, rate in zip(learner.optimizer.param_groups, rates, strict=False):
        group["lr"] = rate * factor
    prompts = learner.batches.next()
    whole = data.of_prompts(prompts)
    groups, untied = float(data.share[whole].sum()), float((data.share * ~data.tied)[whole].sum())
    learner.optimizer.zero_grad(set_to_none=True)
    totals: dict[str, float] = {}
    for part in prompts.split(settings.micro_batch_size or len(prompts)):
        rows = data.of_prompts(part)
        texts, chosen_at, rejected_at = data.texts_of(rows)
        if learner.features is not None:
            scores = model.raw(learner.features[texts])
        else:
            scores = model.raw(model.features(*data.texts(texts)))
        chosen = scores[chosen_at, :, data.objective[rows]]
        rejected = scores[rejected_at, :, data.objective[rows]]
        share = data.share[rows] / groups
        weights = share.unsqueeze(1) * learner.resampled[:, data.prompt[rows]].T / model.ensemble
        loss = comparison_loss(
            model, data, rows, chosen=chosen, rejected=rejected, weights=weights, config=config.reward
        )
        loss.backward()
        _add(
            totals,
            _measured(chosen.detach(), rejected.detach(), share, data.tied[rows], groups / max(untied, 1e-9)),
        )
        totals["loss/reward"] = totals.get("loss/reward", 0.0) + loss.item()
        learner.counters.tokens += int(data.attention_mask[texts].sum())
    grad_norm = clipped_step(learner.optimizer, max_grad_norm=settings.max_grad_norm, losses=totals)
    learner.counters.samples += len(whole)
    return {**totals, "policy/grad_norm": float(grad_norm), "lr": rates[2] * factor, "lr/heads": rates[0] * factor}


def _measured(chosen: Tensor, rejected: Tensor, share: Tensor, tied: Tensor, untied: float) -> dict[str, float]:
    """What the heads' mean says of the comparisons [n, K]; accuracy over those that are not tied."""
    difference = chosen.mean(1) - rejected.mean(1)
    right = share * (difference > 0) * ~tied * untied
    spread = (chosen - rejected).std(1) if chosen.shape[1] > 1 else torch.zeros_like(difference)
    return {
        "rewards/chosen": float((share * chosen.mean(1)).sum()),
        "rewards/rejected": float((share * rejected.mean(1)).sum()),
        "rewards/margins": float((share * difference).sum()),
        "rewards/accuracies": float(right.sum()),
        "rewards/disagreement": float((share * spread).sum()),
    }


def _add(totals: dict[str, float], more: Mapping[str, float]) -> None:
    for name, value in more.items():
        totals[name] = totals.get(name, 0.0) + value


@torch.no_grad()
def validate(learner: Learner, config: RewardConfig) -> dict[str, float]:
    """Loss and accuracy of the heads' mean on the validation comparisons; fits the model's temperature to them."""
    data, model = learner.held_out, learner.model
    if data is None:
        return {}
    known = learner.held_out_features
    scores = model.raw(features_of(model, data) if known is None else known).mean(1, keepdim=True)
    chosen, rejected = (scores[at, :, data.objective] for at in (data.chosen, data.rejected))
    rows = torch.arange(len(data))
    weights = (data.share / data.share.sum()).unsqueeze(1)
    loss = comparison_loss(model, data, rows, chosen=chosen, rejected=rejected, weights=weights, config=config)
    difference = (chosen - rejected).squeeze(1)
    result = {"eval/loss": float(loss), "eval/margin": float((weights.squeeze(1) * difference).sum())}
    decided = ~data.tied
    if decided.any() and torch.isfinite(difference).all():
        model.temperature = fit_temperature(*both_ways(difference[decided]))
        result["eval/temperature"] = model.temperature
    for number, name in enumerate(["", *model.objectives] if len(model.objectives) > 1 else [""]):
        of = decided & (data.objective == number - 1) if name else decided
        count, right = int(of.sum()), int((of & (difference > 0)).sum())
        if count:
            key = f"eval/accuracy/{name}" if name else "eval/accuracy"
            low, high = wilson_interval(right, count)
            result |= {key: right / count, f"{key}_low": low, f"{key}_high": high}
    return result


@torch.no_grad()
def shift(learner: Learner, config: TrainRewardConfig) -> None:
    """Set the offset with which the saved model's scores of training texts have mean 0; training knows none."""
    if not config.reward.shift:
        return
    generator = torch.Generator().manual_seed(config.run.seed + 2)
    texts = torch.randperm(len(learner.data.input_ids), generator=generator)[: config.reward.shift_texts]
    known = learner.features
    features = features_of(learner.model, learner.data, texts) if known is None else known[texts]
    learner.model.offset.copy_(learner.model.raw(features).mean(0))
