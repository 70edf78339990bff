"""What an evaluation says: success with Wilson intervals, return with a bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from envs.stepper import EpisodeRecord
from experiment.statistics import bootstrap_interval, wilson_interval

VALIDATION_SEEDS = 10_000_000
"""Episodes played during training, to watch it and to choose its best checkpoint, are reset from here on."""
TEST_SEEDS = 20_000_000
"""Episodes that are reported are reset from here on; training's own seeds stay below 10 million."""


def seeds(first: int, count: int) -> list[int]:
    """`count` consecutive episode seeds."""
    return list(range(first, first + count))


def summarize(records: Sequence[EpisodeRecord], *, prefix: str = "eval") -> dict[str, float]:
    """Means over episodes with 95% intervals (`_low`, `_high`); success only where the environment reports it."""
    returns = np.array([record.episode_return for record in records], dtype=np.float64)
    low, high = bootstrap_interval(returns)
    summary = {
        "episodes": float(len(records)),
        "mean_reward": float(returns.mean()),
        "mean_reward_low": low,
        "mean_reward_high": high,
        "ep_len_mean": float(np.mean([record.length for record in records])),
    }
    for name in ("success_once", "success_at_end"):
        outcomes = [getattr(record, name) for record in records]
        if all(outcome is not None for outcome in outcomes):
            successes = sum(map(bool, outcomes))
            low, high = wilson_interval(successes, len(outcomes))
            summary |= {name: successes / len(outcomes), f"{name}_low": low, f"{name}_high": high}
    return {f"{prefix}/{name}": value for name, value in summary.items()}
