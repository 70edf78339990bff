"""What `tandem data validate` finds: nothing in a good set, and each way of spoiling one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embodied.datasets.lerobot_check import problems

FIXTURES = Path(__file__).parents[2] / "fixtures" / "lerobot_v3"
FRONT = "observation.images.front"
DATA, EPISODES = "data/chunk-000/file-001.parquet", "meta/episodes/chunk-000/file-000.parquet"


def column(folder: Path, file: str, name: str, change: Callable[[list[Any]], object]) -> None:
    """Change the values of a column in place."""
    table = pq.read_table(folder / file)
    values = table[name].to_pylist()
    change(values)
    position = table.column_names.index(name)
    table = table.set_column(position, name, pa.array(values, table.schema.field(name).type))
    pq.write_table(table, folder / file)


def put(at: int, value: object) -> Callable[[list[Any]], None]:
    def change(values: list[Any]) -> None:
        values[at] = value

    return change


@pytest.mark.parametrize("kind", ["images", "videos"])
def test_lerobots_own_sets_are_well(kind: str) -> None:
    assert list(problems(FIXTURES / kind)) == []


def test_tandems_sets_are_well(filled: Path, tmp_path: Path, filler: Callable[..., Path]) -> None:
    seen: list[int] = []
    assert list(problems(filled, seen.append)) == []
    assert seen == [0, 1, 2]
    assert list(problems(filler(tmp_path / "video", size=(32, 48), video=True))) == []


@pytest.mark.parametrize(
    ("file", "name", "change", "message"),
    [
        (DATA, "action", put(2, [float("nan"), 0.0]), "episode 1: action is not finite in frame 2: [nan, 0.0]"),
        (DATA, "frame_index", put(3, 7), "episode 1: frame_index of frame 3 is 7, not 3"),
        (DATA, "index", put(0, 5), "episode 1: index of frame 0 is 5, not 4"),
        (DATA, "timestamp", put(2, 0.21), "episode 1: timestamp of frame 2 is 0.2100 s, at 10 fps it is 0.2000 s"),
        (DATA, "task_index", put(1, 9), "episode 1: task_index 9 is not in meta/tasks.parquet"),
        (DATA, "task_index", put(1, 0), "episode 1: its frames and meta/episodes disagree about the task 'even'"),
        (DATA, "next.done", put(1, True), "episode 1: next.done is true at frame 1, before the end"),
        (DATA, "action", put(2, [5.0, 0.0]), "episode 1: statistics of action: max is [0.4, -0.25], that of the"),
        (DATA, "episode_index", put(4, 2), "meta/episodes says that episode 1 has 5 rows here, it has 4"),
        (DATA, FRONT, put(0, {"bytes": b"?", "path": ""}), f"episode 1: {FRONT}: frame 0 cannot be decoded"),
        (DATA, FRONT, put(0, None), f"episode 1: {FRONT}: frame 0 is not in the data file"),
        (EPISODES, "dataset_from_index", put(2, 8), "episode 2: meta/episodes puts its frames at 8 to 15"),
        (EPISODES, "length", put(1, 4), "meta/episodes says that episode 1 has 4 rows here, it has 5"),
        (EPISODES, "tasks", put(1, ["dance"]), "has the task 'dance', which meta/tasks.parquet does not know"),
        (EPISODES, "episode_index", put(1, 2), "row 1 is episode 2, out of order"),
        (
            EPISODES,
            "stats/action/mean",
            put(1, [9.0, 9.0]),
            "episode 1: statistics of action: mean is [9, 9], that of the frames [0.2, -0.25]",
        ),
    ],
)
def test_what_is_found(
    filled: Path, file: str, name: str, change: Callable[[list[Any]], object], message: str
) -> None:
    column(filled, file, name, change)
    found = list(problems(filled))
    assert any(message in line for line in found), found
    assert not any("\n" in line for line in found)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"total_episodes": 4}, "info.json: total_episodes is 4, there are 3"),
        ({"total_frames": 14}, "info.json: total_frames is 14, there are 15"),
        ({"total_tasks": 3}, "info.json: total_tasks is 3, there are 2"),
        ({"fps": 20}, "timestamp of frame 1 is 0.1000 s, at 20 fps it is 0.0500 s"),
        ({"codebase_version": "v2.0"}, "codebase_version is v2.0"),
        ({"fps": "ten"}, "info.json: lacks or garbles 'fps', which is 'ten'"),
        (
            {"data_path": "data/{foo}.parquet"},
            "data_path is 'data/{foo}.parquet'; only {chunk_index}, {file_index}, ",
        ),
        ({"data_path": "data/{chunk_index"}, "info.json: data_path is 'data/{chunk_index'"),
        ({"video_path": "videos/{}.mp4"}, "info.json: video_path is 'videos/{}.mp4'"),
    ],
)
def test_a_wrong_info(filled: Path, keys: dict[str, Any], message: str) -> None:
    path = filled / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    found = list(problems(filled))
    assert any(message in line for line in found), found


def test_a_feature_of_another_kind(filled: Path) -> None:
    path = filled / "meta/info.json"
    told = json.loads(path.read_text())
    told["features"]["thoughts"] = {"dtype": "language", "shape": [1], "names": None}
    path.write_text(json.dumps(told))
    found = [line for line in problems(filled) if "thoughts" in line]
    assert found[0] == f"{path}: feature thoughts is of dtype 'language', which nothing here reads"


def test_wrong_statistics_of_the_whole(filled: Path) -> None:
    path = filled / "meta/stats.json"
    stats = json.loads(path.read_text())
    stats["observation.state"]["std"][1] = 3.0
    del stats["expert_action"]
    path.write_text(json.dumps(stats))
    found = list(problems(filled))
    assert len(found) == 2
    assert any("stats.json of observation.state: std is [" in line for line in found)
    assert any("stats.json of expert_action are missing" in line for line in found)


def test_files_that_are_missing_or_too_many(filled: Path) -> None:
    shutil.copy(filled / DATA, filled / "data/chunk-000/file-003.parquet")
    shutil.copy(filled / DATA, filled / "data/chunk-000/file-004.parquet.77.part")
    (filled / DATA).unlink()
    (filled / "meta/stats.json").unlink()
    found = "\n".join(problems(filled))
    assert "file-003.parquet: belongs to no episode of meta/episodes (half-written, or its row is lost)" in found
    assert "file-004.parquet.77.part: half-written" in found
    assert "file-001.parquet: no such file" in found
    assert "stats.json: no such file" in found


def test_a_half_written_last_episode(filled: Path) -> None:
    path = filled / "data/chunk-000/file-002.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    found = list(problems(filled))
    assert len(found) == 1
    assert "file-002.parquet: damaged or not finished" in found[0]


def test_a_video_of_something_else(tmp_path: Path, filler: Callable[..., Path]) -> None:
    """It can be decoded, but its pictures are not those that the statistics were taken from."""
    from experiment.video import write_mp4

    folder = filler(tmp_path / "set", range(2), (32, 48), video=True)
    assert list(problems(folder)) == []
    video = folder / f"videos/{FRONT}/chunk-000/file-001.mp4"
    write_mp4([np.full((32, 48, 3), 200, np.uint8)] * 5, video, 10)
    found = list(problems(folder))
    assert len(found) == 2, found  # those of the whole set, too
    assert f"episode 1: statistics of {FRONT}: mean is" in found[0]


def test_an_empty_set_and_none(tmp_path: Path, filler: Callable[..., Path]) -> None:
    assert list(problems(filler(tmp_path / "set", range(0)))) == [
        f"{tmp_path / 'set'}: has no episodes",
        f"{tmp_path / 'set/meta/stats.json'}: no such file",
    ]
    assert list(problems(tmp_path / "x")) == [f"{tmp_path / 'x'}: no such folder"]
