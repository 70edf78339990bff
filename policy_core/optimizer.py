"""Adam over a few flat tensors instead of many small ones.

For small networks a step's cost is the number of tensors, not of weights: zeroing, the gradient's norm and Adam
itself each visit every one. `flatten_` moves a group of parameters into one contiguous tensor and leaves the
parameters as views of it, gradients too, so the visits become one. Nothing else about the network changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.nn import Parameter


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
