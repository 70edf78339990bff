"""What another engine sampled counts as much as it should: by hand, in expectation, and in the update."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from policy_core.masking import normalize
from policy_core.mismatch import importance_weights, weighted
from policy_core.ppo import PPOConfig
from policy_core.returns import gae
from tests.policy_core.helpers import NAN, TinyPolicy, close, flags, make_rollout, sampled_rollout
from tests.policy_core.test_ppo_update import ONE_STEP, step_of


def test_weights_by_hand() -> None:
    """exp of the difference, at most the cap, 1 on what was not decided, whatever stands there."""
    old = torch.tensor([[math.log(0.5), math.log(0.2), NAN]])
    behaviour = torch.tensor([[math.log(0.4), math.log(0.05), 3.0]])
    rollout = make_rollout([[0.0, 0.0, 0.0]], old_log_probs=old, behaviour_log_probs=behaviour, mask=flags("110"))
    found = importance_weights(rollout, level="decision", cap=2.0)
    assert found is not None
    close(found, [[1.25, 2.0, 1.0]], atol=1e-7)
    assert importance_weights(replace(rollout, behaviour_log_probs=None), level="decision", cap=2.0) is None


def test_factors_by_hand() -> None:
    """A decision's weight is the product of its executed factors'; at the factors' level each has its own."""
    gap = torch.tensor([[[0.1, 0.2], [0.3, -0.5]]])
    rollout = make_rollout(
        [[0.0, 0.0]],
        old_log_probs=gap,
        behaviour_log_probs=torch.zeros_like(gap),
        factor_mask=torch.tensor([[[True, True], [True, False]]]),
    )
    by_decision = importance_weights(rollout, level="decision", cap=10.0)
    by_factor = importance_weights(rollout, level="factor", cap=10.0)
    assert by_decision is not None
    assert by_factor is not None
    close(by_decision, torch.tensor([[0.3, 0.3]]).exp(), atol=1e-7)
    close(by_factor, torch.tensor([[[0.1, 0.2], [0.3, 0.0]]]).exp(), atol=1e-7)
    assert weighted(torch.ones(1, 2), by_factor).shape == (1, 2, 2)
    assert weighted(torch.ones(1, 2, 2), by_decision).shape == (1, 2, 2)


def test_weighted_samples_of_another_engine_have_the_policys_gradient() -> None:
    """Sum over outcomes of q w A grad log p is that of p A grad log p, where no weight is cut."""
    logits = torch.tensor([0.2, -0.4, 1.0], requires_grad=True)
    log_p = torch.log_softmax(logits, 0)
    q = torch.softmax(torch.tensor([0.5, 0.0, 0.3]), 0)
    advantages = torch.tensor([1.0, -2.0, 0.5])
    rollout = make_rollout([[0.0, 0.0, 0.0]], old_log_probs=log_p.detach()[None], behaviour_log_probs=q.log()[None])
    weights = importance_weights(rollout, level="decision", cap=100.0)
    assert weights is not None
    (found,) = torch.autograd.grad(
        (q * weighted(advantages[None], weights)[0] * log_p).sum(), logits, retain_graph=True
    )
    (expected,) = torch.autograd.grad((log_p.detach().exp() * advantages * log_p).sum(), logits)
    close(found, expected, atol=1e-7)


@pytest.mark.parametrize("level", ["decision", "factor"])
@pytest.mark.parametrize("normalised", [False, True])
def test_the_update_weighs_the_surrogate_and_nothing_else(
    level: Literal["decision", "factor"], normalised: bool
) -> None:
    """As an update whose (normalised) advantages are multiplied by hand; entropy and values are as before."""
    policy = TinyPolicy()
    rollout = sampled_rollout(policy)
    config = replace(ONE_STEP, ratio_level=level, normalize_advantages=normalised, entropy_coef=0.3)
    other = replace(
        rollout, behaviour_log_probs=rollout.old_log_probs + 0.2 * torch.randn_like(rollout.old_log_probs)
    )
    weights = importance_weights(other, level=level, cap=1.1)
    assert weights is not None
    assert float(weights.max()) == pytest.approx(1.1)

    def step(given: object, **changes: object) -> Tensor:
        return step_of(policy, given, replace(config, **changes))  # type: ignore[arg-type]

    moved = step(other, mismatch_cap=1.1)
    advantages, _ = gae(rollout, gae_lambda=0.9)
    plain = normalize(advantages, rollout.mask) if normalised else advantages
    by_hand = replace(config, normalize_advantages=False)
    whole = replace(rollout, factor_mask=torch.ones_like(rollout.old_log_probs, dtype=torch.bool))
    close(moved, step_of(policy, whole, by_hand, advantages=weighted(plain, weights)), atol=1e-10)
    assert not torch.allclose(moved, step(rollout), atol=1e-4)
    torch.testing.assert_close(step(other, mismatch_cap=None), step(rollout))
    same = replace(rollout, behaviour_log_probs=rollout.old_log_probs)
    torch.testing.assert_close(step(same, mismatch_cap=1.1), step(rollout))
    torch.testing.assert_close(step(other, mismatch_cap=1.1, micro_batch_size=1), moved)


def test_a_cap_below_1_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ppo\.mismatch_cap must be at least 1"):
        PPOConfig(mismatch_cap=0.5)
