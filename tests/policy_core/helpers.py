"""Small rollouts and small policies for the tests of the core."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from policy_core.distributions import Categorical, DiagonalGaussian
from policy_core.policy import Evaluation
from policy_core.rollout import Rollout

NAN = float("nan")
EXACT = {"rtol": 0.0, "atol": 1e-12}


def close(actual: Tensor, expected: Tensor | Sequence[Any] | float, *, atol: float = 1e-12) -> None:
    """Equal in shape, and in every entry within `atol`; NaN equals nothing."""
    wanted = expected if isinstance(expected, Tensor) else torch.tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, wanted.to(actual.dtype), rtol=0.0, atol=atol)


def flags(*rows: str) -> Tensor:
    """Rows such as "1101" as a [B, T] bool tensor."""
    return torch.tensor([[character == "1" for character in row] for row in rows])


def make_rollout(rewards: Sequence[Sequence[float]] | Tensor, **columns: Any) -> Rollout:
    """A rollout around `rewards` [B, T]; what is not given is one counted, never-ending episode a row, gamma 1."""
    reward = torch.as_tensor(rewards, dtype=torch.get_default_dtype())
    nothing = torch.zeros_like(reward, dtype=torch.bool)
    given = {name: value if isinstance(value, Tensor) else torch.tensor(value) for name, value in columns.items()}
    discount = given.pop("discount", torch.tensor(1.0))
    fields: dict[str, Any] = {
        "observations": reward.unsqueeze(-1),
        "actions": reward.unsqueeze(-1),
        "terminated": nothing,
        "truncated": nothing,
        "mask": ~nothing,
        "old_log_probs": torch.zeros_like(reward),
        "episode": torch.zeros_like(reward, dtype=torch.long),
        **given,
    }
    return Rollout(rewards=reward, discount=torch.ones_like(reward) * discount, **fields)


class TinyPolicy(nn.Module):
    """Linear-tanh actor and critic on observations [B, T, D], sharing their trunk or not.

    kind "gaussian" acts in [B, T, A] with log-probs by factor; "categorical" in [B, T] int, or [B, T, F] int
    where `factors` is given.
    """

    def __init__(
        self,
        *,
        observation_size: int = 3,
        action_size: int = 2,
        kind: Literal["gaussian", "categorical"] = "gaussian",
        factors: int | None = None,
        shared_trunk: bool = False,
        critic: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def linear(inputs: int, outputs: int) -> nn.Linear:
            layer = nn.Linear(inputs, outputs)
            with torch.no_grad():
                layer.weight.copy_(torch.randn(outputs, inputs, generator=generator) / inputs**0.5)
                layer.bias.copy_(0.1 * torch.randn(outputs, generator=generator))
            return layer

        self.kind, self.factors, self.action_size = kind, factors, action_size
        self.actor_trunk = linear(observation_size, 5)
        self.actor = linear(5, action_size * (factors or 1))
        self.log_std = Parameter(torch.full((action_size,), -0.3))
        self.critic = linear(5, 1) if critic else None
        self.critic_trunk = None if shared_trunk or not critic else linear(observation_size, 5)

    def distribution(self, observations: Tensor) -> DiagonalGaussian | Categorical:
        outputs = self.actor(torch.tanh(self.actor_trunk(observations)))
        if self.kind == "gaussian":
            return DiagonalGaussian(outputs, self.log_std)
        if self.factors is not None:
            outputs = outputs.unflatten(-1, (self.factors, self.action_size))
        return Categorical(outputs)

    def evaluate(self, observations: Any, actions: Any) -> Evaluation:
        distribution = self.distribution(observations)
        values = None
        if self.critic is not None:
            trunk = self.actor_trunk if self.critic_trunk is None else self.critic_trunk
            values = self.critic(torch.tanh(trunk(observations))).squeeze(-1)
        return Evaluation(distribution.log_prob(actions), distribution.entropy(), values)

    def critic_parameters(self) -> Iterator[Parameter]:
        for module in (self.critic, self.critic_trunk):
            if module is not None:
                yield from module.parameters()

    def actor_parameters(self) -> list[Parameter]:
        critic = {id(parameter) for parameter in self.critic_parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in critic]


def sampled_rollout(policy: TinyPolicy, *, rows: int = 6, width: int = 5, seed: int = 1) -> Rollout:
    """A rollout that `policy` sampled on random observations: two episodes in each row, a masked column in each.

    Column 1 is an observation column of the first episode; the last row ends in padding.
    """
    generator = torch.Generator().manual_seed(seed)
    observations = torch.randn(rows, width, 3, generator=generator)
    with torch.no_grad():
        distribution = policy.distribution(observations)
        actions = distribution.sample(generator)
        evaluation = policy.evaluate(observations, actions)
    mask = torch.ones(rows, width, dtype=torch.bool)
    mask[:, 1] = False
    mask[-1, -1] = False
    episode = (torch.arange(width) > 2).long().repeat(rows, 1)
    episode[-1, -1] = -1
    terminated = torch.zeros_like(mask)
    terminated[:, 2] = True
    return Rollout(
        observations=observations,
        actions=actions,
        rewards=torch.randn(rows, width, generator=generator),
        terminated=terminated,
        truncated=torch.zeros_like(mask),
        mask=mask,
        discount=torch.full((rows, width), 0.9),
        old_log_probs=evaluation.log_probs,
        episode=episode,
        values=evaluation.values,
        next_values=None if evaluation.values is None else torch.roll(evaluation.values, -1, dims=1),
    )


def weights_of(policy: nn.Module) -> Tensor:
    """All parameters as one vector, copied."""
    return torch.cat([parameter.detach().flatten().clone() for parameter in policy.parameters()])


def gradient_of(policy: nn.Module) -> Tensor:
    """All gradients as one vector, 0 where there is none."""
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten().clone() for p in policy.parameters()]
    )


def clone(policy: TinyPolicy) -> TinyPolicy:
    return copy.deepcopy(policy)
