"""PPO's update: what moves, by how much, when it stops, and what it refuses."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from policy_core.distributions import Categorical
from policy_core.kl import KLConfig
from policy_core.masking import normalize
from policy_core.optimizer import FlatAdam, NonFiniteLoss
from policy_core.policy import Evaluation
from policy_core.ppo import PPOConfig, make_batches, only_critic, update
from policy_core.returns import gae
from policy_core.rollout import Rollout, leaves
from tests.policy_core.helpers import (
    NAN,
    TinyPolicy,
    clone,
    close,
    gradient_of,
    make_rollout,
    sampled_rollout,
    weights_of,
)

ONE_STEP = PPOConfig(epochs=1, minibatch_size=100, normalize_advantages=False, max_grad_norm=1e9)


def run(
    policy: TinyPolicy,
    rollout: Rollout,
    config: PPOConfig,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
    **options: Any,
) -> dict[str, float]:
    """One update by plain gradient descent with rate 1 (or the given optimizer), advantages by GAE."""
    if rollout.values is not None:
        advantages, returns = gae(rollout, gae_lambda=0.9)
        options = {"advantages": advantages, "returns": returns, **options}
    return update(
        policy=policy,
        optimizer=torch.optim.SGD(policy.parameters(), lr=1.0) if optimizer is None else optimizer,
        rollout=rollout,
        config=config,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )


def step_of(policy: TinyPolicy, rollout: Rollout, config: PPOConfig, **options: Any) -> Tensor:
    """The change of the weights that an update of a copy makes."""
    moved = clone(policy)
    run(moved, rollout, config, **options)
    return weights_of(moved) - weights_of(policy)


def textbook_gradient(policy: TinyPolicy, rollout: Rollout, advantages: Tensor, returns: Tensor) -> Tensor:
    """Of the mean over decisions of -min(r A, clip(r) A) + 0.5 (V - R)^2 - 0.01 H."""
    policy = clone(policy)
    evaluation = policy.evaluate(rollout.observations, rollout.actions)
    assert evaluation.values is not None
    ratio = (evaluation.log_probs.sum(-1) - rollout.old_log_probs.sum(-1)).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    terms = -surrogate + 0.5 * (evaluation.values - returns) ** 2 - 0.01 * evaluation.entropy.sum(-1)
    terms[rollout.mask].mean().backward()
    return gradient_of(policy)


def test_one_step_follows_the_textbook_gradient() -> None:
    rollout = sampled_rollout(TinyPolicy(seed=0))
    policy = TinyPolicy(seed=0)
    with torch.no_grad():  # away from the policy that acted, so that some ratios are clipped
        for parameter in policy.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    advantages, returns = gae(rollout, gae_lambda=0.9)
    expected = -textbook_gradient(policy, rollout, advantages, returns)
    step = step_of(policy, rollout, replace(ONE_STEP, entropy_coef=0.01))
    close(step, expected)
    metrics = run(clone(policy), rollout, ONE_STEP)
    assert 0.0 < metrics["clip_fraction"] < 1.0


def test_advantages_are_normalised_over_all_decisions_of_the_rollout() -> None:
    policy = TinyPolicy()
    rollout = sampled_rollout(policy)
    advantages, _ = gae(rollout, gae_lambda=0.9)
    config = replace(ONE_STEP, minibatch_size=2)
    by_hand = step_of(policy, rollout, config, advantages=normalize(advantages, rollout.mask))
    close(step_of(policy, rollout, replace(config, normalize_advantages=True)), by_hand)
    assert not torch.allclose(step_of(policy, rollout, config), by_hand)


def test_a_better_action_becomes_likelier() -> None:
    policy = TinyPolicy(kind="categorical")
    rollout = make_rollout(
        [[1.0, -1.0]],
        observations=torch.randn(1, 2, 3),
        actions=torch.tensor([[0, 1]]),
        episode=[[0, 0]],
    )
    with torch.no_grad():
        before = policy.evaluate(rollout.observations, rollout.actions).log_probs
    rollout = replace(rollout, old_log_probs=before)
    moved = clone(policy)
    run(
        moved,
        rollout,
        ONE_STEP,
        advantages=rollout.rewards,
        returns=None,
        optimizer=torch.optim.SGD(moved.parameters(), lr=0.01),
    )
    with torch.no_grad():
        after = moved.evaluate(rollout.observations, rollout.actions).log_probs
    assert after[0, 0] > before[0, 0]
    assert after[0, 1] < before[0, 1]


def test_counts_of_steps_and_order_of_rows() -> None:
    policy = TinyPolicy()
    rollout = sampled_rollout(policy)  # 6 rows
    config = PPOConfig(epochs=3, minibatch_size=4)
    metrics = run(clone(policy), rollout, config, optimizer=None)
    assert metrics["updates"] == 6.0  # minibatches of 3 and 3, three times
    same = step_of(policy, rollout, config, seed=5)
    assert torch.equal(same, step_of(policy, rollout, config, seed=5))
    assert not torch.equal(same, step_of(policy, rollout, config, seed=6))


@pytest.mark.parametrize(
    ("rows", "size", "expected"), [(65, 64, [33, 32]), (8, 4, [4, 4]), (10, 4, [4, 3, 3]), (3, 9, [3]), (0, 4, [0])]
)
def test_no_row_has_a_step_of_its_own_because_it_was_left_over(rows: int, size: int, expected: list[int]) -> None:
    batches = make_batches(
        make_rollout(torch.zeros(rows, 1)),
        advantages=torch.zeros(rows, 1),
        returns=None,
        config=PPOConfig(minibatch_size=size),
        order=torch.arange(rows),
    )
    assert [len(batch.advantages) for batch in batches] == expected


def test_the_gradient_is_clipped_to_its_global_norm() -> None:
    policy = TinyPolicy()
    rollout = sampled_rollout(policy)
    free = step_of(policy, rollout, ONE_STEP)
    clipped = step_of(policy, rollout, replace(ONE_STEP, max_grad_norm=0.01))
    close(clipped, free * 0.01 / (free.norm() + 1e-6))
    metrics = run(clone(policy), rollout, replace(ONE_STEP, max_grad_norm=0.01))
    assert metrics["grad_norm"] == pytest.approx(float(free.norm()), abs=1e-12)  # the norm before clipping
    close(step_of(policy, rollout, replace(ONE_STEP, max_grad_norm=float(free.norm()) * 1.001)), free)


def test_metrics_are_means_over_the_steps() -> None:
    policy = TinyPolicy()
    rollout = sampled_rollout(policy)
    frozen = torch.optim.SGD(policy.parameters(), lr=0.0)
    rows = [rollout.select(torch.tensor([row])) for row in range(6)]
    advantages, returns = gae(rollout, gae_lambda=0.9)
    alone = [
        run(policy, row, ONE_STEP, optimizer=frozen, advantages=advantages[i : i + 1], returns=returns[i : i + 1])
        for i, row in enumerate(rows)
    ]
    together = run(policy, rollout, replace(ONE_STEP, minibatch_size=1), optimizer=frozen)
    for name in ("policy_loss", "value_loss", "entropy", "grad_norm"):
        assert together[name] == pytest.approx(sum(one[name] for one in alone) / 6, abs=1e-12)


# ---------------------------------------------------------------- micro-batches


@pytest.mark.parametrize("aggregation", ["decision", "episode", "constant"])
@pytest.mark.parametrize("level", ["decision", "factor"])
@pytest.mark.parametrize("size", [1, 4])
def test_micro_batches_make_the_same_step(
    aggregation: Literal["decision", "episode", "constant"], level: Literal["decision", "factor"], size: int
) -> None:
    policy = TinyPolicy()
    rollout = sampled_rollout(policy)
    rollout = replace(rollout, ref_log_probs=rollout.old_log_probs + 0.1 * torch.randn(6, 5, 2))
    config = PPOConfig(
        epochs=2,
        minibatch_size=5,
        aggregation=aggregation,
        aggregation_constant=7.0,
        ratio_level=level,
        entropy_coef=0.01,
        value_clip_range=0.1,
    )
    kl: dict[str, Any] = {"kl": KLConfig(coef=0.3, placement="loss", estimator="k3"), "kl_coef": 0.3}
    whole, parts = clone(policy), clone(policy)
    one = run(whole, rollout, config, **kl)
    other = run(parts, rollout, replace(config, micro_batch_size=size), **kl)
    close(weights_of(parts), weights_of(whole))
    assert not torch.equal(weights_of(parts), weights_of(policy))
    assert other == pytest.approx(one, abs=1e-12)


# ---------------------------------------------------------------- nothing moves


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_learning_rate_0_changes_nothing(optimizer: type[torch.optim.Optimizer]) -> None:
    policy = TinyPolicy()
    before = weights_of(policy)
    run(policy, sampled_rollout(policy), PPOConfig(), optimizer=optimizer(policy.parameters(), lr=0.0))  # type: ignore[call-arg]
    assert torch.equal(weights_of(policy), before)


@pytest.mark.parametrize("level", ["decision", "factor"])
def test_nan_under_the_mask_changes_nothing(level: Literal["decision", "factor"]) -> None:
    policy = TinyPolicy()
    rollout = sampled_rollout(policy)
    rollout = replace(rollout, ref_log_probs=rollout.old_log_probs - 0.1)
    advantages, returns = gae(rollout, gae_lambda=0.9)
    config = PPOConfig(epochs=2, minibatch_size=4, ratio_level=level, value_clip_range=0.2, entropy_coef=0.1)
    options: dict[str, Any] = {
        "kl": KLConfig(coef=0.3, placement="loss", estimator="k2"),
        "kl_coef": 0.3,
        "advantages": advantages,
        "returns": returns,
    }
    expected = step_of(policy, rollout, config, **options)

    def spoil(tensor: Tensor) -> Tensor:
        mask = rollout.mask if tensor.dim() == 2 else rollout.mask.unsqueeze(-1)
        return torch.where(mask, tensor, NAN)

    assert rollout.values is not None
    assert rollout.ref_log_probs is not None
    spoiled = replace(
        rollout,
        old_log_probs=spoil(rollout.old_log_probs),
        ref_log_probs=spoil(rollout.ref_log_probs),
        values=spoil(rollout.values),
    )
    options |= {"advantages": spoil(advantages), "returns": spoil(returns)}
    close(step_of(policy, spoiled, config, **options), expected)


class Forbidding(TinyPolicy):
    """Calls action 1 impossible (logit -inf) where the observation's last entry is above 0."""

    def distribution(self, observations: Tensor) -> Any:
        distribution = super().distribution(observations)
        assert isinstance(distribution, Categorical)
        logits = distribution.logits.clone()
        forbidden = observations[..., -1] > 0
        logits[..., 1] = torch.where(forbidden, -math.inf, logits[..., 1])
        return Categorical(logits)


def test_an_impossible_action_under_the_mask_changes_nothing() -> None:
    # a masked column shows an action that the policy rules out: log-probability -inf under it and the reference
    policy = Forbidding(kind="categorical", action_size=3)
    rollout = sampled_rollout(policy)
    observations, actions = leaves(rollout.observations)[0].clone(), leaves(rollout.actions)[0].clone()
    observations[..., -1] = -observations[..., -1].abs()
    policy_sees = replace(rollout, observations=observations)
    with torch.no_grad():
        old = policy.evaluate(observations, actions).log_probs
    policy_sees = replace(policy_sees, old_log_probs=old, ref_log_probs=old - 0.1)
    config = PPOConfig(epochs=2, minibatch_size=4, entropy_coef=0.1)
    kl: dict[str, Any] = {"kl": KLConfig(coef=0.3, placement="loss", estimator="k3"), "kl_coef": 0.3}
    expected = step_of(policy, policy_sees, config, **kl)

    observations, actions = observations.clone(), actions.clone()
    observations[:, 1, -1], actions[:, 1] = 1.0, 1
    reference = old - 0.1
    reference[:, 1] = -math.inf
    impossible = replace(policy_sees, observations=observations, actions=actions, ref_log_probs=reference)
    close(step_of(policy, impossible, config, **kl), expected)


# ---------------------------------------------------------------- target KL


def test_target_kl_stops_before_the_step_that_went_too_far() -> None:
    policy = TinyPolicy()
    rollout = sampled_rollout(policy)

    def steps(target: float | None, epochs: int = 2) -> tuple[Tensor, dict[str, float]]:
        moved = clone(policy)
        config = replace(ONE_STEP, epochs=epochs, target_kl=target)
        metrics = run(moved, rollout, config, optimizer=torch.optim.SGD(moved.parameters(), lr=0.05))
        return weights_of(moved), metrics

    second_kl = 2 * steps(None)[1]["approx_kl"]  # the first step's is 0
    assert second_kl > 1e-4
    just_enough, metrics = steps(second_kl / 1.45)
    assert metrics["updates"] == 2.0
    assert torch.equal(just_enough, steps(None)[0])
    stopped, metrics = steps(second_kl / 1.55, epochs=5)
    assert metrics["updates"] == 1.0
    assert torch.equal(stopped, steps(None, epochs=1)[0])


class Counting(TinyPolicy):
    """Counts how often it is asked."""

    asked = 0

    def evaluate(self, observations: Any, actions: Any) -> Evaluation:
        self.asked += 1
        return super().evaluate(observations, actions)


def test_target_kl_ends_all_epochs_not_one() -> None:
    policy = Counting()
    rollout = sampled_rollout(TinyPolicy())
    metrics = run(policy, rollout, replace(ONE_STEP, epochs=8, minibatch_size=3, target_kl=1e-12))
    assert metrics["updates"] == 1.0
    assert policy.asked == 2  # the second minibatch is too far already, and nothing is looked at after it


# ---------------------------------------------------------------- critic warm-up


@pytest.mark.parametrize("shared_trunk", [False, True])
def test_critic_warm_up_leaves_the_actor_bit_identical(shared_trunk: bool) -> None:
    policy = TinyPolicy(shared_trunk=shared_trunk)
    before = clone(policy)
    metrics = run(
        policy,
        sampled_rollout(policy),
        PPOConfig(entropy_coef=0.1),
        optimizer=torch.optim.Adam(policy.parameters(), lr=0.01),
        train_policy=False,
    )
    for parameter, old in zip(policy.actor_parameters(), before.actor_parameters(), strict=True):
        assert torch.equal(parameter, old)
    for parameter, old in zip(policy.critic_parameters(), before.critic_parameters(), strict=True):
        assert not torch.equal(parameter, old)
    assert "policy_loss" not in metrics
    assert all(parameter.requires_grad for parameter in policy.parameters())


def test_critic_warm_up_with_an_optimizer_that_has_momentum() -> None:
    # a used Adam moves even by a gradient of 0: the actor's group must be left out, not fed zeros
    policy = TinyPolicy()
    rollout = sampled_rollout(policy)
    optimizer = FlatAdam([policy.actor_parameters(), policy.critic_parameters()], learning_rate=0.01)
    run(policy, rollout, PPOConfig(), optimizer=optimizer)
    before = torch.cat([parameter.detach().flatten().clone() for parameter in policy.actor_parameters()])
    run(policy, rollout, PPOConfig(), optimizer=optimizer, train_policy=False)
    after = torch.cat([parameter.detach().flatten() for parameter in policy.actor_parameters()])
    assert torch.equal(after, before)
    run(policy, rollout, PPOConfig(), optimizer=optimizer)
    assert not torch.equal(torch.cat([p.detach().flatten() for p in policy.actor_parameters()]), before)


def test_critic_warm_up_learns_the_values() -> None:
    policy = TinyPolicy()
    rollout = sampled_rollout(policy)
    config = PPOConfig(epochs=1, minibatch_size=100)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)
    steps = [run(policy, rollout, config, optimizer=optimizer, train_policy=False) for _ in range(30)]
    assert steps[-1]["value_loss"] < 0.9 * steps[0]["value_loss"]


def test_only_critic_restores_what_required_gradients() -> None:
    policy = TinyPolicy()
    policy.actor_trunk.requires_grad_(False)
    critic = {id(parameter) for parameter in policy.critic_parameters()}
    inside = set()
    with contextlib.suppress(KeyError), only_critic(policy):
        inside = {id(parameter) for parameter in policy.parameters() if parameter.requires_grad}
        raise KeyError
    assert inside == critic
    frozen = {id(parameter) for parameter in policy.actor_trunk.parameters()}
    assert {id(p) for p in policy.parameters() if not p.requires_grad} == frozen


def test_warm_up_needs_a_critic_and_returns() -> None:
    rollout = sampled_rollout(TinyPolicy())
    with pytest.raises(ValueError, match=r"^critic warm-up needs a policy with a critic \(critic_parameters"):
        run(TinyPolicy(critic=False), rollout, PPOConfig(), train_policy=False)
    with pytest.raises(ValueError, match=r"^critic warm-up needs returns: without them there is nothing to learn$"):
        run(TinyPolicy(), rollout, PPOConfig(), train_policy=False, returns=None)


# ---------------------------------------------------------------- auxiliary loss, KL, failures


@pytest.mark.parametrize("flat", [False, True])
def test_what_does_not_count_moves_nothing_by_momentum(flat: bool) -> None:
    """Minibatches without a decision that counts make no step; the others make theirs."""
    policy = TinyPolicy()
    rollout = sampled_rollout(policy)
    optimizer: torch.optim.Optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)
    if flat:
        optimizer = FlatAdam([policy.parameters()], learning_rate=0.01)
    assert run(policy, rollout, PPOConfig(epochs=2, minibatch_size=1), optimizer=optimizer)["updates"] > 2
    before = weights_of(policy)
    nothing = replace(rollout, mask=torch.zeros_like(rollout.mask))
    for train_policy in (True, False):
        assert run(policy, nothing, PPOConfig(), optimizer=optimizer, train_policy=train_policy) == {"updates": 0.0}
    assert torch.equal(weights_of(policy), before)
    counts = nothing.mask.clone()
    counts[0] = rollout.mask[0]
    assert counts.any()
    one = run(policy, replace(rollout, mask=counts), PPOConfig(epochs=3, minibatch_size=1), optimizer=optimizer)
    assert one["updates"] == 3.0
    assert not torch.equal(weights_of(policy), before)


def test_the_auxiliary_loss_goes_on_where_nothing_counts() -> None:
    policy = TinyPolicy()
    rollout = sampled_rollout(policy)
    before = weights_of(policy)
    nothing = replace(rollout, mask=torch.zeros_like(rollout.mask))

    def auxiliary() -> tuple[Tensor, dict[str, Tensor]]:
        loss = policy.log_std.sum()
        return loss, {"demonstrations": loss.detach()}

    found = run(policy, nothing, PPOConfig(epochs=1, minibatch_size=100), auxiliary=auxiliary)
    assert found["updates"] == 1.0
    assert not torch.equal(weights_of(policy), before)


def test_the_auxiliary_loss_is_added_at_every_step() -> None:
    policy = TinyPolicy()
    rollout = sampled_rollout(policy)
    moved = clone(policy)
    calls = []

    def auxiliary() -> tuple[Tensor, dict[str, Tensor]]:
        loss = 0.7 * moved.log_std.sum() + moved.actor.weight.square().sum()
        calls.append(loss)
        return loss, {"demonstrations": loss.detach()}

    metrics = run(moved, rollout, ONE_STEP, auxiliary=auxiliary)
    difference = weights_of(moved) - weights_of(policy) - step_of(policy, rollout, ONE_STEP)
    expected = clone(policy)
    (0.7 * expected.log_std.sum() + expected.actor.weight.square().sum()).backward()
    close(difference, -gradient_of(expected))
    assert metrics["demonstrations"] == pytest.approx(float(calls[0].detach()), abs=1e-12)

    calls.clear()
    run(moved, rollout, PPOConfig(epochs=3, minibatch_size=4), auxiliary=auxiliary)
    assert len(calls) == 6
    calls.clear()
    run(moved, rollout, PPOConfig(epochs=3), auxiliary=auxiliary, train_policy=False)
    assert not calls


def test_the_kl_term_pulls_to_the_reference() -> None:
    policy = TinyPolicy()
    rollout = sampled_rollout(policy)
    reference = rollout.old_log_probs + 0.3 * torch.randn(6, 5, 2)
    rollout = replace(rollout, ref_log_probs=reference)
    kl = KLConfig(coef=1.0, placement="loss", estimator="k2")
    pull = step_of(policy, rollout, ONE_STEP, kl=kl, kl_coef=0.4) - step_of(policy, rollout, ONE_STEP)
    expected = clone(policy)
    log_probs = expected.evaluate(rollout.observations, rollout.actions).log_probs
    (0.4 * ((log_probs - reference).square() / 2).sum(-1)[rollout.mask].mean()).backward()
    close(pull, -gradient_of(expected))
    close(step_of(policy, rollout, ONE_STEP, kl=kl, kl_coef=0.0), step_of(policy, rollout, ONE_STEP))
    in_reward = KLConfig(coef=1.0)
    close(step_of(policy, rollout, ONE_STEP, kl=in_reward, kl_coef=0.4), step_of(policy, rollout, ONE_STEP))


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched() -> None:
    policy = TinyPolicy()
    before = weights_of(policy)
    rollout = sampled_rollout(policy)
    advantages = torch.where(rollout.mask, 1.0, 0.0)
    advantages[2, 3] = NAN
    with pytest.raises(NonFiniteLoss) as caught:
        run(policy, rollout, ONE_STEP, advantages=advantages)
    assert str(caught.value) == "NaN or infinity in the update: policy_loss not finite (gradient norm nan)"
    assert torch.equal(weights_of(policy), before)


class BadGradient(TinyPolicy):
    """A finite loss whose gradient is not: the root of 0."""

    def evaluate(self, observations: Any, actions: Any) -> Evaluation:
        evaluation = super().evaluate(observations, actions)
        nothing = (self.log_std * 0.0).sqrt().sum()
        return Evaluation(evaluation.log_probs + nothing, evaluation.entropy, evaluation.values)


def test_a_gradient_that_is_not_finite_is_told_from_a_loss_that_is_not() -> None:
    policy = BadGradient()
    before = weights_of(policy)
    with pytest.raises(NonFiniteLoss, match=r"the losses are finite, their gradient is not"):
        run(policy, sampled_rollout(TinyPolicy()), ONE_STEP, optimizer=torch.optim.Adam(policy.parameters()))
    assert torch.equal(weights_of(policy), before)
