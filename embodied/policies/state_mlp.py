"""A policy from state: separate actor and critic MLPs, Gaussian or categorical actions, its own normaliser."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import Parameter

from embodied.normalization import ObservationNormalizer
from experiment.errors import UserError
from policy_core.distributions import Categorical, DiagonalGaussian
from policy_core.networks import StackedMLP, head
from policy_core.policy import Evaluation

Array = NDArray[np.float32]


@dataclass(frozen=True)
class StatePolicyConfig:
    """hidden: widths of both MLPs; log_std: initial log standard deviation of the actions (Gaussian head)."""

    hidden: tuple[int, ...] = (64, 64)
    activation: Literal["tanh", "relu"] = "tanh"
    log_std: float = 0.0
    normalize_observations: bool = True


@dataclass(frozen=True)
class Spaces:
    """observation_size: length of the flat observation; action_size: dimensions, or choices if discrete."""

    observation_size: int
    action_size: int
    discrete: bool = False


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

    def learn_normalization(self, observations: Tensor) -> None:
        """Take raw observations [N, D] into the normaliser, unless the configuration switches it off."""
        if self.config.normalize_observations:
            self.normalizer.update(observations)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write policy.json and policy.safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        description = {"policy": "state_mlp", "spaces": asdict(self.spaces), "config": asdict(self.config)}
        (folder / "policy.json").write_text(json.dumps(description, indent=2) + "\n")
        save_file({name: t.contiguous() for name, t in self.state_dict().items()}, folder / "policy.safetensors")

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> StatePolicy:
        """Read a folder written by `save_pretrained`; UserError if it is none."""
        folder = Path(folder)
        try:
            description = json.loads((folder / "policy.json").read_text())
            config = dict(description["config"], hidden=tuple(description["config"]["hidden"]))
            policy = cls(Spaces(**description["spaces"]), StatePolicyConfig(**config))
            policy.load_state_dict(load_file(folder / "policy.safetensors"))
        except FileNotFoundError as error:
            raise UserError(
                f"{folder}: no policy here ({Path(error.filename or folder).name} is missing); give a folder that"
                " save_pretrained wrote, such as RUN/checkpoints/best/policy"
            ) from error
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder}: not a state policy, or a damaged one: {error}") from error
        policy.normalizer.refresh()
        return policy


class NumpyActor:
    """The actor of a StatePolicy in numpy, for stepping a few environments: a tenth of torch's dispatch cost.

    `weights` is a flat float32 vector that `export` fills and that may live in shared memory; `load` reads it.
    """

    def __init__(self, spaces: Spaces, config: StatePolicyConfig) -> None:
        self.spaces, self.config = spaces, config
        sizes = (spaces.observation_size, *config.hidden, spaces.action_size)
        self._shapes = [shape for i, o in itertools.pairwise(sizes) for shape in ((i, o), (o,))] + [
            (spaces.action_size,),
            (spaces.observation_size,),
            (spaces.observation_size,),
        ]
        self.size = sum(math.prod(shape) for shape in self._shapes)
        self._arrays = self._split(np.zeros(self.size, np.float32))

    def _split(self, weights: Array) -> list[Array]:
        pieces = np.split(weights, np.cumsum([math.prod(shape) for shape in self._shapes])[:-1])
        return [piece.reshape(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]

    def load(self, weights: Array) -> None:
        """Take a copy of exported weights [size]."""
        self._arrays = self._split(weights.copy())

    @torch.no_grad()
    def export(self, policy: StatePolicy, weights: Array) -> None:
        """Write the actor of `policy` into `weights` [size]."""
        log_std = torch.zeros(self.spaces.action_size) if self.spaces.discrete else policy.log_std
        hidden = [tensor for i in range(len(self.config.hidden)) for tensor in policy.trunks.layer(i, 0)]
        tensors = [
            *hidden,
            policy.actor.weight.t(),
            policy.actor.bias,
            log_std,
            policy.normalizer.scale,
            policy.normalizer.offset,
        ]
        for array, tensor in zip(self._split(weights), tensors, strict=True):
            array[:] = tensor.numpy()

    def outputs(self, observations: Array) -> Array:
        """[N, D] raw -> means [N, A] or logits [N, K]."""
        *layers, _, scale, offset = self._arrays
        hidden = observations * scale
        hidden += offset
        limit = 10.0
        np.clip(hidden, -limit, limit, out=hidden)
        last = len(layers) - 2
        for i in range(0, len(layers), 2):
            hidden = hidden @ layers[i]
            hidden += layers[i + 1]
            if i < last:
                if self.config.activation == "tanh":
                    np.tanh(hidden, out=hidden)
                else:
                    np.maximum(hidden, 0.0, out=hidden)
        return hidden

    def act(self, observations: Array, noise: Array | None) -> Array:
        """[N, D] raw -> actions [N, A] (or [N] int64 if discrete).

        noise: standard normal [N, A], or standard Gumbel [N, K] if discrete; None for the mode.
        """
        outputs = self.outputs(observations)
        if self.spaces.discrete:
            return (outputs if noise is None else outputs + noise).argmax(-1)
        if noise is not None:
            outputs += noise * np.exp(self._arrays[-3])
        return outputs
