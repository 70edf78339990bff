"""Offline learning on HalfCheetah-v5 and Walker2d-v5 beside d3rlpy, in D4RL's manner, from data recorded here.

    python -m studies.offline_locomotion --cell data-cheetah
    python -m studies.offline_locomotion --cell data-walker      beside it
    python -m studies.offline_locomotion --share 1/2             and, beside it, --share 2/2

Every run has one thread, so that two go on at once on two cores.

The data come from our own PPO: `medium` is 200,000 steps of the first checkpoint halfway from the untrained return
to the best one's on validation episodes, `replay` as many steps from all checkpoints up to it. Every algorithm gets
the same updates (30,000; CQL 10,000, on HalfCheetah alone), networks (2 x 256), units and data, IQL rewards scaled
by the spread of returns; the learning rate of BC falls along a cosine, those of the others stay as they are. The
last policy plays the same 20 test episodes of the environment's own length.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from embodied.datasets.writing import write_dataset
from embodied.evaluate import VALIDATION_SEEDS, seeds
from embodied.logged.played import PlayedSource, play_policies, run_to_play, told_of
from embodied.policies.state_mlp import StatePolicy
from embodied.rollouts.rollout import Collector
from embodied.rollouts.workers import EnvironmentConfig
from experiment.config import read_tree
from experiment.run import RunResult
from studies.cells import RUNS, Figures, difference, main, mean_and_error, paired, require
from tandem.recipes import evaluator_for, find_config, read_plan

ENVIRONMENTS = {"cheetah": "HalfCheetah-v5", "walker": "Walker2d-v5"}
KINDS = ("medium", "replay")
SEEDS = range(3)
PPO_STEPS, LOGGED = 2_000_000, 200_000
UPDATES = {"cql": 10_000}
OURS = ("bc", "iql", "iql_bf16", "td3_bc", "cql", "cql_bf16")
THEIRS = ("d3rlpy_iql", "d3rlpy_cql")
PAIRS = (("iql", "d3rlpy_iql"), ("cql", "d3rlpy_cql"), ("iql_bf16", "iql"), ("cql_bf16", "cql"))
PAIRED = (
    "Intervals by Student's t over seeds, which all learn from one recording of a data set; over all pairs, each"
    " difference is divided by the mean return of the environment's medium data (that of replay is small). Pairs"
    " with d3rlpy share data, test episodes and the seed's number, not initial weights or batches; pairs of bf16"
    " and float32 share these two as well."
)


def _cells() -> list[str]:
    cells = [f"data-{name}" for name in ENVIRONMENTS]
    for seed in SEEDS:
        for name in ENVIRONMENTS:
            for kind in KINDS:
                algorithms = [a for a in (*OURS, *THEIRS) if name == "cheetah" or "cql" not in a]
                cells += [f"{algorithm}-{name}-{kind}-{seed}" for algorithm in algorithms]
    return cells


CELLS = _cells()


def run(cell: str, options: argparse.Namespace) -> Figures:
    """Make the data, or learn from them and judge."""
    algorithm, name, *rest = cell.split("-")
    if algorithm == "data":
        return make_data(name)
    require("offline_locomotion", f"data-{name}")
    kind, seed = rest[0], int(rest[1])
    folder = RUNS / f"offline-{cell}"
    shutil.rmtree(folder, ignore_errors=True)
    seconds = learn(algorithm, name, RUNS / f"offline-data-{name}" / kind, folder, seed)
    return {"seconds": seconds, **judge(folder)}


def make_data(name: str) -> Figures:
    """PPO, then both data sets of an environment."""
    folder, data = RUNS / f"offline-ppo-{name}", RUNS / f"offline-data-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(data, ignore_errors=True)
    overrides = [
        f"environment.id={ENVIRONMENTS[name]}",
        f"total_steps={PPO_STEPS}",
        "run.keep=1000",
        *common(folder, 0),
    ]
    _train("half_cheetah_ppo", overrides)
    environment, policies = run_to_play(folder, "all")
    returns = validation_returns(policies, environment)
    halfway = (returns[0] + max(returns)) / 2
    medium = next(i for i, value in enumerate(returns) if value >= halfway)
    figures: Figures = {"returns": returns, "medium": medium}
    for kind, chosen in (("medium", policies[medium : medium + 1]), ("replay", policies[: medium + 1])):
        episodes = play_policies(chosen, environment, steps=LOGGED, seed=7)
        write_dataset(PlayedSource(episodes, folder, told_of(environment)), data / kind, "minari")
        logged = [float(episode.rewards.sum()) for episode in episodes if not _cut_short(episode)]
        figures[kind] = {
            "episodes": len(episodes),
            "steps": sum(map(len, episodes)),
            "mean_return": statistics.fmean(logged),
        }
    return figures


def validation_returns(policies: Sequence[Path], environment: EnvironmentConfig) -> list[float]:
    """Mean return of each policy of a run over ten validation episodes: the test's choose nothing."""
    loaded = [StatePolicy.from_pretrained(policy) for policy in policies]
    with Collector(environment, loaded[0], steps=1, seed=0) as collector:
        played = [collector.evaluate(policy, seeds(VALIDATION_SEEDS, 10)) for policy in loaded]
    return [statistics.fmean(record.episode_return for record in records) for records in played]


def _cut_short(episode: Any) -> bool:
    """Whether the recording ended before the episode did."""
    return not episode.terminated and len(episode) < 1000


def learn(algorithm: str, name: str, data: Path, folder: Path, seed: int) -> float:
    """Train; returns the seconds it took."""
    updates = UPDATES.get(algorithm.removeprefix("d3rlpy_").removesuffix("_bf16"), 30_000)
    config, options = described(algorithm, data, updates)
    shared = [f"environment.id={ENVIRONMENTS[name]}", f"evaluate_every={updates}", "episodes=5"]
    return float(_train(config, [*shared, *options, *common(folder, seed)]).metrics["time/elapsed"])


def described(algorithm: str, data: Path, updates: int) -> tuple[str, list[str]]:
    """Which configuration file an algorithm begins with, and what it changes there."""
    match algorithm:
        case "d3rlpy_iql":
            own = ["algorithm=d3rlpy/IQL", "data.rewards=returns"]
            return "backend", [f"data.path={data}", f"total={updates}", *own]
        case "d3rlpy_cql":
            own = ["algorithm=d3rlpy/CQL", "options.alpha_learning_rate=0.0", "options.alpha_threshold=0.0"]
            return "backend", [f"data.path={data}", f"total={updates}", *own]
        case "bc":
            own = ["policy.hidden=[256,256]", "policy.activation=relu", "learning_rate=3e-4", "observation_noise=0"]
            own.append("environment.max_episode_steps=null")  # the door's limit
            return "adroit_door_bc", [f"data.path={data}", f"updates={updates}", *own]
    own = ["precision=bf16"] if algorithm.endswith("_bf16") else []
    return f"half_cheetah_{algorithm.removesuffix('_bf16')}", [f"data.path={data}", f"updates={updates}", *own]


def judge(folder: Path) -> Figures:
    """The last policy's return over 20 test episodes."""
    module = evaluator_for(str(read_tree(folder / "config.yaml").values["recipe"]))
    figures = module.evaluate_run(folder, module.EvaluateConfig(checkpoint="last", episodes=20))
    return {"mean_return": figures["eval/mean_reward"]}


def common(folder: Path, seed: int) -> list[str]:
    """Overrides that every run has."""
    return [f"run.folder={folder}", f"run.seed={seed}", "run.wandb=disabled", "run.threads=1"]


def _train(config: str, overrides: list[str]) -> RunResult:
    """Train what configs/embodied/CONFIG.yaml with these changes says."""
    plan = read_plan(find_config(f"embodied/{config}"), overrides)
    result: RunResult = plan.module.train(plan.config)
    return result


def table(results: Mapping[str, Figures]) -> str:
    """Mean return by data set, and paired differences with their intervals."""
    sets = [f"{name}-{kind}" for name in ENVIRONMENTS for kind in KINDS]
    lines = [f"| mean return ± standard error | {' | '.join(sets)} |", f"|---|{'---|' * len(sets)}"]
    logged = {chosen: _logged(results, chosen) for chosen in sets}
    shown = ["" if value is None else f"{value:.0f}" for value in logged.values()]
    lines.append(f"| the data | {' | '.join(shown)} |")
    for algorithm in (*OURS, *THEIRS):
        columns = [_level(list(_by_seed(results, algorithm, chosen).values())) for chosen in sets]
        lines.append(f"| {algorithm} | {' | '.join(columns)} |")
    head = f"| paired difference (95% interval) | {' | '.join(sets)} | all, % of medium's return | pairs |"
    lines += ["", head, f"|---|{'---|' * (len(sets) + 2)}"]
    for first, second in PAIRS:
        found = {
            chosen: paired(_by_seed(results, first, chosen), _by_seed(results, second, chosen)) for chosen in sets
        }
        columns = [difference(values, digits=0) for values in found.values()]
        units = {chosen: logged[f"{chosen.partition('-')[0]}-medium"] for chosen in sets}
        shares = [value / abs(unit) for chosen, unit in units.items() if unit for value in found[chosen]]
        pooled = f"{difference(shares, scale=100)} | {len(shares)}"
        lines.append(f"| {first} - {second} | {' | '.join(columns)} | {pooled} |")
    return "\n".join([*lines, "", PAIRED])


def _logged(results: Mapping[str, Figures], chosen: str) -> float | None:
    """Mean return of a data set's episodes."""
    name, _, kind = chosen.partition("-")
    data = results.get(f"data-{name}")
    return None if data is None else float(data[kind]["mean_return"])


def _level(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean, error = mean_and_error(values)
    return f"{mean:.0f}" if len(values) == 1 else f"{mean:.0f} ± {error:.0f}"


def _by_seed(results: Mapping[str, Figures], algorithm: str, chosen: str) -> dict[int, float]:
    cells = {seed: f"{algorithm}-{chosen}-{seed}" for seed in SEEDS}
    return {seed: results[cell]["mean_return"] for seed, cell in cells.items() if cell in results}


if __name__ == "__main__":
    main("offline_locomotion", cells=CELLS, run=run, table=table)
