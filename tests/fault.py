"""What a planted fault is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One line of policy_core/`file`.py, what it becomes, and what that breaks."""

    file: str
    original: str
    mutated: str
    breaks: str
