"""Judging a policy that follows instructions: combinations and words it never met, another look, swapped words.

    tandem eval RUN episodes=200 suites=[normal,held_out,synonyms,swapped] videos=2

Initial state i of task t is reset(episode_seed(TEST_SEEDS + i, 0), {"task": t}), the same for every policy, so that
two policies can be compared state by state. State i of one task and state i of another come from the same seed and
resemble each other, so the interval over all tasks is a little too narrow; those of single tasks are not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from embodied.evaluate import TEST_SEEDS
from embodied.policies.vla import VLAPolicy
from embodied.vla.judge import Judge, check_policy, unknown_words
from embodied.vla.report import describe, suite_figures
from embodied.vla.seats import Play, TableConfig, make_table
from embodied.vla.video import Film, Studio, contact_sheet, write_film
from envs.table.language import TASKS
from experiment.checkpoint import Which, find_checkpoint, write_atomically
from experiment.config import read_tree

Suite = Literal["normal", "held_out", "synonyms", "randomized", "swapped"]
SUITES: tuple[Suite, ...] = get_args(Suite)


@dataclass(frozen=True)
class EvaluateVLAConfig:
    """What `tandem eval RUN` plays.

    checkpoint          "best", "last" or "auto": the best, or the last where the run judged none of its own
    episodes            of each task, in each suite
    suites              normal: combinations and phrasings of training; held_out: combinations that training never
                        asks for; synonyms: words that it never uses; randomized: another look and other physics;
                        swapped: the scenes of normal, but the words name another object
    tasks               None: those of the run, all five where it does not say
    phrasing            of all suites but synonyms: "train", "synonyms", or your own sentences, FILE.py:FUNCTION.
                        None: the run's, "train" where it does not say
    randomization       the preset of suite "randomized", or a FILE.yaml
    deterministic       the mode of the policy instead of samples
    until_time_limit    go on after success, to tell success at the end from success once
    videos              episodes of each task to film, of the first suite
    workers, count      processes (0 = this one), and tables that are played together
    """

    checkpoint: Which = "auto"
    episodes: int = 200
    suites: tuple[Suite, ...] = ("normal", "held_out", "synonyms", "swapped")
    tasks: tuple[str, ...] | None = None
    phrasing: str | None = None
    randomization: str = "full"
    deterministic: bool = True
    until_time_limit: bool = False
    videos: int = 0
    workers: int = 2
    count: int = 32

    def __post_init__(self) -> None:
        if self.episodes < 1 or self.videos < 0 or self.count < 1 or not 0 <= self.workers <= self.count:
            raise ValueError("episodes and count must be at least 1, videos not negative, workers 0..count")
        if not self.suites or not set(self.suites) <= set(SUITES):
            raise ValueError(f"suites must be some of {', '.join(SUITES)}, got {', '.join(self.suites) or 'none'}")
        if self.tasks is not None and not self.tasks:
            raise ValueError("tasks must name one at least")


def suite_table(suite: Suite, tasks: Sequence[str], phrasing: str, config: EvaluateVLAConfig) -> TableConfig:
    """The table of a suite."""
    return TableConfig(
        tasks=tuple(tasks),
        combinations="held_out" if suite == "held_out" else "train",
        phrasing="synonyms" if suite == "synonyms" else phrasing,
        randomization=config.randomization if suite == "randomized" else None,
        end_on_success=not config.until_time_limit,
    )


def suite_plays(suite: Suite, tasks: Sequence[str], episodes: int) -> list[Play]:
    """`episodes` initial states of each task."""
    swap = {"swap": True} if suite == "swapped" else {}
    return [(TEST_SEEDS + index, {"task": task, **swap}) for task in tasks for index in range(episodes)]


def evaluate_policy(
    policy: VLAPolicy,
    config: EvaluateVLAConfig,
    *,
    tasks: Sequence[str] = TASKS,
    phrasing: str = "train",
    source: str = "policy",
) -> dict[str, Any]:
    """Play all suites; returns the report without videos.

    tasks, phrasing     where the configuration names none
    source              names the policy in messages

    UserError if the policy is not one for the table, a task or preset is unknown, or nothing can be drawn here.
    """
    check_policy(policy, source)
    tasks, phrasing = asked(config, tasks, phrasing)
    tables = {suite: suite_table(suite, tasks, phrasing, config) for suite in config.suites}
    for table in tables.values():  # a mistake is told before the first minutes of play
        make_table(table, policy.spaces.image_size).close()
    found: dict[str, Any] = {}
    unknown: set[str] = set()
    with Judge(policy, workers=config.workers, count=config.count) as judge:
        for suite, table in tables.items():
            started = time.perf_counter()
            plays = suite_plays(suite, tasks, config.episodes)
            played = judge.evaluate(policy, plays, environment=table, deterministic=config.deterministic)
            found[suite] = suite_figures(played, at_end=config.until_time_limit)
            unknown |= set(unknown_words(policy, [episode.instruction for episode in played]))
            seconds = time.perf_counter() - started
            print(
                f"{suite}: {len(played)} episodes, {found[suite]['successes']} successes, {seconds:.0f} s",
                flush=True,
            )
    return {
        "policy": {"folder": source, "ablate": policy.config.ablate, "spaces": asdict(policy.spaces)},
        "first_seed": TEST_SEEDS,
        "config": {**asdict(config), "tasks": list(tasks), "phrasing": phrasing},
        "unknown_words": sorted(unknown),
        "suites": found,
    }


def evaluate_vla_run(run_folder: Path, config: EvaluateVLAConfig) -> dict[str, Any]:
    """Evaluate a run's checkpoint, write RUN/eval.json and RUN/videos; returns the report.

    UserError if the run holds no such checkpoint, and as `evaluate_policy`.
    """
    run_folder = Path(run_folder)
    folder = find_checkpoint(run_folder, config.checkpoint)
    described = read_tree(run_folder / "config.yaml").values
    tasks, phrasing = tasks_of(described), phrasing_of(described)
    policy = VLAPolicy.from_pretrained(folder / "policy")
    report = evaluate_policy(policy, config, tasks=tasks, phrasing=phrasing, source=str(folder / "policy"))
    report = {"recipe": described.get("recipe"), "checkpoint": folder.resolve().name, **report}
    write_atomically(run_folder / "eval.json", json.dumps(report, indent=2) + "\n")
    if config.videos:  # last: where they fail, the figures are kept
        film_tasks(policy, config, *asked(config, tasks, phrasing), run_folder / "videos")
    return report


def asked(config: EvaluateVLAConfig, tasks: Sequence[str], phrasing: str) -> tuple[tuple[str, ...], str]:
    """The tasks, each once, and the phrasing of an evaluation: its own, or else those given."""
    return tuple(dict.fromkeys(config.tasks or tasks)), config.phrasing or phrasing


def tasks_of(described: Mapping[str, Any]) -> tuple[str, ...]:
    """The tasks that a run's configuration names, all five where it names none."""
    named = _of_environment(described, "tasks")
    return tuple(dict.fromkeys(named)) if named else TASKS


def phrasing_of(described: Mapping[str, Any]) -> str:
    """The phrasing that a run's configuration names, "train" where it names none."""
    return str(_of_environment(described, "phrasing") or "train")


def _of_environment(described: Mapping[str, Any], name: str) -> Any:
    environment = described.get("environment")
    return environment.get(name) if isinstance(environment, Mapping) else None


def film_tasks(
    policy: VLAPolicy, config: EvaluateVLAConfig, tasks: Sequence[str], phrasing: str, folder: Path
) -> list[Path]:
    """FOLDER/eval-TASK-i.mp4 of the first initial states of each task, and all of them on FOLDER/eval.png."""
    suite = config.suites[0]
    table = suite_table(suite, tasks, phrasing, config)
    written: list[Path] = []
    films: list[Film] = []
    with Studio(policy) as studio:
        for task in tasks:
            for index, play in enumerate(suite_plays(suite, [task], config.videos)):
                films.append(studio.film(play, table=table, deterministic=config.deterministic))
                written.append(write_film(films[-1], folder / f"eval-{films[-1].episode.task}-{index}.mp4"))
    return [*written, contact_sheet(films, folder / "eval.png")]


def print_results(report: Mapping[str, Any]) -> None:
    """The report as text."""
    print(describe(report))


# What `tandem eval` asks of a module that evaluates runs.
EvaluateConfig, evaluate_run = EvaluateVLAConfig, evaluate_vla_run
