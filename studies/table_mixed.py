"""The table from demonstrations of mixed quality: cloning, filtered cloning and IQL, then PPO from each.

    python -m studies.table_mixed --cell data-0                  then data-1 and data-2
    python -m studies.table_mixed --share 1/2                    and, beside it, --share 2/2

Two tasks from the privileged state. Six episodes of ten are the scripted expert's; four are those of a demonstrator
that mishears: half the time it does the same with another thing than the one that was named, so it succeeds in
about half of its episodes (`data-SEED` reports in how many), and nothing tells whose an episode is. The clone, the
clone of the best half and IQL learn from the same episodes (none is held out) for the same number of updates, the
clones at a learning rate that falls along a cosine, IQL at a constant one; PPO then goes on from the first and the
last of them for the same number of steps. 400 test scenes each, the same for all.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from embodied.datasets.episode import Episode
from embodied.datasets.writing import write_dataset
from embodied.evaluate import EvaluateConfig, evaluate_run
from embodied.logged.played import PlayedSource
from envs.table.env import TIME_LIMIT, TableEnv
from envs.table.expert import Expert
from envs.table.language import Goal
from envs.table.layout import TRAINING_SEEDS
from envs.table.tasks import destination, locate
from envs.table.world import Array
from experiment.metrics import read_metrics
from experiment.run import RunResult
from studies.cells import RUNS, Figures, difference, main, paired, regret, require
from tandem.recipes import find_config, read_plan

TASKS = ("pick", "place")
PLAYED = f"environment.options.tasks={'+'.join(TASKS)}"
"""The override that plays these alone."""
GOOD, WEAK = 1200, 800
MISHEARD, NOISE = 0.5, 0.2
EPISODES = 400
SEEDS = range(3)
LEARNED = ("bc", "filtered", "iql", "ppo_from_bc", "ppo_from_iql")
STAGES = ("data", *LEARNED)
CELLS = [*(f"data-{seed}" for seed in SEEDS), *(f"{stage}-{seed}" for seed in SEEDS for stage in LEARNED)]
PAIRS = (("iql", "bc"), ("filtered", "bc"), ("iql", "filtered"), ("ppo_from_iql", "ppo_from_bc"))
BAR = 0.15
"""What iql - bc is asked to reach, in success."""
READ = (
    "Intervals by Student's t over seeds. Validations: 100 scenes each, every 15 updates; before the first there"
    " were 10 updates of the critic alone and 5 of both. Regret: how far they fell short of success in every"
    " episode, on average."
)


def run(cell: str, options: argparse.Namespace) -> Figures:
    """Make the data, or learn from them and judge."""
    stage, _, number = cell.partition("-")
    seed = int(number)
    data = RUNS / f"table_mixed-data-{seed}"
    if stage == "data":
        return make_data(data, seed)
    needed = f"{stage.removeprefix('ppo_from_') if stage.startswith('ppo_from_') else 'data'}-{seed}"
    require("table_mixed", needed)
    folder = RUNS / f"table_mixed-{cell}"
    mixed = data / "mixed"
    cloned = (f"data.path={mixed}", "held_out=0.0")  # IQL holds nothing out either
    match stage:
        case "bc":
            return learn("table_state_bc", folder, seed, *cloned)
        case "filtered":
            return learn("table_state_bc", folder, seed, *cloned, "data.best=0.5")
        case "iql":
            return learn("table_state_iql", folder, seed, f"data.path={mixed}")
    start = RUNS / f"table_mixed-{needed}" / "checkpoints" / "last" / "policy"
    return learn("table_state_ppo", folder, seed, f"init={start}")


def make_data(folder: Path, seed: int) -> Figures:
    """FOLDER/mixed: the expert's episodes and the other demonstrator's, from the state."""
    shutil.rmtree(folder, ignore_errors=True)
    env = TableEnv(tasks=TASKS, observe=("state",))
    good, bad = (
        [
            demonstrate(env, np.random.default_rng([seed, which, i]), TASKS[i % len(TASKS)], misheard)
            for i in range(count)
        ]
        for which, (count, misheard) in enumerate(((GOOD, 0.0), (WEAK, MISHEARD)))
    )
    write_dataset(PlayedSource([*good, *bad], folder, {}), folder / "mixed", "minari")
    return {
        name: {
            "episodes": len(some),
            "steps": sum(map(len, some)),
            "success": statistics.fmean(bool(one.success) for one in some),
            "return": statistics.fmean(float(one.rewards.sum()) for one in some),
        }
        for name, some in (("expert", good), ("weak", bad))
    }


class Misheard:
    """A table as somebody sees it who thinks of another goal."""

    def __init__(self, env: TableEnv, goal: Goal) -> None:
        self.world, self.goal, self.own_task = env.world, goal, None
        self.slots = locate(goal, env.world)

    @property
    def destination(self) -> Array:
        """The destination of the thing that is thought of."""
        return destination(self.world, self.slots)


def demonstrate(env: TableEnv, rng: np.random.Generator, task: str, misheard: float) -> Episode:
    """One episode of the scripted expert, who with probability `misheard` thinks of another goal than was named."""
    wrong = bool(rng.random() < misheard)
    level = rng.uniform(0.0, NOISE)
    seen, _ = env.reset(seed=int(rng.integers(TRAINING_SEEDS)), options={"task": task, "swap": wrong})
    expert = Expert(env) if env.other is None else Expert(cast(TableEnv, Misheard(env, env.other)))
    observations, actions, rewards = [seen["state"]], list[np.ndarray](), list[float]()
    terminated, success = False, False
    while not terminated and len(actions) < TIME_LIMIT:
        action = np.clip(expert.act() + level * rng.normal(size=4), -1.0, 1.0).astype(np.float32)
        seen, reward, terminated, _, info = env.step(action)
        observations.append(seen["state"])
        actions.append(action)
        rewards.append(reward)
        success |= bool(info["success"])
    return Episode(
        observations=np.stack(observations[:-1]),
        actions=np.stack(actions),
        rewards=np.array(rewards, np.float32),
        terminated=terminated,
        truncated=not terminated,
        final_observation=observations[-1],
        success=success,
        name=f"{task}, {'misheard' if wrong else 'as named'}",
    )


def train(config: str, folder: Path, seed: int, *overrides: str) -> RunResult:
    """Train what configs/embodied/CONFIG.yaml with these changes says, as `tandem train` would."""
    shutil.rmtree(folder, ignore_errors=True)
    common = [f"run.folder={folder}", f"run.seed={seed}", "run.wandb=disabled"]
    plan = read_plan(find_config(f"embodied/{config}"), [*common, *overrides])
    result: RunResult = plan.module.train(plan.config)
    return result


def learn(config: str, folder: Path, seed: int, *overrides: str) -> Figures:
    """Train one policy and judge its last state on the test scenes."""
    result = train(config, folder, seed, PLAYED, *overrides)
    figures = evaluate_run(folder, EvaluateConfig(checkpoint="last", episodes=EPISODES))
    rows = read_metrics(folder / "metrics.jsonl")
    return {
        "seconds": result.metrics["time/elapsed"],
        "success_once": figures["eval/success_once"],
        "success_once_interval": [figures["eval/success_once_low"], figures["eval/success_once_high"]],
        "validation_curve": [
            [int(row.get("env_steps", row["global_step"])), row["eval/success_once"]]
            for row in rows
            if "eval/success_once" in row
        ],
    }


def table(results: Mapping[str, Figures]) -> str:
    """Success by stage and seed, and paired differences."""
    seeds = sorted({int(cell.partition("-")[2]) for cell in results})
    lines = [f"| stage | {' | '.join(f'seed {seed}' for seed in seeds)} |", f"|---|{'---|' * len(seeds)}"]
    for stage in STAGES:
        columns = [_column(results.get(f"{stage}-{seed}")) for seed in seeds]
        lines.append(f"| {stage} | {' | '.join(columns)} |")
    lines += ["", "| paired difference in success | points (95% interval) | pairs |", "|---|---|---|"]
    for first, second in PAIRS:
        values = paired(by_seed(results, first), by_seed(results, second))
        asked = f" (asked: at least {BAR:+.0%})" if (first, second) == ("iql", "bc") else ""
        lines.append(f"| {first} - {second}{asked} | {difference(values, scale=100)} | {len(values)} |")
    return "\n".join([*lines, "", *switch(results, seeds), "", READ])


def switch(results: Mapping[str, Figures], seeds: Sequence[int]) -> list[str]:
    """What PPO made of its beginning: the validations on its way."""
    lines = ["| validations of PPO | first | worst | best | last | regret |", "|---|---|---|---|---|---|"]
    for stage in ("ppo_from_bc", "ppo_from_iql"):
        for cell in (f"{stage}-{seed}" for seed in seeds if f"{stage}-{seed}" in results):
            curve = results[cell]["validation_curve"]
            success = [value for _, value in curve]
            shown = (success[0], min(success), max(success), success[-1], regret(curve))
            lines.append(f"| {cell} | {' | '.join(f'{value:.1%}' for value in shown)} |")
    return lines


def by_seed(results: Mapping[str, Figures], stage: str) -> dict[int, float]:
    """Success of a stage's cells."""
    cells = {seed: f"{stage}-{seed}" for seed in SEEDS}
    return {seed: results[cell]["success_once"] for seed, cell in cells.items() if cell in results}


def _column(figures: Figures | None) -> str:
    if figures is None:
        return ""
    if "weak" in figures:
        return f"{figures['expert']['success']:.1%} and {figures['weak']['success']:.1%} of the episodes"
    low, high = figures["success_once_interval"]
    return f"{figures['success_once']:.1%} ({low:.1%}-{high:.1%})"


if __name__ == "__main__":
    main("table_mixed", cells=CELLS, run=run, table=table)
