"""Updates a second of IQL and CQL beside d3rlpy's, on the same data and networks, alternating in one process.

    python -m studies.offline_speed --cell iql-2

100,000 synthetic transitions (17 observations, 6 actions), batch 256, two critics, 256x256 ReLU networks, CQL with
ten sampled actions of each source. A cell is an algorithm and a number of threads; every round times d3rlpy, ours
in float32 and ours in bfloat16 one after the other, sampling included: a slow spell of the machine meets all.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from studies.cells import Figures, main

CELLS = ["iql-1", "iql-2", "cql-1", "cql-2"]
OBSERVATIONS, ACTIONS, EPISODES, LENGTH, BATCH = 17, 6, 100, 1000, 256
ROUNDS = 7
UPDATES = {"iql": 300, "cql": 40}


def run(cell: str, options: argparse.Namespace) -> Figures:
    """Medians over rounds, and the medians of the rounds' ratios to d3rlpy."""
    algorithm, _, threads = cell.partition("-")
    torch.set_num_threads(int(threads))
    data = synthetic()
    sides = {
        "d3rlpy": theirs(algorithm, data),
        "float32": ours(algorithm, data, "float32"),
        "bf16": ours(algorithm, data, "bf16"),
    }
    for step in sides.values():
        measure(step, 10)
    rounds = [{name: measure(step, UPDATES[algorithm]) for name, step in sides.items()} for _ in range(ROUNDS)]
    figures: Figures = {name: statistics.median(r[name] for r in rounds) for name in sides}
    for name in ("float32", "bf16"):
        figures[f"{name}_ratio"] = statistics.median(r[name] / r["d3rlpy"] for r in rounds)
    return figures | {"rounds": rounds, "updates_a_round": UPDATES[algorithm], "gigaflops": floor()}


def measure(step: Callable[[], object], updates: int) -> float:
    """Updates a second."""
    started = time.perf_counter()
    for _ in range(updates):
        step()
    return updates / (time.perf_counter() - started)


def floor() -> float:
    """float32 GFLOP/s of one matrix product of CQL's shape, [7936, 256] x [256, 256]."""
    left, right = torch.randn(31 * BATCH, 256), torch.randn(256, 256)
    rates = []
    for _ in range(20):
        started = time.perf_counter()
        torch.mm(left, right)
        rates.append(2 * left.shape[0] * 256 * 256 / (time.perf_counter() - started) / 1e9)
    return statistics.median(rates)


def synthetic() -> dict[str, np.ndarray]:
    """Random observations, actions that depend on them; every tenth episode terminates, the others are cut."""
    rng = np.random.default_rng(0)
    count = EPISODES * LENGTH
    observations = rng.standard_normal((count, OBSERVATIONS), dtype=np.float32)
    weights = rng.standard_normal((OBSERVATIONS, ACTIONS)).astype(np.float32) * 0.3
    noise = 0.3 * rng.standard_normal((count, ACTIONS)).astype(np.float32)
    actions = np.clip(np.tanh(observations @ weights + noise), -0.999, 0.999).astype(np.float32)
    rewards = (observations[:, 0] - (actions**2).sum(1)).astype(np.float32)
    ends = np.arange(1, count + 1) % LENGTH == 0
    terminated = np.arange(1, count + 1) % (10 * LENGTH) == 0
    return {
        "observations": observations,
        "actions": actions,
        "rewards": rewards,
        "terminals": terminated.astype(np.float32),
        "timeouts": (ends & ~terminated).astype(np.float32),
    }


def theirs(algorithm: str, data: Mapping[str, np.ndarray]) -> Callable[[], object]:
    """d3rlpy's update, as its fit() makes it."""
    import d3rlpy
    import structlog
    from d3rlpy.models.encoders import VectorEncoderFactory

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    encoder = VectorEncoderFactory([256, 256])
    common: dict[str, Any] = {
        "batch_size": BATCH,
        "actor_encoder_factory": encoder,
        "critic_encoder_factory": encoder,
    }
    if algorithm == "iql":
        config: Any = d3rlpy.algos.IQLConfig(**common, value_encoder_factory=encoder)
    else:
        config = d3rlpy.algos.CQLConfig(**common, n_action_samples=10)
    dataset = d3rlpy.dataset.MDPDataset(**data)
    learner = config.create(device="cpu:0")
    learner.build_with_dataset(dataset)
    return lambda: learner.update(dataset.sample_transition_batch(BATCH))


def ours(algorithm: str, data: Mapping[str, np.ndarray], precision: str) -> Callable[[], object]:
    """The update of embodied.train_iql or train_cql, and the drawing of its batch."""
    from embodied.datasets.episode import Episode
    from embodied.logged.offline import Inputs, OfflineConfig, adam, new_networks, new_policy, offline_data
    from embodied.logged.offline import precision as in_precision
    from embodied.rollouts.workers import EnvironmentConfig, environment_spec
    from policy_core import cql, iql
    from policy_core.sac import Coefficient, Optimizers

    config = OfflineConfig(environment=EnvironmentConfig(id="HalfCheetah-v5"), precision=precision)  # type: ignore[arg-type]
    episodes = []
    for start in range(0, EPISODES * LENGTH, LENGTH):
        rows = slice(start, start + LENGTH)
        ended = bool(data["terminals"][start + LENGTH - 1])
        columns = (data["observations"][rows], data["actions"][rows], data["rewards"][rows])
        episodes.append(Episode(*columns, terminated=ended, truncated=not ended))
    inputs = Inputs(environment_spec(config.environment), episodes)
    policy = new_policy(config, inputs, "bounded" if algorithm == "iql" else "squashed")
    networks = new_networks(config, policy)
    logged = offline_data(config, inputs, policy)
    generator = torch.Generator().manual_seed(0)
    if algorithm == "iql":
        optimizer = adam([*policy.parameters(), *networks.critic.parameters()], 3e-4)
        traced = iql.traced_gradient(networks)

        def step() -> None:
            batch, _, _ = logged.draw(BATCH, generator)
            with in_precision(config):
                iql.update(networks, optimizer, batch, iql.IQLConfig(), traced=traced)

        return step
    temperature = Coefficient(1.0)
    of_critic = adam(networks.critic.parameters(), 3e-4)
    optimizers = Optimizers(adam(policy.parameters(), 1e-4), of_critic, adam(temperature.parameters(), 1e-4))

    def conservative_step() -> None:
        batch, _, _ = logged.draw(BATCH, generator)
        with in_precision(config):
            cql.update(networks, temperature, optimizers, batch, cql.CQLConfig(), generator=generator)

    return conservative_step


def table(results: Mapping[str, Figures]) -> str:
    """Updates a second, and the ratio to d3rlpy."""
    lines = ["| algorithm, threads | d3rlpy | ours, float32 | ours, bf16 |", "|---|---|---|---|"]
    for cell, figures in results.items():
        shown = [f"{figures[name]:.1f} ({figures[name + '_ratio']:.2f}x)" for name in ("float32", "bf16")]
        lines.append(f"| {cell} | {figures['d3rlpy']:.1f} | {' | '.join(shown)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main("offline_speed", cells=CELLS, run=run, table=table)
