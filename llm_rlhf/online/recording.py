"""A run's updates as they are kept: shown to the monitor, logged, saved as plain transformers folders."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from experiment.errors import UserError
from experiment.run import Run
from llm_rlhf.models.card import with_cards
from llm_rlhf.models.causal import LanguagePolicy
from llm_rlhf.models.generation import Samples
from llm_rlhf.models.lora import merged_writer
from llm_rlhf.models.tokenizer import decode_completions
from llm_rlhf.online.critic import FOLDER
from llm_rlhf.online.experience import Sampler
from llm_rlhf.online.monitor import Monitor, MonitorConfig, Report, Shown, act_on, looks_needed
from llm_rlhf.online.moved import Counters, Moved
from llm_rlhf.rewards.functions import Scores


class Resumable(Protocol):
    """What a run moves, the weights apart: how much it has done, and all that it must remember."""

    counters: Counters

    def state_dict(self) -> dict[str, Any]:
        """What goes into a checkpoint."""
        ...


class Watched(Resumable, Protocol):
    """What is moved under the monitor's eyes."""

    monitor: Monitor


def announce_looks(config: MonitorConfig, *, updates: int, every: int) -> None:
    """Before a run: say which of the monitor's rules it can not judge, because they need more looks than it has.

    updates, every      of the run, and between looks at the validation prompts (0 = none); the last one looks, too

    Raises UserError for a monitor that is to stop a run which never looks.
    """
    if config.enabled and config.stop and every == 0:
        raise UserError(
            "monitor.stop: the monitor looks when a run validates, and validation.every is 0, so it would stop "
            "nothing; set validation.every to the updates between looks, or monitor.stop=false"
        )
    looks = math.ceil(updates / every) if every else 0
    missed = [f"{rule} (needs {needed})" for rule, needed in looks_needed(config).items() if needed > looks]
    if missed:
        print(
            f"monitor: looks in this run (validation.every): {looks}; too few to judge {', '.join(missed)}",
            flush=True,
        )


def conclude(
    run: Run,
    learner: Watched,
    metrics: Mapping[str, float],
    looked: Mapping[str, float],
    *,
    shown: Shown | None,
    global_step: int,
    last: bool,
    log_every: int,
    folders: Mapping[str, Callable[[Path], None]],
) -> None:
    """Show a look to the monitor, log the update, save when that is due.

    shown       what the monitor sees besides; None = it was not looked at the validation prompts

    Other arguments and errors are those of `log_and_save` and `act_on`.
    """
    report = Report([], [], {})
    if shown is not None:
        seen = {**shown.metrics, **metrics, **looked}
        report = learner.monitor.look(
            seen,
            global_step=global_step,
            prompts=shown.prompts,
            completions=shown.completions,
            written=shown.step,
        )
    log_and_save(
        run,
        learner,
        metrics,
        {**looked, **report.metrics},
        global_step=global_step,
        last=last,
        log_every=log_every,
        folders=folders,
    )
    act_on(report, learner.monitor, folder=run.folder)


def log_and_save(
    run: Run,
    learner: Resumable,
    metrics: Mapping[str, float],
    looked: Mapping[str, float],
    *,
    global_step: int,
    last: bool,
    log_every: int,
    folders: Mapping[str, Callable[[Path], None]],
    epoch: int | None = None,
    best: str = "eval/greedy",
) -> None:
    """Log an update where that is due or something was looked at, save where that is due; the last always.

    metrics, looked     of the update, and of what was looked at beside it (validation, a new round), if anything
    folders             the checkpoint's, beside the learner's state
    best                which of `looked` decides which checkpoint is the best one
    """
    if looked or last or global_step % log_every == 0:
        position = {"samples": learner.counters.samples, "tokens": learner.counters.tokens}
        position |= {} if epoch is None else {"epoch": epoch}
        run.log({**metrics, **position, **looked}, global_step=global_step)
    if last or run.should_save(global_step):
        carded = with_cards(run, folders)
        run.save(learner.state_dict(), global_step=global_step, folders=carded, metric=looked.get(best))


def folders_of(learner: Moved, tokenizer: PreTrainedTokenizerBase) -> dict[str, Callable[[Path], None]]:
    """The checkpoint's folders: the policy, and the value model of its own where there is one."""
    folders = writer(learner.policy, tokenizer)
    if learner.critic is not None:
        folders[FOLDER] = learner.critic.save_pretrained
    return folders


def writer(policy: LanguagePolicy, tokenizer: PreTrainedTokenizerBase) -> dict[str, Callable[[Path], None]]:
    """The checkpoint's `policy` folder: a plain transformers model with its tokenizer; and, where an adapter's
    configuration asks for it, the `merged` one."""

    def write(folder: Path) -> None:
        policy.save_pretrained(folder)
        tokenizer.save_pretrained(str(folder))

    return {"policy": write} | merged_writer(policy.model, tokenizer, asked=policy.write_merged)


def log_completions(
    run: Run, sampler: Sampler, samples: Samples, scores: Scores, *, global_step: int, rows: int = 16
) -> None:
    """A table of what the policy writes and what that earns: the first `rows` completions of a rollout."""
    texts = zip(*texts_of(samples, sampler.tokenizer, rows=rows), strict=True)
    named = {name: values[:rows].tolist() for name, values in scores.by_name.items()}
    table = [[prompt, text, *(column[i] for column in named.values())] for i, (prompt, text) in enumerate(texts)]
    run.log_table("completions", ["prompt", "completion", *named], table, global_step=global_step)


def texts_of(
    samples: Samples, tokenizer: PreTrainedTokenizerBase, *, rows: int | None = None
) -> tuple[list[str], list[str]]:
    """Prompts and completions of a rollout as texts; of its first `rows`, or of all."""
    given = samples.attention_mask.bool() & ~samples.mask
    prompts = [ids[real].tolist() for ids, real in zip(samples.input_ids[:rows], given[:rows], strict=True)]
    drawn = samples.completions()[:rows]
    return decode_completions(tokenizer, prompts), decode_completions(tokenizer, drawn)
