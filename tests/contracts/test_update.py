"""Contracts of the update: micro-batches, the first pass, learning rate 0, critic warm-up, chunks of one step."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch

from policy_core.kl import KLConfig
from policy_core.optimizer import FlatAdam
from policy_core.ppo import PPOConfig, traced_gradient, update
from policy_core.returns import fold_chunk, gae
from tests.contracts.bodies import BODIES, GAMMA, LAMBDA, Body, ByFactor, by_factor, same, trained, weights_of

WHOLE = PPOConfig(epochs=1, minibatch_size=10_000, normalize_advantages=False)
KL: dict[str, Any] = {"kl": KLConfig(coef=0.2, placement="loss", estimator="k2"), "kl_coef": 0.2}


@pytest.mark.parametrize("aggregation", ["decision", "episode", "constant"])
@pytest.mark.parametrize("size", [1, 3])
def test_splitting_into_micro_batches_gives_the_same_gradient(
    body: Body, size: int, aggregation: Literal["decision", "episode", "constant"]
) -> None:
    config = PPOConfig(
        epochs=2,
        minibatch_size=4,
        aggregation=aggregation,
        aggregation_constant=9.0,
        entropy_coef=0.01,
        value_clip_range=0.1,
    )
    whole, metrics = trained(body.policy, body.rollout, config, **KL)
    parts, part_metrics = trained(body.policy, body.rollout, replace(config, micro_batch_size=size), **KL)
    same(parts, whole)
    assert part_metrics == pytest.approx(metrics, abs=1e-10)
    assert not torch.equal(whole, weights_of(body.policy))


def test_the_ratio_is_1_on_the_first_pass(body: Body) -> None:
    """The policy that is updated finds its own actions as likely as when it acted: for the language model, what
    token-by-token sampling with a cache recorded is what one pass over the whole text gives."""
    rollout = body.rollout
    log_probs = body.policy.evaluate(rollout.observations, rollout.actions).log_probs  # type: ignore[operator]
    same(log_probs[rollout.mask], rollout.old_log_probs[rollout.mask], atol=1e-10)
    advantages, _ = gae(rollout, gae_lambda=LAMBDA)
    mean = float(advantages[rollout.mask].mean())
    for config in (WHOLE, replace(WHOLE, ratio_level="factor"), replace(WHOLE, dual_clip=3.0)):
        _, metrics = trained(body.policy, rollout, config, rate=0.0)
        assert metrics["approx_kl"] == pytest.approx(0.0, abs=1e-15)
        assert metrics["clip_fraction"] == 0.0
        assert metrics["policy_loss"] == pytest.approx(-mean, abs=1e-9)


def test_the_first_step_is_the_policy_gradient(body: Body) -> None:
    """At ratio 1 nothing is clipped: the step is that of -mean(A log p)."""
    rollout = body.rollout
    advantages, _ = gae(rollout, gae_lambda=LAMBDA)
    plain: Any = copy.deepcopy(body.policy)
    log_probs = plain.evaluate(rollout.observations, rollout.actions).log_probs
    log_probs = log_probs if log_probs.dim() == 2 else log_probs.sum(-1)
    loss = -(advantages * log_probs)[rollout.mask].mean()
    learned = list(plain.parameters())
    gradients = torch.autograd.grad(loss, learned, allow_unused=True)
    step = [torch.zeros_like(p) if g is None else -0.01 * g for p, g in zip(learned, gradients, strict=True)]
    expected = weights_of(body.policy) + torch.cat([part.flatten() for part in step])
    same(trained(body.policy, rollout, WHOLE, returns=None)[0], expected, atol=1e-10)


@pytest.mark.parametrize("kind", ["sgd", "adam", "flat_adam"])
def test_learning_rate_0_changes_nothing(body: Body, kind: str) -> None:
    policy: Any = copy.deepcopy(body.policy)
    advantages, returns = gae(body.rollout, gae_lambda=LAMBDA)
    optimizer: torch.optim.Optimizer
    if kind == "flat_adam":
        optimizer = FlatAdam([policy.parameters()], learning_rate=0.0)
    else:
        optimizer = (torch.optim.SGD if kind == "sgd" else torch.optim.Adam)(policy.parameters(), lr=0.0)
    config = PPOConfig(epochs=3, minibatch_size=3, entropy_coef=0.1)
    update(
        policy=policy,
        optimizer=optimizer,
        rollout=body.rollout,
        advantages=advantages,
        returns=returns,
        config=config,
        **KL,
    )
    assert torch.equal(weights_of(policy), weights_of(body.policy))
    for one, other in zip(policy.buffers(), body.policy.buffers(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("flat", [False, True])
def test_critic_warm_up_leaves_the_actor_bit_identical(body: Body, flat: bool) -> None:
    policy: Any = copy.deepcopy(body.policy)
    advantages, returns = gae(body.rollout, gae_lambda=LAMBDA)
    optimizer: torch.optim.Optimizer
    if flat:
        optimizer = FlatAdam([policy.parameters()], learning_rate=0.01)
    else:
        optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)
    before = policy.evaluate(body.rollout.observations, body.rollout.actions)
    update(
        policy=policy,
        optimizer=optimizer,
        rollout=body.rollout,
        advantages=advantages,
        returns=returns,
        config=PPOConfig(epochs=3, minibatch_size=3, entropy_coef=0.1),
        train_policy=False,
    )
    after = policy.evaluate(body.rollout.observations, body.rollout.actions)
    assert torch.equal(after.log_probs, before.log_probs)
    assert not torch.equal(after.values, before.values)


@pytest.mark.parametrize("name", ["robot_pendulum", "robot_cartpole"])
def test_replayed_gradients_make_the_same_steps(name: str) -> None:
    """For policies without branches on data, which a language model that skips padding is not."""
    body = BODIES[name]()
    moved: Any = copy.deepcopy(body.policy)
    advantages, returns = gae(body.rollout, gae_lambda=LAMBDA)
    config = PPOConfig(epochs=2, minibatch_size=3, entropy_coef=0.01, max_grad_norm=1e9)
    metrics = update(
        policy=moved,
        optimizer=torch.optim.SGD(moved.parameters(), lr=0.01),
        rollout=body.rollout,
        advantages=advantages,
        returns=returns,
        config=config,
        generator=torch.Generator().manual_seed(11),
        traced=traced_gradient(moved),
        **KL,
    )
    weights, expected = trained(body.policy, body.rollout, config, **KL)
    same(weights_of(moved), weights, atol=1e-10)
    assert metrics == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("level", ["decision", "factor"])
def test_a_chunk_of_length_1_equals_a_step(body: Body, level: Literal["decision", "factor"]) -> None:
    """Every decision as a chunk of one step (one token): folded, with a factor axis and a factor mask."""
    rollout = body.rollout
    reward, discount, step_mask = fold_chunk(
        rewards=rollout.rewards.unsqueeze(-1), executed=torch.ones(rollout.shape, dtype=torch.long), gamma=GAMMA
    )
    assert rollout.ref_log_probs is not None
    old_log_probs = by_factor(rollout.old_log_probs)
    chunks = replace(
        rollout,
        rewards=reward,
        discount=discount,
        old_log_probs=old_log_probs,
        ref_log_probs=by_factor(rollout.ref_log_probs),
        factor_mask=step_mask.expand_as(old_log_probs),
    )
    chunks.validate()
    for ours, theirs in zip(gae(chunks, gae_lambda=LAMBDA), gae(rollout, gae_lambda=LAMBDA), strict=True):
        assert torch.equal(ours, theirs)
    config = PPOConfig(epochs=2, minibatch_size=4, entropy_coef=0.01, ratio_level=level)
    steps, metrics = trained(body.policy, rollout, config, **KL)
    weights, chunk_metrics = trained(ByFactor(body.policy), chunks, config, **KL)
    same(weights, steps)
    assert chunk_metrics == pytest.approx(metrics, abs=1e-10)
