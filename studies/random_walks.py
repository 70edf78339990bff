"""Random walks: sampled optimality after supervised training on aimless walks, and after reinforcement learning.

    python -m studies.random_walks

Five graphs, one thread. Every arm starts from the same model except the filtered one, which is trained from nothing
on the walks that are at least 0.85 optimal. PPO and GRPO are given 15 s of processor time, continued supervised
training the same. Prompted starts are those that reinforcement learning draws; held-out ones it never sees.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from studies.cells import Figures, main, mean_and_error
from studies.language import Arm, column, run_arms

GRAPHS = range(5)
CELLS = [f"graph-{graph}" for graph in GRAPHS]
SECONDS = 15

SUPERVISED = ("sft.steps=1000000", f"sft.max_seconds={SECONDS}")
SAMPLED = ("sampling.updates=1000000", f"sampling.max_seconds={SECONDS}")
BASE = Arm("random_walks_sft")
ARMS = {
    "continued SFT": Arm("random_walks_sft", SUPERVISED),
    "filtered SFT (fresh)": Arm("random_walks_filtered", SUPERVISED),
    "PPO": Arm("random_walks_ppo", SAMPLED),
    "GRPO": Arm("random_walks_grpo", SAMPLED),
}
SPLITS = ("prompted", "test")


def run(cell: str, options: argparse.Namespace) -> Figures:
    """All arms on one graph."""
    graph = cell.rpartition("-")[2]
    common = [f"run.seed={graph}", f"task.seed={graph}"]
    return run_arms("random_walks", cell, base=BASE, arms=ARMS, common=common, splits=SPLITS, samples=100)


def table(results: Mapping[str, Figures], arms: Sequence[str] = ("base", *ARMS)) -> str:
    """Sampled optimality by graph, prompted / held-out starts."""
    names = list(results)
    lines = [f"| arm | {' | '.join(names)} | mean prompted | mean held-out |", "|---" * (len(names) + 3) + "|"]
    for arm in arms:
        by_split = {split: column(results, arm, split, "sampled") for split in SPLITS}
        pairs = [f"{p:.2f} / {h:.2f}" for p, h in zip(*by_split.values(), strict=True)]
        means = ["{:.3f} ± {:.3f}".format(*mean_and_error(by_split[split])) for split in SPLITS]
        lines.append(f"| {arm} | {' | '.join(pairs)} | {' | '.join(means)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main("random_walks", cells=CELLS, run=run, table=table)
