"""The gradient of a small network's update as a recorded graph.

For a 64x64 network two thirds of an update are Python, dispatch and autograd's bookkeeping, the same at every
minibatch. `TracedGradient` records the operations of one forward and backward pass (torch.fx's `make_fx`, so the
gradients are autograd's own) and replays them in TorchScript's interpreter: the same kernels in the same order on
the same numbers, in half the time. Recording costs about a second.

Only for policies without randomness, dropout or branches on data in `evaluate`; the first replay is compared with
autograd's result, and a policy that cannot be replayed is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from policy_core.policy import Evaluation

Loss = Callable[[Evaluation, Any, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(the policy's evaluation, a batch, scalar) -> loss and metrics; `scalar` is a number that may change."""


class TracedGradient:
    """Replays forward and backward passes of one policy; one graph per kind and shape of batch.

    flatten     batch -> its tensors, in a fixed order
    rebuild     (batch of that kind, tensors) -> batch
    """

    def __init__(
        self,
        policy: nn.Module,
        *,
        flatten: Callable[[Any], list[Tensor]],
        rebuild: Callable[[Any, Sequence[Tensor]], Any],
    ) -> None:
        self._module = _Evaluate(policy)
        self._parameters = list(self._module.parameters())  # walking the modules at every call would cost as much
        self._buffers = list(self._module.buffers())  # as the replay
        self._flatten, self._rebuild = flatten, rebuild
        self._scalar = torch.tensor(0.0)
        self._graphs: dict[tuple[Any, ...], tuple[Any, list[str]]] = {}

    def __call__(self, batch: Any, loss: Loss, *, kind: Hashable, scalar: float = 0.0) -> dict[str, Tensor]:
        """Add the gradient of `loss` on `batch` to the parameters' .grad; returns its metrics.

        kind names the loss: the same name must mean the same computation.
        """
        tensors = self._flatten(batch)
        learned = [parameter for parameter in self._parameters if parameter.requires_grad]
        frozen = [parameter for parameter in self._parameters if not parameter.requires_grad]
        if float(self._scalar) != scalar:
            self._scalar = torch.tensor(scalar)
        inputs = [*learned, *frozen, *self._buffers, *tensors, self._scalar]
        trained = tuple(parameter.requires_grad for parameter in self._parameters)
        key = (kind, trained, *((tensor.shape, tensor.dtype) for tensor in tensors))
        if key not in self._graphs:
            self._graphs[key] = self._record(batch, loss, inputs)
        graph, names = self._graphs[key]
        for parameter in learned:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        with torch.inference_mode():  # a tenth less dispatch than no_grad
            outputs = graph(*inputs)
            for parameter, gradient in zip(learned, outputs, strict=False):
                parameter.grad.add_(gradient)  # type: ignore[union-attr]
        return dict(zip(names, outputs[len(learned) :], strict=True))

    def _record(self, batch: Any, loss: Loss, inputs: list[Tensor]) -> tuple[Any, list[str]]:
        """The graph of one kind of batch and the names of its metrics. Raises ValueError if a replay differs."""
        from torch.fx.experimental.proxy_tensor import make_fx  # half a second of imports

        parameters = dict(self._module.named_parameters())
        learned = [name for name, p in parameters.items() if p.requires_grad]
        others = [name for name, p in parameters.items() if not p.requires_grad]
        others += [name for name, _ in self._module.named_buffers()]
        names: list[str] = []

        def gradient(*values: Tensor) -> list[Tensor]:
            roots = [value.detach().requires_grad_() for value in values[: len(learned)]]
            constants = values[len(learned) : len(learned) + len(others)]
            rebuilt = self._rebuild(batch, values[len(learned) + len(others) : -1])
            state = dict(zip([*learned, *others], [*roots, *constants], strict=True))
            evaluation = functional_call(self._module, state, (rebuilt.observations, rebuilt.actions))
            value, metrics = loss(evaluation, rebuilt, values[-1])
            names[:] = list(metrics)
            gradients = torch.autograd.grad(value, roots, allow_unused=True, materialize_grads=True)
            return [*gradients, *metrics.values()]

        graph = make_fx(gradient)(*inputs)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # TorchScript announces its age at every use
            replay = torch.jit.trace(graph, tuple(inputs), check_trace=False)
        with torch.inference_mode():
            replayed = replay(*inputs)
        for expected, found in zip(gradient(*inputs), replayed, strict=True):
            if not torch.allclose(expected, found, rtol=1e-4, atol=1e-6, equal_nan=True):
                raise ValueError(
                    "this policy's update cannot be replayed: a replay differs from autograd's gradient"
                )
        return replay, list(names)


class _Evaluate(nn.Module):
    """`policy.evaluate` as a module's forward, for functional_call."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observations: Any, actions: Any) -> Evaluation:
        evaluation: Evaluation = self.policy.evaluate(observations, actions)  # type: ignore[operator]
        return evaluation
