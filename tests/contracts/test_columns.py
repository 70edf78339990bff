"""Contracts: padding changes nothing; inserting observation columns changes nothing; packing changes nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from policy_core.kl import KLConfig, kl_in_unit, kl_rewards
from policy_core.ppo import PPOConfig
from policy_core.returns import episode_returns, gae
from policy_core.rollout import Rollout, credit_decisions
from tests.contracts.bodies import LAMBDA, NAN, Body, Interleaved, same, trained, widened

EVERYTHING = PPOConfig(epochs=2, minibatch_size=4, value_clip_range=0.1, entropy_coef=0.01)
KL: dict[str, Any] = {"kl": KLConfig(coef=0.2, placement="loss", estimator="k3"), "kl_coef": 0.2}
Aggregation = Literal["decision", "episode", "constant"]
aggregations = pytest.mark.parametrize("aggregation", ["decision", "episode", "constant"])


def padded(rollout: Rollout) -> Rollout:
    """Two columns of padding before, three after."""
    width = rollout.shape[1]
    return widened(rollout, [None, None, *range(width), None, None, None], inside=False)


def interleaving(width: int) -> list[int | None]:
    """A new column after every third one, and three in a row after the sixth."""
    columns: list[int | None] = []
    for column in range(width):
        columns.append(column)
        columns += [None] * (3 if column == 6 else int(column % 3 == 2))
    return columns


def same_advantages(one: Rollout, other: Rollout) -> None:
    for ours, theirs in zip(gae(one, gae_lambda=LAMBDA), gae(other, gae_lambda=LAMBDA), strict=True):
        same(ours[one.mask], theirs[other.mask])
        assert not theirs[~other.mask].any()


def same_statistics(one: Rollout, other: Rollout) -> None:
    """Returns of episodes and the KL to the reference, in the reward and in both units."""
    same(episode_returns(one)[0], episode_returns(other)[0])
    penalized = []
    for rollout in (one, other):
        assert rollout.ref_log_probs is not None
        rewards, kl = kl_rewards(
            rewards=rollout.rewards,
            old_log_probs=rollout.old_log_probs,
            ref_log_probs=rollout.ref_log_probs,
            mask=rollout.mask,
            coef=0.3,
        )
        units = [
            kl_in_unit(kl, mask=rollout.mask, episode=rollout.episode, unit=unit)
            for unit in ("episode", "decision")
        ]
        penalized.append((rewards[rollout.mask], torch.tensor(units)))
    for ours, theirs in zip(*penalized, strict=True):
        same(ours, theirs)


@aggregations
def test_padding_changes_nothing(body: Body, aggregation: Aggregation) -> None:
    wide = padded(body.rollout)
    wide.validate()
    same_advantages(body.rollout, wide)
    same_statistics(body.rollout, wide)
    config = replace(EVERYTHING, aggregation=aggregation, aggregation_constant=9.0)
    plain, metrics = trained(body.policy, body.rollout, config, **KL)
    weights, wide_metrics = trained(body.policy, wide, config, **KL)
    same(weights, plain)
    assert wide_metrics == pytest.approx(metrics, abs=1e-10)


@aggregations
def test_inserting_observation_columns_changes_nothing(body: Body, aggregation: Aggregation) -> None:
    columns = interleaving(body.rollout.shape[1])
    wide = widened(body.rollout, columns, inside=True)
    wide.validate()
    same_advantages(body.rollout, wide)
    same_statistics(body.rollout, wide)
    config = replace(EVERYTHING, aggregation=aggregation, aggregation_constant=9.0)
    plain, metrics = trained(body.policy, body.rollout, config, **KL)
    weights, wide_metrics = trained(Interleaved(body.policy, columns), wide, config, **KL)
    same(weights, plain)
    assert wide_metrics == pytest.approx(metrics, abs=1e-10)


def test_rewards_and_cuts_on_inserted_columns_come_back_to_their_decisions(body: Body) -> None:
    """A column after every old one takes half of its decision's reward and its cut, as an environment's answer."""
    columns = [column for old in range(body.rollout.shape[1]) for column in (old, None)]
    wide = widened(body.rollout, columns, inside=True)
    decided = wide.rewards[:, ::2]
    answered = torch.where(wide.mask[:, ::2], decided / 2, 0.0)

    def moved(flag: Tensor) -> Tensor:
        return torch.stack([torch.zeros_like(flag[:, ::2]), flag[:, ::2]], dim=2).flatten(1)

    split = replace(
        wide,
        rewards=torch.stack([decided - answered, answered], dim=2).flatten(1),
        terminated=moved(wide.terminated),
        truncated=moved(wide.truncated),
    )
    with pytest.raises(ValueError, match="a cut lies on a masked column"):
        split.validate()
    credited = credit_decisions(split)
    credited.validate()
    same_advantages(body.rollout, credited)
    same_statistics(body.rollout, credited)


def test_a_row_of_several_episodes_is_its_episodes_apart(body: Body) -> None:
    """Rows laid end to end have the advantages that they have one by one."""
    rollout = body.rollout
    cut = rollout.terminated | rollout.truncated
    last = rollout.mask & (rollout.mask.flip(1).cumsum(1).flip(1) == 1)
    assert rollout.next_values is not None
    rollout = replace(rollout, truncated=rollout.truncated | (last & ~cut))  # every row ends in a cut
    rollout.validate()
    rows, width = rollout.shape
    ids = rollout.episode + torch.arange(rows).unsqueeze(1) * width

    def laid(name: str) -> Any:
        column = getattr(rollout, name)
        return column if column is None else column.reshape(1, rows * width, *column.shape[2:])

    names = ("rewards", "terminated", "truncated", "mask", "discount", "old_log_probs", "values", "next_values")
    packed = Rollout(
        observations=laid("rewards"),
        actions=laid("rewards"),
        episode=torch.where(rollout.episode < 0, -1, ids).reshape(1, -1),
        **{name: laid(name) for name in names},
    )
    packed.validate()
    same_advantages(rollout, packed)
    same(episode_returns(rollout)[0], episode_returns(packed)[0])


def test_decisions_one_by_one_are_the_rows(body: Body) -> None:
    """A step on all decisions at once is the same whether they come in rows or, for a policy that judges decisions
    one by one, alone; padding and observation columns fall away."""
    wide = widened(body.rollout, interleaving(body.rollout.shape[1]), inside=True)
    advantages, returns = gae(wide, gae_lambda=LAMBDA)
    mask = wide.mask
    alone = wide.decisions()
    assert alone.shape == (int(mask.sum()), 1)
    same(alone.rewards.squeeze(1), body.rollout.rewards[body.rollout.mask])
    same(alone.old_log_probs.squeeze(1), body.rollout.old_log_probs[body.rollout.mask])
    if isinstance(body.rollout.observations, torch.Tensor):  # tokens need their row
        config = replace(EVERYTHING, epochs=1, minibatch_size=10_000)
        plain, _ = trained(body.policy, body.rollout, config, **KL)
        options: dict[str, Any] = {
            "advantages": advantages[mask].unsqueeze(1),
            "returns": returns[mask].unsqueeze(1),
        }
        same(trained(body.policy, alone, config, **options, **KL)[0], plain)


def test_nan_in_masked_columns_changes_nothing(body: Body) -> None:
    wide = widened(body.rollout, interleaving(body.rollout.shape[1]), inside=True)
    spoiled = replace(wide, rewards=torch.where(wide.mask, wide.rewards, NAN))
    same_advantages(body.rollout, spoiled)
