"""Reads data sets in the LeRobot v3 layout: Tandem's own and those that LeRobot wrote.

    demonstrations = LeRobotDataset("data/table")
    demonstrations.read(3).actions          # [T, A]

Opening reads `meta/` only. `read` opens the files of one episode and decodes its pictures; nothing is kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from embodied.datasets.lerobot_decode import check_finite, decode_pictures, decode_video, number_column
from embodied.datasets.lerobot_layout import (
    ACTION,
    AHEAD,
    CAMERA,
    DONE,
    EXPERT_ACTION,
    INDEX_FEATURES,
    INFO,
    OBSERVED,
    PROPRIO,
    REWARD,
    STATE,
    STATS,
    SUCCESS,
    SUCCESS_IF_KNOWN,
    TASKS,
    TRUNCATED,
    Info,
    read_info,
)
from embodied.datasets.lerobot_stats import Stats, read_stats
from embodied.datasets.lerobot_tables import (
    EpisodeEntry,
    episode_files,
    open_parquet,
    read_entries,
    read_tasks,
)
from embodied.datasets.recorded import OTHER_INSTRUCTIONS, RecordedEpisode
from experiment.errors import UserError


class LeRobotDataset:
    """A data set on the disk.

    folder: where it lies. fps: frames a second. features: name -> Feature, the index columns included.
    cameras: name -> feature, of every picture ("front" of `observation.images.front`).
    tasks: instructions by task_index. stats: feature -> statistic -> array, of the whole set.
    episodes: what can be read. An episode at the end that is not on the disk as a whole (its recording was killed,
        or not all files were copied) is left out with a warning.
    """

    tasks_file = TASKS

    def __init__(self, folder: str | Path) -> None:
        """Raises UserError when this is no v3 data set or `meta/` is damaged."""
        self.folder = Path(folder)
        self.info, self.stats, self.tasks, entries = self._read_meta()
        self.fps, self.features = self.info.fps, self.info.features
        self.robot_type = self.info.robot_type
        self.cameras = {camera_name(name): name for name, one in self.features.items() if one.picture}
        self.episodes = tuple(self._finished(entries))

    def _read_meta(self) -> tuple[Info, Stats, tuple[str, ...], list[EpisodeEntry]]:
        """What `meta/` holds: the counts, the statistics, the instructions by task_index, the episodes."""
        info = read_info(self.folder)
        tasks = tuple(read_tasks(self.folder / TASKS)) if (self.folder / TASKS).is_file() else ()
        return info, read_stats(self.folder / STATS), tasks, read_entries(self.folder, info)

    def __len__(self) -> int:
        """Episodes."""
        return len(self.episodes)

    def __iter__(self) -> Iterator[RecordedEpisode]:
        return map(self.read, range(len(self)))

    @property
    def frames(self) -> int:
        """The frames of all episodes."""
        return sum(entry.length for entry in self.episodes)

    def successes(self) -> list[bool | None]:
        """Whether each episode succeeded, from the statistics in `meta/` alone; None where they do not say."""
        told = SUCCESS_IF_KNOWN if SUCCESS_IF_KNOWN in self.features else SUCCESS
        return [None if most is None or most < 0 else bool(most) for most in self.statistic(told, "max")]

    def final_known(self) -> list[bool]:
        """Whether each episode says what was seen after its last action, from the statistics in `meta/` alone."""
        if not any(name.startswith(AHEAD) for name in self.features):
            return [False] * len(self)
        if OBSERVED not in self.features:
            return [True] * len(self)
        return [mean == 1.0 for mean in self.statistic(OBSERVED, "mean")]

    def statistic(self, feature: str, which: Literal["max", "mean"]) -> list[float | None]:
        """The statistic of a feature of one number, by episode, from `meta/` alone; None where it does not say."""
        column = f"stats/{feature}/{which}"
        found: list[float | None] = []
        for path in episode_files(self.folder):
            with open_parquet(path) as file:
                known = column in file.schema_arrow.names
                rows = file.read(columns=[column])[column].to_pylist() if known else [None] * file.metadata.num_rows
            found += [None if row is None else float(row[0]) for row in rows]
        return found[: len(self)]

    def read(self, index: int, *, images: bool = True) -> RecordedEpisode:
        """One episode, by its number from 0.

        images: whether to decode pictures; without, `RecordedEpisode.images` is empty.

        Raises:
            UserError: there is no such episode, a file of it is missing or damaged, a column has another shape or
                length than `meta/` says, a number is not finite, a picture cannot be decoded, there is no action.
        """
        if not 0 <= index < len(self.episodes):
            known = f"0 to {len(self) - 1}" if len(self) else "none"
            raise UserError(f"{self.folder}: has no episode {index}; there are {known}")
        entry = self.episodes[index]
        where = f"{self.folder}: episode {index}"
        table = self.table(entry, images=images)
        numbers = {
            name: number_column(table[name], feature, f"{where}: {name}")
            for name, feature in self.features.items()
            if feature.number and name in table.column_names
        }
        if ACTION not in numbers:
            raise UserError(f"{self.folder}: has no feature {ACTION}; it has {', '.join(sorted(self.features))}")
        for name, values in numbers.items():
            check_finite(values, f"{where}: {name}")
        pictures = {}
        if images:
            for camera, name in self.cameras.items():
                pictures[camera] = self.pictures(entry, name, table, numbers["timestamp"])
        return self._recorded(entry, table, numbers, pictures)

    def table(self, entry: EpisodeEntry, *, images: bool = True) -> pa.Table:
        """The episode's rows of its data file. Raises UserError as `read`."""
        stored = {name for name, one in self.features.items() if one.dtype != "video"}
        stored -= set() if images else set(self.cameras.values())
        columns = [name for name in self.features if name in stored]
        with open_parquet(entry.data) as file:
            if missing := [name for name in columns if name not in file.schema_arrow.names]:
                raise UserError(f"{entry.data}: has no column {missing[0]}, which {INFO} lists")
            first, end, groups = _rows_of(file, entry)
            try:
                table = file.read_row_groups(groups, columns=columns)
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{entry.data}: damaged ({error}); fetch it again") from error
        return table.slice(first, end - first)

    def pictures(
        self, entry: EpisodeEntry, name: str, table: pa.Table, timestamps: NDArray[np.floating]
    ) -> NDArray[np.uint8]:
        """[T, H, W, 3]: the frames of a picture feature. Raises UserError as `read`."""
        feature, where = self.features[name], f"{self.folder}: episode {entry.index}: {name}"
        if feature.dtype == "image":
            return decode_pictures(table[name], feature, where)
        return decode_video(entry.videos[name], timestamps, self.fps, feature, where)

    def _finished(self, entries: list[EpisodeEntry]) -> list[EpisodeEntry]:
        """The entries without a last episode that is not on the disk as a whole."""
        if len(entries) < self.info.episodes:
            warnings.warn(
                f"{self.folder}: {INFO} counts {self.info.episodes} episodes, meta/episodes lists {len(entries)};"
                " the rest is not read (`tandem data validate` says more)",
                stacklevel=3,
            )
        if not entries:
            return entries
        last, before = entries[-1], entries[-2:-1]
        if any(entry.data == last.data for entry in before) and not _readable(last.data):
            return entries  # all of the file is lost, not just its last episode: reading says so
        try:
            with open_parquet(last.data) as file:
                _rows_of(file, last)
            if missing := [span.path for span in last.videos.values() if not span.path.is_file()]:
                raise UserError(f"{missing[0]}: no such file")
        except UserError as problem:
            warnings.warn(f"{self.folder}: the last episode is left out: {problem}", stacklevel=3)
            return entries[:-1]
        return entries

    def _recorded(
        self,
        entry: EpisodeEntry,
        table: pa.Table,
        numbers: Mapping[str, NDArray],
        pictures: Mapping[str, NDArray[np.uint8]],
    ) -> RecordedEpisode:
        def floats(name: str) -> NDArray[np.float32] | None:
            if name not in numbers:
                return None
            values = numbers[name].astype(np.float32)
            return values if values.ndim > 1 or name == REWARD else values[:, None]

        actions, proprio = floats(ACTION), floats(PROPRIO)
        assert actions is not None
        success = bool(np.any(numbers[SUCCESS])) if SUCCESS in numbers else None
        if success is None and SUCCESS_IF_KNOWN in numbers and numbers[SUCCESS_IF_KNOWN][-1] >= 0:
            success = bool(numbers[SUCCESS_IF_KNOWN][-1])
        done = bool(numbers[DONE][-1]) if DONE in numbers else False
        cut = bool(numbers[TRUNCATED][-1]) if TRUNCATED in numbers else not success
        named = {ACTION, EXPERT_ACTION, PROPRIO, STATE, REWARD, DONE, SUCCESS, SUCCESS_IF_KNOWN, TRUNCATED}
        return RecordedEpisode(
            images=pictures,
            proprio=np.zeros((len(table), 0), np.float32) if proprio is None else proprio,
            actions=actions,
            terminated=done and not cut,
            truncated=not done or cut,
            instruction=self._instruction(entry, numbers),
            state=floats(STATE),
            expert_actions=floats(EXPERT_ACTION),
            rewards=floats(REWARD),
            success=success,
            timestamps=numbers["timestamp"].astype(np.float32),
            others={name: one for name, one in numbers.items() if name not in named | set(INDEX_FEATURES)},
            left_out=self._left_out(numbers),
            name=f"{self.folder}: episode {entry.index}",
        )

    def _left_out(self, numbers: Mapping[str, NDArray]) -> tuple[str, ...]:
        """What the frames have that `RecordedEpisode` has not."""
        texts = [f"texts ({name})" for name, one in self.features.items() if one.dtype == "string"]
        changes = bool((numbers["task_index"] != numbers["task_index"][0]).any())
        return (*texts, *([OTHER_INSTRUCTIONS] if changes else []))

    def _instruction(self, entry: EpisodeEntry, numbers: Mapping[str, NDArray]) -> str:
        """What the robot was told at the first frame."""
        task = int(numbers["task_index"][0])
        if not 0 <= task < len(self.tasks):
            raise UserError(
                f"{self.folder}: episode {entry.index}: task_index {task}, but {self.tasks_file} has"
                f" {len(self.tasks)} tasks"
            )
        return self.tasks[task]


def camera_name(feature: str) -> str:
    """`front` of `observation.images.front`, `image` of `observation.image`."""
    return feature.removeprefix(CAMERA).removeprefix("observation.")


def _readable(path: Path) -> bool:
    try:
        open_parquet(path).close()
    except UserError:
        return False
    return True


def _rows_of(file: pq.ParquetFile, entry: EpisodeEntry) -> tuple[int, int, list[int]]:
    """Where an episode's rows are in its data file: first and end within the row groups that hold them.

    Raises UserError when the file does not hold `entry.length` such rows together.
    """
    if "episode_index" not in file.schema_arrow.names:
        raise UserError(f"{entry.data}: has no column episode_index")
    rows = np.flatnonzero(file.read(columns=["episode_index"])[0].to_numpy() == entry.index)
    if len(rows) != entry.length or not len(rows) or rows[-1] - rows[0] + 1 != len(rows):
        raise UserError(
            f"{entry.data}: meta/episodes says that episode {entry.index} has {entry.length} rows here, it has "
            f"{len(rows)}{', not together' if len(rows) == entry.length else ''}"
        )
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    ends = np.cumsum(sizes)
    groups = np.flatnonzero((ends > rows[0]) & (ends - sizes <= rows[-1]))
    first = int(rows[0] - (ends[groups[0]] - sizes[groups[0]]))
    return first, first + len(rows), groups.tolist()
