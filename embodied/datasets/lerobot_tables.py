"""The tables of a LeRobot data set: episodes and tasks, and Parquet files read with one-line errors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embodied.datasets.lerobot_layout import EPISODES, Info, file_number
from experiment.errors import UserError, first_line


@dataclass(frozen=True)
class VideoSpan:
    """Where an episode lies in a video file: from_seconds <= time < to_seconds."""

    path: Path
    number: int
    from_seconds: float
    to_seconds: float


@dataclass(frozen=True)
class EpisodeEntry:
    """A row of `meta/episodes`.

    index: of the episode; length: frames; tasks: its instructions.
    data: the file with its rows, the `data_number`-th of the set.
    from_index, to_index: its frames among those of the whole set, the end excluded.
    videos: feature -> where its frames lie.
    """

    index: int
    length: int
    tasks: tuple[str, ...]
    data: Path
    data_number: int
    from_index: int
    to_index: int
    videos: Mapping[str, VideoSpan] = field(default_factory=dict)


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a Parquet file. Raises UserError when it is missing or has no end (whoever wrote it was killed)."""
    try:
        return pq.ParquetFile(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; `tandem data validate` lists what is missing") from error
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: damaged or not finished ({first_line(error)})") from error


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file. Raises UserError when it is missing, damaged, or lacks one of the columns."""
    with open_parquet(path) as file:
        present = file.schema_arrow.names
        if missing := [name for name in columns or () if name not in present]:
            raise UserError(f"{path}: has no column {missing[0]}; it has {', '.join(sorted(present))}")
        try:
            return file.read(columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: damaged ({first_line(error)}); fetch it again") from error


def episode_files(folder: Path) -> list[Path]:
    """The files of `meta/episodes`, in order."""
    return sorted((folder / EPISODES).glob("*/*.parquet"))


def read_entries(folder: Path, info: Info) -> list[EpisodeEntry]:
    """The rows of `meta/episodes`.

    Raises:
        UserError: a file is damaged, a column is missing, or the episodes are not numbered 0, 1, 2, ...
    """
    plain = ["episode_index", "tasks", "length", "dataset_from_index", "dataset_to_index"]
    data = ["data/chunk_index", "data/file_index"]
    videos = [name for name, feature in info.features.items() if feature.dtype == "video"]
    if videos and info.video_path is None:
        raise UserError(f"{folder}: has the video feature {videos[0]}, but meta/info.json has no video_path")
    parts = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    wanted = plain + data + [f"videos/{name}/{part}" for name in videos for part in parts]
    rows: list[dict[str, Any]] = []
    for path in episode_files(folder):
        rows += read_parquet(path, wanted).to_pylist()
    entries = []
    for position, row in enumerate(rows):
        if row["episode_index"] != position:
            raise UserError(f"{folder / EPISODES}: row {position} is episode {row['episode_index']}, out of order")
        where = {part: row[f"data/{part}"] for part in ("chunk_index", "file_index")}
        entries.append(
            EpisodeEntry(
                index=position,
                length=row["length"],
                tasks=tuple(row["tasks"]),
                data=folder / info.data_path.format(**where),
                data_number=file_number(**where, chunk_size=info.chunk_size),
                from_index=row["dataset_from_index"],
                to_index=row["dataset_to_index"],
                videos={name: _span(folder, info, name, row) for name in videos},
            )
        )
    return entries


def _span(folder: Path, info: Info, name: str, row: Mapping[str, Any]) -> VideoSpan:
    assert info.video_path is not None
    where = {part: row[f"videos/{name}/{part}"] for part in ("chunk_index", "file_index")}
    return VideoSpan(
        path=folder / info.video_path.format(video_key=name, **where),
        number=file_number(**where, chunk_size=info.chunk_size),
        from_seconds=row[f"videos/{name}/from_timestamp"],
        to_seconds=row[f"videos/{name}/to_timestamp"],
    )


def tasks_table(tasks: Sequence[str]) -> pa.Table:
    """`meta/tasks.parquet`: LeRobot reads it with pandas, whose index are the instructions."""
    columns = [
        {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy, "metadata": None}
        for name, kind, numpy in (("task_index", "int64", "int64"), ("task", "unicode", "object"))
    ]
    told = {"index_columns": ["task"], "column_indexes": [], "columns": columns, "pandas_version": "2.0.0"}
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": pa.array(tasks, pa.string())})
    return table.replace_schema_metadata({"pandas": json.dumps(told)})


def read_tasks(path: Path) -> list[str]:
    """The instructions, in the order of their task_index. Raises UserError when the table is damaged."""
    table = read_parquet(path)
    text = (pa.string(), pa.large_string())
    words = [column.name for column in table.schema if column.type in text]
    if "task_index" not in table.column_names or len(words) != 1:
        raise UserError(f"{path}: expected task_index and one column of instructions, got {table.column_names}")
    pairs = sorted(zip(table["task_index"].to_pylist(), table[words[0]].to_pylist(), strict=True))
    if [index for index, _ in pairs] != list(range(len(pairs))):
        raise UserError(f"{path}: task_index is not 0, 1, 2, ...")
    return [task for _, task in pairs]
