"""Where a model computes.

Everything that is read or recorded (tokens, masks, rewards, rollouts) lies in the processor's memory. What holds a
model brings tokens to its device and the numbers of single tokens back, so nothing else asks where that is.
"""

from __future__ import annotations

import torch

from experiment.errors import UserError, first_line


def find_device(name: str, *, setting: str) -> torch.device:
    """The device `name`; "auto" is a CUDA card where there is one, else the processor.

    Raises UserError, naming `setting`, for a device that is not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = first_line(error)
        raise UserError(f"{setting}: {name} cannot be used here ({reason})") from error
