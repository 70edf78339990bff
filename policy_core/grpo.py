"""Advantages from groups of episodes instead of a critic, for PPO's clipped update.

A group is a set of episodes that started alike: answers to one prompt, or attempts at one task from one seed.
The functions differ in one line each; `GRPOConfig.advantage` picks one, and a recipe calls `ppo.update` with
`returns=None`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from policy_core.masking import FLAT
from policy_core.returns import episode_returns, rest_of_episode
from policy_core.rollout import Rollout

Advantage = Literal["grpo", "rloo", "dr_grpo", "reinforce_pp", "reinforce_pp_baseline"]


@dataclass(frozen=True)
class GRPOConfig:
    """advantage: how answers are compared, each a function below; group_size: episodes sampled per prompt (or task
    and seed), 1 only for "reinforce_pp", whose baseline is the batch."""

    advantage: Advantage = "grpo"
    group_size: int = 8

    def __post_init__(self) -> None:
        if self.group_size < 1 or (self.group_size == 1 and self.advantage != "reinforce_pp"):
            raise ValueError(f"grpo.group_size must be at least 2, got {self.group_size}: one answer has no peer")


def is_flat(returns: Tensor, group: Tensor) -> Tensor:
    """Whether an episode's group earned one and the same return: max - min <= 1e-6 * max(1, |max|).

    returns, group [E] -> [E] bool. Its advantages are exactly 0: an optimizer that scales gradients, as Adam does,
    would make a step of the rounding.
    """
    _, inverse = torch.unique(group, return_inverse=True)
    groups = int(inverse.max()) + 1 if inverse.numel() else 0
    most = returns.new_full((groups,), -torch.inf).scatter_reduce(0, inverse, returns, "amax")
    least = returns.new_full((groups,), torch.inf).scatter_reduce(0, inverse, returns, "amin")
    return (most - least <= FLAT * most.abs().clamp(min=1.0))[inverse]


def _group_sums(returns: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """returns, group [E] -> returns, size, sum and centred sum of squares of each episode's group, [E] float64.

    Returns of flat groups read 0, whose mean is 0 to the bit.
    """
    returns = torch.where(is_flat(returns, group), 0.0, returns.double())
    _, inverse = torch.unique(group, return_inverse=True)
    groups = int(inverse.max()) + 1 if inverse.numel() else 0
    ones = torch.ones_like(returns)
    size = returns.new_zeros(groups).index_add_(0, inverse, ones)[inverse]
    total = returns.new_zeros(groups).index_add_(0, inverse, returns)[inverse]
    squares = returns.new_zeros(groups).index_add_(0, inverse, (returns - total / size).square())[inverse]
    return returns, size, total, squares


def grpo(returns: Tensor, group: Tensor) -> Tensor:
    """(R - mean) / (std + 1e-4) within the group, std with n - 1 (Shao 2024, 2402.03300 eq. 4). [E] -> [E]."""
    returns, size, total, squares = _group_sums(returns, group)
    std = (squares / (size - 1).clamp(min=1)).sqrt()
    return (returns - total / size) / (std + 1e-4)


def rloo(returns: Tensor, group: Tensor) -> Tensor:
    """R less the mean of the group's *other* episodes (Ahmadian 2024, 2402.14740 eq. 8). [E] -> [E]; alone: 0."""
    returns, size, total, _ = _group_sums(returns, group)
    others = (total - returns) / (size - 1).clamp(min=1)
    return torch.where(size > 1, returns - others, 0.0)


def dr_grpo(returns: Tensor, group: Tensor) -> Tensor:
    """R - mean, not divided by the standard deviation (Liu 2025, 2503.20783). [E] -> [E].

    Its other half is ppo.aggregation "constant".
    """
    returns, size, total, _ = _group_sums(returns, group)
    return returns - total / size


def _over_batch(values: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 (n - 1) over all values; 0 where all are the same. [N] -> [N]."""
    if is_flat(values, torch.zeros_like(values, dtype=torch.long)).all():
        return torch.zeros_like(values)
    return (values - values.mean()) / values.std().clamp(min=1e-4)


def reinforce_pp(rest: Tensor, mask: Tensor) -> Tensor:
    """REINFORCE++: what is earned from a decision on, normalised over the batch's decisions (Hu 2025, 2501.03262
    eq. 8 to 10). rest [B, T] (`returns.rest_of_episode`), mask [B, T] -> [B, T], 0 where masked.

    A KL in the reward is charged to its own token and those before, never to those after. An easy prompt's answers
    all gain and a hard one's all lose: the baseline does not know the prompt.
    """
    advantages = torch.zeros_like(rest)
    advantages[mask] = _over_batch(rest[mask].double()).to(rest)
    return advantages


def reinforce_pp_baseline(returns: Tensor, group: Tensor) -> Tensor:
    """REINFORCE++ with baseline: R less its group's mean, then normalised over the batch (2501.03262). [E] -> [E].

    Unlike `grpo`'s, its scale does not blow up the groups whose returns hardly differ.
    """
    return _over_batch(dr_grpo(returns, group)).masked_fill(is_flat(returns, group), 0.0)


# (returns [E], group [E]) -> advantages of whole episodes [E], computed in float64, and given so
ADVANTAGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grpo": grpo,
    "rloo": rloo,
    "dr_grpo": dr_grpo,
    "reinforce_pp_baseline": reinforce_pp_baseline,
}


def overlong_punishment(lengths: Tensor, *, max_length: int, cache: int) -> Tensor:
    """What to add to the reward of a long answer, between 0 and -1 (DAPO, Yu 2025, 2503.14476 eq. 13).

    0 up to max_length - cache tokens, falling linearly to -1 at max_length, -1 beyond: an answer learns to end
    before it is cut. lengths [...] tokens -> [...] float. Raises ValueError unless 0 < cache <= max_length.
    """
    if not 0 < cache <= max_length:
        raise ValueError(f"overlong punishment needs 0 < cache <= max_length, got {cache} and {max_length}")
    return ((max_length - cache - lengths) / cache).clamp(-1.0, 0.0)


def group_advantages(
    rollout: Rollout, *, config: GRPOConfig, scores: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Every decision gets its episode's advantage over its group ("reinforce_pp": its own over the batch). Returns
    [B, T] and metrics.

    scores  [B, T] rewards before a KL was taken off them; None = the rollout's rewards. Where all that a standard
            deviation is taken over ("grpo": a group, "reinforce_pp": the batch, its variant: all groups) have one
            and the same score, advantages are 0: nothing but the KL differs, and its hundredths would be scaled up
            to full strength. "rloo" and "dr_grpo" divide by none: there the KL pulls in flat groups, too.

    Metrics: frac_reward_zero_std (share of episodes whose group is flat, see `is_flat`: no signal),
    reward_std (mean over episodes of their group's standard deviation).
    Raises ValueError if the rollout has no groups.
    """
    if rollout.group is None:
        raise ValueError("group advantages need rollout.group")
    returns, index, group = episode_returns(rollout)
    earned = returns if scores is None else episode_returns(replace(rollout, rewards=scores))[0]
    flat = is_flat(earned, group)
    spread = torch.zeros_like(rollout.rewards)
    if config.advantage == "reinforce_pp":
        if scores is None or not is_flat(earned, torch.zeros_like(group)).all():
            spread = reinforce_pp(rest_of_episode(rollout), rollout.mask)
    else:
        kl_alone = {"grpo": flat, "reinforce_pp_baseline": flat.all()}.get(config.advantage, torch.tensor(False))
        advantages = torch.where(kl_alone, 0.0, ADVANTAGES[config.advantage](returns, group)).to(returns)
        spread[rollout.mask] = advantages[index[rollout.mask]]
    _, size, _, squares = _group_sums(returns, group)
    std = (squares / (size - 1).clamp(min=1)).sqrt()
    return spread, {"frac_reward_zero_std": flat.float().mean(), "reward_std": std.mean()}


def with_signal(rollout: Rollout, advantages: Tensor) -> tuple[Rollout, Tensor]:
    """The rows with a group that has an advantage, which a flat one has not; all of them if there is none.

    Raises ValueError if the rollout has no groups.
    """
    if rollout.group is None:
        raise ValueError("groups with signal need rollout.group")
    useful = torch.isin(rollout.group, rollout.group[rollout.mask & (advantages != 0)].unique())
    rows = (rollout.mask & useful).any(1).nonzero().squeeze(1)
    if rows.numel() == 0:
        return rollout, advantages
    return rollout.select(rows), advantages[rows]
