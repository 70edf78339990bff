"""The table from demonstrations of mixed quality: cloning, filtered cloning and IQL, then PPO from each.

    python -m studies.table_mixed

Two tasks from the privileged state. Six episodes of ten are the scripted expert's, four are a weak policy's: a
clone of a few demonstrations, which succeeds in 30 to 60% of its episodes (`data-SEED` reports in how many). The
clone, the clone of the best half and IQL learn from the same episodes for the same number of updates; PPO then goes
on from the first and the last of them for the same number of steps. 400 test scenes each, the same for all.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from embodied.datasets.episode import Episode
from embodied.datasets.formats import read_dataset
from embodied.datasets.writing import write_dataset
from embodied.evaluate import EvaluateConfig, evaluate_run
from embodied.logged.played import PlayedSource, play_policies, run_to_play
from embodied.recording.record import RecordConfig, record_expert
from experiment.metrics import read_metrics
from studies.cells import RUNS, Figures, main
from tandem.recipes import find_config, read_plan

TASKS = ("pick", "place")
GOOD, WEAK, SHOWN_TO_THE_WEAK = 300, 200, 16
EPISODES = 400
STAGES = ("data", "bc", "filtered", "iql", "ppo_from_bc", "ppo_from_iql")
CELLS = [f"{stage}-{seed}" for seed in range(3) for stage in STAGES]


def run(cell: str, options: argparse.Namespace) -> Figures:
    """Make the data, or learn from them and judge."""
    stage, _, number = cell.partition("-")
    seed = int(number)
    data = RUNS / f"table_mixed-data-{seed}"
    if stage == "data":
        return make_data(data, seed)
    folder = RUNS / f"table_mixed-{cell}"
    mixed = data / "mixed"
    match stage:
        case "bc":
            return learn("table_state_bc", folder, seed, f"demonstrations={mixed}")
        case "filtered":
            return learn("table_state_bc", folder, seed, f"demonstrations={mixed}", "best=0.5")
        case "iql":
            return learn("table_state_iql", folder, seed, f"data.path={mixed}")
    start = RUNS / f"table_mixed-{stage.removeprefix('ppo_from_')}-{seed}" / "checkpoints" / "last" / "policy"
    return learn("table_state_ppo", folder, seed, f"init={start}")


def make_data(folder: Path, seed: int) -> Figures:
    """FOLDER/mixed: the expert's episodes and the weak policy's, from the state."""
    shutil.rmtree(folder, ignore_errors=True)
    record_expert(folder / "recorded", RecordConfig(tasks=TASKS, episodes=GOOD, seed=seed))
    good = read_dataset(folder / "recorded", observation_keys=("environment_state",))
    shown = _write(good[:SHOWN_TO_THE_WEAK], folder / "shown")
    weak = learn("table_state_bc", folder / "weak", seed, f"demonstrations={shown}", "updates=2000")
    environment, policies = run_to_play(folder / "weak", "last")
    played: list[Episode] = []
    while len(played) < WEAK:  # what the recording itself cut is no episode
        more = play_policies(policies, environment, steps=64 * WEAK, seed=1_000_000 * (seed + 1) + len(played))
        played += [one for one in more if one.terminated or len(one) == 64]
    bad = played[:WEAK]
    _write([*good, *bad], folder / "mixed")
    return {
        "weak_policy": weak["success_once"],
        "weak_success": statistics.fmean(float(one.terminated) for one in bad),
        "episodes": {"expert": len(good), "weak": len(bad)},
        "steps": {"expert": sum(map(len, good)), "weak": sum(map(len, bad))},
        "returns": {
            name: statistics.fmean(float(one.rewards.sum()) for one in some)
            for name, some in (("expert", good), ("weak", bad))
        },
    }


def _write(episodes: Sequence[Episode], target: Path) -> Path:
    write_dataset(PlayedSource(episodes, target, {}), target, "minari")
    return target


def learn(config: str, folder: Path, seed: int, *overrides: str) -> Figures:
    """Train one policy and judge its last state on the test scenes."""
    shutil.rmtree(folder, ignore_errors=True)
    common = [f"run.folder={folder}", f"run.seed={seed}", "run.wandb=disabled"]
    tasks = f"environment.options.tasks={'+'.join(TASKS)}"
    plan = read_plan(find_config(f"embodied/{config}"), [*common, tasks, *overrides])
    result = plan.module.train(plan.config)
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
    return "\n".join(lines)


def _column(figures: Figures | None) -> str:
    if figures is None:
        return ""
    if "weak_success" in figures:
        return f"weak policy {figures['weak_success']:.1%}"
    low, high = figures["success_once_interval"]
    return f"{figures['success_once']:.1%} ({low:.1%}-{high:.1%})"


if __name__ == "__main__":
    main("table_mixed", cells=CELLS, run=run, table=table)
