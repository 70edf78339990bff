"""Contracts: the KL estimators against the exact KL of the policies' categorical distributions.

For the language model they are its next-token distributions at every sampled position; expectations are sums over
all choices, not samples.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from policy_core.kl import Estimator, kl_estimate
from tests.contracts.bodies import Body, same


def all_log_probs(policy: Any, body: Body) -> Tensor:
    """Log-probabilities of every choice at every decision, [decisions, choices]."""
    rollout = body.rollout
    assert body.choices is not None
    columns = []
    for choice in range(body.choices):
        actions = torch.full(rollout.shape, choice)
        columns.append(policy.evaluate(rollout.observations, actions).log_probs[rollout.mask])
    return torch.stack(columns, dim=-1)


def exact_kl(policy: Tensor, reference: Tensor) -> Tensor:
    return (policy.exp() * (policy - reference)).sum(-1)


@torch.no_grad()
def test_the_distributions_are_the_ones_that_acted(categorical_body: Body) -> None:
    body, rollout = categorical_body, categorical_body.rollout
    log_probs = all_log_probs(body.policy, body)
    same(log_probs.exp().sum(-1), torch.ones(len(log_probs)))
    actions = rollout.actions
    assert isinstance(actions, Tensor)
    taken = log_probs.gather(-1, actions[rollout.mask].long().unsqueeze(-1)).squeeze(-1)
    same(taken, rollout.old_log_probs[rollout.mask], atol=1e-10)
    policy: Any = body.policy
    entropy = policy.evaluate(rollout.observations, rollout.actions).entropy[rollout.mask]
    same(entropy, -(log_probs.exp() * log_probs).sum(-1), atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(categorical_body: Body, estimator: Estimator) -> None:
    policy = all_log_probs(categorical_body.policy, categorical_body)
    reference = all_log_probs(categorical_body.reference, categorical_body)
    estimate = kl_estimate(log_probs=policy, ref_log_probs=reference, estimator=estimator)
    kl = exact_kl(policy, reference)
    assert kl.min() > 0
    same((policy.exp() * estimate).sum(-1), kl)
    if estimator == "k3":
        assert estimate.min() >= 0


def test_the_gradient_of_k2_is_that_of_the_kl(categorical_body: Body) -> None:
    """With respect to the policy's own weights, in expectation over its choices at each decision."""
    policy: Any = copy.deepcopy(categorical_body.policy)
    with torch.no_grad():
        reference = all_log_probs(categorical_body.reference, categorical_body)
    learned = list(policy.parameters())

    def gradient(loss: Tensor) -> Tensor:
        parts = torch.autograd.grad(loss, learned, allow_unused=True, materialize_grads=True)
        return torch.cat([part.flatten() for part in parts])

    log_probs = all_log_probs(policy, categorical_body)
    kl_gradient = gradient(exact_kl(log_probs, reference).mean())
    log_probs = all_log_probs(policy, categorical_body)
    estimate = kl_estimate(log_probs=log_probs, ref_log_probs=reference, estimator="k2")
    expected = gradient((log_probs.detach().exp() * estimate).sum(-1).mean())
    assert kl_gradient.abs().max() > 1e-4
    same(expected, kl_gradient, atol=1e-10)
