"""Random walks without walking: implicit language Q-learning beside supervised, filtered and reinforced training.

    python -m studies.ilql

The graphs, starts and walks of `studies.random_walks`, its base model, its filtered arm and its PPO arm. ILQL
starts from the base model as PPO does and has the same 15 s of processor time; it reads walks and their scores and
never walks itself. One run is judged at several strengths; beta 0 is its language model alone. `BETA` was chosen on
graphs from 100 on, which are not among those judged here; the paired differences are of that strength.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from studies import random_walks
from studies.cells import RUNS, Figures, difference, main
from studies.language import Arm, judge_arm, run_arms, train_arm
from studies.random_walks import BASE, CELLS, SECONDS, SPLITS

BETA = 32.0
BETAS = (0.0, 4.0, 16.0, BETA, 100.0)
SAMPLES = 100
ONLINE = {name: random_walks.ARMS[name] for name in ("filtered SFT (fresh)", "PPO")}
HELD_OUT = (
    "Intervals by Student's t over graphs. Held-out starts are those that reinforcement learning is never prompted"
    " with, but the logged walks begin at them too: ILQL and the filtered arm learn from these walks and their"
    " scores; PPO never walks from one and knows them from its base model alone."
)
ILQL = Arm("walks_ilql", ("learning.steps=1000000", f"learning.max_seconds={SECONDS}"))


def named(beta: float) -> str:
    """The arm's name at a strength."""
    return f"ILQL, beta {beta:g}"


def run(cell: str, options: argparse.Namespace) -> Figures:
    """All arms on one graph."""
    graph = cell.rpartition("-")[2]
    common = [f"run.seed={graph}", f"task.seed={graph}"]
    figures = run_arms("ilql", cell, base=BASE, arms=ONLINE, common=common, splits=SPLITS, samples=SAMPLES)
    folder = train_arm(ILQL, RUNS / f"ilql-{cell}-ilql", [*common, f"model.path={RUNS / f'ilql-{cell}-base'}"])
    for beta in BETAS:
        figures[named(beta)] = judge_arm(folder, SPLITS, SAMPLES, beta=beta)
    return figures


def table(results: Mapping[str, Figures]) -> str:
    """Sampled optimality by graph, prompted / held-out starts, and paired differences over the graphs."""
    levels = random_walks.table(results, arms=("base", *ONLINE, *map(named, BETAS)))
    lines = ["| paired difference (95% interval) | prompted | held-out | graphs |", "|---|---|---|---|"]
    for other in ONLINE:
        found = {split: _differences(results, named(BETA), other, split) for split in SPLITS}
        columns = [difference(values, digits=3) for values in found.values()]
        lines.append(f"| {named(BETA)} - {other} | {' | '.join(columns)} | {len(found['test'])} |")
    return "\n".join([levels, "", *lines, "", HELD_OUT])


def _differences(results: Mapping[str, Figures], first: str, second: str, split: str) -> list[float]:
    """Sampled optimality of one arm less another's, graph by graph."""
    both = [graph for graph in results.values() if first in graph and second in graph]
    ours, theirs = ([graph[arm]["judged"][split]["sampled"] for graph in both] for arm in (first, second))
    return [a - b for a, b in zip(ours, theirs, strict=True)]


if __name__ == "__main__":
    main("ilql", cells=CELLS, run=run, table=table)
