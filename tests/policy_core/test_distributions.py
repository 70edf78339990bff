"""Distributions against torch.distributions, numeric integration and exact enumeration."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical as TorchCategorical
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from policy_core.distributions import Categorical, DiagonalGaussian, TanhGaussian, log_tanh_slope
from tests.policy_core.helpers import close


def parameters() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(4, 3, generator=generator), torch.tensor([-1.0, 0.0, 0.7])


def test_gaussian_by_hand() -> None:
    # standard deviation 2, one deviation away: -1/2 - ln 2 - ln sqrt(2 pi)
    gaussian = DiagonalGaussian(torch.tensor([1.0]), torch.tensor([math.log(2.0)]))
    close(gaussian.log_prob(torch.tensor([3.0])), [-0.5 - math.log(2) - 0.5 * math.log(2 * math.pi)])
    close(gaussian.entropy(), [0.5 * math.log(2 * math.pi * math.e * 4)])
    close(gaussian.mode(), [1.0])


def test_gaussian_equals_torch() -> None:
    mean, log_std = parameters()
    ours, theirs = DiagonalGaussian(mean, log_std), Normal(mean, log_std.exp())
    actions = torch.randn(4, 3)
    close(ours.log_prob(actions), theirs.log_prob(actions))
    close(ours.entropy(), theirs.entropy())
    close(ours.log_prob(actions).sum(-1), Independent(theirs, 1).log_prob(actions))


def test_gaussian_takes_a_scale_per_decision() -> None:
    mean, _ = parameters()
    log_std = torch.randn(4, 3)
    close(DiagonalGaussian(mean, log_std).entropy(), Normal(mean, log_std.exp()).entropy())


def test_gaussian_samples_have_its_moments_and_follow_the_generator() -> None:
    gaussian = DiagonalGaussian(torch.full((20_000, 1), 2.0, requires_grad=True), torch.tensor([math.log(0.5)]))
    samples = gaussian.sample(torch.Generator().manual_seed(0))
    assert not samples.requires_grad
    assert float(samples.mean()) == pytest.approx(2.0, abs=0.02)  # five standard errors
    assert float(samples.std()) == pytest.approx(0.5, abs=0.02)
    assert torch.equal(samples, gaussian.sample(torch.Generator().manual_seed(0)))
    assert not torch.equal(samples, gaussian.sample(torch.Generator().manual_seed(1)))


# ---------------------------------------------------------------- squashed


def test_tanh_gaussian_equals_torch() -> None:
    mean, log_std = parameters()
    theirs = TransformedDistribution(Normal(mean, log_std.exp()), [TanhTransform(cache_size=0)])
    actions = torch.rand(4, 3) * 1.8 - 0.9
    close(TanhGaussian(mean, log_std).log_prob(actions), theirs.log_prob(actions), atol=1e-10)


@pytest.mark.parametrize("mean, log_std", [(0.0, 0.0), (1.0, -0.5), (-0.5, 0.3)])
def test_tanh_gaussian_integrates_to_1(mean: float, log_std: float) -> None:
    # the trapezoid rule over raw space, where the density is smooth: p(a) da with da = (1 - a^2) dx
    raw = torch.linspace(-12.0, 12.0, 4801)
    density = TanhGaussian(torch.tensor([mean]), torch.tensor([log_std])).log_prob(torch.tanh(raw).unsqueeze(-1))
    mass = torch.trapezoid(density.squeeze(-1).exp() / torch.cosh(raw).square(), raw)
    assert float(mass) == pytest.approx(1.0, abs=1e-6)


def test_tanh_gaussian_samples_carry_their_log_probs() -> None:
    mean, log_std = parameters()
    squashed = TanhGaussian(mean, log_std)
    actions, log_probs = squashed.rsample_with_log_prob(torch.Generator().manual_seed(2))
    close(actions, squashed.sample(torch.Generator().manual_seed(2)))
    close(log_probs, squashed.log_prob(actions), atol=1e-9)
    close(squashed.entropy(torch.Generator().manual_seed(2)), -log_probs)
    close(squashed.mode(), torch.tanh(mean))


def test_reparameterised_samples_have_gradients_and_plain_ones_have_not() -> None:
    mean = torch.zeros(1, 1, requires_grad=True)
    squashed = TanhGaussian(mean, torch.zeros(1))
    assert not squashed.sample().requires_grad
    actions, _ = squashed.rsample_with_log_prob(torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(actions.sum(), mean)
    close(gradient, 1 - actions.detach().square())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("action", [1.0, -1.0, 1.5])
def test_saturated_actions_have_finite_log_probs_and_gradients(action: float, dtype: torch.dtype) -> None:
    mean = torch.zeros(1, dtype=dtype, requires_grad=True)
    log_std = torch.zeros(1, dtype=dtype, requires_grad=True)
    log_prob = TanhGaussian(mean, log_std).log_prob(torch.tensor([action], dtype=dtype))
    gradients = torch.autograd.grad(log_prob.sum(), (mean, log_std))
    assert bool(torch.isfinite(log_prob).all())
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    assert float(gradients[0]) * action > 0  # the mean is drawn towards the action


def test_samples_far_in_saturation_keep_finite_log_probs() -> None:
    mean = torch.full((1, 1), 40.0, dtype=torch.float32, requires_grad=True)
    actions, log_probs = TanhGaussian(mean, torch.zeros(1, dtype=torch.float32)).rsample_with_log_prob()
    assert actions.tolist() == [[1.0]]
    assert bool(torch.isfinite(log_probs).all())
    assert bool(torch.isfinite(torch.autograd.grad(log_probs.sum(), mean)[0]).all())


def test_log_tanh_slope() -> None:
    raw = torch.tensor([-3.0, 0.0, 0.5])
    close(log_tanh_slope(raw), torch.log(1 - torch.tanh(raw) ** 2))
    # at x = 50, 1 - tanh^2 rounds to 0, but its log is ln 4 - 100
    close(log_tanh_slope(torch.tensor([50.0, -50.0])), [math.log(4) - 100] * 2)


# ---------------------------------------------------------------- categorical


def test_categorical_by_hand() -> None:
    # odds 1 : 3
    categorical = Categorical(torch.tensor([[0.0, math.log(3.0)]]))
    close(categorical.log_prob(torch.tensor([1])), [math.log(0.75)])
    close(categorical.entropy(), [-0.25 * math.log(0.25) - 0.75 * math.log(0.75)])
    assert categorical.mode().tolist() == [1]


def test_categorical_equals_torch_with_factors() -> None:
    logits = torch.randn(2, 3, 4, 5)  # decisions [2, 3] of four tokens
    actions = torch.randint(0, 5, (2, 3, 4))
    ours, theirs = Categorical(logits), TorchCategorical(logits=logits)
    assert ours.log_prob(actions).shape == (2, 3, 4)
    close(ours.log_prob(actions), theirs.log_prob(actions))
    close(ours.entropy(), theirs.entropy())


def test_categorical_samples_with_its_frequencies() -> None:
    logits = torch.log(torch.tensor([0.1, 0.6, 0.3])).expand(2, 5000, 2, 3)
    samples = Categorical(logits).sample(torch.Generator().manual_seed(0))
    assert samples.shape == (2, 5000, 2)
    shares = torch.bincount(samples.flatten(), minlength=3) / samples.numel()
    close(shares, [0.1, 0.6, 0.3], atol=0.018)  # five standard errors
    # neighbouring factors are independent
    assert float((samples[..., 0] == samples[..., 1]).double().mean()) == pytest.approx(0.46, abs=0.025)


def test_impossible_choices() -> None:
    logits = torch.tensor([[0.0, -math.inf, math.log(3.0)]], requires_grad=True)
    categorical = Categorical(logits)
    close(categorical.log_prob(torch.tensor([2])), [math.log(0.75)])
    assert categorical.log_prob(torch.tensor([1])).tolist() == [-math.inf]
    entropy = categorical.entropy()
    close(entropy, [-0.25 * math.log(0.25) - 0.75 * math.log(0.75)])
    # d entropy / d logit_k = -p_k (ln p_k + entropy), and an impossible choice has none
    (gradient,) = torch.autograd.grad(entropy.sum(), logits)
    p = torch.tensor([0.25, 0.75])
    expected = -p * (p.log() + entropy.detach())
    close(gradient, [[float(expected[0]), 0.0, float(expected[1])]])
    assert 1 not in categorical.sample(torch.Generator().manual_seed(0)).tolist()


def test_the_entropy_at_the_median_nears_the_true_one_as_the_deviation_shrinks() -> None:
    for deviation, tolerance in ((0.3, 0.1), (0.03, 1e-3)):
        distribution = TanhGaussian(torch.tensor([0.7, -0.2]), torch.full((2,), deviation).log())
        raw = distribution.mean + deviation * torch.linspace(-6, 6, 20_001).unsqueeze(1)
        weights = torch.exp(-0.5 * torch.linspace(-6, 6, 20_001) ** 2)
        true = -(distribution.log_prob(torch.tanh(raw)) * (weights / weights.sum()).unsqueeze(1)).sum(0)
        torch.testing.assert_close(distribution.entropy_at_median(), true, rtol=0, atol=tolerance)
