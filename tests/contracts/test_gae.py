"""Contracts: GAE equals stable-baselines3's on gathered data, and a hand-computed table on padded text."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from policy_core.returns import gae, next_values_of
from policy_core.rollout import Rollout, credit_decisions
from tests.contracts.bodies import GAMMA, Body, same
from tests.policy_core.referees import sb3_gae


@pytest.mark.parametrize("gae_lambda", [0.0, 0.9, 1.0])
def test_gae_equals_stable_baselines3(body: Body, gae_lambda: float) -> None:
    """Row by row, for its buffer knows neither padding nor observation columns: it is given the decisions only."""
    rollout = body.rollout
    assert rollout.values is not None
    assert rollout.next_values is not None
    advantages, returns = gae(rollout, gae_lambda=gae_lambda)
    assert (rollout.terminated | rollout.truncated).any()
    for row in range(rollout.shape[0]):
        mask = rollout.mask[row]

        def decisions(tensor: Tensor, row: int = row, mask: Tensor = mask) -> Tensor:
            return tensor[row, mask].unsqueeze(0)

        expected = sb3_gae(
            rewards=decisions(rollout.rewards),
            values=decisions(rollout.values),
            terminated=decisions(rollout.terminated),
            truncated=decisions(rollout.truncated),
            final_values=decisions(rollout.next_values),
            gamma=GAMMA,
            gae_lambda=gae_lambda,
        )
        same(decisions(advantages), expected[0])
        same(decisions(returns), expected[1])


def test_gae_of_padded_text_with_several_episodes_in_a_row() -> None:
    """Two conversations packed into one row and a third, padded, in another; gamma 0.8, lambda 0.5.

    The tool's reward and its end of the conversation fall on its own tokens, and go to the token before.

    row 0:  <user> a b <tool> c <tool ends> | <user> d e          the second conversation is cut by the row
    row 1:  <pad>  <pad> <user> f g <pad> ...                     cut by the length limit, bootstrapped
    """
    text = [
        ["u", "a", "b", "t", "c", "T", "u", "d", "e"],
        [".", ".", "u", "f", "g", ".", ".", ".", "."],
    ]
    sampled = torch.tensor([[token in "abcdefg" for token in row] for row in text])
    values = {"a": 1.0, "b": 2.0, "c": 5.0, "d": 2.0, "e": 4.0, "f": 3.0, "g": 5.0}
    rollout = Rollout(
        observations=torch.zeros(2, 9),
        actions=torch.zeros(2, 9),
        #                      u    a    b    t    c    T    u    d    e
        rewards=torch.tensor([[0.0, 0.0, 1.0, 2.0, 0.0, 4.0, 0.0, 1.0, 0.0], [0.0] * 3 + [1.0, 2.0] + [0.0] * 4]),
        terminated=torch.tensor([[token == "T" for token in row] for row in text]),
        truncated=torch.tensor([[token == "g" for token in row] for row in text]),
        mask=sampled,
        discount=torch.full((2, 9), 0.8),
        old_log_probs=torch.zeros(2, 9),
        episode=torch.tensor([[0] * 6 + [1] * 3, [-1, -1, 0, 0, 0, -1, -1, -1, -1]]),
        values=torch.tensor([[values.get(token, 99.0) for token in row] for row in text]),
    )
    rollout = credit_decisions(rollout)
    rollout.validate()
    assert rollout.values is not None
    final_values = torch.full((2, 9), 99.0)
    final_values[0, 8], final_values[1, 4] = 10.0, 2.5
    next_values = next_values_of(
        values=rollout.values,
        mask=rollout.mask,
        episode=rollout.episode,
        terminated=rollout.terminated,
        final_values=final_values,
    )
    advantages, returns = gae(replace(rollout, next_values=next_values), gae_lambda=0.5)
    # rewards after crediting: a 0, b 1 + 2 (its tool), c 4 (the tool that ends it), d 1, e 0, f 1, g 2
    # c: 4 - 5 = -1                     terminated: no bootstrap
    # b: 3 + 0.8 * 5 - 2 = 5            + 0.4 * -1   = 4.6     over the tool's token, neither discounted nor decayed
    # a: 0 + 0.8 * 2 - 1 = 0.6          + 0.4 * 4.6  = 2.44
    # e: 0 + 0.8 * 10 - 4 = 4           the row ends: bootstraps from what follows
    # d: 1 + 0.8 * 4 - 2 = 2.2          + 0.4 * 4    = 3.8
    # g: 2 + 0.8 * 2.5 - 5 = -1         truncated: bootstraps
    # f: 1 + 0.8 * 5 - 3 = 2            + 0.4 * -1   = 1.6
    expected = {"a": 2.44, "b": 4.6, "c": -1.0, "d": 3.8, "e": 4.0, "f": 1.6, "g": -1.0}
    table = torch.tensor([[expected.get(token, 0.0) for token in row] for row in text])
    same(advantages, table, atol=1e-12)
    same(returns, torch.where(sampled, table + rollout.values, 0.0), atol=1e-12)
