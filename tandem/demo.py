"""`tandem demo`: imitation, then PPO, for a robot and for language models, in about ten minutes.

Robot: told in words to reach, push or pick up one of four objects that it sees in pictures (`demo_robot`).
Walks: find the shortest way through a graph that is known only from aimless walks, failures kept. Slip: learn
arithmetic from a demonstrator who is wrong in six answers of ten, with an exact verifier. The control continues the
supervised training for as long as PPO took: more imitation of flawed demonstrations does not mend them.
"""

from __future__ import annotations

import io
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tandem.demo_robot import RobotOutcome, robot_commands, robot_rows, run_robot
from tandem.recipes import find_config, read_plan


@dataclass(frozen=True)
class Measure:
    """One line of the final table: where it stands in eval.json, and its name in words."""

    split: str
    key: str
    words: str


@dataclass(frozen=True)
class DemoTask:
    """One task of the demo; its configurations are configs/demo/NAME_sft.yaml and NAME_ppo.yaml.

    Attributes:
        name: of the configurations and run folders.
        title: in the table.
        samples: completions drawn per prompt in the evaluation.
        measures: what to show.
    """

    name: str
    title: str
    samples: int
    measures: tuple[Measure, ...]


TASKS = (
    DemoTask(
        "walks",
        "shortest ways from aimless walks",
        128,
        (
            Measure("prompted", "sampled", "optimality, starts that PPO practised"),
            Measure("test", "sampled", "optimality, starts kept out of PPO"),
        ),
    ),
    DemoTask(
        "slip",
        "arithmetic from a demonstrator who slips",
        8,
        (
            Measure("test", "greedy_solved", "right, best answer"),
            Measure("test", "sampled", "right, sampled answers"),
        ),
    ),
)


@dataclass(frozen=True)
class Outcome:
    """The three runs of a task with their evaluations, and the picture of their curves.

    Attributes:
        runs: "before" (SFT), "after" (PPO from there) and "control" (more SFT from there) -> run folder.
        results: the same names -> split -> what `evaluate_run` measured.
        curves: a PNG.
    """

    runs: Mapping[str, Path]
    results: Mapping[str, Mapping[str, Any]]
    curves: Path


def run_demo(*, folder: Path | None = None, dry_run: bool = False) -> int:
    """Train, evaluate and show the outcome.

    Args:
        folder: where the eight runs go; None means runs/demo-DATE-TIME.
        dry_run: one update of everything.
    """
    root = folder or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    robot = run_robot(root, dry_run=dry_run)
    show({task.name: run_task(task, root, dry_run=dry_run) for task in TASKS}, root, robot)
    return 0


def run_task(task: DemoTask, root: Path, *, dry_run: bool) -> Outcome:
    """SFT, PPO from there, and more SFT from there for as long as PPO took; all three evaluated."""

    def train(config: str, name: str, *overrides: str) -> Path:
        target = root / name
        common = (f"run.folder={target}", f"run.name={name}", f"run.dry_run={str(dry_run).lower()}")
        plan = read_plan(find_config(f"demo/{config}"), (*common, *overrides))
        plan.module.train(plan.config)
        return target

    before = train(f"{task.name}_sft", f"{task.name}-sft")
    after = train(f"{task.name}_ppo", f"{task.name}-ppo", f"model.path={before}")
    steps, seconds = last_step(before)
    control_steps = max(1, round(steps * last_step(after)[1] / seconds))
    control = train(
        f"{task.name}_sft", f"{task.name}-more-sft", f"model.path={before}", f"sft.steps={control_steps}"
    )
    runs = {"before": before, "after": after, "control": control}
    results = {name: evaluate(run, task.samples) for name, run in runs.items()}
    return Outcome(runs, results, draw([after, control], root / f"{task.name}.png"))


def last_step(run: Path) -> tuple[float, float]:
    """How many updates a run made, and how many seconds they took."""
    from experiment.metrics import read_metrics

    row = read_metrics(run / "metrics.jsonl")[-1]
    return row["global_step"], row["time/elapsed"]


def evaluate(run: Path, samples: int) -> dict[str, Any]:
    """The held-out prompts of a run's task; writes RUN/eval.json."""
    from llm_rlhf.evaluate import EvaluateConfig, evaluate_run

    return evaluate_run(run, EvaluateConfig(samples=samples))


def draw(
    runs: Sequence[Path],
    picture: Path,
    *,
    metrics: Sequence[str] = ("eval/greedy", "eval/sampled"),
    over: str = "samples",
) -> Path:
    """Validation curves, without the tables that `tandem compare` prints."""
    from rich.console import Console

    from experiment.compare import compare

    quiet = Console(file=io.StringIO())
    compare(runs, metrics=metrics, over=over, figure=picture, console=quiet)
    return picture


# ---------------------------------------------------------------- the last screen


def show(outcomes: Mapping[str, Outcome], root: Path, robot: RobotOutcome | None = None) -> None:
    """Before and after with 95% intervals, where everything is, and what to type next."""
    from rich import box
    from rich.console import Console, Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table("", "SFT", "SFT, then PPO", "SFT, then SFT for as long", box=box.SIMPLE_HEAD)
    for task in TASKS:
        table.add_row(Text(task.title, style="bold"))
        for measure in task.measures:
            cells = [cell(outcomes[task.name].results[run], measure) for run in ("before", "after", "control")]
            table.add_row(f"  {measure.words}", cells[0], Text(cells[1], style="bold green"), cells[2])
    places = Table.grid(padding=(0, 2))
    places.add_row("runs", str(root))
    tables = [table]
    if robot is not None:
        body = Table("", "cloned", "cloned, then PPO", box=box.SIMPLE_HEAD)
        body.add_row(Text("a robot that is told what to do, from pictures", style="bold"))
        for words, before, after in robot_rows(robot):
            body.add_row(f"  success, {words}", before, Text(after, style="bold green"))
        tables.insert(0, body)
        places.add_row("curves of the robot", str(robot.curves))
        places.add_row("its videos", str(robot.sheet.parent))
    for task in TASKS:
        places.add_row(f"curves of {task.name}", str(outcomes[task.name].curves))
    for line in wandb_lines(root):
        places.add_row("wandb", line)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    note = Text("95% intervals in brackets; the right column is the control\n", style="dim")
    parts = Group(*tables, note, places)
    console.print(Panel(parts, title="before and after PPO", title_align="left"))
    # Outside the frame, and unwrapped: these lines are made for copying.
    for command in [*next_commands(outcomes), *(robot_commands(robot) if robot is not None else [])]:
        console.print(f"  {command}", soft_wrap=True, highlight=False, markup=False)


def cell(result: Mapping[str, Any], measure: Measure) -> str:
    """`0.74 [0.70, 0.78]`."""
    low, high = result[measure.split][f"{measure.key}_interval"]
    return f"{result[measure.split][measure.key]:.2f} [{low:.2f}, {high:.2f}]"


def wandb_lines(root: Path) -> list[str]:
    """Where wandb's files are, if it was on."""
    if not any(root.glob("*/wandb")):
        return []
    offline = any(root.glob("*/wandb/offline-run-*"))
    return [f"{root}/*/wandb" + (", offline: `wandb sync` with a folder in there sends it" if offline else "")]


def next_commands(outcomes: Mapping[str, Outcome]) -> list[str]:
    """What someone who has just seen the table may want to type."""
    runs = outcomes["slip"].runs
    before, after, control = (shlex.quote(str(runs[name])) for name in ("before", "after", "control"))
    return [
        f"tandem compare {after} {control} --metric 'eval/*' --over samples",
        f"tandem eval {after} samples=16",
        f"tandem train demo/slip_ppo model.path={before} kl.coef=0.05",
        "tandem config show demo/slip_ppo",
    ]
