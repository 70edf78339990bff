"""One row of text data, and reading rows from jsonl files."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiment.errors import UserError


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


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) of a .jsonl or .jsonl.gz file; empty lines are skipped.

    Raises UserError naming file and line for JSON that cannot be parsed, lines that are no objects, text that is
    not UTF-8, and truncated or damaged gzip data.
    """
    file = Path(path)
    number = 0
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
                yield number, row
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}:{number + 1}: damaged or truncated gzip data; fetch the file again") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{number}: not valid JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise UserError(f"{path}:{number}: JSON that cannot be read ({str(error).split(';')[0]})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def text_column(row: Mapping[str, Any], name: str, place: str) -> str:
    """A column that must be there and be text. Raises UserError naming `place` and the columns that are there."""
    value = row.get(name)
    if not isinstance(value, str):
        what = f"is {type(value).__name__}, not text" if name in row else f"is missing (there is {', '.join(row)})"
        raise UserError(f"{place}: column {name!r} {what}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{place}: column {name!r} holds half of a character (a lone surrogate)") from None
    return value


def number_column(row: Mapping[str, Any], name: str, place: str) -> float:
    """A column that must be there and be a finite number. Raises UserError naming `place`."""
    if name not in row:
        raise UserError(f"{place}: column {name!r} is missing (there is {', '.join(row)})")
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{place}: column {name!r} is {type(value).__name__}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or abs(number) > 1e30:
        raise UserError(f"{place}: column {name!r} is {number}; a finite number is needed (at most 1e30)")
    return number
