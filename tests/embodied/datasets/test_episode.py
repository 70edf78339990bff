"""Episodes: statistics by hand, and the comparison with an environment."""

import numpy as np
import pytest

from embodied.datasets.episode import Episode, check_against, dataset_statistics
from envs.make import EnvironmentSpec
from experiment.errors import UserError


def _episode(values: list[float]) -> Episode:
    column = np.array(values, np.float32)[:, None]
    return Episode(
        observations=np.concatenate([column, np.ones_like(column)], axis=1),
        actions=-column,
        rewards=column[:, 0],
        terminated=False,
        truncated=True,
    )


def _spec(observation_dim: int, action_dim: int, discrete: bool = False) -> EnvironmentSpec:
    return EnvironmentSpec("Some-v0", observation_dim, action_dim, discrete, None, None, 100)


def test_statistics_by_hand() -> None:
    statistics = dataset_statistics([_episode([1.0, 2.0, 3.0]), _episode([6.0])])
    assert statistics.observation_mean.tolist() == [3.0, 1.0]
    np.testing.assert_allclose(statistics.observation_std, [np.sqrt(3.5), 0.0], rtol=1e-15)
    assert statistics.action_mean.tolist() == [-3.0]
    np.testing.assert_allclose(statistics.action_std, [np.sqrt(3.5)], rtol=1e-15)


def test_nothing_to_describe() -> None:
    with pytest.raises(UserError, match="empty"):
        dataset_statistics([])
    with pytest.raises(UserError, match=r"a\.hdf5: no episodes"):
        check_against([], _spec(2, 1), "a.hdf5")


def test_an_environment_with_other_dimensions_is_named() -> None:
    check_against([_episode([1.0])], _spec(2, 1))
    with pytest.raises(UserError, match=r"a.hdf5: observations have 2 .* actions 1, but Some-v0 has 3 and 1"):
        check_against([_episode([1.0])], _spec(3, 1), "a.hdf5")
    with pytest.raises(UserError, match="but Some-v0 has 2 and 4"):
        check_against([_episode([1.0])], _spec(2, 4))
    with pytest.raises(UserError, match="4 discrete choices"):
        check_against([_episode([1.0])], _spec(2, 4, discrete=True))
