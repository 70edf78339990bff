"""The numpy actor says what the torch policy says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from embodied.policies.numpy_actor import NumpyActor, Spaces, StatePolicyConfig, layout, split
from embodied.policies.state_mlp import StatePolicy
from policy_core.distributions import Categorical, DiagonalGaussian


def exported(policy: StatePolicy) -> NumpyActor:
    actor = NumpyActor(policy.spaces, policy.config)
    weights = np.zeros(actor.size, np.float32)
    policy.export_actor(weights)
    actor.load(weights)
    return actor


def observations(rows: int = 32, size: int = 5) -> np.ndarray:
    generated = 4.0 * np.random.default_rng(0).standard_normal((rows, size)).astype(np.float32)
    generated[0, 0], generated[1, 1] = 1e6, -1e6  # beyond the normaliser's limit
    return generated


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("hidden", [(16,), (16, 8), (8, 8, 8)])
def test_it_equals_the_torch_policy(
    make_policy: Callable[..., StatePolicy], activation: str, discrete: bool, hidden: tuple[int, ...]
) -> None:
    policy = make_policy(Spaces(5, 3, discrete), activation=activation, hidden=hidden)
    distribution, _ = policy(torch.from_numpy(observations()))
    expected = distribution.logits if isinstance(distribution, Categorical) else distribution.mean
    actor = exported(policy)
    np.testing.assert_allclose(actor.outputs(observations()), expected.detach().numpy(), rtol=1e-5, atol=1e-5)
    one_by_one = np.concatenate([actor.outputs(row[None]) for row in observations()])
    np.testing.assert_allclose(one_by_one, expected.detach().numpy(), rtol=1e-5, atol=1e-5)
    mode = actor.act(observations(), None)
    assert mode.dtype == (np.int64 if discrete else np.float32)
    np.testing.assert_allclose(mode, distribution.mode().detach().numpy(), rtol=1e-5, atol=1e-5)


def test_outputs_do_not_touch_the_observations(make_policy: Callable[..., StatePolicy]) -> None:
    seen = observations()
    exported(make_policy(Spaces(5, 3))).act(seen, None)
    np.testing.assert_array_equal(seen, observations())


def test_gaussian_actions_are_mean_plus_noise_times_deviation(make_policy: Callable[..., StatePolicy]) -> None:
    policy = make_policy(Spaces(5, 3))
    distribution, _ = policy(torch.from_numpy(observations()))
    assert isinstance(distribution, DiagonalGaussian)
    noise = np.random.default_rng(1).standard_normal((32, 3)).astype(np.float32)
    expected = distribution.mean + torch.from_numpy(noise) * policy.log_std.exp()
    actions = exported(policy).act(observations(), noise)
    np.testing.assert_allclose(actions, expected.detach().numpy(), rtol=1e-5, atol=1e-5)


def test_gumbel_noise_draws_from_the_categorical(make_policy: Callable[..., StatePolicy]) -> None:
    policy = make_policy(Spaces(5, 4, discrete=True), seed=3)
    with torch.no_grad():
        policy.actor.weight.mul_(0.3)
    seen = observations()[5:6]
    actor = exported(policy)
    noise = actor.noise(np.random.default_rng(2), 40_000)
    assert noise.shape == (40_000, 4)
    chosen = actor.act(np.repeat(seen, 40_000, axis=0), noise)
    frequencies = np.bincount(chosen, minlength=4) / 40_000
    probabilities = torch.softmax(policy(torch.from_numpy(seen))[0].logits, -1)[0].detach().numpy()
    assert probabilities.max() < 0.9
    np.testing.assert_allclose(frequencies, probabilities, atol=0.012)  # five standard errors


def test_gaussian_noise_is_standard_normal() -> None:
    noise = NumpyActor(Spaces(5, 2), StatePolicyConfig()).noise(np.random.default_rng(0), 20_000)
    assert noise.shape == (20_000, 2)
    assert noise.dtype == np.float32
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1.0) < 0.03


def test_layout_and_size_by_hand() -> None:
    spaces, config = Spaces(3, 2), StatePolicyConfig(hidden=(4, 5))
    shapes = [(3, 4), (4,), (4, 5), (5,), (5, 2), (2,), (2,), (2,), (2,), (3,), (3,)]
    assert layout(spaces, config) == shapes
    assert NumpyActor(spaces, config).size == 12 + 4 + 20 + 5 + 10 + 2 + 2 + 2 + 2 + 3 + 3
    pieces = split(np.arange(65, dtype=np.float32), shapes)
    assert [piece.shape for piece in pieces] == shapes
    assert pieces[1].tolist() == [12.0, 13.0, 14.0, 15.0]
    assert pieces[-1].tolist() == [62.0, 63.0, 64.0]


def test_loaded_weights_are_a_copy(make_policy: Callable[..., StatePolicy]) -> None:
    policy = make_policy(Spaces(5, 3))
    actor = NumpyActor(policy.spaces, policy.config)
    weights = np.zeros(actor.size, np.float32)
    policy.export_actor(weights)
    actor.load(weights)
    expected = actor.outputs(observations())
    weights[:] = 0.0  # as the parent does in memory that the workers share
    np.testing.assert_array_equal(actor.outputs(observations()), expected)


def test_the_workers_do_not_import_torch() -> None:
    """Each would pay a second and 200 MB for it."""
    program = "import embodied.rollouts.workers, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
