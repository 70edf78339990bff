"""The actor of a state policy in numpy: for a few rows it costs a tenth of torch's dispatch, and no torch import.

The processes that step environments use it; `StatePolicy.export_actor` writes its weights, which may live in memory
shared between processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

OBSERVATION_LIMIT = 10.0
"""Normalised observations are clipped to +-this, here and in the torch policy."""


Head = Literal["gaussian", "bounded", "squashed", "values"]

LOG_STD_BOUNDS = (-20.0, 2.0)
"""Bounds of a log deviation that depends on the state: SAC's customary ones."""


@dataclass(frozen=True)
class StatePolicyConfig:
    """hidden      widths of both MLPs
    log_std     initial log standard deviation of the actions, where it is a parameter
    head        of continuous actions: "gaussian", normal about a linear mean (PPO's custom); "bounded", normal
                about the tanh of it (IQL's, TD3's); "squashed", the tanh of a normal whose deviation depends on the
                state (SAC's, CQL's). The last two reach from bound to bound of the environment's actions.
                Of choices: "values", what a critic says of each (discrete CQL's), of which the best is taken
    """

    hidden: tuple[int, ...] = (64, 64)
    activation: Literal["tanh", "relu"] = "tanh"
    log_std: float = 0.0
    head: Head = "gaussian"
    normalize_observations: bool = True

    def __post_init__(self) -> None:
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"policy.hidden must be widths of at least 1, got {list(self.hidden)}")

    def outputs(self, spaces: Spaces) -> int:
        """Width of the actor's last layer."""
        return spaces.action_size * (2 if self.head == "squashed" and not spaces.discrete else 1)


@dataclass(frozen=True)
class Spaces:
    """observation_size: length of the flat observation; action_size: dimensions, or choices if discrete."""

    observation_size: int
    action_size: int
    discrete: bool = False


def layout(spaces: Spaces, config: StatePolicyConfig) -> list[tuple[int, ...]]:
    """Shapes within the flat weights: (weight [in, out], bias [out]) a layer, log_std, the action's reach and
    centre, the observation's scale and offset."""
    sizes = (spaces.observation_size, *config.hidden, config.outputs(spaces))
    layers: list[tuple[int, ...]] = [shape for i, o in pairwise(sizes) for shape in ((i, o), (o,))]
    return [*layers, *[(spaces.action_size,)] * 3, *[(spaces.observation_size,)] * 2]


def split(weights: Array, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    """Views of the flat `weights` in the given shapes."""
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    pieces = np.split(weights[: ends[-1]], ends[:-1])
    return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]


class NumpyActor:
    """Acts with weights that are read at `load`."""

    def __init__(self, spaces: Spaces, config: StatePolicyConfig) -> None:
        self.spaces, self.config = spaces, config
        self._shapes = layout(spaces, config)
        self.size = sum(math.prod(shape) for shape in self._shapes)
        self.load(np.zeros(self.size, np.float32))

    def load(self, weights: Array) -> None:
        """Take a copy of exported weights [size]."""
        *layers, log_std, self._reach, self._centre, self._scale, self._offset = split(weights.copy(), self._shapes)
        self._layers = list(zip(layers[::2], layers[1::2], strict=True))
        self._std = np.exp(log_std)

    def outputs(self, observations: Array) -> Array:
        """[N, D] raw -> means [N, A], means and log deviations [N, 2A] (head "squashed"), or logits [N, K]."""
        hidden = observations * self._scale
        hidden += self._offset
        np.minimum(hidden, OBSERVATION_LIMIT, out=hidden)  # a third of np.clip's time on a few rows
        np.maximum(hidden, -OBSERVATION_LIMIT, out=hidden)
        *layers, (last_weight, last_bias) = self._layers
        for weight, bias in layers:
            hidden = hidden @ weight
            hidden += bias
            if self.config.activation == "tanh":
                np.tanh(hidden, out=hidden)
            else:
                np.maximum(hidden, 0.0, out=hidden)
        outputs = np.asarray(hidden @ last_weight, np.float32)
        outputs += last_bias
        return outputs

    def act(self, observations: Array, noise: Array | None) -> NDArray[Any]:
        """[N, D] raw -> actions [N, A] float32, or [N] int64 if discrete.

        noise: standard normal [N, A], or standard Gumbel [N, K] if discrete; None for the mode. Values of choices
            are not disturbed: their best is taken.
        """
        outputs = self.outputs(observations)
        if self.spaces.discrete:
            if noise is not None and self.config.head != "values":
                outputs += noise
            return outputs.argmax(-1)
        if self.config.head == "gaussian":
            if noise is not None:
                outputs += noise * self._std
            return outputs
        return self._bounded(outputs, noise)

    def _bounded(self, outputs: Array, noise: Array | None) -> Array:
        """Actions of a head that reaches from bound to bound."""
        if self.config.head == "bounded":
            actions = np.tanh(outputs)
            if noise is not None:
                actions += noise * self._std
        else:
            means, log_stds = np.split(outputs, 2, axis=-1)
            raw = means if noise is None else means + noise * np.exp(np.clip(log_stds, *LOG_STD_BOUNDS))
            actions = np.tanh(raw)
        return np.asarray(actions * self._reach + self._centre, np.float32)

    def noise(self, generator: np.random.Generator, steps: int) -> Array:
        """Noise for `steps` actions of one environment, [steps, A]."""
        shape = (steps, self.spaces.action_size)
        if self.spaces.discrete:
            return generator.gumbel(size=shape).astype(np.float32)
        return generator.standard_normal(shape, dtype=np.float32)
