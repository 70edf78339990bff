"""An optimizer step with a clipped gradient, and Adam over a few flat tensors instead of many small ones.

For small networks a step's cost is the number of tensors, not of weights: zeroing, the gradient's norm and Adam
itself each visit every one. `flatten_` moves a group of parameters into one contiguous tensor and leaves the
parameters as views of it, gradients too, so the visits become one. Nothing else about the network changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from policy_core.metrics import describe


class NonFiniteLoss(ArithmeticError):
    """A loss or a gradient became NaN or infinite; the weights were left as they were before that step.

    setting     the learning rate that is to blame, where it is not the caller's own
    """

    def __init__(self, message: str, *, setting: str | None = None) -> None:
        super().__init__(message)
        self.setting = setting


def clipped_step(
    optimizer: torch.optim.Optimizer, *, max_grad_norm: float, losses: Mapping[str, float | Tensor]
) -> Tensor:
    """Scale the gradient down to a global norm of `max_grad_norm`, where it is larger, and step.

    losses  by name, to say which of them was not finite

    Returns the norm before clipping. Raises NonFiniteLoss, before the step, if it is not finite.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    grad_norm = torch.nn.utils.get_total_norm(gradients)
    norm = float(grad_norm)
    if not math.isfinite(norm):
        raise NonFiniteLoss(describe(losses, norm))
    if norm > max_grad_norm:
        for gradient in gradients:
            gradient.mul_(max_grad_norm / (norm + 1e-6))
    optimizer.step()
    return grad_norm


def flatten_(parameters: Iterable[Parameter]) -> Parameter:
    """Move `parameters` (one dtype, one device) into one flat parameter [N]; they become views of it.

    Call it after the weights are in place: whatever re-assigns `parameter.data` afterwards breaks the views
    (`load_state_dict` copies in place and is fine). Raises ValueError for an empty or mixed group.
    """
    group = list(parameters)
    kinds = {(parameter.dtype, parameter.device) for parameter in group}
    if len(kinds) != 1:
        raise ValueError(f"a flat group needs parameters of one dtype and device, got {len(kinds)} kinds")
    flat = Parameter(torch.cat([parameter.detach().flatten() for parameter in group]))
    flat.grad = torch.zeros_like(flat)
    sizes = [parameter.numel() for parameter in group]
    pieces = zip(group, flat.detach().split(sizes), flat.grad.split(sizes), strict=True)
    for parameter, values, gradient in pieces:
        parameter.data = values.view_as(parameter)
        parameter.grad = gradient.view_as(parameter)
    return flat


class FlatAdam(torch.optim.Adam):
    """Adam whose groups are flat tensors; a drop-in optimizer for `policy_core.ppo.update`.

    groups          parameters that are sometimes frozen together (an actor under critic warm-up) form a group
                    of their own: a group whose parameters all have requires_grad False is left out of the step,
                    moments and step count too
    learning_rate   of every group
    epsilon         1e-5, the customary one in PPO
    """

    def __init__(
        self, groups: Sequence[Iterable[Parameter]], *, learning_rate: float, epsilon: float = 1e-5
    ) -> None:
        self._members = [list(group) for group in groups]
        flat = [flatten_(group) for group in self._members]
        self._gradients = [tensor.grad for tensor in flat if tensor.grad is not None]
        super().__init__(flat, lr=learning_rate, eps=epsilon, fused=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero in place whatever `set_to_none` says, for the parameters' gradients are views that must stay.

        A frozen group has no gradient until its parameters require one again.
        """
        for flat, gradient, members in zip(
            self.param_groups[0]["params"], self._gradients, self._members, strict=True
        ):
            if any(member.requires_grad for member in members):
                flat.grad = gradient
                gradient.zero_()
            else:
                flat.grad = None
