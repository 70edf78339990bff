"""Rows of data files (jsonl, json, parquet, and folders that the `datasets` library saved), and what is in them."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from experiment.errors import UserError, first_line

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
_BATCH = 1000


@dataclass(frozen=True)
class Row:
    """One row: where it stands, for messages ("FILE:LINE" or "FILE: row N", both from 1), and its columns."""

    place: str
    columns: dict[str, Any]


def read_rows(path: str | Path) -> Iterator[Row]:
    """Every row of a file or folder, one at a time.

    A folder is one that `Dataset.save_to_disk` wrote, or holds data files of one kind, which are read by name.
    Raises UserError for anything that cannot be read, naming the file and, where it is known, the line or row.
    """
    source = Path(path)
    if not source.exists():
        raise UserError(f"{path}: no such file or folder")
    if source.is_dir():
        yield from _folder_rows(source)
    elif source.suffix == ".parquet":
        yield from _parquet_rows(source)
    elif source.name.endswith((".json", ".json.gz")) and _is_array(source):
        yield from _array_rows(source)
    elif source.name.endswith(SUFFIXES):
        yield from _line_rows(source)
    else:
        raise UserError(f"{path}: not a known kind of data file; they end in {', '.join(SUFFIXES)}")


def _folder_rows(folder: Path) -> Iterator[Row]:
    if (folder / "dataset_dict.json").is_file():
        splits = [entry.name for entry in sorted(folder.iterdir()) if (entry / "state.json").is_file()]
        example = folder / (splits or ["train"])[0]
        raise UserError(f"{folder}: holds the splits {', '.join(splits)}; name one of them, such as {example}")
    if (folder / "state.json").is_file():
        yield from _saved_rows(folder)
        return
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.name.endswith(SUFFIXES)]
    kinds = {file.suffix for file in files}
    if len(kinds) != 1:
        what = f"files of several kinds ({', '.join(sorted(kinds))})" if kinds else "no data file"
        raise UserError(f"{folder}: holds {what}; give a file, or a folder that save_to_disk wrote")
    for file in files:
        yield from read_rows(file)


def _saved_rows(folder: Path) -> Iterator[Row]:
    """What `datasets` saved; its arrow files are mapped, not loaded."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder)).with_format(None)
        first = 1
        for batch in saved.iter(batch_size=_BATCH):
            for columns in _transposed(batch):
                yield Row(f"{folder}: row {first}", columns)
                first += 1
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: cannot be read as a saved data set: {first_line(error)}") from error


def _transposed(batch: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    names = list(batch)
    for values in zip(*batch.values(), strict=True):
        yield dict(zip(names, values, strict=True))


def _parquet_rows(file: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(batch_size=_BATCH):
                for columns in batch.to_pylist():
                    number += 1
                    yield Row(f"{file}: row {number}", columns)
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: row {number + 1} or one of the next {_BATCH}: not UTF-8 text") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a whole parquet file: {first_line(error)}") from error


def _is_array(file: Path) -> bool:
    """Whether a .json file is one list, rather than an object a line."""
    with _opened(file) as opened:
        return opened.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _array_rows(file: Path) -> Iterator[Row]:
    with _opened(file) as opened:
        data = opened.read()
    for number, columns in enumerate(_parsed(data, file, first_line=1), start=1):
        yield _row(columns, f"{file}: row {number}")


def _line_rows(file: Path) -> Iterator[Row]:
    """An object a line; empty lines are skipped."""
    with _opened(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _row(_parsed(line.rstrip(), file, first_line=number), f"{file}:{number}")


def _row(columns: Any, place: str) -> Row:
    if not isinstance(columns, dict):
        raise UserError(f"{place}: expected a JSON object, got {type(columns).__name__}")
    return Row(place, columns)


@contextmanager
def _opened(file: Path) -> Iterator[BufferedIOBase]:
    """A file, unpacked where it ends in .gz. Raises UserError where it cannot be read to its end."""
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as opened:
            yield opened
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file}: damaged or truncated gzip data; fetch the file again") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error


def _parsed(data: bytes, file: Path, *, first_line: int) -> Any:
    """A JSON value that begins on a line of a file. Raises UserError naming the line that is no JSON."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise UserError(f"{file}:{line}: not UTF-8 text") from error
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"{file}:{line}: not valid JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise UserError(f"{file}:{first_line}: JSON that cannot be read ({str(error).split(';')[0]})") from error


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
