"""A policy from state: separate actor and critic MLPs, Gaussian or categorical actions, its own normaliser."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from embodied.normalization import ObservationNormalizer
from embodied.policies import numpy_actor
from embodied.policies.folder import read_description, read_weights, reading_policy, write_policy
from embodied.policies.numpy_actor import Array, Spaces, StatePolicyConfig
from policy_core.distributions import Categorical, DiagonalGaussian
from policy_core.networks import StackedMLP, head
from policy_core.policy import Evaluation


class StatePolicy(nn.Module):
    """Observations [..., D] -> actions [..., A] (or [...] int if discrete) and values [...]."""

    def __init__(self, spaces: Spaces, config: StatePolicyConfig) -> None:
        super().__init__()
        self.spaces, self.config = spaces, config
        self.trunks = StackedMLP(2, (spaces.observation_size, *config.hidden), activation=config.activation)
        self.actor = head(config.hidden[-1], spaces.action_size, gain=0.01)
        self.critic = head(config.hidden[-1], 1, gain=1.0)
        if not spaces.discrete:
            self.log_std = Parameter(torch.full((spaces.action_size,), config.log_std))
        self.normalizer = ObservationNormalizer(spaces.observation_size)

    def critic_parameters(self) -> Iterator[Parameter]:
        """Those of the critic; the actor's trunk is stacked with its trunk, but gets no gradient from a value."""
        yield from self.trunks.parameters()
        yield from self.critic.parameters()

    def forward(self, observations: Tensor) -> tuple[DiagonalGaussian | Categorical, Tensor]:
        """Raw observations [..., D] -> distribution of actions [...] and values [...]."""
        leading = observations.shape[:-1]
        actor_features, critic_features = self.trunks(self.normalizer(observations).flatten(0, -2))
        outputs = F.linear(actor_features, self.actor.weight, self.actor.bias).view(*leading, -1)
        values = F.linear(critic_features, self.critic.weight, self.critic.bias).view(leading)
        return (Categorical(outputs) if self.spaces.discrete else DiagonalGaussian(outputs, self.log_std)), values

    def evaluate(self, observations: Tensor, actions: Tensor) -> Evaluation:
        """observations [B, T, D], actions [B, T, A] ([B, T] if discrete); log-probs [B, T, A] ([B, T])."""
        distribution, values = self(observations)
        return Evaluation(distribution.log_prob(actions), distribution.entropy(), values)

    @torch.no_grad()
    def values(self, observations: Tensor) -> Tensor:
        """[..., D] -> [...]."""
        return self(observations)[1]

    @torch.no_grad()
    def export_actor(self, weights: Array) -> None:
        """Write the actor into `weights`, the flat vector of a `NumpyActor`."""
        log_std = torch.zeros(self.spaces.action_size) if self.spaces.discrete else self.log_std
        hidden = [tensor for i in range(len(self.config.hidden)) for tensor in self.trunks.layer(i, 0)]
        output = [self.actor.weight.t(), self.actor.bias]
        tensors = [*hidden, *output, log_std, self.normalizer.scale, self.normalizer.offset]
        sizes = numpy_actor.layout(self.spaces, self.config)
        for array, tensor in zip(numpy_actor.split(weights, sizes), tensors, strict=True):
            array[:] = tensor.numpy()

    def learn_normalization(self, observations: Tensor) -> None:
        """Take raw observations [N, D] into the normaliser, unless the configuration switches it off."""
        if self.config.normalize_observations:
            self.normalizer.update(observations)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write policy.json and policy.safetensors."""
        description = {"policy": "state_mlp", "spaces": asdict(self.spaces), "config": asdict(self.config)}
        write_policy(folder, description, self)

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> StatePolicy:
        """Read a folder written by `save_pretrained`; UserError if it is none."""
        folder = Path(folder)
        with reading_policy(folder, "a state policy"):
            description = read_description(folder)
            config = dict(description["config"], hidden=tuple(description["config"]["hidden"]))
            policy = cls(Spaces(**description["spaces"]), StatePolicyConfig(**config))
            read_weights(folder, policy)
        policy.normalizer.refresh()
        return policy
