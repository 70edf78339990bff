"""The replayed gradient is autograd's: the same weights after the same update, whatever the update holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from policy_core.kl import KLConfig
from policy_core.optimizer import FlatAdam
from policy_core.policy import Evaluation
from policy_core.ppo import PPOConfig, traced_gradient, update
from policy_core.returns import gae
from policy_core.rollout import Rollout
from policy_core.traced import agree
from tests.policy_core.helpers import TinyPolicy, clone, close, sampled_rollout, weights_of

# minibatches of 4 and 2 rows: two shapes, so two graphs
CONFIG = PPOConfig(epochs=2, minibatch_size=4, entropy_coef=0.01, value_clip_range=0.1)


def both_ways(policy: TinyPolicy, rollout: Rollout, *calls: dict[str, Any]) -> None:
    """A sequence of updates by autograd and by replay; weights and metrics must agree after each."""
    plain, replayed = clone(policy), clone(policy)
    advantages, returns = gae(rollout, gae_lambda=0.9)
    learners = []
    for learner in (plain, replayed):
        groups = [learner.actor_parameters(), list(learner.critic_parameters())]
        learners.append((learner, FlatAdam(groups, learning_rate=0.01)))
    traced = traced_gradient(replayed)
    for call in calls:
        found = []
        for learner, optimizer in learners:
            found.append(
                update(
                    policy=learner,
                    optimizer=optimizer,
                    rollout=rollout,
                    advantages=advantages,
                    returns=returns,
                    generator=torch.Generator().manual_seed(4),
                    traced=traced if learner is replayed else None,
                    **{"config": CONFIG, **call},
                )
            )
        assert found[1] == pytest.approx(found[0], abs=1e-10)
        close(weights_of(replayed), weights_of(plain), atol=1e-10)
    assert not torch.equal(weights_of(plain), weights_of(policy))


def test_replays_equal_autograd() -> None:
    policy = TinyPolicy()
    both_ways(policy, sampled_rollout(policy), {}, {}, {})


@pytest.mark.parametrize(
    "changes",
    [
        {"ratio_level": "factor", "dual_clip": 3.0, "clip_range_high": 0.3},
        {"micro_batch_size": 1, "aggregation": "episode"},
        {"entropy_coef": 0.0, "value_clip_range": None, "target_kl": 1e-4},
    ],
)
def test_replays_equal_autograd_for_every_kind_of_loss(changes: dict[str, Any]) -> None:
    policy = TinyPolicy()
    both_ways(policy, sampled_rollout(policy), {"config": replace(CONFIG, **changes)})


def test_categorical_policies_can_be_replayed() -> None:
    policy = TinyPolicy(kind="categorical", factors=3)
    both_ways(policy, sampled_rollout(policy), {})


def test_the_coefficient_of_the_kl_may_change_between_replays() -> None:
    policy = TinyPolicy()
    rollout = sampled_rollout(policy)
    rollout = replace(rollout, ref_log_probs=rollout.old_log_probs - 0.2)
    kl = KLConfig(coef=0.1, placement="loss", estimator="k3")
    calls = [{"kl": kl, "kl_coef": coef} for coef in (0.1, 0.7, 0.0, 0.3)]
    both_ways(policy, rollout, *calls)


def test_warm_up_and_the_update_after_it() -> None:
    policy = TinyPolicy(shared_trunk=True)
    both_ways(policy, sampled_rollout(policy), {"train_policy": False}, {}, {"train_policy": False}, {})


def test_gradients_are_added_to_what_is_there() -> None:
    # the auxiliary loss goes through autograd in the same step
    policy = TinyPolicy()
    rollout = sampled_rollout(policy)
    weights = []
    for replay in (False, True):
        moved = clone(policy)

        def pull(moved: TinyPolicy = moved) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return moved.actor.weight.square().sum(), {}

        advantages, returns = gae(rollout, gae_lambda=0.9)
        update(
            policy=moved,
            optimizer=torch.optim.SGD(moved.parameters(), lr=0.01),
            rollout=rollout,
            advantages=advantages,
            returns=returns,
            config=CONFIG,
            generator=torch.Generator().manual_seed(4),
            auxiliary=pull,
            traced=traced_gradient(moved) if replay else None,
        )
        weights.append(weights_of(moved))
    close(weights[1], weights[0], atol=1e-10)


def test_every_replay_gives_the_bits_of_the_first() -> None:
    # a run that is resumed records anew and must not see another rounding than one that went on
    torch.set_default_dtype(torch.float32)
    policy = TinyPolicy()
    rollout = sampled_rollout(policy)
    advantages, returns = gae(rollout, gae_lambda=0.9)
    used = traced_gradient(policy)
    found = []
    for traced in (used, used, used, used, traced_gradient(policy)):
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
        update(
            policy=policy,
            optimizer=optimizer,
            rollout=rollout,
            advantages=advantages,
            returns=returns,
            config=replace(CONFIG, epochs=1, minibatch_size=6),
            generator=torch.Generator().manual_seed(4),
            traced=traced,
        )
        found.append([p.grad.clone() for p in policy.parameters() if p.grad is not None])
    for gradients in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients, found[0], strict=True))


class Wavering(TinyPolicy):
    """Judges with noise."""

    def evaluate(self, observations: Any, actions: Any) -> Evaluation:
        return super().evaluate(observations + torch.randn_like(observations), actions)


def test_a_policy_that_cannot_be_replayed_is_refused() -> None:
    policy = Wavering()
    rollout = sampled_rollout(TinyPolicy())
    advantages, returns = gae(rollout, gae_lambda=0.9)
    before = weights_of(policy)
    with pytest.raises(ValueError, match=r"^this policy's update cannot be replayed: a replay differs from"):
        update(
            policy=policy,
            optimizer=torch.optim.SGD(policy.parameters(), lr=0.01),
            rollout=rollout,
            advantages=advantages,
            returns=returns,
            config=CONFIG,
            traced=traced_gradient(policy),
        )
    assert torch.equal(weights_of(policy), before)


def test_rounding_is_measured_by_the_largest_number() -> None:
    expected = torch.tensor([1.0, 3e-6, 0.0])
    assert agree(expected, expected + torch.tensor([3e-6, -3e-6, 3e-6]))  # what a replay of a cancelling sum does
    assert not agree(expected, expected + torch.tensor([0.0, 1e-3, 0.0]))
    assert not agree(expected * 1e-3, expected * 1.01e-3)
    undefined = torch.tensor([float("nan"), 1.0])
    assert agree(undefined, undefined)
    assert not agree(undefined, torch.tensor([0.0, 1.0]))
    assert agree(torch.zeros(0), torch.zeros(0))
