"""Writes demonstrations in the LeRobot v3 layout, an episode at a time, so that a kill loses at most the last one.

    with LeRobotWriter(folder, fps=10, features=features, robot_type="table") as writer:
        with writer.episode("push the red cube to the white pad") as episode:
            episode.add(frame)
            episode.save()          # leaving without it forgets the episode

Every episode gets data and video files of its own, so nothing that is finished is ever opened again for writing.
Every file is written under another name, flushed to the disk and renamed. The order is videos, data, tasks,
`meta/episodes`, `meta/stats.json`, `meta/info.json`: the row in `meta/episodes` is what makes an episode exist, and
whoever counts by `info.json` (LeRobot does) sees it one step later. Opening the folder again completes or removes
what a killed process left between two of these steps.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embodied.datasets.lerobot_episode import EncodedEpisode, EpisodeEncoder
from embodied.datasets.lerobot_layout import (
    EPISODES_PATH,
    INDEX_FEATURES,
    TASKS,
    VIDEO_PATH,
    Feature,
    Info,
    data_schema,
    place,
)
from embodied.datasets.lerobot_state import State, open_folder, publish, publish_counts
from embodied.datasets.lerobot_stats import NAMES, Stats, fold, vector_stats
from embodied.datasets.lerobot_tables import tasks_table
from experiment.errors import UserError, storage_errors

ROWS_OF_EPISODES = 200
"""Rows in a file of `meta/episodes`, which is rewritten for every episode."""


class LeRobotWriter:
    """One data set that grows. Only one writer at a time may have a folder."""

    def __init__(
        self, folder: str | Path, *, fps: int, features: Mapping[str, Feature], robot_type: str | None = None
    ) -> None:
        """Make a data set, or go on with one of the same features.

        features: without the index columns; `lerobot_layout.demonstration_features` makes Tandem's.
        fps: frames a second.

        Raises:
            UserError: the folder holds something else, a data set of other features, one that another process is
                writing, or one that is damaged in a way no interrupted writer leaves; or it cannot be written.
        """
        self.folder, self.features = Path(folder), dict(features)
        if isinstance(fps, bool) or not isinstance(fps, int) or fps < 1:
            raise UserError(f"fps must be a whole number of at least 1, got {fps!r}")
        EpisodeEncoder(self.features, fps)  # complains of features that cannot be written
        video_path = VIDEO_PATH if any(one.dtype == "video" for one in features.values()) else None
        fresh = Info(fps, self.features | INDEX_FEATURES, robot_type=robot_type, video_path=video_path)
        with storage_errors(self.folder):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError) as error:
                raise UserError(f"{self.folder}: a file is in the way; name a new folder") from error
            self._lock = lock_folder(self.folder)
            try:
                self._state = open_folder(self.folder, fresh)
            except BaseException:
                self.close()
                raise

    def __len__(self) -> int:
        """Finished episodes."""
        return self._state.info.episodes

    @property
    def info(self) -> Info:
        """`meta/info.json` as it is."""
        return self._state.info

    def __enter__(self) -> LeRobotWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let another writer have the folder. Nothing is left to be written."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def episode(self, instruction: str) -> OpenEpisode:
        """Begin an episode in which the robot is told `instruction`."""
        return OpenEpisode(self, instruction)

    def append(self, episode: EncodedEpisode) -> int:
        """Write a finished episode; returns its index. When this returns, it is on the disk.

        Raises:
            UserError: the disk is full or read-only. The episodes before it are untouched.
        """
        if self._lock < 0:
            raise ValueError("the writer is closed")
        state, info = self._state, self._state.info
        tasks = state.tasks
        if episode.instruction not in tasks:
            tasks = {**tasks, episode.instruction: len(tasks)}
        counted = _index_columns(episode.length, info, tasks[episode.instruction])
        stats = episode.stats | {name: vector_stats(values) for name, values in counted.items()}
        rows, rows_number = self._with_row(_row(state, episode, stats))
        with storage_errors(self.folder):
            for name, content in episode.videos.items():
                self._write_bytes(state.video_name(name), content)
            data = _data_table(info, episode, counted)
            publish(self.folder, state.data_name(), lambda path: _write_data(path, data, episode))
            if tasks is not state.tasks:
                publish(self.folder, TASKS, lambda path: pq.write_table(tasks_table(list(tasks)), path))
            publish(
                self.folder,
                EPISODES_PATH.format(**place(rows_number, info.chunk_size)),
                lambda path: pq.write_table(rows, path, use_dictionary=False, write_statistics=False),
            )
            frames = info.frames + episode.length
            info = dataclasses.replace(info, episodes=len(self) + 1, frames=frames, tasks=len(tasks))
            together = fold(state.stats, stats)
            publish_counts(self.folder, info, together)
        self._state = State(
            info=info,
            stats=together,
            tasks=tasks,
            rows=rows,
            rows_number=rows_number,
            columns=rows.schema,
            next_data=state.next_data + 1,
            next_video={name: state.next_video.get(name, 0) + 1 for name in episode.videos},
        )
        return len(self) - 1

    def _write_bytes(self, name: str, content: bytes) -> None:
        publish(self.folder, name, lambda path: path.write_bytes(content))

    def _with_row(self, row: pa.Table) -> tuple[pa.Table, int]:
        """The rows of the file of `meta/episodes` to which `row` goes, and that file's number."""
        state, number = self._state, self._state.rows_number
        full = state.rows is not None and len(state.rows) >= ROWS_OF_EPISODES
        number += full
        for name, part in place(number, state.info.chunk_size).items():
            row = row.append_column(f"meta/episodes/{name}", pa.array([part], pa.int64()))
        if state.columns is not None:
            if odd := sorted(set(row.column_names) ^ set(state.columns.names)):
                raise UserError(f"{self.folder}: its episodes and the new one do not both have the column {odd[0]}")
            row = row.select(state.columns.names).cast(state.columns)
        if state.rows is None or full:
            return row, number
        # combined: a chunk a row in every one of a hundred columns would take megabytes
        return pa.concat_tables([state.rows, row]).combine_chunks(), number


class OpenEpisode:
    """An episode that is being recorded; it is written by `save` and forgotten otherwise."""

    def __init__(self, writer: LeRobotWriter, instruction: str) -> None:
        self._writer, self.instruction = writer, instruction
        self._encoder: EpisodeEncoder | None = EpisodeEncoder(writer.features, writer.info.fps)

    def __enter__(self) -> OpenEpisode:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._encoder = None

    def __len__(self) -> int:
        """Frames so far."""
        return self._encoder.length if self._encoder else 0

    def add(self, frame: Mapping[str, Any]) -> None:
        """One more frame: a value for every feature. Raises UserError when one does not fit."""
        self._open_encoder().add(frame)

    def save(self) -> int:
        """Write the episode; returns its index. Raises UserError as `LeRobotWriter.append`."""
        episode = self._open_encoder().finish(self.instruction)
        self._encoder = None
        return self._writer.append(episode)

    def _open_encoder(self) -> EpisodeEncoder:
        if self._encoder is None:
            raise ValueError("this episode is over")
        return self._encoder


def lock_folder(folder: Path) -> int:
    """A lock on the folder that the system gives back when this process ends. UserError when another has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f"{folder}: another process is writing this data set; wait for it or end it") from error
    return descriptor


def _index_columns(length: int, info: Info, task: int) -> dict[str, np.ndarray]:
    frames = np.arange(length)
    return {
        "timestamp": (frames / info.fps).astype(np.float32),
        "frame_index": frames,
        "episode_index": np.full(length, info.episodes),
        "index": info.frames + frames,
        "task_index": np.full(length, task),
    }


def _data_table(info: Info, episode: EncodedEpisode, counted: Mapping[str, np.ndarray]) -> pa.Table:
    schema = data_schema(info.features)
    columns = [_column(name, episode, counted).cast(schema.field(name).type) for name in schema.names]
    return pa.table(columns, schema=schema)


def _column(name: str, episode: EncodedEpisode, counted: Mapping[str, np.ndarray]) -> pa.Array:
    if name in episode.pictures:
        files = episode.pictures[name]
        names = [f"frame-{number:06d}.png" for number in range(len(files))]
        return pa.StructArray.from_arrays([pa.array(files, pa.binary()), pa.array(names)], ["bytes", "path"])
    if name in episode.strings:
        return pa.array(episode.strings[name], pa.string())
    values = counted[name] if name in counted else episode.numbers[name]
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _write_data(path: Path, table: pa.Table, episode: EncodedEpisode) -> None:
    # Pictures are compressed already, and a footer need not repeat the first and the last of them.
    plain = [name for name in table.column_names if name not in episode.pictures]
    pq.write_table(table, path, compression="snappy", use_dictionary=plain, write_statistics=plain)


def _row(state: State, episode: EncodedEpisode, stats: Stats) -> pa.Table:
    """A row of `meta/episodes`, but for its place among the files of `meta/episodes`."""
    info, whole = state.info, pa.int64()
    columns: dict[str, pa.Array] = {
        "episode_index": pa.array([info.episodes], whole),
        "tasks": pa.array([[episode.instruction]], pa.list_(pa.field("element", pa.string()))),
        "length": pa.array([episode.length], whole),
        "dataset_from_index": pa.array([info.frames], whole),
        "dataset_to_index": pa.array([info.frames + episode.length], whole),
    }
    for name, number in place(state.next_data, info.chunk_size).items():
        columns[f"data/{name}"] = pa.array([number], whole)
    for video in episode.videos:
        for name, number in place(state.next_video.get(video, 0), info.chunk_size).items():
            columns[f"videos/{video}/{name}"] = pa.array([number], whole)
        columns[f"videos/{video}/from_timestamp"] = pa.array([0.0])
        columns[f"videos/{video}/to_timestamp"] = pa.array([episode.length / info.fps])
    for feature, one in stats.items():
        for statistic in NAMES:
            value, kind = one[statistic], whole if statistic == "count" else pa.float64()
            for _ in value.shape:
                kind = pa.list_(pa.field("element", kind))
            columns[f"stats/{feature}/{statistic}"] = pa.array([value.tolist()], kind)
    return pa.table(columns)
