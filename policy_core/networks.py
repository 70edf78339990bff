"""Small networks evaluated side by side: one batched matrix product where there would be one a member."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

MANY = 512
"""From this many rows on, one thread multiplies the members' matrices faster one after the other: what a member's
layer leaves is then in the cache for its next one. More threads take a member each of a batched product."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu}
IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh_, "relu": torch.relu_}
"""The same over a layer's fresh output, which nothing else needs."""


class StackedMLP(nn.Module):
    """Hidden layers of `members` networks of the same widths on the same input, no weight shared between them.

    sizes   input width, then the hidden widths; every layer is followed by the activation
    weights start orthogonal with gain sqrt 2, biases at 0 (the customary start of PPO)
    """

    def __init__(self, members: int, sizes: Sequence[int], *, activation: str) -> None:
        super().__init__()
        self.members = members
        self.activation, self._activate = ACTIVATIONS[activation], IN_PLACE[activation]
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for inputs, outputs in itertools.pairwise(sizes):
            start = [nn.init.orthogonal_(torch.empty(outputs, inputs), math.sqrt(2)).t() for _ in range(members)]
            self.weights.append(Parameter(torch.stack(start)))  # [members, inputs, outputs]
            self.biases.append(Parameter(torch.zeros(members, 1, outputs)))

    def layer(self, index: int, member: int) -> tuple[Tensor, Tensor]:
        """Weight [inputs, outputs] and bias [outputs] of one member."""
        return self.weights[index][member], self.biases[index][member, 0]

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """[N, sizes[0]] -> each member's [N, sizes[-1]]."""
        hidden = inputs.expand(self.members, *inputs.shape)
        if self.activation is torch.tanh and inputs.device.type == "cpu":
            return self._tanh_by_sigmoid(hidden).unbind(0)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            hidden = self._activate(torch.baddbmm(bias, hidden, weight))
        return hidden.unbind(0)

    def member(self, index: int, inputs: Tensor) -> Tensor:
        """One network alone, [N, sizes[0]] -> [N, sizes[-1]]."""
        for weight, bias in zip(self.weights, self.biases, strict=True):
            inputs = self._activate(torch.addmm(bias[index], inputs, weight[index]))
        return inputs

    def _tanh_by_sigmoid(self, hidden: Tensor) -> Tensor:
        """The same tanh layers through tanh(z) = 2 sigmoid(2z) - 1, equal to 1e-6.

        On a CPU torch's float32 tanh costs five times its sigmoid, which is 15% of a small network's update. The
        factor and the shift go into the next layer's weights, where they cost nothing.
        """
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if index == 0:
                doubled = torch.baddbmm(bias * 2.0, hidden, weight * 2.0)
            else:
                doubled = torch.baddbmm((bias - weight.sum(1, keepdim=True)) * 2.0, hidden, weight * 4.0)
            hidden = torch.sigmoid(doubled)
        return hidden * 2.0 - 1.0


def head(inputs: int, outputs: int, *, gain: float) -> nn.Linear:
    """A linear output layer, orthogonal with the given gain, bias 0."""
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class MLP(nn.Module):
    """One network: linear layers with an activation between them, orthogonal (gain sqrt 2, `output_gain` last)."""

    def __init__(self, sizes: Sequence[int], *, activation: str, output_gain: float) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        *hidden, last = itertools.pairwise(sizes)
        self.hidden = nn.ModuleList(head(i, o, gain=math.sqrt(2)) for i, o in hidden)
        self.last = head(*last, gain=output_gain)

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., sizes[0]] -> [..., sizes[-1]]."""
        for layer in self.hidden:
            inputs = self.activation(layer(inputs))
        return F.linear(inputs, self.last.weight, self.last.bias)
