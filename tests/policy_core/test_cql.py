"""The conservative term by hand, where it leads, and that a batch may be judged in parts."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from policy_core import cql, sac
from policy_core.cql import CQLConfig, Multiplier, Noise, calibrated, conservative_gap, discrete_conservative_gap
from policy_core.critics import ActorCritic, EnsembleCritic
from policy_core.sac import Coefficient, Optimizers, SACConfig
from tests.policy_core.test_critics import transitions
from tests.policy_core.test_sac import Squashed


def test_the_gap_by_hand() -> None:
    q_values = torch.tensor([[[1.0, 5.0], [3.0, 5.0]]])  # [M=1, K=2, N=2]
    densities = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    gap = conservative_gap(
        q_values=q_values,
        log_densities=densities,
        data_q_values=torch.tensor([[2.0, torch.nan]]),
        mask=torch.tensor([True, False]),
    )
    assert gap.tolist() == pytest.approx([math.log(math.exp(1.0) + math.exp(2.0)) - 2.0])


def test_importance_sampling_is_unbiased() -> None:
    """Q = 0 everywhere: the integral of exp Q over [-1, 1]^2 is 4, however the actions are drawn."""
    normal = torch.distributions.Normal(0.0, 1.0)
    raw = normal.sample((200_000, 1, 2))
    actions = torch.tanh(raw)
    density = (normal.log_prob(raw) - torch.log1p(-actions.square())).sum(-1)
    gap = conservative_gap(
        q_values=torch.zeros(1, 200_000, 1),
        log_densities=density,
        data_q_values=torch.zeros(1, 1),
        mask=torch.ones(1).bool(),
    )
    assert float(gap) - math.log(200_000) == pytest.approx(math.log(4.0), abs=0.02)


def test_the_discrete_gap_is_the_cross_entropy_of_q() -> None:
    q_values, actions = torch.randn(3, 4, 7), torch.randint(7, (3, 4))
    mask = torch.rand(3, 4) < 0.6
    gap = discrete_conservative_gap(q_values=q_values, actions=actions, mask=mask)
    expected = torch.nn.functional.cross_entropy(q_values[mask], actions[mask])
    torch.testing.assert_close(gap, expected)


def test_calibration_is_a_floor_for_every_action() -> None:
    q_values = torch.tensor([[[1.0, 1.0], [3.0, -2.0]]])
    assert calibrated(q_values, torch.tensor([2.0, -torch.inf])).tolist() == [[[2.0, 1.0], [3.0, -2.0]]]


def learner(seed: int = 0) -> tuple[ActorCritic, Coefficient, Optimizers]:
    torch.manual_seed(seed)
    policy = Squashed(2, 1)
    networks, temperature = ActorCritic.of(policy, EnsembleCritic(2, 2, 1, (16,))), Coefficient(0.3).double()
    optimizers = Optimizers(
        torch.optim.Adam(policy.parameters(), 1e-3),
        torch.optim.Adam(networks.critic.parameters(), 1e-3),
        torch.optim.Adam(temperature.parameters(), 1e-3),
    )
    return networks, temperature, optimizers


@pytest.mark.parametrize("returns", [None, torch.linspace(-1, 1, 10)])
def test_a_batch_judged_in_parts_is_the_whole(returns: torch.Tensor | None) -> None:
    batch = transitions(10)
    batch.mask[3] = False
    noise = Noise.draw(4, batch.actions, torch.Generator().manual_seed(1))
    outcomes = []
    for rows in (None, 3):
        networks, temperature, optimizers = learner()
        config = CQLConfig(samples=4, rows=rows)
        drawn = torch.Generator().manual_seed(2)
        for _ in range(3):
            metrics = cql.update(
                networks, temperature, optimizers, batch, config, returns=returns, noise=noise, generator=drawn
            )
        outcomes.append((metrics, [p.detach() for p in networks.critic.parameters()]))
    (whole, weights), (parts, other_weights) = outcomes
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(other_weights, weights, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows", [None, 4])
def test_the_multiplier_grows_while_the_gap_is_too_wide(rows: int | None) -> None:
    values = {}
    for threshold in (-100.0, 100.0):
        networks, temperature, optimizers = learner()
        coefficient = Coefficient(1.0).double()
        multiplier = Multiplier(coefficient, torch.optim.Adam(coefficient.parameters(), 1e-2))
        config = CQLConfig(samples=4, rows=rows, threshold=threshold)
        for _ in range(5):
            metrics = cql.update(networks, temperature, optimizers, transitions(10), config, multiplier=multiplier)
        values[threshold] = float(metrics["multiplier"])
    assert values[-100.0] > 1.03
    assert values[100.0] < 0.97


def test_what_was_never_done_looks_worse_than_what_was() -> None:
    """One state, reward 0 for every action, the data only ever did 0.5."""
    networks, temperature, optimizers = learner()
    batch = transitions(32)
    batch.actions.fill_(0.5)
    batch.rewards.zero_()
    batch.terminated.fill_(True)
    before = copy.deepcopy(networks.critic)
    for _ in range(300):
        cql.update(networks, temperature, optimizers, batch, CQLConfig(samples=8, weight=1.0))
    observations = batch.observations

    def preference(critic: EnsembleCritic) -> float:
        done, other = (critic(observations, torch.full((32, 1), action)).mean() for action in (0.5, -0.8))
        return float(done - other)

    assert preference(networks.critic) > preference(before) + 0.3


def test_max_backup_takes_the_best_of_the_samples() -> None:
    networks, temperature, _ = learner()
    batch = transitions(6)
    noise = Noise.draw(5, batch.actions, torch.Generator().manual_seed(1))
    config = CQLConfig(samples=5, max_backup=True)
    sampled = cql._sample(networks, temperature, batch, config, returns=None, noise=noise, generator=None)
    following, _ = networks.policy.distribution_of(batch.next_observations).from_noise(noise.following)
    best = networks.target(batch.next_observations, following).amin(0).amax(0)
    torch.testing.assert_close(sampled.targets, batch.rewards + 0.9 * best)
    assert sampled.actions.shape == (16, 6, 1)
    torch.testing.assert_close(sampled.actions[0], batch.actions)
    assert sampled.log_densities[-5:].unique().tolist() == [pytest.approx(-math.log(2.0))]


def test_targets_are_the_least_of_the_chosen_critics() -> None:
    networks, temperature, _ = learner()
    batch = transitions(6)
    noise = Noise.draw(5, batch.actions, torch.Generator().manual_seed(1))
    config = CQLConfig(samples=5, sac=SACConfig(target_critics=1, soft_backup=False))
    mode = networks.policy.distribution_of(batch.next_observations).mode()
    both = networks.target(batch.next_observations, mode)
    chosen = set()
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        sampled = cql._sample(networks, temperature, batch, config, returns=None, noise=noise, generator=generator)
        fits = [torch.allclose(sampled.targets, batch.rewards + 0.9 * values) for values in both]
        assert sum(fits) == 1
        chosen.add(fits.index(True))
    assert chosen == {0, 1}


def test_soft_backup_charges_the_entropy() -> None:
    networks, temperature, _ = learner()
    batch = transitions(6)
    noise = Noise.draw(5, batch.actions, torch.Generator().manual_seed(1))
    config = CQLConfig(samples=5, sac=SACConfig(soft_backup=True))
    sampled = cql._sample(networks, temperature, batch, config, returns=None, noise=noise, generator=None)
    actions, log_probs = networks.policy.distribution_of(batch.next_observations).from_noise(noise.following[0])
    value = networks.target(batch.next_observations, actions).amin(0) - 0.3 * log_probs.sum(-1)
    torch.testing.assert_close(sampled.targets, batch.rewards + 0.9 * value)


def test_a_multiplier_needs_a_threshold() -> None:
    networks, temperature, optimizers = learner()
    coefficient = Coefficient(1.0)
    multiplier = Multiplier(coefficient, torch.optim.Adam(coefficient.parameters()))
    with pytest.raises(ValueError, match="threshold"):
        cql.update(networks, temperature, optimizers, transitions(4), CQLConfig(), multiplier=multiplier)


def test_impossible_settings() -> None:
    for options in ({"weight": -1.0}, {"samples": 0}, {"rows": 0}):
        with pytest.raises(ValueError, match="must"):
            CQLConfig(**options)
    assert sac.SACConfig().soft_backup
