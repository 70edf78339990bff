"""Stacked networks equal the same networks one at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from policy_core.networks import ACTIVATIONS, MLP, StackedMLP, head
from tests.policy_core.helpers import close


def one_by_one(stack: StackedMLP, inputs: Tensor, member: int) -> Tensor:
    for index in range(len(stack.weights)):
        weight, bias = stack.layer(index, member)
        inputs = stack.activation(inputs @ weight + bias)
    return inputs


def stack_with_biases(activation: str) -> StackedMLP:
    stack = StackedMLP(3, (4, 6, 5), activation=activation)
    with torch.no_grad():
        for bias in stack.biases:
            bias.normal_()
    return stack


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_members_compute_what_they_would_alone(activation: str) -> None:
    stack, inputs = stack_with_biases(activation), torch.randn(7, 4)
    outputs = stack(inputs)
    assert len(outputs) == 3
    for member, output in enumerate(outputs):
        close(output, one_by_one(stack, inputs, member))


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_members_gradients_are_what_they_would_be_alone(activation: str) -> None:
    stack, inputs = stack_with_biases(activation), torch.randn(7, 4)
    weights = list(stack.parameters())
    together = torch.autograd.grad(sum(output.square().sum() for output in stack(inputs)), weights)
    alone = sum(one_by_one(stack, inputs, member).square().sum() for member in range(3))
    assert isinstance(alone, Tensor)
    for ours, theirs in zip(together, torch.autograd.grad(alone, weights), strict=True):
        close(ours, theirs, atol=1e-11)


def test_members_share_no_weight() -> None:
    stack, inputs = stack_with_biases("tanh"), torch.randn(7, 4)
    gradients = torch.autograd.grad(stack(inputs)[1].sum(), list(stack.parameters()))
    for gradient in gradients:
        assert not gradient[0].any()
        assert gradient[1].any()
        assert not gradient[2].any()


def test_tanh_is_exact_in_saturation_and_in_single_precision() -> None:
    stack = StackedMLP(2, (3, 8, 8), activation="tanh").float()
    inputs = torch.randn(50, 3, dtype=torch.float32) * 100
    for member, output in enumerate(stack(inputs)):
        close(output, one_by_one(stack, inputs, member), atol=5e-6)


def test_layers_start_orthogonal_with_their_gain() -> None:
    stack = StackedMLP(2, (8, 4), activation="relu")
    for member in range(2):
        weight, bias = stack.layer(0, member)
        close(weight.T @ weight, 2.0 * torch.eye(4))  # gain sqrt 2
        assert not bias.any()
    assert not torch.equal(stack.layer(0, 0)[0], stack.layer(0, 1)[0])
    layer = head(8, 4, gain=0.01)
    close(layer.weight @ layer.weight.T, 1e-4 * torch.eye(4))
    assert not layer.bias.any()


def test_mlp_is_linear_layers_with_the_activation_between_only() -> None:
    network = MLP((3, 5, 2), activation="relu", output_gain=2.0)
    inputs = torch.randn(4, 6, 3)
    (hidden,) = network.hidden
    assert isinstance(hidden, nn.Linear)
    expected = ACTIVATIONS["relu"](inputs @ hidden.weight.T + hidden.bias) @ network.last.weight.T  # biases are 0
    assert network(inputs).shape == (4, 6, 2)
    close(network(inputs), expected)
    close(network.last.weight @ network.last.weight.T, 4.0 * torch.eye(2))
    close(hidden.weight.T @ hidden.weight, math.sqrt(2) ** 2 * torch.eye(3))
    with torch.no_grad():
        network.last.bias.fill_(3.0)
    close(network(inputs), expected + 3.0)
