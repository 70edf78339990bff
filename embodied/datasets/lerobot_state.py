"""Where a growing LeRobot data set stands, and how a writer that was killed is recovered from."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from embodied.datasets.lerobot_layout import (
    INFO,
    STATS,
    TASKS,
    UNFINISHED,
    Info,
    file_number,
    place,
    read_info,
)
from embodied.datasets.lerobot_stats import NAMES, Stats, as_text, fold, merged
from embodied.datasets.lerobot_tables import EpisodeEntry, episode_files, read_entries, read_parquet, read_tasks
from experiment.checkpoint import sync
from experiment.errors import UserError


@dataclass(frozen=True)
class State:
    """What the next episode continues.

    stats: of all episodes, None without any; tasks: instruction -> task_index.
    rows: the file of `meta/episodes` that the next row joins, None where it begins one; rows_number: its number.
    columns: the columns of all files of `meta/episodes`, None without any.
    next_data, next_video: numbers of the files that the next episode writes.
    """

    info: Info
    stats: Stats | None = None
    tasks: Mapping[str, int] = field(default_factory=dict)
    rows: pa.Table | None = None
    rows_number: int = 0
    columns: pa.Schema | None = None
    next_data: int = 0
    next_video: Mapping[str, int] = field(default_factory=dict)

    def data_name(self) -> str:
        """Name of the next episode's data file within the folder."""
        return self.info.data_path.format(**place(self.next_data, self.info.chunk_size))

    def video_name(self, feature: str) -> str:
        """Name of the next episode's video of a feature within the folder."""
        assert self.info.video_path is not None
        where = place(self.next_video.get(feature, 0), self.info.chunk_size)
        return self.info.video_path.format(video_key=feature, **where)


def publish(folder: Path, name: str, write: Callable[[Path], object]) -> None:
    """Write the file `name` of a folder so that it is there whole or not at all, also after the power went.

    write: writes the file it is given, whose name ends in `UNFINISHED` until it is complete.
    """
    path = folder / name
    for parent in reversed([path.parent, *path.parent.parents]):
        if not parent.exists():
            parent.mkdir()
            sync(parent.parent)
    temporary = path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        write(temporary)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def publish_counts(folder: Path, info: Info, stats: Stats) -> None:
    """Write `meta/stats.json` and `meta/info.json`."""
    publish(folder, STATS, lambda path: path.write_text(as_text(stats), encoding="utf-8"))
    publish(folder, INFO, lambda path: path.write_text(info.as_text(), encoding="utf-8"))


def open_folder(folder: Path, fresh: Info) -> State:
    """Begin the data set that `fresh` describes, or go on with the one in the folder.

    What a killed writer left is completed (the last episode is listed, but not counted yet) or removed (it is not
    listed yet).

    Raises:
        UserError: the folder holds something else, another data set, or one that is damaged otherwise.
    """
    for stray in folder.glob(f"**/*{UNFINISHED}"):
        stray.unlink()
    if not (folder / INFO).is_file():
        if found := [path for path in folder.rglob("*") if not path.is_dir()]:
            raise UserError(f"{folder}: holds {found[0].name} and no {INFO}: choose an empty or a new folder")
        publish(folder, INFO, lambda path: path.write_text(fresh.as_text(), encoding="utf-8"))
        return State(fresh)
    info = read_info(folder)
    _check_same(info, fresh, folder)
    entries = read_entries(folder, info)
    if len(entries) - info.episodes not in (0, 1):
        raise UserError(
            f"{folder}: {INFO} counts {info.episodes} episodes, meta/episodes lists {len(entries)}: whatever wrote"
            " it did not finish; see `tandem data validate`"
        )
    state = _continue(folder, info, entries)
    _remove_unlisted(folder, state, entries)
    if info.episodes != len(entries) and state.stats is not None:
        publish_counts(folder, state.info, state.stats)
    return state


def _continue(folder: Path, info: Info, entries: list[EpisodeEntry]) -> State:
    tasks: dict[str, int] = {}
    if (folder / TASKS).is_file():
        tasks = {task: index for index, task in enumerate(read_tasks(folder / TASKS))}
    if not entries:
        return State(info, tasks=tasks)
    last = entries[-1]
    stats: Stats | None = None
    columns: pa.Schema | None = None
    files = episode_files(folder)
    for path in files:
        rows = read_parquet(path)
        columns = columns or rows.schema.remove_metadata()
        if len(rows):
            stats = fold(stats, _table_stats(rows, info, path))
    chunk, name = files[-1].parent.name, files[-1].stem
    return State(
        info=dataclasses.replace(info, episodes=len(entries), frames=last.to_index, tasks=len(tasks)),
        stats=stats,
        tasks=tasks,
        rows=rows.replace_schema_metadata(None),
        rows_number=file_number(int(chunk.split("-")[1]), int(name.split("-")[1]), info.chunk_size),
        columns=columns,
        next_data=last.data_number + 1,
        next_video={name: span.number + 1 for name, span in last.videos.items()},
    )


def _remove_unlisted(folder: Path, state: State, entries: list[EpisodeEntry]) -> None:
    """Delete the files of an episode that a killed writer began; refuse files that it cannot have begun."""
    listed = {entry.data for entry in entries}
    listed |= {span.path for entry in entries for span in entry.videos.values()}
    videos = [name for name, feature in state.info.features.items() if feature.dtype == "video"]
    begun = {folder / state.data_name(), *(folder / state.video_name(name) for name in videos)}
    present = {*folder.glob("data/*/*.parquet"), *folder.glob("videos/*/*/*.mp4")}
    if missing := sorted(listed - present):
        raise UserError(f"{missing[0]}: no such file; see `tandem data validate {folder}`")
    if strange := sorted(present - listed - begun):
        raise UserError(f"{strange[0]}: belongs to no episode of meta/episodes; move it away to go on")
    for path in present - listed:
        path.unlink()


def _check_same(info: Info, fresh: Info, folder: Path) -> None:
    def brief(told: Info) -> dict[str, object]:
        return {name: (feature.dtype, list(feature.shape)) for name, feature in told.features.items()}

    there: dict[str, object] = {"fps": info.fps, "robot_type": info.robot_type, **brief(info)}
    here: dict[str, object] = {"fps": fresh.fps, "robot_type": fresh.robot_type, **brief(fresh)}
    for what in {**there, **here}:
        if there.get(what) != here.get(what):
            raise UserError(
                f"{folder}: its {what} is {there.get(what, 'absent')}, that of the new episodes "
                f"{here.get(what, 'absent')}: choose another folder to record into"
            )


def _table_stats(table: pa.Table, info: Info, path: Path) -> Stats:
    """The statistics of the episodes in a file of `meta/episodes`, together."""
    stats: Stats = {}
    for name, feature in info.features.items():
        if feature.dtype == "string":
            continue
        columns = {key: f"stats/{name}/{key}" for key in NAMES if f"stats/{name}/{key}" in table.column_names}
        if not {"min", "max", "mean", "std", "count"} <= columns.keys():
            raise UserError(f"{path}: has no statistics of {name}: a data set without them cannot be extended")
        stats[name] = merged({key: np.array(table[column].to_pylist()) for key, column in columns.items()})
    return stats
