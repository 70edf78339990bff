"""d3rlpy's networks and ours with the same weights, in float64, so that what differs is the algorithm alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from d3rlpy.models.encoders import VectorEncoderFactory
from d3rlpy.torch_utility import TorchMiniBatch
from torch import Tensor, nn

from policy_core.critics import ActorCritic, EnsembleCritic
from policy_core.distributions import DiagonalGaussian, TanhGaussian
from policy_core.rollout import Transitions

OBSERVATIONS, ACTIONS, BATCH, GAMMA = 5, 3, 16, 0.97
HIDDEN = (12, 10)


def encoder() -> VectorEncoderFactory:
    return VectorEncoderFactory(list(HIDDEN))


def build(config: Any) -> Any:
    """d3rlpy's implementation of an algorithm, in float64, its weights drawn from the global seed."""
    torch.manual_seed(7)
    algorithm = config.create(device="cpu:0")
    algorithm.create_impl((OBSERVATIONS,), ACTIONS)
    impl = algorithm.impl
    for module in vars(impl._modules).values():
        if isinstance(module, nn.Module):
            module.double()
    return impl


def batches(seed: int) -> tuple[TorchMiniBatch, Transitions]:
    """The same batch for both, with terminations and decisions that lasted one to three steps."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    observations, following = normal(BATCH, OBSERVATIONS), normal(BATCH, OBSERVATIONS)
    actions, next_actions = torch.tanh(normal(BATCH, ACTIONS)), torch.tanh(normal(BATCH, ACTIONS))
    rewards, returns = normal(BATCH), normal(BATCH)
    terminated = torch.rand(BATCH, generator=generator) < 0.3
    intervals = torch.randint(1, 4, (BATCH,), generator=generator).double()
    theirs = TorchMiniBatch(
        observations=observations,
        actions=actions,
        rewards=rewards[:, None],
        next_observations=following,
        next_actions=next_actions,
        returns_to_go=returns[:, None],
        terminals=terminated.double()[:, None],
        intervals=intervals[:, None],
        device="cpu:0",
    )
    ours = Transitions(
        observations=observations,
        actions=actions,
        rewards=rewards,
        next_observations=following,
        terminated=terminated,
        discount=GAMMA**intervals,
        mask=torch.ones(BATCH, dtype=torch.bool),
    )
    return theirs, ours


class TwinActor(nn.Module):
    """Copies of d3rlpy's policy and value network behind our `Actor`."""

    def __init__(self, policy: nn.Module, value: nn.Module | None, *, squashed: bool) -> None:
        super().__init__()
        self.policy, self.value = copy.deepcopy(policy), copy.deepcopy(value)
        self.squashed = squashed

    def distribution_of(self, observations: Tensor) -> DiagonalGaussian | TanhGaussian:
        output = self.policy(observations)
        if output.logstd is None:  # a deterministic policy
            return DiagonalGaussian(output.squashed_mu, torch.zeros_like(output.mu))
        if self.squashed:
            return TanhGaussian(output.mu, output.logstd)
        return DiagonalGaussian(output.squashed_mu, output.logstd)

    def values_of(self, observations: Tensor) -> Tensor:
        assert self.value is not None
        return self.value(observations).squeeze(-1)

    def both_of(self, observations: Tensor) -> tuple[DiagonalGaussian | TanhGaussian, Tensor]:
        return self.distribution_of(observations), self.values_of(observations)

    def actor_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.policy.parameters()


def linear_layers(q_function: nn.Module) -> list[nn.Linear]:
    """In the order in which they are applied."""
    return [module for module in q_function.modules() if isinstance(module, nn.Linear)]


def members_of(critic: EnsembleCritic, what: str) -> list[list[tuple[Tensor, Tensor]]]:
    """Per member, per layer: (weight [out, in], bias [out]) or their gradients (`what` = "grad")."""

    def of(parameter: Tensor) -> Tensor:
        tensor = parameter.grad if what == "grad" else parameter.detach()
        assert tensor is not None
        return tensor

    members = []
    for index in range(critic.members):
        layers = zip(critic.weights, critic.biases, strict=True)
        members.append([(of(weight)[index].t(), of(bias)[index, 0]) for weight, bias in layers])
    return members


@torch.no_grad()
def copy_critics(q_functions: nn.ModuleList) -> EnsembleCritic:
    """Our ensemble with d3rlpy's weights."""
    critic = EnsembleCritic(len(q_functions), OBSERVATIONS, ACTIONS, HIDDEN).double()
    for index, q_function in enumerate(q_functions):
        for layer, linear in enumerate(linear_layers(q_function)):
            critic.weights[layer][index] = linear.weight.t()
            critic.biases[layer][index, 0] = linear.bias
    return critic


def twins(impl: Any, *, squashed: bool) -> ActorCritic:
    """Our networks with the weights of d3rlpy's."""
    modules = impl._modules
    actor = TwinActor(modules.policy, getattr(modules, "value_func", None), squashed=squashed)
    networks = ActorCritic.of(actor, copy_critics(modules.q_funcs))
    networks.target.load_state_dict(copy_critics(modules.targ_q_funcs).state_dict())
    return networks


def assert_same_critics(critic: EnsembleCritic, q_functions: nn.ModuleList, what: str, tolerance: float) -> None:
    """Weights or gradients of every member are d3rlpy's."""
    for layers, q_function in zip(members_of(critic, what), q_functions, strict=True):
        for (weight, bias), linear in zip(layers, linear_layers(q_function), strict=True):
            for ours, theirs in ((weight, linear.weight), (bias, linear.bias)):
                expected = theirs.grad if what == "grad" else theirs.detach()
                torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def assert_same_module(ours: nn.Module, theirs: nn.Module, what: str, tolerance: float) -> None:
    """The same for two modules of one structure."""
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        pair = (mine.grad, other.grad) if what == "grad" else (mine.detach(), other.detach())
        torch.testing.assert_close(*pair, rtol=tolerance, atol=tolerance)
