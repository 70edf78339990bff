"""Staying near a reference policy: KL estimators, the penalty as a reward, and the adaptive coefficient.

All estimators are of KL(policy || reference) from samples of the policy (Schulman, "Approximating KL
divergence", 2020), with r = log policy - log reference:

    k1 = r                  unbiased, may be negative; the right one for a penalty in the reward
    k2 = r**2 / 2           biased, but its gradient is that of the KL: the right one for a loss
    k3 = exp(-r) - 1 + r    unbiased and never negative; its gradient is that of KL(reference || policy)

k1 in a loss has a gradient of mean zero, so it is refused there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from policy_core.masking import episode_index

Estimator = Literal["k1", "k2", "k3"]


@dataclass(frozen=True)
class KLConfig:
    """How far the policy may go from its reference.

    coef        nats to reward (or loss): initial coefficient; 0 switches the term off
    placement   "reward": -coef * k on every decision, before advantages (Ziegler 2019); "loss": + coef * k
    estimator   see the module; "k1" for the reward, "k2" or "k3" for the loss
    target      nats per `unit` that an adaptive coefficient steers to; None keeps it fixed
    unit        "episode": KL summed over an episode's decisions (Ziegler's); "decision": mean per decision
    horizon     episodes over which the controller corrects
    """

    coef: float = 0.0
    placement: Literal["reward", "loss"] = "reward"
    estimator: Estimator = "k1"
    target: float | None = None
    unit: Literal["episode", "decision"] = "episode"
    horizon: float = 10_000.0

    def __post_init__(self) -> None:
        if self.coef < 0:
            raise ValueError(f"kl.coef must not be negative, got {self.coef}")
        if self.target is not None and self.coef == 0:
            raise ValueError("kl.target needs a kl.coef above 0 to start from")
        if self.horizon <= 0 or (self.target is not None and self.target <= 0):
            raise ValueError(f"kl.target and kl.horizon must be positive, got {self.target} and {self.horizon}")
        if self.placement == "loss" and self.estimator == "k1":
            raise ValueError("kl.estimator k1 has no gradient in the loss: use k2 or k3")


def kl_estimate(*, log_probs: Tensor, ref_log_probs: Tensor, estimator: Estimator) -> Tensor:
    """Per-sample estimate of KL(policy || reference); equal shapes in and out."""
    log_ratio = log_probs - ref_log_probs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    return torch.expm1(-log_ratio) + log_ratio


def per_decision(values: Tensor, factor_mask: Tensor | None = None) -> Tensor:
    """[B, T] as it is; [B, T, F] summed over the factors that were executed -> [B, T]."""
    if values.dim() == 2:
        return values
    if factor_mask is not None:
        values = torch.where(factor_mask, values, 0.0)
    return values.sum(-1)


def kl_rewards(
    *,
    rewards: Tensor,
    old_log_probs: Tensor,
    ref_log_probs: Tensor,
    mask: Tensor,
    coef: float,
    estimator: Estimator = "k1",
    factor_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rewards less `coef` times the KL of each decision (Ziegler 2019, 1909.08593, eq. 2).

    rewards, mask [B, T]; log-probs [B, T] or [B, T, F]. Returns the rewards and the KL in nats, [B, T], 0 where
    masked.
    """
    estimate = kl_estimate(log_probs=old_log_probs, ref_log_probs=ref_log_probs, estimator=estimator)
    kl = torch.where(mask, per_decision(estimate, factor_mask), 0.0)
    return rewards - coef * kl, kl


def kl_in_unit(kl: Tensor, *, mask: Tensor, episode: Tensor, unit: Literal["episode", "decision"]) -> float:
    """Mean KL per episode (summed over its decisions) or per decision, in nats; all tensors [B, T]."""
    total = float(torch.where(mask, kl, 0.0).sum())
    count = episode_index(mask, episode)[1] if unit == "episode" else int(mask.sum())
    return total / max(count, 1)


class KLController:
    """The KL coefficient: fixed, or steered proportionally to a target (Ziegler 2019, section 2.2).

    Each update multiplies the coefficient by 1 + clip(kl / target - 1, -0.2, 0.2) * min(episodes / horizon, 1).
    `kl` is in nats per `config.unit`, the unit of `config.target`.
    """

    def __init__(self, config: KLConfig) -> None:
        self.config = config
        self.coef = config.coef

    def update(self, kl: float, *, episodes: int) -> float:
        """Feed what was measured over `episodes` episodes; returns the new coefficient."""
        if self.config.target is not None:
            error = min(max(kl / self.config.target - 1.0, -0.2), 0.2)
            self.coef *= 1.0 + error * min(episodes / self.config.horizon, 1.0)
        return self.coef

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from `state_dict()`."""
        self.coef = float(state["coef"])
