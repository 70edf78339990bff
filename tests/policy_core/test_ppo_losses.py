"""The terms of PPO's loss: numbers by hand, and autograd of the formulas as they stand in the papers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from policy_core.kl import KLConfig
from policy_core.policy import Evaluation
from policy_core.ppo import Batch, PPOConfig, make_batches, policy_loss, ppo_loss, value_loss
from tests.policy_core.helpers import NAN, TinyPolicy, close, flags, make_rollout, sampled_rollout


def surrogate(ratio: float, advantage: float, **options: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, its gradient with respect to the log-probability, and metrics of one decision with weight 1."""
    log_probs = torch.tensor([[ratio]]).log().add(-1.5).requires_grad_()
    loss, metrics = policy_loss(
        log_probs=log_probs,
        old_log_probs=torch.full_like(log_probs, -1.5),
        advantages=torch.tensor([[advantage]]),
        weights=torch.ones(1, 1),
        **{"clip_range": 0.2, **options},
    )
    return loss.detach(), torch.autograd.grad(loss, log_probs)[0][0], metrics


@pytest.mark.parametrize(
    "ratio, advantage, loss, gradient",
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.0, -2.0, 2.0, 2.0),
        (1.5, 1.0, -1.2, 0.0),  # gained enough: the clip takes the gradient away
        (1.5, -1.0, 1.5, 1.5),  # went the wrong way: no clip
        (0.5, 1.0, -0.5, -0.5),
        (0.5, -1.0, 0.8, 0.0),
        (1.1, 1.0, -1.1, -1.1),
        (1.2 - 1e-9, 1.0, -1.2 + 1e-9, -1.2 + 1e-9),  # just inside the band
        (1.2 + 1e-9, 1.0, -1.2, 0.0),  # just outside
        (0.8 + 1e-9, -1.0, 0.8 + 1e-9, 0.8 + 1e-9),
        (0.8 - 1e-9, -1.0, 0.8, 0.0),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_clipped_surrogate_by_hand(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    value, slope, metrics = surrogate(ratio, advantage)
    close(value, loss)
    close(slope, [gradient])
    clipped = gradient == 0.0 and advantage != 0.0
    close(metrics["clip_fraction"], float(clipped))


@pytest.mark.parametrize(
    "ratio, advantage, loss, gradient",
    [(1.25, 1.0, -1.25, -1.25), (1.4, 1.0, -1.3, 0.0), (0.75, -1.0, 0.8, 0.0), (0.85, -1.0, 0.85, 0.85)],
)
def test_clip_higher_widens_the_upper_half_only(
    ratio: float, advantage: float, loss: float, gradient: float
) -> None:
    value, slope, _ = surrogate(ratio, advantage, clip_range_high=0.3)
    close(value, loss)
    close(slope, [gradient])


@pytest.mark.parametrize(
    "ratio, advantage, loss, gradient",
    [
        (5.0, -2.0, 6.0, 0.0),  # 5 * -2 = -10 is bounded by 3 * -2
        (2.0, -2.0, 4.0, 4.0),
        (0.5, -2.0, 1.6, 0.0),
        (5.0, 2.0, -2.4, 0.0),  # a positive advantage knows no second bound
        (0.5, 2.0, -1.0, -1.0),
    ],
)
def test_dual_clip_bounds_negative_advantages(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    value, slope, metrics = surrogate(ratio, advantage, dual_clip=3.0)
    close(value, loss)
    close(slope, [gradient])
    close(metrics["clip_fraction"], float(gradient == 0.0))


def test_weights_and_metrics() -> None:
    log_probs = torch.tensor([[math.log(2.0), 0.0, math.log(0.5)]])
    loss, metrics = policy_loss(
        log_probs=log_probs,
        old_log_probs=torch.zeros(1, 3),
        advantages=torch.tensor([[1.0, 3.0, 4.0]]),
        weights=torch.tensor([[0.5, 0.25, 0.125]]),
        clip_range=0.2,
    )
    close(loss, -(0.5 * 1.2 + 0.25 * 3.0 + 0.125 * 2.0))
    close(metrics["clip_fraction"], 0.5)
    # ratio - 1 - ln ratio: 1 - ln 2, 0, ln 2 - 1/2
    close(metrics["approx_kl"], 0.5 * (1 - math.log(2)) + 0.125 * (math.log(2) - 0.5))


def test_an_astronomic_ratio_does_not_overflow() -> None:
    log_probs = torch.tensor([[800.0, -800.0]], requires_grad=True)
    loss, metrics = policy_loss(
        log_probs=log_probs,
        old_log_probs=torch.zeros(1, 2),
        advantages=torch.tensor([[-1.0, 1.0]]),
        weights=torch.ones(1, 2),
        clip_range=0.2,
    )
    close(loss.detach(), math.exp(20) - math.exp(-20), atol=1e-6)
    assert bool(torch.isfinite(torch.autograd.grad(loss, log_probs)[0]).all())
    assert math.isfinite(metrics["approx_kl"])


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
@pytest.mark.parametrize("high, dual", [(None, None), (0.35, None), (None, 2.0), (0.35, 1.5)])
def test_equals_autograd_of_the_textbook_formula(
    shape: tuple[int, ...], high: float | None, dual: float | None
) -> None:
    log_probs = torch.randn(shape, requires_grad=True)
    old, weights = torch.randn(shape), torch.rand(shape)
    advantages = torch.randn(5, 7) if len(shape) == 2 else torch.randn(5, 7, 1)

    ratio = (log_probs - old).exp()
    clipped = torch.clamp(ratio, 1 - 0.2, 1 + (0.2 if high is None else high))
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    if dual is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual * advantages), objective)
    expected = -(objective * weights).sum()

    loss, _ = policy_loss(
        log_probs=log_probs,
        old_log_probs=old,
        advantages=advantages,
        weights=weights,
        clip_range=0.2,
        clip_range_high=high,
        dual_clip=dual,
    )
    close(loss, expected)
    close(torch.autograd.grad(loss, log_probs)[0], torch.autograd.grad(expected, log_probs)[0])


# ---------------------------------------------------------------- value loss


def test_squared_error_by_hand() -> None:
    values = torch.tensor([[1.0, 5.0]], requires_grad=True)
    weights = torch.tensor([[0.5, 0.25]])
    loss, metrics = value_loss(values=values, returns=torch.tensor([[3.0, 4.0]]), weights=weights)
    close(loss.detach(), 0.5 * 4.0 + 0.25 * 1.0)
    close(torch.autograd.grad(loss, values)[0], [[0.5 * 2 * -2.0, 0.25 * 2 * 1.0]])
    assert metrics == {}


@pytest.mark.parametrize(
    "value, loss, gradient, clips",
    [
        # the old value 1, the band 0.5, the return 3
        (1.25, 3.0625, -3.5, 0.0),  # inside the band: the plain error
        (2.5, 2.25, 0.0, 1.0),  # clipped to 1.5: the error stays (3 - 1.5)^2, no gradient
        (0.0, 9.0, -6.0, 0.0),  # moved away: the plain error is the larger one
        (6.0, 9.0, 6.0, 0.0),  # overshot: the plain error again
    ],
)
def test_clipped_value_by_hand(value: float, loss: float, gradient: float, clips: float) -> None:
    values = torch.tensor([[value]], requires_grad=True)
    result, metrics = value_loss(
        values=values,
        returns=torch.tensor([[3.0]]),
        weights=torch.ones(1, 1),
        old_values=torch.tensor([[1.0]]),
        clip_range=0.5,
    )
    close(result.detach(), loss)
    close(torch.autograd.grad(result, values)[0], [[gradient]])
    close(metrics["value_clip_fraction"], clips)


def test_value_clipping_equals_autograd_of_its_formula() -> None:
    values = torch.randn(5, 7, requires_grad=True)
    old, returns, weights = torch.randn(5, 7), torch.randn(5, 7), torch.rand(5, 7)
    clipped = old + torch.clamp(values - old, -0.3, 0.3)
    expected = (torch.maximum((values - returns) ** 2, (clipped - returns) ** 2) * weights).sum()
    loss, _ = value_loss(values=values, returns=returns, weights=weights, old_values=old, clip_range=0.3)
    close(loss, expected)
    close(torch.autograd.grad(loss, values)[0], torch.autograd.grad(expected, values)[0])


def test_value_clipping_needs_the_old_values() -> None:
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match=r"^value clipping needs old_values$"):
        value_loss(values=one, returns=one, weights=one, clip_range=0.2)


# ---------------------------------------------------------------- the whole loss


def one_decision(**changes: Any) -> Batch:
    """Ratio 1, advantage 2, return 3; two factors."""
    fields: dict[str, Any] = {
        "observations": torch.zeros(1, 1),
        "actions": torch.zeros(1, 1),
        "old_log_probs": torch.tensor([[-3.0]]),
        "advantages": torch.tensor([[2.0]]),
        "weights": torch.ones(1, 1),
        "decision_weights": torch.ones(1, 1),
        "returns": torch.tensor([[3.0]]),
        **changes,
    }
    return Batch(**fields)


def judged() -> Evaluation:
    return Evaluation(
        log_probs=torch.tensor([[[-1.0, -2.0]]], requires_grad=True),
        entropy=torch.tensor([[[0.5, 0.25]]], requires_grad=True),
        values=torch.tensor([[1.0]], requires_grad=True),
    )


def test_terms_and_their_signs() -> None:
    evaluation = judged()
    assert evaluation.values is not None
    kl = KLConfig(coef=9.0, placement="loss", estimator="k2")  # the coefficient in use is the controller's
    loss, metrics = ppo_loss(
        evaluation=evaluation,
        batch=one_decision(ref_log_probs=torch.tensor([[[-1.5, -2.0]]])),
        config=PPOConfig(value_coef=0.25, entropy_coef=0.1),
        kl=kl,
        kl_coef=2.0,
    )
    # policy -2; value (1 - 3)^2 = 4; entropy 0.75; KL 0.5^2 / 2 = 0.125
    close(loss.detach(), -2.0 + 0.25 * 4.0 - 0.1 * 0.75 + 2.0 * 0.125)
    found = {name: float(value) for name, value in metrics.items()}
    assert found == pytest.approx(
        {
            "policy_loss": -2.0,
            "value_loss": 4.0,
            "entropy": 0.75,
            "reference_kl": 0.125,
            "approx_kl": 0.0,
            "clip_fraction": 0.0,
        },
        abs=1e-12,
    )
    gradients = torch.autograd.grad(loss, (evaluation.log_probs, evaluation.entropy, evaluation.values))
    close(gradients[0], [[[-2.0 + 2.0 * 0.5, -2.0]]])  # the surrogate's -A, and k2's gradient, the log-ratio
    close(gradients[1], [[[-0.1, -0.1]]])  # more entropy, less loss
    close(gradients[2], [[0.25 * 2 * -2.0]])


def test_critic_warm_up_leaves_the_value_term_only() -> None:
    evaluation = judged()
    loss, metrics = ppo_loss(
        evaluation=evaluation,
        batch=one_decision(),
        config=PPOConfig(value_coef=0.25, entropy_coef=0.1),
        train_policy=False,
    )
    close(loss.detach(), 1.0)
    assert list(metrics) == ["value_loss"]
    (gradient,) = torch.autograd.grad(loss, evaluation.log_probs, allow_unused=True)
    assert gradient is None


def test_entropy_is_reported_without_a_gradient_where_its_coefficient_is_0() -> None:
    evaluation = judged()
    loss, metrics = ppo_loss(evaluation=evaluation, batch=one_decision(), config=PPOConfig(entropy_coef=0.0))
    close(metrics["entropy"], 0.75)
    (gradient,) = torch.autograd.grad(loss, evaluation.entropy, allow_unused=True)
    assert gradient is None


@pytest.mark.parametrize("kl", [None, KLConfig(coef=1.0), KLConfig(coef=1.0, placement="loss", estimator="k3")])
def test_coefficient_0_or_placement_in_the_reward_adds_no_kl(kl: KLConfig | None) -> None:
    coef = 0.0 if kl is not None and kl.placement == "loss" else 1.0
    loss, metrics = ppo_loss(
        evaluation=judged(), batch=one_decision(), config=PPOConfig(value_coef=0.0), kl=kl, kl_coef=coef
    )
    close(loss.detach(), -2.0)
    assert "reference_kl" not in metrics


def test_a_kl_term_needs_the_references_log_probs() -> None:
    with pytest.raises(ValueError, match=r"^a KL term in the loss needs ref_log_probs$"):
        ppo_loss(
            evaluation=judged(),
            batch=one_decision(),
            config=PPOConfig(),
            kl=KLConfig(coef=1.0, placement="loss", estimator="k3"),
            kl_coef=1.0,
        )


def test_a_policy_without_a_critic_has_no_value_term() -> None:
    evaluation = replace(judged(), values=None)
    loss, metrics = ppo_loss(evaluation=evaluation, batch=one_decision(), config=PPOConfig())
    close(loss.detach(), -2.0)
    assert "value_loss" not in metrics
    loss, metrics = ppo_loss(evaluation=judged(), batch=one_decision(returns=None), config=PPOConfig())
    assert "value_loss" not in metrics


# ---------------------------------------------------------------- batches and ratio levels


def batches_of(config: PPOConfig, **changes: Any) -> list[Batch]:
    rollout = make_rollout(
        [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]],
        mask=flags("11", "10", "11"),
        episode=[[0, 0], [0, -1], [0, 1]],
        truncated=flags("00", "00", "10"),
        old_log_probs=torch.tensor([[[-1.0, -2.0], [-4.0, -8.0]]]).repeat(3, 1, 1),
        **changes,
    )
    return make_batches(
        rollout,
        advantages=torch.arange(6.0).view(3, 2),
        returns=None,
        config=config,
        order=torch.tensor([2, 0, 1]),
    )


def test_minibatches_follow_the_order_and_have_weights_of_their_own() -> None:
    first, second = batches_of(PPOConfig(minibatch_size=2))
    close(first.advantages, [[4.0, 5.0], [0.0, 1.0]])
    close(second.advantages, [[2.0, 0.0]])  # what is masked is cleared
    close(first.weights, [[0.25, 0.25], [0.25, 0.25]])
    close(second.weights, [[1.0, 0.0]])
    close(first.old_log_probs, [[-3.0, -12.0], [-3.0, -12.0]])


def test_episode_weights_within_a_minibatch() -> None:
    first, second = batches_of(PPOConfig(minibatch_size=2, aggregation="episode"))
    close(first.weights, [[1 / 3, 1 / 3], [1 / 6, 1 / 6]])
    close(second.weights, [[1.0, 0.0]])


def test_factor_level_keeps_the_factors_and_counts_the_executed_ones() -> None:
    first, _ = batches_of(PPOConfig(minibatch_size=2, ratio_level="factor"))
    close(first.weights, torch.full((2, 2, 2), 1 / 8))
    close(first.old_log_probs, [[[-1.0, -2.0], [-4.0, -8.0]]] * 2)
    close(first.decision_weights, torch.full((2, 2), 0.25))
    factor_mask = torch.ones(3, 2, 2, dtype=torch.bool)
    factor_mask[2, 1, 1] = False
    first, _ = batches_of(PPOConfig(minibatch_size=2, ratio_level="factor"), factor_mask=factor_mask)
    close(first.weights, [[[1 / 7, 1 / 7], [1 / 7, 0]], [[1 / 7, 1 / 7], [1 / 7, 1 / 7]]])
    # at the decision level an unexecuted factor is no part of the decision's log-probability
    first, _ = batches_of(PPOConfig(minibatch_size=2), factor_mask=factor_mask)
    close(first.old_log_probs, [[-3.0, -4.0], [-3.0, -12.0]])


def test_the_two_levels_by_hand() -> None:
    # factors with ratios 2 and 0.5, advantage 1: together ratio 1; apart -(1.2 + 0.5) / 2
    evaluation = Evaluation(
        log_probs=torch.tensor([[[math.log(2.0), -math.log(2.0)]]]), entropy=torch.tensor([[[0.5, 0.25]]])
    )
    together, metrics = ppo_loss(
        evaluation=evaluation,
        batch=one_decision(old_log_probs=torch.zeros(1, 1), advantages=torch.ones(1, 1)),
        config=PPOConfig(),
    )
    close(together, -1.0)
    close(metrics["entropy"], 0.75)
    apart, metrics = ppo_loss(
        evaluation=evaluation,
        batch=one_decision(
            old_log_probs=torch.zeros(1, 1, 2), advantages=torch.ones(1, 1), weights=torch.full((1, 1, 2), 0.5)
        ),
        config=PPOConfig(ratio_level="factor"),
    )
    close(apart, -0.85)
    close(metrics["entropy"], 0.375)


def test_an_advantage_for_each_factor_by_hand() -> None:
    # ratios 2 and 0.5 with advantages 1 and -2: min(2, 1.2) and min(-1, -1.6)
    evaluation = Evaluation(
        log_probs=torch.tensor([[[math.log(2.0), -math.log(2.0)]]]), entropy=torch.zeros(1, 1, 2)
    )
    loss, _ = ppo_loss(
        evaluation=evaluation,
        batch=one_decision(
            old_log_probs=torch.zeros(1, 1, 2),
            advantages=torch.tensor([[[1.0, -2.0]]]),
            weights=torch.full((1, 1, 2), 0.5),
        ),
        config=PPOConfig(ratio_level="factor"),
    )
    close(loss, 0.2)


@pytest.mark.parametrize("level", ["decision", "factor"])
def test_factors_that_were_not_executed_change_nothing(level: Any) -> None:
    policy = TinyPolicy()
    factor_mask = torch.ones(6, 5, 2, dtype=torch.bool)
    factor_mask[:, 3, 1] = False
    reference = torch.randn(6, 5, 2)
    rollout = replace(sampled_rollout(policy), factor_mask=factor_mask, ref_log_probs=reference)
    spoil = torch.where(factor_mask, 0.0, NAN)
    spoiled = replace(rollout, old_log_probs=rollout.old_log_probs + spoil, ref_log_probs=reference + spoil)
    config = PPOConfig(ratio_level=level, entropy_coef=0.1, minibatch_size=6)
    losses = []
    for variant, disturbance in ((rollout, torch.zeros(())), (spoiled, spoil)):
        (batch,) = make_batches(
            variant,
            advantages=rollout.rewards,
            returns=rollout.rewards,
            config=config,
            order=torch.arange(6),
            with_reference=True,
        )
        evaluation = policy.evaluate(rollout.observations, rollout.actions)
        evaluation = Evaluation(
            evaluation.log_probs + disturbance, evaluation.entropy + disturbance, evaluation.values
        )
        kl = KLConfig(coef=1.0, placement="loss", estimator="k2")
        losses.append(ppo_loss(evaluation=evaluation, batch=batch, config=config, kl=kl, kl_coef=0.5)[0])
    close(losses[1], losses[0])


@pytest.mark.parametrize(
    "values, message",
    [
        ({"minibatch_size": 0}, "ppo.minibatch_size and ppo.epochs must be at least 1"),
        ({"epochs": 0}, "ppo.minibatch_size and ppo.epochs must be at least 1"),
        ({"micro_batch_size": 0}, "ppo.micro_batch_size must be at least 1"),
        ({"dual_clip": 1.0}, "ppo.dual_clip must be above 1, got 1.0"),
        ({"aggregation_constant": -5.0}, "ppo.aggregation_constant must be above 0, got -5.0"),
        ({"clip_range_high": 0.0}, "ppo.clip_range_high must be above 0, got 0.0"),
        ({"target_kl": -1.0}, "ppo.target_kl must be above 0, got -1.0"),
        ({"warmup": 1.0}, r"ppo.value_coef and critic_warmup must not be negative, ppo.warmup in \[0, 1\)"),
        ({"critic_warmup": -1}, r"ppo.value_coef and critic_warmup must not be negative, ppo.warmup in \[0, 1\)"),
        ({"gamma": 0.0}, r"ppo.gamma must be in \(0, 1\] and ppo.gae_lambda in \[0, 1\]"),
        ({"gamma": 1.1}, r"ppo.gamma must be in \(0, 1\] and ppo.gae_lambda in \[0, 1\]"),
        ({"gae_lambda": -0.1}, r"ppo.gamma must be in \(0, 1\] and ppo.gae_lambda in \[0, 1\]"),
        ({"aggregation": "constant"}, "ppo.aggregation 'constant' needs ppo.aggregation_constant"),
    ],
)
def test_config_errors(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        PPOConfig(**values)
