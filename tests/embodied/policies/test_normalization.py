"""Running statistics against numpy, and reward scaling against a loop by hand and stable-baselines3."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from embodied.policies.normalization import ObservationNormalizer, RewardScaler, RunningMoments


@pytest.mark.parametrize("sizes", [[60], [1, 59], [7, 0, 13, 40], [1] * 60])
def test_moments_of_split_batches_are_those_of_all(sizes: list[int]) -> None:
    data = 5.0 + 2.0 * np.random.default_rng(0).standard_normal((60, 3))
    moments = RunningMoments((3,))
    for batch in torch.from_numpy(data).split(sizes):
        moments.update(batch)
    np.testing.assert_allclose(moments.mean.numpy(), data.mean(0), rtol=1e-13)
    np.testing.assert_allclose(moments.variance.numpy(), data.var(0), rtol=1e-13)
    assert float(moments.count) == 60


def test_large_offsets_do_not_cancel() -> None:
    """The textbook mean of squares less square of the mean would be noise here, and float32 more so."""
    data = 1e6 + np.random.default_rng(1).standard_normal((500, 1))
    moments = RunningMoments((1,))
    for batch in torch.from_numpy(data).split(50):
        moments.update(batch)
    np.testing.assert_allclose(moments.variance.numpy(), data.var(0), rtol=1e-9)


def test_an_empty_batch_changes_nothing() -> None:
    moments = RunningMoments((2,))
    moments.update(torch.zeros(0, 2))
    assert moments.mean.tolist() == [0.0, 0.0]
    assert moments.variance.tolist() == [1.0, 1.0]
    assert float(moments.count) == 0
    moments.update(torch.tensor([[1.0, 3.0]]))
    before = {name: tensor.clone() for name, tensor in moments.state_dict().items()}
    moments.update(torch.zeros(0, 2))
    assert all(torch.equal(before[name], tensor) for name, tensor in moments.state_dict().items())


def test_the_normalizer_is_the_identity_before_data_but_for_the_limit() -> None:
    normalizer = ObservationNormalizer(2, limit=10.0)
    assert normalizer(torch.tensor([[0.25, -3.0], [11.0, -1e9]])).tolist() == [[0.25, -3.0], [10.0, -10.0]]


def test_normalised_by_hand() -> None:
    normalizer = ObservationNormalizer(2, limit=1.5, epsilon=0.0)
    normalizer.update(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))  # means 2 and 20, deviations 1 and 10
    seen = normalizer(torch.tensor([[[2.0, 20.0]], [[3.0, 15.0]], [[9.0, -90.0]]]))
    torch.testing.assert_close(seen, torch.tensor([[[0.0, 0.0]], [[1.0, -0.5]], [[1.5, -1.5]]]))


def test_a_dimension_that_never_changes_stays_finite() -> None:
    """And is shifted alone: the first change of it should not look like ten deviations."""
    normalizer = ObservationNormalizer(2)
    normalizer.update(torch.tensor([[7.0, 0.0], [7.0, 0.002]]))
    seen = normalizer(torch.tensor([[7.0, 0.001], [7.1, 0.002]]))
    torch.testing.assert_close(seen, torch.tensor([[0.0, 0.0], [0.1, 0.995]]), rtol=1e-4, atol=1e-6)


def test_scale_and_offset_come_back_with_the_moments() -> None:
    first, second = ObservationNormalizer(3), ObservationNormalizer(3)
    first.update(torch.randn(40, 3) * 5 + 1)
    assert "scale" not in first.state_dict()
    second.load_state_dict(first.state_dict())
    sample = torch.randn(10, 3)
    assert not torch.equal(second(sample), first(sample))
    second.refresh()
    assert torch.equal(second(sample), first(sample))


def rewards_and_ends() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(3)
    return 3.0 + 5.0 * generator.standard_normal((3, 80)), generator.random((3, 80)) < 0.1


def test_reward_scaling_against_a_loop_by_hand() -> None:
    rewards, ended = rewards_and_ends()
    scaler = RewardScaler(3, gamma=0.9, limit=1e9, epsilon=0.0)
    running, seen = np.zeros(3), []
    for part in (slice(0, 30), slice(30, 80)):  # the discounted return goes on from one rollout to the next
        scaled = scaler(torch.from_numpy(rewards[:, part]), torch.from_numpy(ended[:, part]))
        for step in range(part.start, part.stop):
            running = running * 0.9 + rewards[:, step]
            seen.append(running.copy())
            running[ended[:, step]] = 0.0
        deviation = np.concatenate(seen).std()
        np.testing.assert_allclose(scaled.numpy(), rewards[:, part] / deviation, rtol=1e-12)
    np.testing.assert_allclose(scaler.running_return.numpy(), running * 0.9, rtol=1e-12)


def test_reward_scaling_against_stable_baselines3() -> None:
    rewards, ended = rewards_and_ends()
    scaler = RewardScaler(3, gamma=0.99)
    scaler(torch.from_numpy(rewards), torch.from_numpy(ended))
    theirs = VecNormalize(DummyVecEnv([lambda: gymnasium.make("Pendulum-v1")] * 3), norm_obs=False, gamma=0.99)
    theirs.returns = np.zeros(3)
    for step in range(80):
        theirs._update_reward(rewards[:, step])
        theirs.returns[ended[:, step]] = 0.0
    # they begin with 1e-4 imagined returns of variance 1
    assert float(scaler.variance) == pytest.approx(float(theirs.ret_rms.var), rel=1e-4)
    torch.testing.assert_close(
        scaler(torch.zeros(3, 0), torch.zeros(3, 0, dtype=torch.bool)), torch.zeros(3, 0), rtol=0.0, atol=0.0
    )
    sample = torch.tensor([[2.0], [-1.0], [0.5]])
    expected = theirs.normalize_reward(sample.numpy())
    scaled = sample.double() / torch.sqrt(scaler.variance + scaler.epsilon)
    np.testing.assert_allclose(scaled.numpy(), expected, rtol=1e-4)
    theirs.close()


def test_scaled_rewards_are_limited_and_keep_sign_and_type() -> None:
    scaler = RewardScaler(1, gamma=0.0, limit=2.0)
    rewards = torch.tensor([[-1e-3] * 99 + [1000.0]])
    scaled = scaler(rewards, torch.zeros(1, 100, dtype=torch.bool))
    assert scaled.dtype == torch.float32
    assert float(scaled[0, -1]) == 2.0
    assert bool((scaled[0, :-1] < 0).all())


def test_the_scaler_continues_from_its_state() -> None:
    rewards, ended = (torch.from_numpy(array) for array in rewards_and_ends())
    whole, first, second = (RewardScaler(3, gamma=0.9) for _ in range(3))
    whole(rewards[:, :40], ended[:, :40])
    first(rewards[:, :40], ended[:, :40])
    second.load_state_dict(first.state_dict())
    assert torch.equal(whole(rewards[:, 40:], ended[:, 40:]), second(rewards[:, 40:], ended[:, 40:]))
