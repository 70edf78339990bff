"""A policy from state: separate actor and critic MLPs, Gaussian or categorical actions, its own normaliser."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from embodied.policies import numpy_actor
from embodied.policies.folder import policy_folder, read_description, read_weights, reading_policy, write_policy
from embodied.policies.normalization import ObservationNormalizer
from embodied.policies.numpy_actor import LOG_STD_BOUNDS, Array, Spaces, StatePolicyConfig
from policy_core.distributions import Categorical, DiagonalGaussian, TanhGaussian
from policy_core.networks import StackedMLP, head
from policy_core.policy import Evaluation

Distribution = DiagonalGaussian | TanhGaussian | Categorical


@dataclass(frozen=True)
class ValueUnits:
    """What the values of a policy are sums of: raw rewards times `scale`, plus `shift`."""

    scale: float = 1.0
    shift: float = 0.0


class StatePolicy(nn.Module):
    """Observations [..., D] -> actions [..., A] (or [...] int if discrete) and values [...].

    Its heads work in *learner's units*: normalised observations, and actions of which +-1 are the environment's
    bounds. `forward`, `evaluate` and `values` take raw ones; `distribution_of` and `values_of` the learner's, in
    which offline learning keeps its data. `value_units`: of its values; None where they were never learned.
    """

    def __init__(self, spaces: Spaces, config: StatePolicyConfig) -> None:
        super().__init__()
        if config.head == "values" and not spaces.discrete:
            raise ValueError("policy.head 'values' is of choices, and these actions are continuous")
        self.spaces, self.config = spaces, config
        self.value_units: ValueUnits | None = None
        self.trunks = StackedMLP(2, (spaces.observation_size, *config.hidden), activation=config.activation)
        self.actor = head(config.hidden[-1], config.outputs(spaces), gain=0.01)
        self.critic = head(config.hidden[-1], 1, gain=1.0)
        if self.has_log_std:
            self.log_std = Parameter(torch.full((spaces.action_size,), config.log_std))
        self.normalizer = ObservationNormalizer(spaces.observation_size)
        saved = config.head != "gaussian"
        self.register_buffer("action_reach", torch.ones(spaces.action_size), persistent=saved)
        self.register_buffer("action_centre", torch.zeros(spaces.action_size), persistent=saved)

    action_reach: Tensor
    action_centre: Tensor

    @property
    def has_log_std(self) -> bool:
        """Whether one deviation a dimension is a parameter."""
        return not self.spaces.discrete and self.config.head != "squashed"

    def set_action_bounds(self, low: Tensor, high: Tensor) -> None:
        """The environment's bounds [A], for a head that reaches from one to the other.

        Raises ValueError where such a head meets an action without bounds.
        """
        if self.config.head == "gaussian" or self.spaces.discrete:
            return
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise ValueError(f"policy.head {self.config.head!r} needs actions with bounds; take 'gaussian'")
        self.action_reach.copy_((high - low) / 2)
        self.action_centre.copy_((high + low) / 2)

    def critic_parameters(self) -> Iterator[Parameter]:
        """The critic's; the actor's trunk is stacked with its trunk, but gets no gradient from a value."""
        yield from self.trunks.parameters()
        yield from self.critic.parameters()

    def actor_parameters(self) -> Iterator[Parameter]:
        """The actor's, and the trunks, of which the value's half gets no gradient from actions."""
        yield from self.trunks.parameters()
        yield from self.actor.parameters()
        if self.has_log_std:
            yield self.log_std

    def forward(self, observations: Tensor) -> tuple[Distribution, Tensor]:
        """Raw observations [..., D] -> distribution of actions [...] in learner's units, and values [...]."""
        return self.both_of(self.normalizer(observations))

    def both_of(self, features: Tensor) -> tuple[Distribution, Tensor]:
        """As `forward`, of normalised observations."""
        leading = features.shape[:-1]
        actor_features, critic_features = self.trunks(features.flatten(0, -2))
        return self._act(actor_features, leading), self._value(critic_features).view(leading)

    def distribution_of(self, features: Tensor) -> Distribution:
        """Normalised observations [..., D] -> distribution of actions [...] in learner's units; the actor alone."""
        hidden = self.trunks.member(0, features.flatten(0, -2))
        return self._act(hidden, features.shape[:-1])

    def values_of(self, features: Tensor) -> Tensor:
        """Normalised observations [..., D] -> values [...]; the critic alone."""
        hidden = self.trunks.member(1, features.flatten(0, -2))
        return self._value(hidden).view(features.shape[:-1])

    def _value(self, hidden: Tensor) -> Tensor:
        """[N, D] -> [N] or [N, 1], in float32 also where autocast made the trunk's features narrower: near 300 a
        bfloat16 is right to 2 only."""
        if hidden.dtype == torch.float32:
            return F.linear(hidden, self.critic.weight, self.critic.bias)
        return (hidden * self.critic.weight).sum(-1) + self.critic.bias

    def _act(self, hidden: Tensor, leading: torch.Size) -> Distribution:
        outputs = F.linear(hidden, self.actor.weight, self.actor.bias).view(*leading, -1)
        if self.spaces.discrete:
            return Categorical(outputs)
        if self.config.head == "gaussian":
            return DiagonalGaussian(outputs, self.log_std)
        if self.config.head == "bounded":
            return DiagonalGaussian(torch.tanh(outputs), self.log_std)
        mean, log_std = outputs.chunk(2, -1)
        return TanhGaussian(mean, log_std.clamp(*LOG_STD_BOUNDS))

    def evaluate(self, observations: Tensor, actions: Tensor) -> Evaluation:
        """observations [B, T, D], actions [B, T, A] ([B, T] if discrete); log-probs [B, T, A] ([B, T])."""
        distribution, values = self(observations)
        squashed = isinstance(distribution, TanhGaussian)  # its entropy has no closed form
        entropy = distribution.entropy_at_median() if squashed else distribution.entropy()
        return Evaluation(distribution.log_prob(self.to_learner(actions)), entropy, values)

    def to_learner(self, actions: Tensor) -> Tensor:
        """The environment's actions [..., A] in learner's units."""
        if self.config.head == "gaussian" or self.spaces.discrete:
            return actions
        return (actions - self.action_centre) / self.action_reach

    def to_environment(self, actions: Tensor) -> Tensor:
        """Learner's actions [..., A] in the environment's units."""
        if self.config.head == "gaussian" or self.spaces.discrete:
            return actions
        return actions * self.action_reach + self.action_centre

    @torch.no_grad()
    def values(self, observations: Tensor) -> Tensor:
        """Raw observations [..., D] -> [...]."""
        return self(observations)[1]

    @torch.no_grad()
    def set_value_units(self, units: ValueUnits) -> None:
        """Values are in `units` from now on; what was learned in others is rescaled.

        Where a shift differs, which is worth more the longer an episode is, values begin anew at 0.
        """
        before, self.value_units = self.value_units, units
        if before is None:
            return
        factor = units.scale / before.scale if units.shift == before.shift else 0.0
        self.critic.weight.mul_(factor)
        self.critic.bias.mul_(factor)

    @torch.no_grad()
    def export_actor(self, weights: Array) -> None:
        """Write the actor into `weights`, the flat vector of a `NumpyActor`."""
        log_std = self.log_std if self.has_log_std else torch.zeros(self.spaces.action_size)
        hidden = [tensor for i in range(len(self.config.hidden)) for tensor in self.trunks.layer(i, 0)]
        output = [self.actor.weight.t(), self.actor.bias]
        reach = [self.action_reach, self.action_centre]
        tensors = [*hidden, *output, log_std, *reach, self.normalizer.scale, self.normalizer.offset]
        sizes = numpy_actor.layout(self.spaces, self.config)
        for array, tensor in zip(numpy_actor.split(weights, sizes), tensors, strict=True):
            array[:] = tensor.numpy()

    def learn_normalization(self, observations: Tensor) -> None:
        """Take raw observations [N, D] into the normaliser, unless the configuration switches it off."""
        if self.config.normalize_observations:
            self.normalizer.update(observations)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write policy.json and policy.safetensors."""
        description: dict[str, Any] = {
            "policy": "state_mlp",
            "spaces": asdict(self.spaces),
            "config": asdict(self.config),
        }
        if self.value_units is not None:
            description["value_units"] = asdict(self.value_units)
        write_policy(folder, description, self)

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> StatePolicy:
        """Read a folder written by `save_pretrained`, or a run's best policy; UserError if it is none."""
        folder = policy_folder(folder)
        with reading_policy(folder, "a state policy"):
            description = read_description(folder)
            config = dict(description["config"], hidden=tuple(description["config"]["hidden"]))
            policy = cls(Spaces(**description["spaces"]), StatePolicyConfig(**config))
            read_weights(folder, policy)
            if units := description.get("value_units"):
                policy.value_units = ValueUnits(**units)
        policy.normalizer.refresh()
        return policy
