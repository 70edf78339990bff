"""The demo's robot, which is told what to do and sees pictures: demonstrations, cloning, PPO by its own episodes.

Three of the table's tasks, so that it fits into a few minutes: reach, push, pick.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.recipes import find_config, read_plan

TASKS = ("reach", "push", "pick")
DEMONSTRATIONS = 12
"""Four a task: the hand copies them badly, which is what PPO is there to mend."""
EPISODES = 200
"""Episodes of each task to judge by."""


@dataclass(frozen=True)
class RobotOutcome:
    """Two runs, what each achieved on the same test scenes (a suite of eval.json), and pictures of the end.

    curves: success on validation scenes while PPO learned. sheet: three pictures of one episode a task.
    """

    clone: Path
    ppo: Path
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    curves: Path
    sheet: Path


def run_robot(root: Path, *, dry_run: bool, seed: int = 0) -> RobotOutcome:
    """Record, clone, fine-tune and judge; everything goes below `root`. dry_run: as little of each as can be."""
    from embodied.recording.record import RecordConfig, record_expert

    demonstrations = root / "robot-demonstrations"
    count = 6 if dry_run else DEMONSTRATIONS
    record_expert(demonstrations, RecordConfig(tasks=TASKS, episodes=count, noise=0.4, seed=seed))
    seeded = f"run.seed={seed}"
    clone = _train("table_bc", root / "robot-clone", dry_run, f"data.path={demonstrations}", seeded)
    policy = clone / "checkpoints" / "last" / "policy"
    small = ["environment.count=2", "horizon=2", "evaluation.every=1", "evaluation.episodes=3"] if dry_run else []
    ppo = _train("table_ppo", root / "robot-ppo", dry_run, f"init={policy}", seeded, *small)
    episodes = 2 if dry_run else EPISODES
    before, after = _judge(clone, episodes, videos=0), _judge(ppo, episodes, videos=1)
    return RobotOutcome(clone, ppo, before, after, _draw(ppo, root / "robot.png"), ppo / "videos" / "eval.png")


def _train(config: str, folder: Path, dry_run: bool, *overrides: str) -> Path:
    common = (f"run.folder={folder}", f"run.name={folder.name}", f"run.dry_run={str(dry_run).lower()}")
    plan = read_plan(find_config(f"demo/{config}"), (*common, *overrides))
    plan.module.train(plan.config)
    return folder


def _judge(run: Path, episodes: int, videos: int) -> Mapping[str, Any]:
    from embodied.evaluate_vla import EvaluateVLAConfig, evaluate_vla_run

    config = EvaluateVLAConfig(checkpoint="last", episodes=episodes, suites=("normal",), tasks=TASKS, videos=videos)
    suite: Mapping[str, Any] = evaluate_vla_run(run, config)["suites"]["normal"]
    return suite


def _draw(run: Path, picture: Path) -> Path:
    from tandem.demo import draw

    return draw([run], picture, metrics=("eval/success_once",), over="env_steps")


def robot_rows(outcome: RobotOutcome) -> list[tuple[str, str, str]]:
    """Lines of the last table: what is measured, before and after, with 95% intervals."""
    rows = [("all three tasks", _cell(outcome.before), _cell(outcome.after))]
    for task in TASKS:
        rows.append((task, _cell(outcome.before["tasks"][task]), _cell(outcome.after["tasks"][task])))
    return rows


def robot_commands(outcome: RobotOutcome) -> list[str]:
    """What someone who has just seen the robot may want to type."""
    run = shlex.quote(str(outcome.ppo))
    return [
        f"tandem watch {run} --say 'push the red cube to the white pad'",
        f"tandem eval {run} suites=[held_out,synonyms,swapped]",
        f"tandem data view {shlex.quote(str(outcome.clone.parent / 'robot-demonstrations'))}",
    ]


def _cell(counts: Mapping[str, Any]) -> str:
    low, high = counts["success_once_interval"]
    return f"{counts['success_once']:.2f} [{low:.2f}, {high:.2f}]"
