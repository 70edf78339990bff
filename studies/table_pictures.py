"""The table from pictures and demonstrations of mixed quality: cloning weighted by what IQL thinks of each step.

    python -m studies.table_pictures --cell data-0               then data-1 and data-2
    python -m studies.table_pictures

Two tasks; as many episodes as in `studies.table_mixed`, six of ten the scripted expert's, four those of a
demonstrator that mishears, recorded with pictures. `eyes` learns where things are from all of them. Three hands
learn what to do, from the same eyes and for the same number of updates: `clone` imitates all episodes, `weighted`
does so in proportion to exp(advantage) of `iql`, which learned from the recorded state, `successes` imitates those
that succeeded. 200 test scenes a task, the same for all; every policy acts from pictures and words.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from embodied.datasets.lerobot_writer import LeRobotWriter
from embodied.evaluate_vla import EvaluateVLAConfig, evaluate_vla_run
from embodied.recording.record import FPS, ROBOT, Player, RecordConfig, table_features
from envs.table.env import TableEnv
from envs.table.expert import Expert
from experiment.run import RunResult
from studies.cells import RUNS, Figures, difference, main, paired, require
from studies.table import share
from studies.table_mixed import GOOD, MISHEARD, NOISE, PLAYED, SEEDS, TASKS, WEAK, Misheard, by_seed, train

EPISODES = 200
"""Test episodes of a task."""
HANDS: dict[str, tuple[str, ...]] = {
    "clone": ("data.successes=false",),
    "weighted": ("data.successes=false",),
    "successes": ("data.successes=true",),
}
"""Stage -> overrides; `weighted` gets its critic as well."""
STAGES = ("data", "eyes", "iql", *HANDS)
CELLS = [f"{stage}-{seed}" for seed in SEEDS for stage in STAGES]
PAIRS = (("weighted", "clone"), ("successes", "clone"), ("weighted", "successes"))


def run(cell: str, options: argparse.Namespace) -> Figures:
    """Record the data, or learn from them and judge."""
    stage, _, number = cell.partition("-")
    seed, data = int(number), RUNS / f"table_pictures-data-{number}"
    folder = RUNS / f"table_pictures-{cell}"
    if stage == "data":
        return record_mixed(data, seed)
    require("table_pictures", f"data-{seed}")
    if stage == "iql":
        state = "data.observation_keys=[environment_state]"
        return seconds(train("table_state_iql", folder, seed, f"data.path={data}", state, PLAYED))
    every = [f"data.path={data}", "held_out=0.0", "run.threads=1"]
    if stage == "eyes":
        eyes_alone = ("data.successes=false", "hand.updates=0", "eyes.updates=5000")
        return seconds(train("table_bc", folder, seed, *every, *eyes_alone))
    require("table_pictures", f"eyes-{seed}")
    eyes = RUNS / f"table_pictures-eyes-{seed}" / "checkpoints" / "last" / "policy"
    overrides = [*every, *HANDS[stage], f"init={eyes}", "eyes.updates=0", "grounding.scenes=0"]
    if stage == "weighted":
        require("table_pictures", f"iql-{seed}")
        overrides.append(f"advantage.critic={RUNS / f'table_pictures-iql-{seed}'}")
    result = train("table_bc", folder, seed, *overrides)
    judged = evaluate_vla_run(
        folder, EvaluateVLAConfig(checkpoint="last", tasks=TASKS, suites=("normal",), episodes=EPISODES)
    )
    suite: Mapping[str, Any] = judged["suites"]["normal"]
    names = ("episodes", "success_once", "success_once_interval")
    return {**seconds(result), **{name: suite[name] for name in names}}


def seconds(result: RunResult) -> Figures:
    """How long a run took."""
    return {"seconds": result.metrics["time/elapsed"]}


class MixedPlayer(Player):
    """The expert who, while `mishears`, does the same with another thing than was named now and then."""

    mishears = False

    def begin(self, task: str, rng: np.random.Generator, *, swap: bool = False) -> dict[str, Any]:
        """A new scene; of another thing than the one that is named, where the expert mishears."""
        seen = super().begin(task, rng, swap=swap or (self.mishears and bool(rng.random() < MISHEARD)))
        misheard = cast(TableEnv, Misheard(self.env, self.env.other)) if self.env.other is not None else self.env
        self.expert = Expert(misheard)
        return seen


def record_mixed(folder: Path, seed: int) -> Figures:
    """The expert's episodes and the other demonstrator's, with pictures."""
    shutil.rmtree(folder, ignore_errors=True)
    config = RecordConfig(tasks=TASKS, noise=NOISE, seed=seed, keep_failures=True, workers=0)
    features = table_features(config)
    player = MixedPlayer(config, features)
    found: dict[str, list[bool]] = {"expert": [], "weak": []}
    with LeRobotWriter(folder, fps=FPS, features=features, robot_type=ROBOT) as writer:
        for slot in range(GOOD + WEAK):
            player.mishears = slot >= GOOD
            played = player.play(slot)
            writer.append(played.episode)
            found["weak" if player.mishears else "expert"].append(played.success)
    return {name: {"episodes": len(some), "success": sum(some) / len(some)} for name, some in found.items()}


def table(results: Mapping[str, Figures]) -> str:
    """Success by hand and seed, and paired differences."""
    lines = [f"| hand | {' | '.join(f'seed {seed}' for seed in SEEDS)} |", f"|---|{'---|' * len(SEEDS)}"]
    data = [results.get(f"data-{seed}") for seed in SEEDS]
    shown = [
        "" if one is None else f"{one['expert']['success']:.1%} and {one['weak']['success']:.1%}" for one in data
    ]
    lines.append(f"| the data: the expert's and the other's episodes | {' | '.join(shown)} |")
    for hand in HANDS:
        cells = [results.get(f"{hand}-{seed}") for seed in SEEDS]
        lines.append(f"| {hand} | {' | '.join('' if one is None else share(one) for one in cells)} |")
    lines += ["", "| paired difference in success | points (95% interval) | pairs |", "|---|---|---|"]
    for first, second in PAIRS:
        values = paired(by_seed(results, first), by_seed(results, second))
        lines.append(f"| {first} - {second} | {difference(values, scale=100)} | {len(values)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main("table_pictures", cells=CELLS, run=run, table=table)
