"""What the robot recipes that learn from their own episodes have in common, whatever the policy."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from embodied.rollouts.processes import Workers
from envs.stepper import EpisodeRecord
from experiment.errors import UserError
from policy_core.kl import KLConfig, kl_in_unit, kl_rewards
from policy_core.optimizer import NonFiniteLoss
from policy_core.rollout import Rollout


def charge_kl(
    rollout: Rollout, config: KLConfig, coef: float, *, decisions: float | None = None
) -> tuple[Rollout, dict[str, float]]:
    """The rollout with the KL penalty in its rewards, where the configuration puts it there; and metrics.

    decisions   of a whole episode, on average, where rollouts cut episodes; None: the rollout's episodes are whole

    objective/kl is measured in `config.unit`, as the controller wants it; no metrics without a reference.
    """
    if rollout.ref_log_probs is None:
        return rollout, {}
    in_reward = config.placement == "reward"
    penalized, divergence = kl_rewards(
        rewards=rollout.rewards,
        old_log_probs=rollout.old_log_probs,
        ref_log_probs=rollout.ref_log_probs,
        mask=rollout.mask,
        coef=coef if in_reward else 0.0,
        estimator=config.estimator if in_reward else "k1",
        factor_mask=rollout.factor_mask,
    )
    parts = {"mask": rollout.mask, "episode": rollout.episode}
    if config.unit == "episode" and decisions is not None:
        measured = decisions * kl_in_unit(divergence, unit="decision", **parts)
    else:
        measured = kl_in_unit(divergence, unit=config.unit, **parts)
    return replace(rollout, rewards=penalized), {"objective/kl": measured, "objective/kl_coef": coef}


def decisions_of(recent: Sequence[EpisodeRecord], *, steps_a_decision: float = 1.0) -> float | None:
    """Decisions of an episode, on average over the latest that have ended; None where none has."""
    return float(np.mean([record.length for record in recent])) / steps_a_decision if recent else None


@contextlib.contextmanager
def stopping_on_nan(update: int, *, setting: str = "ppo.learning_rate") -> Iterator[None]:
    """Turn a NaN or infinity in an update into one line for the user; the weights were not spoiled."""
    try:
        yield
    except NonFiniteLoss as error:
        rate = error.setting or setting
        raise UserError(f"update {update}: {error}; lower {rate}, or go on from the last checkpoint") from error


def continue_environments(workers: Workers, state: Mapping[str, Any]) -> bool:
    """Put the environments of a checkpoint back, or say that new episodes begin; returns whether they went back."""
    workers.set_state(state)
    if obstacle := workers.capture_obstacle():
        print(f"resuming with new episodes, not bit for bit: {obstacle}", file=sys.stderr, flush=True)
        return False
    return True


def episode_metrics(recent: Sequence[EpisodeRecord], total: int) -> dict[str, float]:
    """Means over the latest training episodes (of the exploring policy), under SB3's names; and how many in all."""
    metrics = {"episodes": float(total)}
    if recent:
        metrics["rollout/ep_rew_mean"] = float(np.mean([record.episode_return for record in recent]))
        metrics["rollout/ep_len_mean"] = float(np.mean([record.length for record in recent]))
        if any(record.success_once is not None for record in recent):
            metrics["env/success_once"] = float(np.mean([bool(record.success_once) for record in recent]))
            metrics["env/success_at_end"] = float(np.mean([bool(record.success_at_end) for record in recent]))
    return metrics
