"""One row of text data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Example:
    """A prompt, the completion that someone gave (right or wrong), and columns that rewards may ask for; `place` is
    where it was read (FILE:LINE), for messages to the user, "" where nobody read it."""

    prompt: str
    completion: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    place: str = field(default="", compare=False)


@dataclass(frozen=True)
class Piece:
    """A part of a logged text.

    reward  what its writer earned at its end; None = the text was given (a prompt, somebody else's turn)
    """

    text: str
    reward: float | None
