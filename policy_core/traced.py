"""The gradient of a small network's update as a recorded graph.

For a 64x64 network two thirds of an update are Python, dispatch and autograd's bookkeeping, the same at every
minibatch. `TracedGradient` records the operations of one forward and backward pass (torch.fx's `make_fx`, so the
gradients are autograd's own) and replays them in TorchScript's interpreter: the same kernels in the same order on
the same numbers, in half the time. Recording costs about a second.

Only for networks without randomness, dropout or branches on data where they judge a batch; the replay is compared
with autograd's result, and what cannot be replayed is refused.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from policy_core.policy import Evaluation
from policy_core.rollout import leaves, map_nested

Loss = Callable[[Any, Any, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(what the module says of a batch, the batch, scalar) -> loss and metrics; `scalar` is a number that may vary."""


def tensors_of(batch: Any) -> list[Tensor]:
    """The tensors of a dataclass whose fields are nested tensors or None, in the fields' order."""
    columns = (getattr(batch, field.name) for field in fields(batch))
    return [leaf for column in columns if column is not None for leaf in leaves(column)]


def with_tensors(batch: Any, tensors: Sequence[Tensor]) -> Any:
    """A batch as `batch` of other `tensors`, in the order of `tensors_of`."""
    rest = iter(tensors)
    columns = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return type(batch)(
        **{
            name: None if column is None else map_nested(lambda _: next(rest), column)
            for name, column in columns.items()
        }
    )


def evaluation_of(policy: Any, batch: Any) -> Evaluation:
    """The policy's view of the batch's decisions."""
    evaluation: Evaluation = policy.evaluate(batch.observations, batch.actions)
    return evaluation


SETTLING = 3
"""TorchScript observes a graph's first run and rewrites it at the second; later runs all give the same bits."""


class TracedGradient:
    """Replays forward and backward passes of one module; one graph per kind and shape of batch.

    judge       (the module, a batch) -> what the loss takes
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        judge: Callable[[Any, Any], Any] = evaluation_of,
    ) -> None:
        self._module = _Judge(module, judge)
        self._parameters = list(self._module.parameters())  # walking the modules at every call would cost as much
        self._buffers = list(self._module.buffers())  # as the replay
        self._scalar = torch.tensor(0.0)
        self._graphs: dict[tuple[Any, ...], tuple[Any, list[str]]] = {}

    def __call__(self, batch: Any, loss: Loss, *, kind: Hashable, scalar: float = 0.0) -> dict[str, Tensor]:
        """Add the gradient of `loss` on `batch` to the parameters' .grad; returns its metrics.

        kind names the loss: the same name must mean the same computation.
        """
        tensors = tensors_of(batch)
        learned = [parameter for parameter in self._parameters if parameter.requires_grad]
        frozen = [parameter for parameter in self._parameters if not parameter.requires_grad]
        if float(self._scalar) != scalar:
            self._scalar = torch.tensor(scalar)
        inputs = [*learned, *frozen, *self._buffers, *tensors, self._scalar]
        trained = tuple(parameter.requires_grad for parameter in self._parameters)
        key = (kind, trained, _autocast_dtype(), *((tensor.shape, tensor.dtype) for tensor in tensors))
        if key not in self._graphs:
            self._graphs[key] = self._record(batch, loss, inputs)
        graph, names = self._graphs[key]
        gradients = []
        for parameter in learned:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        with _replaying():
            outputs = graph(*inputs)
            torch._foreach_add_(gradients, outputs[: len(learned)])
        return dict(zip(names, outputs[len(learned) :], strict=True))

    def _record(self, batch: Any, loss: Loss, inputs: list[Tensor]) -> tuple[Any, list[str]]:
        """The graph of one kind of batch and the names of its metrics. Raises ValueError if a replay differs."""
        from torch._decomp import get_decompositions  # half a second of imports
        from torch.fx.experimental.proxy_tensor import make_fx

        parameters = dict(self._module.named_parameters())
        learned = [name for name, p in parameters.items() if p.requires_grad]
        others = [name for name, p in parameters.items() if not p.requires_grad]
        others += [name for name, _ in self._module.named_buffers()]
        names: list[str] = []

        def gradient(*values: Tensor) -> list[Tensor]:
            roots = [value.detach().requires_grad_() for value in values[: len(learned)]]
            constants = values[len(learned) : len(learned) + len(others)]
            rebuilt = with_tensors(batch, values[len(learned) + len(others) : -1])
            state = dict(zip([*learned, *others], [*roots, *constants], strict=True))
            judged = functional_call(self._module, state, (rebuilt,))
            value, metrics = loss(judged, rebuilt, values[-1])
            names[:] = list(metrics)
            gradients = torch.autograd.grad(value, roots, allow_unused=True, materialize_grads=True)
            return [*gradients, *metrics.values()]

        parts: Any = get_decompositions([torch.ops.aten.native_layer_norm_backward])  # whole, it cannot be traced
        graph = make_fx(gradient, decomposition_table=parts)(*inputs)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        with warnings.catch_warnings(), _replaying():
            warnings.simplefilter("ignore")  # TorchScript announces its age at every use
            replay = torch.jit.trace(graph, tuple(inputs), check_trace=False)
            for _ in range(SETTLING):
                replayed = replay(*inputs)
        for expected, found in zip(gradient(*inputs), replayed, strict=True):
            if not agree(expected, found):
                raise ValueError(
                    "this policy's update cannot be replayed: a replay differs from autograd's gradient"
                )
        return replay, list(names)


def agree(expected: Tensor, found: Tensor) -> bool:
    """Equal but for rounding, measured by the largest number: where terms cancel, what is left of them is noise."""
    largest = expected.nan_to_num(0.0, 0.0, 0.0).abs().max().item() if expected.numel() else 0.0
    return torch.allclose(expected, found, rtol=1e-4, atol=1e-6 + 1e-4 * largest, equal_nan=True)


class _Judge(nn.Module):
    """A function of a module and a batch as a module's forward, for functional_call."""

    def __init__(self, module: nn.Module, judge: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.module, self.judge = module, judge

    def forward(self, batch: Any) -> Any:
        return self.judge(self.module, batch)


def _autocast_dtype() -> torch.dtype | None:
    """What matrix products of a CPU run in, if not in their operands' type."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


@contextlib.contextmanager
def _replaying() -> Iterator[None]:
    """Without autograd (a tenth less dispatch than no_grad), and without autocast, whose casts are in the graph."""
    if _autocast_dtype() is None:
        with torch.inference_mode():
            yield
    else:
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            yield
