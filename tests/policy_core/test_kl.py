"""KL estimators against the exact KL of categoricals, the penalty in the reward, and the controller by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from policy_core.kl import Estimator, KLConfig, KLController, kl_estimate, kl_in_unit, kl_rewards, per_decision
from tests.policy_core.helpers import NAN, close, flags


def categoricals(rows: int = 6, choices: int = 5) -> tuple[Tensor, Tensor]:
    """Log-probabilities of policy and reference over all choices, [rows, choices]; the policy's need a gradient."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, rows, choices, generator=generator)
    return torch.log_softmax(logits[0], -1).requires_grad_(), torch.log_softmax(logits[1], -1)


def exact_kl(log_policy: Tensor, log_reference: Tensor) -> Tensor:
    return (log_policy.exp() * (log_policy - log_reference)).sum(-1)


def test_estimators_by_hand() -> None:
    # ratio policy/reference = 2: r = ln 2; k3 = 1/2 - 1 + ln 2
    log_probs, reference = torch.tensor(math.log(0.5)), torch.tensor(math.log(0.25))

    def estimate(estimator: Estimator) -> Tensor:
        return kl_estimate(log_probs=log_probs, ref_log_probs=reference, estimator=estimator)

    close(estimate("k1"), math.log(2))
    close(estimate("k2"), math.log(2) ** 2 / 2)
    close(estimate("k3"), math.log(2) - 0.5)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator: Estimator) -> None:
    policy, reference = categoricals()
    estimate = kl_estimate(log_probs=policy, ref_log_probs=reference, estimator=estimator)
    close((policy.exp() * estimate).sum(-1), exact_kl(policy, reference))


def test_k3_is_never_negative_and_k1_can_be() -> None:
    policy, reference = categoricals()
    assert kl_estimate(log_probs=policy, ref_log_probs=reference, estimator="k3").min() >= 0
    assert kl_estimate(log_probs=policy, ref_log_probs=reference, estimator="k1").min() < 0
    close(kl_estimate(log_probs=policy, ref_log_probs=policy, estimator="k3"), torch.zeros(6, 5))


def expected_gradient(logits: Tensor, reference: Tensor, estimator: Estimator) -> Tensor:
    """The mean, over samples of the policy, of the estimator's gradient with respect to the logits."""
    log_policy = torch.log_softmax(logits, -1)
    estimate = kl_estimate(log_probs=log_policy, ref_log_probs=reference, estimator=estimator)
    return torch.autograd.grad((log_policy.exp().detach() * estimate).sum(), logits)[0]


def test_gradients_of_the_estimators_are_those_the_module_promises() -> None:
    policy, reference = categoricals()
    logits = policy.detach().clone().requires_grad_()
    log_policy = torch.log_softmax(logits, -1)
    gradient_of_kl = torch.autograd.grad(exact_kl(log_policy, reference).sum(), logits, retain_graph=True)[0]
    reverse = (reference.exp() * (reference - log_policy)).sum()
    gradient_of_reverse_kl = torch.autograd.grad(reverse, logits)[0]
    close(expected_gradient(logits, reference, "k2"), gradient_of_kl)
    close(expected_gradient(logits, reference, "k3"), gradient_of_reverse_kl)
    close(expected_gradient(logits, reference, "k1"), torch.zeros_like(logits))


def test_k3_keeps_its_digits_near_zero() -> None:
    # exp(-r) - 1 + r = r^2 / 2 - r^3 / 6 + ...; computed naively in float32, r = 1e-4 leaves nothing
    r = torch.tensor(1e-4, dtype=torch.float32)
    estimate = kl_estimate(log_probs=r, ref_log_probs=torch.zeros_like(r), estimator="k3")
    assert 0 <= float(estimate) < 1e-7


def test_per_decision_sums_executed_factors() -> None:
    values = torch.tensor([[[1.0, 2.0], [4.0, NAN]]])
    close(per_decision(values, torch.tensor([[[True, True], [True, False]]])), [[3.0, 4.0]])
    close(per_decision(values[:, :1]), [[3.0]])
    two = torch.tensor([[1.0, 2.0]])
    assert per_decision(two, torch.zeros(1, 2, 3, dtype=torch.bool)) is two


def test_kl_rewards_by_hand() -> None:
    log_ratio = torch.tensor([[0.5, NAN, -0.25]])
    rewards, kl = kl_rewards(
        rewards=torch.tensor([[1.0, 7.0, 2.0]]),
        old_log_probs=log_ratio - 1.0,
        ref_log_probs=torch.full((1, 3), -1.0),
        mask=flags("101"),
        coef=0.1,
    )
    close(kl, [[0.5, 0.0, -0.25]])
    close(rewards, [[0.95, 7.0, 2.025]])


def test_kl_rewards_sum_the_executed_factors_and_take_the_estimator() -> None:
    rewards, kl = kl_rewards(
        rewards=torch.zeros(1, 1),
        old_log_probs=torch.tensor([[[0.2, -0.4, 5.0]]]),
        ref_log_probs=torch.zeros(1, 1, 3),
        mask=flags("1"),
        coef=2.0,
        estimator="k2",
        factor_mask=torch.tensor([[[True, True, False]]]),
    )
    close(kl, [[0.02 + 0.08]])
    close(rewards, [[-0.2]])


def test_coefficient_0_leaves_the_rewards() -> None:
    rewards, kl = kl_rewards(
        rewards=torch.tensor([[1.0, 2.0]]),
        old_log_probs=torch.tensor([[0.3, 0.1]]),
        ref_log_probs=torch.zeros(1, 2),
        mask=flags("11"),
        coef=0.0,
    )
    close(rewards, [[1.0, 2.0]], atol=0.0)
    close(kl, [[0.3, 0.1]])


def test_kl_in_its_two_units() -> None:
    # three decisions with 0.6 + 0.2 nats and 0.4 nats in two episodes
    kl = torch.tensor([[0.6, 0.2, NAN, 0.4]])
    episode = torch.tensor([[0, 0, 0, 1]])
    assert kl_in_unit(kl, mask=flags("1101"), episode=episode, unit="episode") == pytest.approx(0.6, abs=1e-12)
    assert kl_in_unit(kl, mask=flags("1101"), episode=episode, unit="decision") == pytest.approx(0.4, abs=1e-12)
    assert kl_in_unit(kl, mask=flags("0000"), episode=episode, unit="episode") == 0.0


# ---------------------------------------------------------------- controller


@pytest.mark.parametrize(
    "kl, factor",
    [
        (6.6, 1 + 0.1 * 50 / 1000),  # a tenth above the target
        (5.4, 1 - 0.1 * 50 / 1000),
        (60.0, 1 + 0.2 * 50 / 1000),  # clipped at a fifth
        (0.0, 1 - 0.2 * 50 / 1000),
        (6.0, 1.0),
    ],
)
def test_controller_by_hand(kl: float, factor: float) -> None:
    controller = KLController(KLConfig(coef=0.2, target=6.0, horizon=1000))
    assert controller.update(kl, episodes=50) == pytest.approx(0.2 * factor, abs=1e-15)
    assert controller.coef == pytest.approx(0.2 * factor, abs=1e-15)


def test_controller_without_target_is_fixed() -> None:
    controller = KLController(KLConfig(coef=0.2))
    assert controller.update(1e6, episodes=1000) == 0.2


def test_controller_never_turns_the_penalty_into_a_reward() -> None:
    # far more episodes at once than the horizon: a correction of more than a fifth would overshoot below 0
    controller = KLController(KLConfig(coef=0.2, target=6.0, horizon=10))
    assert controller.update(0.0, episodes=1000) == pytest.approx(0.16, abs=1e-15)


def test_controller_state_round_trip() -> None:
    config = KLConfig(coef=0.2, target=6.0)
    first, second = KLController(config), KLController(config)
    first.update(30.0, episodes=500)
    second.load_state_dict(first.state_dict())
    assert second.coef == first.coef != 0.2
    assert second.update(1.0, episodes=10) == first.update(1.0, episodes=10)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"coef": -0.1}, "kl.coef must not be negative, got -0.1"),
        ({"target": 6.0}, "kl.target needs a kl.coef above 0 to start from"),
        ({"coef": 0.1, "placement": "loss"}, "kl.estimator k1 has no gradient in the loss: use k2 or k3"),
        ({"coef": 0.1, "target": 0.0}, "kl.target and kl.horizon must be positive, got 0.0 and 10000.0"),
        ({"coef": 0.1, "horizon": -1.0}, "kl.target and kl.horizon must be positive, got None and -1.0"),
    ],
)
def test_config_errors(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        KLConfig(**values)
