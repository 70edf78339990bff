"""IQL, CQL, Cal-QL, TD3+BC and ReBRAC against d3rlpy 2.8: losses, gradients, and a hundred updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from d3rlpy.algos import AWACConfig as TheirAWACConfig
from d3rlpy.algos import CalQLConfig, ReBRACConfig, TD3PlusBCConfig
from d3rlpy.algos import CQLConfig as TheirCQLConfig
from d3rlpy.algos import IQLConfig as TheirIQLConfig
from torch import Tensor

from policy_core import awac, cql, iql, td3_bc
from policy_core.cql import CQLConfig, Multiplier, Noise
from policy_core.critics import ActorCritic
from policy_core.iql import IQLConfig, weighted_likelihood_loss
from policy_core.sac import Coefficient, Optimizers, SACConfig
from policy_core.td3_bc import TD3BCConfig, TD3Networks
from tests.policy_core import d3rlpy_twins as peers

SAMPLES = 4
EXACT = 1e-7
"""Both sides compute in float64, but for a few constants that d3rlpy keeps in float32."""


def networks_config(**more: Any) -> dict[str, Any]:
    names = ("actor_encoder_factory", "critic_encoder_factory")
    return {name: peers.encoder() for name in names} | {"gamma": peers.GAMMA, "batch_size": peers.BATCH} | more


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give d3rlpy these numbers instead of what it would draw, in the order in which it asks."""

    def give(*, normal: list[Tensor], uniform: list[Tensor], smoothing: list[Tensor] | None = None) -> None:
        normals, uniforms, smoothings = iter(normal), iter(uniform), iter(smoothing or [])
        standard = torch.distributions.normal

        def standard_normal(shape: Any, dtype: Any, device: Any) -> Tensor:
            value = next(normals)
            assert value.shape == torch.Size(shape)
            return value

        monkeypatch.setattr(standard, "_standard_normal", standard_normal)
        monkeypatch.setattr(Tensor, "uniform_", lambda self, low, high: next(uniforms).reshape(self.shape))
        if smoothing is not None:
            randn = torch.randn

            def smoothing_noise(*shape: Any, **more: Any) -> Tensor:
                return randn(*shape, **more) if "generator" in more else next(smoothings)

            monkeypatch.setattr(torch, "randn", smoothing_noise)

    return give


# ---------------------------------------------------------------- IQL


def iql_pair() -> tuple[Any, Any]:
    impl = peers.build(TheirIQLConfig(**networks_config(value_encoder_factory=peers.encoder())))
    return impl, peers.twins(impl, squashed=False)


def test_iql_losses_and_gradients() -> None:
    impl, networks = iql_pair()
    torch.manual_seed(3)
    for parameter in networks.target.parameters():  # a slow copy that is not the critics themselves
        parameter.add_(0.1 * torch.randn_like(parameter))
    pull_targets(impl, networks)
    theirs, ours = peers.batches(0)
    expected = impl.compute_critic_grad(theirs)  # it adds its losses up in float32
    slow = networks.target(ours.observations, ours.actions)
    values = networks.policy.values_of(ours.observations)
    loss, metrics = iql.critic_loss(
        values=values,
        next_values=networks.policy.values_of(ours.next_observations).detach(),
        q_values=networks.critic(ours.observations, ours.actions),
        slow_q_values=slow,
        batch=ours,
        expectile=0.7,
    )
    loss.backward()
    torch.testing.assert_close(loss, expected.critic_loss, rtol=1e-6, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(metrics["value_loss"], expected.v_loss.detach(), rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(
        metrics["critic_loss"], expected.q_loss.detach(), rtol=1e-6, atol=1e-6, check_dtype=False
    )
    peers.assert_same_critics(networks.critic, impl._modules.q_funcs, "grad", EXACT)
    peers.assert_same_module(networks.policy.value, impl._modules.value_func, "grad", EXACT)
    expected_policy = impl.compute_actor_grad(theirs)
    log_probs = networks.policy.distribution_of(ours.observations).log_prob(ours.actions).sum(-1)
    of_policy, _ = iql.policy_loss(
        log_probs=log_probs, values=values, slow_q_values=slow, mask=ours.mask, config=IQLConfig()
    )
    of_policy.backward()
    torch.testing.assert_close(of_policy, expected_policy.actor_loss, rtol=EXACT, atol=EXACT)
    peers.assert_same_module(networks.policy.policy, impl._modules.policy, "grad", EXACT)


def test_a_hundred_iql_updates_in_their_order() -> None:
    impl, networks = iql_pair()
    policy = networks.policy
    slow_moving = torch.optim.Adam([*networks.critic.parameters(), *policy.value.parameters()], lr=3e-4)
    of_policy = torch.optim.Adam(policy.policy.parameters(), lr=3e-4)
    for step in range(100):
        theirs, ours = peers.batches(step)
        impl.inner_update(theirs, step)
        iql.update_in_turn(networks, slow_moving, of_policy, ours, IQLConfig())
    assert_same_networks(impl, networks, 1e-8)
    peers.assert_same_module(policy.value, impl._modules.value_func, "weight", 1e-8)


# ---------------------------------------------------------------- CQL


def cql_pair(config: Any) -> tuple[Any, Any, Coefficient, Coefficient]:
    impl = peers.build(config)
    return impl, peers.twins(impl, squashed=True), Coefficient(1.0).double(), Coefficient(1.0).double()


def noise_of(step: int) -> tuple[Noise, Tensor]:
    """What a CQL update draws, and the policy's own noise."""
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (SAMPLES, peers.BATCH, peers.ACTIONS)
    normal = [torch.randn(shape, generator=generator) for _ in range(2)]
    uniform = torch.rand(shape, generator=generator) * 2 - 1
    return Noise(uniform, *normal), torch.randn(shape[1:], generator=generator)


@pytest.fixture
def own_noise(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor], None]:
    """What our policy's reparameterised action is drawn with."""

    def give(noise: Tensor) -> None:
        def sample(self: Any, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
            return self.from_noise(noise)

        monkeypatch.setattr("policy_core.distributions.TanhGaussian.rsample_with_log_prob", sample)

    return give


@pytest.mark.parametrize(("lagrange", "calibrated"), [(True, False), (False, True)])
def test_a_hundred_cql_updates(
    drawn: Callable[..., None], own_noise: Callable[[Tensor], None], lagrange: bool, calibrated: bool
) -> None:
    kind = CalQLConfig if calibrated else TheirCQLConfig
    rates = {"alpha_learning_rate": 1e-4 if lagrange else 0.0, "alpha_threshold": 10.0 if lagrange else 0.0}
    impl, networks, temperature, coefficient = cql_pair(
        kind(**networks_config(n_action_samples=SAMPLES, conservative_weight=5.0, soft_q_backup=False, **rates))
    )
    optimizers = Optimizers(
        policy=torch.optim.Adam(networks.policy.policy.parameters(), lr=1e-4),
        critic=torch.optim.Adam(networks.critic.parameters(), lr=3e-4),
        temperature=torch.optim.Adam(temperature.parameters(), lr=1e-4),
    )
    multiplier = Multiplier(coefficient, torch.optim.Adam(coefficient.parameters(), lr=1e-4)) if lagrange else None
    config = CQLConfig(
        rows=None, samples=SAMPLES, threshold=10.0 if lagrange else None, sac=SACConfig(soft_backup=False)
    )
    losses = []
    for step in range(100):
        theirs, ours = peers.batches(step)
        noise, own = noise_of(step)
        drawn(normal=[noise.here, noise.following, own], uniform=[noise.uniform.transpose(0, 1)])
        expected = impl.inner_update(theirs, step)
        own_noise(own)
        returns = theirs.returns_to_go.squeeze(-1) if calibrated else None
        found = cql.update(
            networks, temperature, optimizers, ours, config, multiplier=multiplier, returns=returns, noise=noise
        )
        losses.append((float(found["critic_loss"]), expected["critic_loss"] - expected["conservative_loss"]))
        assert float(found["policy_loss"]) == pytest.approx(expected["actor_loss"], rel=1e-7)
    assert [ours for ours, _ in losses] == pytest.approx([theirs for _, theirs in losses], rel=1e-6, abs=1e-6)
    assert_same_networks(impl, networks, 1e-8)
    assert temperature().item() == pytest.approx(impl._modules.log_temp._parameter.exp().item(), rel=1e-9)
    assert coefficient().item() == pytest.approx(impl._modules.log_alpha._parameter.exp().item(), rel=1e-9)
    assert (coefficient().item() != 1.0) == lagrange


# ---------------------------------------------------------------- AWAC


def test_awac_policy_loss_and_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """d3rlpy's loss is the sum over the batch, ours the mean; its critics learn by SAC's squashed samples, another
    policy than the one that it weighs, so that their targets are not compared."""
    impl = peers.build(TheirAWACConfig(**networks_config(lam=0.4, n_action_samples=SAMPLES)))
    networks: Any = peers.twins(impl, squashed=False)
    theirs, ours = peers.batches(0)
    own = torch.randn(SAMPLES, peers.BATCH, peers.ACTIONS, dtype=torch.float64).clamp(-1, 1)
    monkeypatch.setattr(
        "d3rlpy.models.torch.distributions.GaussianDistribution.sample_n", lambda self, n: own.transpose(0, 1)
    )
    expected = impl.compute_actor_loss(theirs, impl._modules.policy(theirs.observations)).actor_loss
    expected.backward()
    judged = networks.critic(ours.observations, torch.cat([theirs.actions.unsqueeze(0), own])).amin(0)
    weights = awac.batch_weights(advantages=judged[0] - judged[1:].mean(0), mask=ours.mask, temperature=0.4)
    log_probs = networks.policy.distribution_of(ours.observations).log_prob(ours.actions).sum(-1)
    loss = peers.BATCH * weighted_likelihood_loss(log_probs=log_probs, weights=weights, mask=ours.mask)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=EXACT, atol=EXACT)
    peers.assert_same_module(networks.policy.policy, impl._modules.policy, "grad", EXACT)


# ---------------------------------------------------------------- TD3+BC and ReBRAC


@pytest.mark.parametrize("rebrac", [False, True])
def test_a_hundred_td3_bc_updates(drawn: Callable[..., None], rebrac: bool) -> None:
    if rebrac:
        impl = peers.build(ReBRACConfig(**networks_config(actor_beta=0.4, critic_beta=0.2)))
        config = TD3BCConfig(alpha=1.0, imitation=0.4, critic_penalty=0.2, distance="sum")
    else:
        impl = peers.build(TD3PlusBCConfig(**networks_config()))
        config = TD3BCConfig()
    networks: Any = TD3Networks.copying(peers.twins(impl, squashed=False))
    rate = 1e-3 if rebrac else 3e-4
    of_policy = torch.optim.Adam(networks.policy.policy.parameters(), lr=rate)
    of_critic = torch.optim.Adam(networks.critic.parameters(), lr=rate)
    for step in range(100):
        theirs, ours = peers.batches(step)
        noise = torch.randn(peers.BATCH, peers.ACTIONS, generator=torch.Generator().manual_seed(step))
        drawn(normal=[], uniform=[], smoothing=[noise])
        impl.inner_update(theirs, step)
        td3_bc.update(
            networks,
            of_policy,
            of_critic,
            ours,
            config,
            number=step,
            noise=noise,
            next_actions=theirs.next_actions,
        )
    assert_same_networks(impl, networks, 1e-8)


# ---------------------------------------------------------------- parts


@torch.no_grad()
def pull_targets(impl: Any, networks: ActorCritic) -> None:
    """Give d3rlpy's slow critics the weights of ours."""
    for layers, q_function in zip(
        peers.members_of(networks.target, "weight"), impl._modules.targ_q_funcs, strict=True
    ):
        for (weight, bias), linear in zip(layers, peers.linear_layers(q_function), strict=True):
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)


def assert_same_networks(impl: Any, networks: Any, tolerance: float) -> None:
    peers.assert_same_critics(networks.critic, impl._modules.q_funcs, "weight", tolerance)
    peers.assert_same_critics(networks.target, impl._modules.targ_q_funcs, "weight", tolerance)
    peers.assert_same_module(networks.policy.policy, impl._modules.policy, "weight", tolerance)
