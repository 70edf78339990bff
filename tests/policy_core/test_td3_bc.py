"""TD3+BC, ReBRAC and AWAC: losses by hand, delays, and who moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from policy_core import awac, td3_bc
from policy_core.awac import AWACConfig, batch_weights
from policy_core.critics import ActorCritic, EnsembleCritic
from policy_core.td3_bc import TD3BCConfig, TD3Networks, policy_loss, target_values
from tests.policy_core.test_critics import transitions
from tests.policy_core.test_iql import Table


def learner() -> tuple[Any, torch.optim.Optimizer, torch.optim.Optimizer]:
    torch.manual_seed(0)
    policy = Table(2)  # its mean is linear in the observation
    torch.nn.init.normal_(policy.mean)
    networks = TD3Networks.copying(ActorCritic.of(policy, EnsembleCritic(2, 2, 1, (8,))))
    adams = (torch.optim.Adam(m.parameters(), 1e-2) for m in (policy, networks.critic))
    of_policy, of_critic = adams
    return networks, of_policy, of_critic


def test_policy_loss_by_hand() -> None:
    loss, metrics = policy_loss(
        actions=torch.tensor([[0.0, 0.0], [1.0, 1.0], [torch.nan, 0.0]]),
        q_values=torch.tensor([2.0, -4.0, 0.0]),
        data_actions=torch.tensor([[1.0, 0.0], [1.0, -1.0], [0.0, 0.0]]),
        mask=torch.tensor([True, True, False]),
        config=TD3BCConfig(alpha=3.0, imitation=2.0),
    )
    away = (0.5 + 2.0) / 2  # mean over two dimensions of 1 and of 4
    assert float(metrics["imitation_loss"]) == pytest.approx(away)
    assert float(loss) == pytest.approx(2.0 * away - 3.0 / 3.0 * (-1.0))  # mean |Q| is 3, mean Q is -1


def test_the_sum_over_dimensions_is_rebracs() -> None:
    arguments: dict[str, Any] = {
        "actions": torch.randn(4, 3),
        "q_values": torch.randn(4),
        "data_actions": torch.randn(4, 3),
        "mask": torch.ones(4).bool(),
    }
    mean = policy_loss(**arguments, config=TD3BCConfig())[1]["imitation_loss"]
    total = policy_loss(**arguments, config=TD3BCConfig(distance="sum"))[1]["imitation_loss"]
    assert float(total) == pytest.approx(3 * float(mean))


def test_the_target_is_smoothed_clipped_and_charged() -> None:
    networks, _, _ = learner()
    batch = transitions(4)
    mode = networks.target_policy.distribution_of(batch.next_observations).mode()
    noise = torch.tensor([[0.5], [10.0], [-10.0], [0.0]])
    disturbed = (mode + torch.tensor([[0.1], [0.3], [-0.3], [0.0]])).clamp(-1, 1)  # 0.2 * noise within 0.3
    expected = networks.target(batch.next_observations, disturbed).amin(0)
    config = TD3BCConfig(noise_clip=0.3)
    found = target_values(networks, batch, config, noise=noise, next_actions=None)
    torch.testing.assert_close(found, expected)
    following = torch.rand(4, 1)
    charged = target_values(
        networks, batch, TD3BCConfig(noise_clip=0.3, critic_penalty=0.5), noise=noise, next_actions=following
    )
    torch.testing.assert_close(charged, expected - 0.5 * (disturbed - following).square().sum(-1))


def test_the_policy_moves_at_every_second_update() -> None:
    networks, of_policy, of_critic = learner()
    moved = []
    for number in range(1, 5):
        before = [
            p.clone() for p in (networks.policy.mean, networks.target_policy.mean, networks.target.weights[0])
        ]
        td3_bc.update(networks, of_policy, of_critic, transitions(8), TD3BCConfig(), number=number)
        after = (networks.policy.mean, networks.target_policy.mean, networks.target.weights[0])
        moved.append([not torch.equal(b, a) for b, a in zip(before, after, strict=True)])
    assert moved == [[False] * 3, [True] * 3] * 2


def test_batch_weights_by_hand() -> None:
    weights = batch_weights(
        advantages=torch.tensor([0.0, 2.0, 99.0]), mask=torch.tensor([True, True, False]), temperature=2.0
    )
    share = torch.tensor([1.0, torch.e]) / (1.0 + torch.e)
    torch.testing.assert_close(weights, torch.cat([2 * share, torch.zeros(1)]))


def test_awac_moves_towards_what_was_better_than_its_own() -> None:
    torch.manual_seed(0)
    policy = Table(2)
    networks = ActorCritic.of(policy, EnsembleCritic(2, 2, 1, (32,)))
    of_policy, of_critic = (torch.optim.Adam(m.parameters(), 1e-2) for m in (policy, networks.critic))
    batch = transitions(64)
    batch.observations.copy_(torch.eye(2).repeat(32, 1))  # the first state likes +, the second -
    sign = torch.tensor([1.0, -1.0]).repeat(32)
    batch.rewards.copy_(sign * batch.actions.squeeze(-1))
    batch.terminated.fill_(True)
    for _ in range(400):
        metrics = awac.update(networks, of_policy, of_critic, batch, AWACConfig(temperature=0.2, samples=4))
    assert policy.mean[0].item() > 0.4
    assert policy.mean[1].item() < -0.4
    assert set(metrics) == {"critic_loss", "policy_loss", "q_values", "advantage"}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (TD3BCConfig, {"alpha": 0.0}, "alpha must be positive"),
        (TD3BCConfig, {"policy_delay": 0}, "policy_delay at least 1"),
        (TD3BCConfig, {"noise_clip": -1.0}, "must not be negative"),
        (AWACConfig, {"temperature": 0.0}, "temperature must be positive"),
        (AWACConfig, {"samples": 0}, "samples at least 1"),
    ],
)
def test_impossible_settings(kind: type, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)
