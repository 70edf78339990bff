"""In which numbers a model's matrix products are computed; weights, losses and optimizers stay float32."""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import torch
from torch import nn

from experiment.errors import UserError

Precision = Literal["float32", "bf16"]


def autocast(module: nn.Module, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """The context of a module's forward pass; casts of weights are not kept across a step."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(next(module.parameters()).device.type, torch.bfloat16, cache_enabled=False)


def has_bfloat16() -> bool:
    """Whether the processor multiplies matrices of bfloat16; without that, they are slower than float32's."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def require_precision(precision: Precision, *, setting: str) -> None:
    """Raises UserError naming `setting` if this machine cannot compute so."""
    if precision == "bf16" and not (torch.cuda.is_available() or has_bfloat16()):
        raise UserError(f"{setting}: this processor has no bfloat16 instructions; leave it at float32")
