"""Supervised fine-tuning on texts with tool calls: what the tools answered is read, not learned."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from experiment.run import Run, RunConfig, RunResult
from llm_rlhf.evaluate_turns import validate_player
from llm_rlhf.models.causal import build_policy
from llm_rlhf.models.generation import GenerationConfig
from llm_rlhf.models.loading import ModelConfig
from llm_rlhf.models.precision import require_precision
from llm_rlhf.online.learner import (
    ValidationConfig,
    announce,
    checkpoint_policy,
    stopping_on_nan,
    validation_prompts,
)
from llm_rlhf.online.recording import log_and_save, writer
from llm_rlhf.tasks.room import require_room
from llm_rlhf.tasks.task import TaskConfig, build_task
from llm_rlhf.train_sft import SupervisedConfig, build_learner, supervised_step
from llm_rlhf.turns.episodes import TurnsConfig
from llm_rlhf.turns.playing import build_player, tokenize_demonstrations

RECIPE = "llm/turns_sft"


@dataclass(frozen=True)
class TrainTurnsSFTConfig:
    """Everything a run is made of. turns: who answers in validation, and which texts are tools' answers;
    generation: of validation's episodes."""

    run: RunConfig = field(default_factory=lambda: RunConfig(name="turns-sft", checkpoint_every=500))
    task: TaskConfig = field(default_factory=lambda: TaskConfig(name="tool_calculator"))
    model: ModelConfig = field(default_factory=lambda: ModelConfig(context=192))
    turns: TurnsConfig = field(default_factory=TurnsConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    sft: SupervisedConfig = field(default_factory=SupervisedConfig)
    validation: ValidationConfig = field(default_factory=lambda: ValidationConfig(every=500))
    log_every: int = 50


def train(config: TrainTurnsSFTConfig, *, resume: Path | None = None) -> RunResult:
    """Train on the task's demonstrations; the run's `policy` folder is a plain transformers model."""
    require_precision(config.sft.precision, setting="sft.precision")
    task = build_task(config.task)
    with Run.start(config, recipe=RECIPE, resume=resume) as run:
        announce(task)
        policy, tokenizer = build_policy(checkpoint_policy(run, config.model), alphabet=task.alphabet)
        player = build_player(
            policy, tokenizer, task, config.turns, rewards={}, max_new_tokens=config.generation.max_new_tokens
        )
        data, notes = tokenize_demonstrations(task.demonstrations, tokenizer, config.turns, context=policy.context)
        for note in notes:
            print(note, flush=True)
        require_room(
            validation_prompts(task, config.validation),
            tokenizer,
            context=policy.context,
            max_new_tokens=1,  # the context is the end of a longer episode
            limited_by="",
            new_model=config.model.path is None,
        )
        learner = build_learner(run, policy, config.sft, texts=len(data), seed=config.run.seed)
        batches, counters = learner.batches, learner.counters
        start = 0 if run.checkpoint is None else run.checkpoint.step
        total = 1 if config.run.dry_run else config.sft.steps
        run.begin_loop(total)
        for step in range(start + 1, total + 1):
            began = time.process_time()
            with stopping_on_nan(run, "sft.learning_rate"):
                losses = supervised_step(
                    policy, learner.optimizer, data, batches, config.sft, step=step, counters=counters
                )
            counters.seconds += time.process_time() - began
            limit = config.sft.max_seconds
            last = step == total or (limit is not None and counters.seconds >= limit)
            due = last or step % max(config.validation.every, 1) == 0
            looked = validate_player(player, task.splits["validation"], config.validation, due=due)
            log_and_save(
                run,
                learner,
                losses,
                looked,
                global_step=step,
                last=last,
                log_every=config.log_every,
                folders=writer(policy, tokenizer),
                epoch=batches.epoch,
            )
            if last:
                break
        return run.finish()
