"""In which numbers a model's matrix products are computed; weights, losses and optimizers stay float32."""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import torch
from torch import Tensor, nn

from experiment.errors import UserError

Precision = Literal["float32", "bf16"]


def autocast(
    module: nn.Module, precision: Precision, *, keep_casts: bool = False
) -> contextlib.AbstractContextManager[Any]:
    """The context of a module's forward pass.

    keep_casts  cast each weight once within it: for many passes without gradients over weights that do not change
    """
    device = next(module.parameters()).device.type
    if precision == "float32" or torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, torch.bfloat16, cache_enabled=keep_casts)


def outside_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within an autocast: what is computed as if there were none."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def widened(numbers: Tensor) -> Tensor:
    """As they are, in float32 where autocast made them narrower."""
    return numbers.float() if numbers.dtype in (torch.bfloat16, torch.float16) else numbers


def has_bfloat16() -> bool:
    """Whether the processor multiplies matrices of bfloat16; without that, they are slower than float32's."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def require_precision(precision: Precision, *, setting: str) -> None:
    """Raises UserError naming `setting` if this machine cannot compute so."""
    if precision == "bf16" and not (torch.cuda.is_available() or has_bfloat16()):
        raise UserError(f"{setting}: this processor has no bfloat16 instructions; leave it at float32")
