"""The table: control steps and pictures per second in a rollout, beside the limit that physics and rendering set.

    python -m studies.table_throughput

The limit is what the same number of processes reach with nothing but the physics of every control step (with its
inverse kinematics) and a picture for every decision of four: no policy, no observation, no reward, no episode. The
two take turns, and the share is that of the medians.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Mapping

import numpy as np

from embodied.policies.vla import VLAConfig, VLAPolicy, VLASpaces
from embodied.policies.words import Words
from embodied.rollouts.processes import Workers
from embodied.vla.chunk_rollout import ChunkCollector
from embodied.vla.seats import TableConfig
from envs.table.env import TableEnv
from envs.table.language import TRAINING_WORDS
from envs.table.observations import PROPRIO, STATE
from studies.cells import Figures, main

CELLS = ["rollout"]
TABLES, CHUNKS, CHUNK, SIZE, WORKERS = 64, 16, 4, 64, 2
ROUNDS = 9
STD = math.exp(VLAConfig().log_std)


class Bare:
    """Tables `rows`, of which only physics and pictures are asked."""

    def __init__(self, rows: range) -> None:
        self._envs = [TableEnv(observe=(), image_size=SIZE) for _ in rows]
        self._rng = np.random.default_rng(rows.start)
        for row, env in zip(rows, self._envs, strict=True):
            env.reset(seed=row)

    def play(self, chunks: int) -> None:
        """Actions as a new policy draws them."""
        for _ in range(chunks):
            actions = self._rng.normal(0.0, STD, (len(self._envs), CHUNK, 4))
            for env, chunk in zip(self._envs, actions, strict=True):
                env.observe(("image",))
                for action in chunk:
                    env.world.step(action)

    def close(self) -> None:
        """Close the tables."""
        for env in self._envs:
            env.close()


def run(cell: str, options: argparse.Namespace) -> Figures:
    """Measure both in turn."""
    policy = VLAPolicy(
        VLASpaces(SIZE, ("front",), PROPRIO, STATE, 4), VLAConfig(chunk=CHUNK), Words(TRAINING_WORDS)
    )
    bare = Workers(Bare, TABLES, WORKERS)
    limits, rollouts = [], []
    table = TableConfig(count=TABLES, workers=WORKERS)
    try:
        with ChunkCollector(table, policy, chunks=CHUNKS, seed=0, step_states=True) as collector:
            for _ in range(ROUNDS + 1):  # the first one warms up
                started = time.perf_counter()
                bare.ask("play", CHUNKS)
                between = time.perf_counter()
                experience = collector.collect(policy)
                finished = time.perf_counter()
                limits.append(TABLES * CHUNKS * CHUNK / (between - started))
                rollouts.append(experience.control_steps / (finished - between))
    finally:
        bare.close()
    limit, rollout = statistics.median(limits[1:]), statistics.median(rollouts[1:])
    return {
        "limit_steps_per_second": limit,
        "rollout_steps_per_second": rollout,
        "rollout_pictures_per_second": rollout / CHUNK,
        "share": rollout / limit,
        "rounds": [list(pair) for pair in zip(limits[1:], rollouts[1:], strict=True)],
    }


def table(results: Mapping[str, Figures]) -> str:
    """The three figures."""
    lines = ["| limit, control steps/s | rollout, control steps/s | pictures/s | share |", "|---|---|---|---|"]
    for figures in results.values():
        lines.append(
            f"| {figures['limit_steps_per_second']:,.0f} | {figures['rollout_steps_per_second']:,.0f} "
            f"| {figures['rollout_pictures_per_second']:,.0f} | {figures['share']:.0%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main("table_throughput", cells=CELLS, run=run, table=table)
