"""Looks at everything in a LeRobot data set and lists what is wrong with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from embodied.datasets.lerobot import LeRobotDataset
from embodied.datasets.lerobot_decode import check_finite, number_column
from embodied.datasets.lerobot_layout import ACTION, DONE, INFO, STATS, TASKS, UNFINISHED, Info, read_info
from embodied.datasets.lerobot_stats import NAMES, PictureStats, Stats, fold, vector_stats
from embodied.datasets.lerobot_tables import (
    EpisodeEntry,
    episode_files,
    open_parquet,
    read_entries,
    read_parquet,
    read_tasks,
)
from experiment.errors import UserError

_MOMENTS = ("min", "max", "mean", "std", "count")
_VIDEO_LOSS = 0.03
"""Most by which the mean of a decoded video may differ from that of what went in, of 1."""


def problems(folder: str | Path, on_episode: Callable[[int], None] = lambda index: None) -> Iterator[str]:
    """A line for everything that is wrong, in the order of the files; none when all is well.

    Every file is opened: counts, numbering, times, shapes, numbers that are not finite, pictures and videos that
    cannot be decoded, statistics that are not those of the frames, files that nothing refers to.

    on_episode: called with its index when an episode has been looked at.
    """
    folder = Path(folder)
    try:
        info = read_info(folder)
        entries = read_entries(folder, info)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say is said below, with more detail
            dataset = LeRobotDataset(folder)
    except UserError as error:
        yield str(error)
        return
    yield from _counts(folder, info, entries)
    yield from _files(folder, info, entries)
    kept = _Kept(folder, info)
    together: Stats | None = None
    whole = True
    for entry in entries:
        try:
            found = Examined(dataset, entry)
        except UserError as error:
            yield str(error)
            whole = False
        else:
            yield from found.problems
            yield from _differences(f"{found.where}: statistics", kept.of(entry), found.stats, info)
            whole = whole and not found.problems
            together = fold(together, found.stats) if whole else None
        on_episode(entry.index)
    if whole and together is not None:
        yield from _differences(f"{folder / STATS}", dataset.stats, together, info)


def _counts(folder: Path, info: Info, entries: list[EpisodeEntry]) -> Iterator[str]:
    path = folder / INFO
    frames = sum(entry.length for entry in entries)
    tasks = read_tasks(folder / TASKS) if (folder / TASKS).is_file() else []
    for what, told, there in (
        ("total_episodes", info.episodes, len(entries)),
        ("total_frames", info.frames, frames),
        ("total_tasks", info.tasks, len(tasks)),
    ):
        if told != there:
            yield f"{path}: {what} is {told}, there are {there}"
    if ACTION not in info.features:
        yield f"{path}: has no feature {ACTION}"
    for name, feature in info.features.items():
        if not feature.known:
            yield f"{path}: feature {name} is of dtype {feature.dtype!r}, which nothing here reads"
    if not entries:
        yield f"{folder}: has no episodes"
    at = 0
    for entry in entries:
        where = f"{folder}: episode {entry.index}: meta/episodes"
        if (entry.from_index, entry.to_index) != (at, at + entry.length):
            yield (
                f"{where} puts its frames at {entry.from_index} to {entry.to_index}, its length is {entry.length}"
                f" and those before end at {at}"
            )
        at = entry.to_index
        if unknown := [task for task in entry.tasks if task not in tasks]:
            yield f"{where} has the task {unknown[0]!r}, which {TASKS} does not know"
        for name, span in entry.videos.items():
            if abs(span.to_seconds - span.from_seconds - entry.length / info.fps) > 0.5 / info.fps:
                yield (
                    f"{where} says that {name} lasts {span.to_seconds - span.from_seconds:.3f} s, not"
                    f" {entry.length / info.fps:.3f} s"
                )


def _files(folder: Path, info: Info, entries: list[EpisodeEntry]) -> Iterator[str]:
    listed = {entry.data for entry in entries}
    listed |= {span.path for entry in entries for span in entry.videos.values()}
    for path in sorted({*folder.glob("data/*/*.parquet"), *folder.glob("videos/*/*/*.mp4")} - listed):
        yield f"{path}: belongs to no episode of meta/episodes (half-written, or its row is lost)"
    for path in sorted(folder.rglob(f"*{UNFINISHED}")):
        yield f"{path}: half-written; recording into the folder again removes it"
    rows: dict[Path, int] = {}
    for entry in entries:
        rows[entry.data] = rows.get(entry.data, 0) + entry.length
    for path, expected in rows.items():
        if path.is_file():
            try:
                with open_parquet(path) as file:
                    there = file.metadata.num_rows
            except UserError:
                continue  # said for each of its episodes
            if there != expected:
                yield f"{path}: has {there} rows, its episodes {expected}"
    if not (folder / STATS).is_file():
        yield f"{folder / STATS}: no such file"


class Examined:
    """One episode, read as a whole. UserError where it cannot be."""

    def __init__(self, dataset: LeRobotDataset, entry: EpisodeEntry) -> None:
        self.where = f"{dataset.folder}: episode {entry.index}"
        self.problems: list[str] = []
        self.stats: Stats = {}
        self._entry, self._dataset = entry, dataset
        table = dataset.table(entry)
        numbers = {
            name: number_column(table[name], feature, f"{self.where}: {name}")
            for name, feature in dataset.features.items()
            if feature.number
        }
        for name, values in numbers.items():
            self._try(check_finite, values, f"{self.where}: {name}")
            self.stats[name] = vector_stats(values)
        self._order(numbers)
        for name in dataset.cameras.values():
            self._try(self._pictures, name, table, numbers["timestamp"])

    def _try(self, check: Callable[..., None], *arguments: Any) -> None:
        try:
            check(*arguments)
        except UserError as error:
            self.problems.append(str(error))

    def _pictures(self, name: str, table: pa.Table, timestamps: NDArray[np.floating]) -> None:
        counted = PictureStats()
        for picture in self._dataset.pictures(self._entry, name, table, timestamps):
            counted.add(picture)
        self.stats[name] = counted.stats()

    def _order(self, numbers: dict[str, NDArray[Any]]) -> None:
        entry, dataset = self._entry, self._dataset
        frames = np.arange(entry.length)
        for name, expected in (("frame_index", frames), ("index", entry.from_index + frames)):
            if bad := _first(numbers[name] != expected):
                step = bad[0]
                self.problems.append(
                    f"{self.where}: {name} of frame {step} is {numbers[name][step]}, not {expected[step]}"
                )
        if bad := _first(np.abs(numbers["timestamp"] - frames / dataset.fps) > 1e-4 + 1e-6 * frames):
            step, told = bad[0], numbers["timestamp"][bad[0]]
            self.problems.append(
                f"{self.where}: timestamp of frame {step} is {told:.4f} s, at {dataset.fps} fps it is"
                f" {step / dataset.fps:.4f} s"
            )
        tasks = numbers["task_index"]
        if bad := _first((tasks < 0) | (tasks >= len(dataset.tasks))):
            self.problems.append(f"{self.where}: task_index {tasks[bad[0]]} is not in {TASKS}")
        elif told := {dataset.tasks[task] for task in tasks} ^ set(entry.tasks):
            self.problems.append(
                f"{self.where}: its frames and meta/episodes disagree about the task {min(told)!r}"
            )
        if DONE in numbers and (bad := _first(numbers[DONE][:-1])):
            self.problems.append(f"{self.where}: {DONE} is true at frame {bad[0]}, before the end")


def _first(where: NDArray[Any]) -> list[int]:
    """The first true index, as a list of one or none."""
    return np.flatnonzero(where)[:1].tolist()


class _Kept:
    """The statistics that `meta/episodes` keeps of single episodes; one file at a time is read."""

    def __init__(self, folder: Path, info: Info) -> None:
        self._features, self._files = info.features, iter(episode_files(folder))
        self._table: pa.Table | None = None
        self._first = 0

    def of(self, entry: EpisodeEntry) -> Stats:
        """The statistics of an episode; later episodes may be asked for next, earlier ones not."""
        while self._table is None or entry.index >= self._first + len(self._table):
            self._first += 0 if self._table is None else len(self._table)
            self._table = read_parquet(next(self._files))
        row, columns = entry.index - self._first, set(self._table.column_names)
        stats: Stats = {}
        for name in self._features:
            present = [key for key in NAMES if f"stats/{name}/{key}" in columns]
            if present:
                stats[name] = {key: np.array(self._table[f"stats/{name}/{key}"][row].as_py()) for key in present}
        return stats


def _differences(where: str, told: Stats, found: Stats, info: Info) -> Iterable[str]:
    """Where statistics that are kept are not those of the frames."""
    for name, values in found.items():
        if name not in told:
            yield f"{where} of {name} are missing"
            continue
        kept, picture = told[name], info.features[name].picture
        count = int(kept["count"][0]) if "count" in kept else -1
        if picture and count != int(values["count"][0]):
            # LeRobot looks at some of the frames of long episodes, and at fewer pixels of large ones
            keys: tuple[str, ...] = ("mean",)
            slack = 0.2
        else:
            keys = ("mean",) if picture and info.features[name].dtype == "video" else _MOMENTS
            slack = _VIDEO_LOSS if len(keys) == 1 else 2e-3 if picture else 0.0
        for key in keys:
            if key not in kept or kept[key].shape != values[key].shape:
                yield f"{where} of {name} lack {key}, or it has another shape"
                break
            scale = np.maximum(1.0, np.abs(values[key]))
            if (np.abs(kept[key] - values[key]) > slack + 1e-4 * scale).any():
                yield f"{where} of {name}: {key} is {_short(kept[key])}, that of the frames {_short(values[key])}"
                break


def _short(values: NDArray[Any]) -> str:
    numbers = [f"{value:.4g}" for value in values.ravel()[:6]]
    return "[" + ", ".join(numbers) + (", ...]" if values.size > 6 else "]")
