"""What one row of data means, whatever file it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Comparison:
    """Two completions of one prompt, one of them preferred.

    prompt, chosen, rejected    texts; those of a conversation are `chat.Chat`, a text that remembers its messages
    margin                      how much better chosen is, in units of reward; None = not said
    tied                        the annotator found neither better; chosen and rejected are in no order then
    columns                     every other column of the row
    """

    prompt: str
    chosen: str
    rejected: str
    margin: float | None = None
    tied: bool = False
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Feedback:
    """One completion of a prompt with a thumb up (`desirable`) or down; texts and `columns` as in Comparison."""

    prompt: str
    completion: str
    desirable: bool
    columns: Mapping[str, Any] = field(default_factory=dict)
