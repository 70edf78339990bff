"""The KL to the policy that training starts from, where rollouts cut episodes."""

import pytest
import torch

from embodied.learning import charge_kl, decisions_of
from envs.stepper import EpisodeRecord
from policy_core.kl import KLConfig
from policy_core.rollout import Rollout


def rollout(nats: float) -> Rollout:
    """Two environments, four decisions each, all of one cut episode a row; log-ratios of `nats` everywhere."""
    ones = torch.ones(2, 4)
    return Rollout(
        observations=torch.zeros(2, 4, 1),
        actions=torch.zeros(2, 4, 1),
        rewards=torch.zeros(2, 4),
        terminated=torch.zeros(2, 4, dtype=torch.bool),
        truncated=torch.zeros(2, 4, dtype=torch.bool),
        mask=ones.bool(),
        discount=ones,
        old_log_probs=ones * nats,
        ref_log_probs=torch.zeros(2, 4),
        episode=torch.zeros(2, 4, dtype=torch.long),
    )


def record(length: int) -> EpisodeRecord:
    return EpisodeRecord(0.0, length, None, None, terminated=False, truncated=True, number=0, seed=0)


def test_the_kl_of_an_episode_is_of_a_whole_one() -> None:
    lately = [record(8), record(12)]
    config = KLConfig(coef=0.1, unit="episode")
    for nats, decisions, expected in ((0.5, None, 2.0), (0.5, decisions_of(lately), 5.0)):
        charged, metrics = charge_kl(rollout(nats), config, 0.1, decisions=decisions)
        assert metrics["objective/kl"] == pytest.approx(expected)
        assert torch.allclose(charged.rewards, torch.full((2, 4), -0.05))
    _, metrics = charge_kl(rollout(0.5), KLConfig(coef=0.1, unit="decision"), 0.1, decisions=10.0)
    assert metrics["objective/kl"] == pytest.approx(0.5)
    assert decisions_of(lately, steps_a_decision=4.0) == 2.5
    assert decisions_of([]) is None
