"""Reader of LeRobot's version 2.1 (and 2.0), in which every episode has files of its own.

    meta/info.json                                       features, counts, path templates
    meta/episodes.jsonl                                  {"episode_index", "tasks", "length"} an episode
    meta/tasks.jsonl                                     {"task_index", "task"} an instruction
    meta/episodes_stats.jsonl                            {"episode_index", "stats"}; 2.0 has meta/stats.json instead
    data/chunk-CCC/episode_EEEEEE.parquet                a row a frame, as in version 3
    videos/chunk-CCC/KEY/episode_EEEEEE.mp4              frames of a camera whose feature is a video

As `lerobot` 0.1 to 0.3 wrote it (https://huggingface.co/docs/lerobot/porting_datasets_v3 tells the two apart).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from embodied.datasets.lerobot import LeRobotDataset
from embodied.datasets.lerobot_layout import INFO, STATS, Info, info_of, read_told
from embodied.datasets.lerobot_stats import Stats, fold, read_stats
from embodied.datasets.lerobot_tables import EpisodeEntry, VideoSpan
from experiment.errors import UserError

EPISODES, TASKS, EPISODES_STATS = "meta/episodes.jsonl", "meta/tasks.jsonl", "meta/episodes_stats.jsonl"


class LeRobotV21Dataset(LeRobotDataset):
    """`LeRobotDataset`, of the older layout. UserError when it is none or `meta/` is damaged."""

    tasks_file = TASKS

    def _read_meta(self) -> tuple[Info, Stats, tuple[str, ...], list[EpisodeEntry]]:
        version, told = read_told(self.folder)
        if not version.lstrip("v").startswith("2."):
            raise UserError(f"{self.folder / INFO}: codebase_version is {version}, v2.x is needed here")
        info = info_of(told, self.folder / INFO)
        tasks = _numbered(self.folder / TASKS, "task_index")
        rows = _numbered(self.folder / EPISODES, "episode_index")
        self._episode_stats = [_stats(row) for row in _numbered(self.folder / EPISODES_STATS, "episode_index")]
        stats = read_stats(self.folder / STATS)
        if self._episode_stats:
            together: Stats | None = None
            for one in self._episode_stats:
                together = fold(together, one)
            stats = together or {}
        return info, stats, tuple(str(task["task"]) for task in tasks), self._entries(info, rows)

    def statistic(self, feature: str, which: Literal["max", "mean"]) -> list[float | None]:
        """As in version 3, from the lines of `meta/episodes_stats.jsonl`."""
        known = [float(one[feature][which].flat[0]) if feature in one else None for one in self._episode_stats]
        return (known + [None] * len(self))[: len(self)]

    def _entries(self, info: Info, rows: list[dict[str, Any]]) -> list[EpisodeEntry]:
        videos = [name for name, feature in info.features.items() if feature.dtype == "video"]
        if videos and info.video_path is None:
            raise UserError(f"{self.folder}: has the video feature {videos[0]}, but {INFO} has no video_path")
        entries: list[EpisodeEntry] = []
        for index, row in enumerate(rows):
            where = {"episode_chunk": index // info.chunk_size, "episode_index": index}
            try:
                length, tasks = int(row["length"]), tuple(map(str, row["tasks"]))
                data = self.folder / info.data_path.format(**where)
                files = {
                    name: self.folder / str(info.video_path).format(video_key=name, **where) for name in videos
                }
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"{self.folder / EPISODES}: episode {index} lacks or garbles {error}") from error
            begin = entries[-1].to_index if entries else 0
            spans = {name: VideoSpan(path, index, 0.0, length / info.fps) for name, path in files.items()}
            entries.append(EpisodeEntry(index, length, tasks, data, index, begin, begin + length, spans))
        return entries


def _numbered(path: Path, number: str) -> list[dict[str, Any]]:
    """The lines of a file, which are numbered 0, 1, 2, ... [] where there is none. UserError when it is damaged."""
    if not path.is_file():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        numbers = [row[number] for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged or cut off ({error}); fetch the data set again") from error
    if numbers != list(range(len(rows))):
        raise UserError(f"{path}: {number} is not 0, 1, 2, ...")
    return rows


def _stats(row: dict[str, Any]) -> Stats:
    told = row.get("stats", {})
    return {name: {key: np.atleast_1d(value) for key, value in one.items()} for name, one in told.items()}
