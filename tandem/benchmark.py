"""`tandem benchmark MODEL --suite NAME --data FILE`: a benchmark on your own copy of its files, with intervals."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from typing import Any

from experiment.errors import UserError, user_errors
from tandem.recipes import suggest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments; each suite uses those that concern it."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a run folder (or its name under runs/), a model's folder, or a hub name")
    add("--suite", required=True, metavar="NAME", help="mmlu, gsm8k, humaneval, ...: docs/language_evaluation.md")
    add("--data", required=True, metavar="FILE", help="the suite's file, as published")
    add("--before", metavar="MODEL", help="measure this model too, and what changed: the alignment tax")
    add("--checkpoint", choices=("last", "best"), default="last", help="which one of a run (last)")
    add("--chat", action="store_true", help="ask through the tokenizer's chat template")
    add("--limit", type=int, metavar="N", help="only the first N items")
    add("--batch-size", type=int, default=16, metavar="N", help="prompts at once (16)")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer in tokens (256)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (0)")
    add("--samples", type=int, default=1, metavar="N", help="answers to a question (1); more need a temperature")
    add("--seed", type=int, default=0, metavar="N", help="of the draws (0)")
    add("--shots", type=int, default=0, metavar="N", help="worked examples before a question (0)")
    add("--shots-from", metavar="FILE", help="where those come from")
    add("--primer", metavar="FILE", help="truthfulqa: text before every question")
    add("--options", choices=("letters", "text"), default="letters", help="mmlu: what is chosen among (letters)")
    add("--reference", metavar="FILE", help="the other side's answers; win_rate: or a model")
    add("--judge", metavar="WHO", help="file.py:function, or a reward model's folder")
    add("--margin", type=float, default=0.0, metavar="X", help="a reward model's scores nearer than this tie (0)")
    add("--rule", action="append", default=[], metavar="FILE.py:NAME", help="red_team: True = broken; repeatable")
    add("--stride", type=int, metavar="N", help="perplexity: tokens a window moves by (half the context)")
    add("--unit", choices=("word", "character"), default="word", help="diversity: what texts are made of (word)")
    add("--allow-code-execution", action="store_true", help="humaneval: run what the model wrote")
    add("--workers", type=int, default=1, metavar="N", help="humaneval: programs at once (1)")
    add("--seconds", type=float, default=10.0, metavar="S", help="humaneval: a program's wall clock (10)")
    add("--out", metavar="FILE.json", help="where the report goes (RUN/benchmarks/SUITE.json, or SUITE.json)")


def benchmark(arguments: argparse.Namespace) -> int:
    """Measure a model, print the table, write the report and, beside it, every item.

    Raises UserError for an unknown suite, a file that cannot be used, or a model that is not there.
    """
    from llm_rlhf.evaluation.results import before_after, write_result
    from llm_rlhf.evaluation.subject import Subject, load_subject
    from llm_rlhf.evaluation.suites import SUITES, prepare
    from tandem.verbs import print_results

    if arguments.suite not in SUITES:
        raise UserError(f"--suite: unknown suite {arguments.suite!r}; {suggest(arguments.suite, SUITES)}")
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {arguments.batch_size}")
    config = _config(arguments)
    measure = prepare(arguments.suite, config)

    def load(name: str) -> Subject:
        return load_subject(
            find_model(name), checkpoint=arguments.checkpoint, chat=arguments.chat, batch_size=arguments.batch_size
        )

    report: dict[str, Any] = {
        "suite": arguments.suite,
        "model": str(find_model(arguments.model)),
        "settings": dataclasses.asdict(config) | {"chat": arguments.chat, "checkpoint": arguments.checkpoint},
    }
    subject = load(arguments.model)
    result = measure(subject)
    notes = [*result.notes, *subject.notes()]
    figures = result.figures()
    report["figures"] = figures
    print_results(figures)
    if arguments.before is not None:
        earlier = load(arguments.before)
        table = before_after(measure(earlier), result)
        report |= {"before": str(find_model(arguments.before)), "change": table}
        print_results(table)
        notes += [f"before: {note}" for note in earlier.notes()]
    report["notes"] = notes
    for note in notes:
        print(f"note: {note}")
    path = _report_path(arguments)
    items = write_result(path, report, result.rows)
    print(f"written to {path}, every item to {items}")
    return 0


def _config(arguments: argparse.Namespace) -> Any:
    """The suite's configuration out of the arguments of the same names."""
    from llm_rlhf.evaluation.suites import SuiteConfig

    given = vars(arguments) | {"rules": tuple(arguments.rule)}
    with user_errors():
        return SuiteConfig(**{field.name: given[field.name] for field in dataclasses.fields(SuiteConfig)})


def find_model(name: str) -> Path | str:
    """A model as the user names it: a path, a run's name under runs/, else what `name` says (a hub name).

    Raises UserError for a name that is neither a path nor looks like a hub name.
    """
    for folder in (Path(name), Path("runs") / name):
        if folder.exists():
            return folder
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith(("runs/", ".")):
        return name
    known = sorted(path.parent.name for path in Path("runs").glob("*/config.yaml"))
    hint = suggest(Path(name).name, known) if known else "there are no runs under runs/ here"
    raise UserError(f"{name}: no such run or model; {hint}")


def _report_path(arguments: argparse.Namespace) -> Path:
    if arguments.out is not None:
        return Path(arguments.out)
    model = find_model(arguments.model)
    if isinstance(model, Path) and (model / "checkpoints").is_dir():
        return model / "benchmarks" / f"{arguments.suite}.json"
    return Path(f"{arguments.suite}.json")
