"""The writer: what it puts where, what it refuses, and that a kill at any moment loses one episode at most."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from embodied.datasets import lerobot_writer
from embodied.datasets.lerobot import LeRobotDataset
from embodied.datasets.lerobot_episode import EpisodeEncoder, encode_png
from embodied.datasets.lerobot_layout import Feature, camera_feature, demonstration_features, outcome
from embodied.datasets.lerobot_stats import PictureStats, fold, vector_stats
from embodied.datasets.lerobot_writer import LeRobotWriter
from experiment.errors import UserError

FRONT = "observation.images.front"
FIXTURE = Path(__file__).parents[2] / "fixtures" / "lerobot_v3" / "images"


# ---------------------------------------------------------------- what is written


def test_files_and_counts(filled: Path) -> None:
    files = sorted(path.relative_to(filled).as_posix() for path in filled.rglob("*") if path.is_file())
    assert files == [
        "data/chunk-000/file-000.parquet",
        "data/chunk-000/file-001.parquet",
        "data/chunk-000/file-002.parquet",
        "meta/episodes/chunk-000/file-000.parquet",
        "meta/info.json",
        "meta/stats.json",
        "meta/tasks.parquet",
    ]
    info = json.loads((filled / "meta/info.json").read_text())
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (3, 15, 2)
    assert info["splits"] == {"train": "0:3"}
    assert info["video_path"] is None
    assert info["features"]["action"] == {"dtype": "float32", "shape": [2], "names": None}
    rows = pq.read_table(filled / "data/chunk-000/file-001.parquet")
    assert rows["index"].to_pylist() == [4, 5, 6, 7, 8]
    assert rows["frame_index"].to_pylist() == [0, 1, 2, 3, 4]
    assert rows["episode_index"].to_pylist() == [1] * 5
    assert rows["task_index"].to_pylist() == [1] * 5
    assert rows["next.truncated"].to_pylist() == [False] * 4 + [True]
    assert rows["next.done"].to_pylist() == [False] * 4 + [True]
    np.testing.assert_allclose(rows["timestamp"].to_numpy(), np.arange(5) / 10, atol=1e-7)


def test_schema_is_lerobots(tmp_path: Path) -> None:
    """The same features give the same columns, types and metadata as LeRobot's own file."""
    theirs = LeRobotDataset(FIXTURE)
    own = {name: theirs.features[name] for name in list(theirs.features)[:6]}
    shown = theirs.read(0)
    with LeRobotWriter(tmp_path, fps=10, features=own) as writer, writer.episode("reach the red cube") as episode:
        for step in range(6):
            done = {"next.done": step == 5, "next.success": step == 5, "next.reward": float(step == 5)}
            seen = {FRONT: shown.images["front"][step], "observation.state": shown.proprio[step]}
            episode.add({**seen, "action": shown.actions[step], **done})
        episode.save()

    def columns(folder: Path, name: str) -> dict[str, str]:
        return {column.name: str(column.type) for column in pq.read_schema(folder / name)}

    for name in (
        "data/chunk-000/file-000.parquet",
        "meta/episodes/chunk-000/file-000.parquet",
        "meta/tasks.parquet",
    ):
        assert columns(tmp_path, name) == columns(FIXTURE, name)
    told = [
        json.loads(pq.read_schema(folder / "data/chunk-000/file-000.parquet").metadata[b"huggingface"])["info"]
        for folder in (tmp_path, FIXTURE)
    ]
    assert told[0] == told[1]
    ours, other = (pq.read_table(f / "meta/episodes/chunk-000/file-000.parquet") for f in (tmp_path, FIXTURE))
    for name in ours.column_names:
        if name.rsplit("/")[-1] in ("min", "max", "mean", "std", "count"):
            np.testing.assert_allclose(ours[name][0].as_py(), other[name][0].as_py(), atol=1e-6, err_msg=name)


def test_tasks_are_an_index_for_pandas(filled: Path) -> None:
    pandas = pytest.importorskip("pandas")
    tasks = pandas.read_parquet(filled / "meta/tasks.parquet")
    assert tasks.index.tolist() == ["even", "odd"]
    assert tasks.loc["odd"].task_index == 1


def test_statistics_are_those_of_all_frames(filled: Path) -> None:
    dataset = LeRobotDataset(filled)
    episodes = list(dataset)
    actions = np.concatenate([one.actions for one in episodes]).astype(np.float64)
    stats = dataset.stats["action"]
    np.testing.assert_allclose(stats["mean"], actions.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(stats["std"], actions.std(axis=0), atol=1e-12)
    np.testing.assert_array_equal(stats["min"], actions.min(axis=0))
    np.testing.assert_array_equal(stats["max"], actions.max(axis=0))
    assert stats["count"].tolist() == [15]
    pictures = np.concatenate([one.images["front"] for one in episodes]) / 255
    np.testing.assert_allclose(dataset.stats[FRONT]["mean"][:, 0, 0], pictures.mean(axis=(0, 1, 2)), atol=1e-12)
    np.testing.assert_allclose(dataset.stats[FRONT]["std"][:, 0, 0], pictures.std(axis=(0, 1, 2)), atol=1e-7)


def test_picture_statistics_by_hand() -> None:
    counted = PictureStats()
    picture = np.zeros((1, 2, 3), np.uint8)
    picture[0, 1] = [255, 51, 0]
    counted.add(picture)
    counted.add(picture)
    stats = counted.stats()
    assert stats["mean"].ravel().tolist() == pytest.approx([0.5, 0.1, 0.0])
    assert stats["std"].ravel().tolist() == pytest.approx([0.5, 0.1, 0.0])
    assert stats["max"].ravel().tolist() == pytest.approx([1.0, 0.2, 0.0])
    assert stats["q10"].ravel().tolist() == [0.0, 0.0, 0.0]
    assert stats["q90"].ravel().tolist() == pytest.approx([1.0, 0.2, 0.0])
    assert stats["count"].tolist() == [2]


def test_folded_statistics_by_hand() -> None:
    together = fold({"x": vector_stats(np.array([0.0, 2.0]))}, {"x": vector_stats(np.array([4.0]))})["x"]
    assert together["mean"].tolist() == [2.0]
    assert together["std"] == pytest.approx(np.sqrt(8 / 3))
    assert together["count"].tolist() == [3]
    assert together["q50"] == pytest.approx((2 * 1.0 + 4.0) / 3)  # LeRobot's weighting


def test_png_is_exact() -> None:
    rng = np.random.default_rng(0)
    for size in ((1, 1), (5, 3), (64, 64)):
        picture = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encode_png(picture)))), picture)


def test_large_pictures_become_videos() -> None:
    assert camera_feature(128, 96, 10).dtype == "image"
    assert camera_feature(130, 96, 10).dtype == "video"
    assert camera_feature(130, 96, 10).info["video.height"] == 130


def test_an_environment_that_says_both_ends() -> None:
    assert outcome(reward=0.0, terminated=True, truncated=True, success=False)["next.truncated"] is False


def test_files_of_the_episodes_table_stay_small(
    tmp_path: Path, filler: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lerobot_writer, "ROWS_OF_EPISODES", 2)
    filler(tmp_path / "set", range(3))
    filler(tmp_path / "set", range(3, 5))
    sizes = [
        pq.read_metadata(path).num_rows for path in sorted((tmp_path / "set/meta/episodes").rglob("*.parquet"))
    ]
    assert sizes == [2, 2, 1]
    rows = pq.read_table(tmp_path / "set/meta/episodes/chunk-000/file-001.parquet")
    assert rows["meta/episodes/file_index"].to_pylist() == [1, 1]
    assert [len(episode) for episode in LeRobotDataset(tmp_path / "set")] == [4, 5, 6, 7, 8]


def test_rows_of_the_episodes_table_lie_in_one_piece(tmp_path: Path) -> None:
    """A piece a row in each of a hundred columns takes megabytes, and memory would grow with the episodes."""
    own = {"action": Feature("float32", (1,))}
    for _ in range(2):  # the second goes on with what it reads
        with LeRobotWriter(tmp_path, fps=10, features=own) as writer:
            for _ in range(3):
                with writer.episode("wait") as episode:
                    episode.add({"action": np.zeros(1)})
                    episode.save()
    rows = writer._state.rows
    assert rows is not None
    assert len(rows) == 6
    assert {name: rows[name].num_chunks for name in rows.column_names} == dict.fromkeys(rows.column_names, 1)


# ---------------------------------------------------------------- going on


def test_opened_again_it_goes_on(tmp_path: Path, filler: Callable[..., Path]) -> None:
    at_once, twice = filler(tmp_path / "a", range(5)), filler(tmp_path / "b", range(2))
    filler(twice, range(2, 5))
    for path in sorted(at_once.rglob("*.parquet")):
        assert pq.read_table(path).equals(pq.read_table(twice / path.relative_to(at_once))), path
    assert (at_once / "meta/info.json").read_text() == (twice / "meta/info.json").read_text()
    for name, stats in LeRobotDataset(at_once).stats.items():
        for key, value in stats.items():
            np.testing.assert_allclose(LeRobotDataset(twice).stats[name][key], value, atol=1e-12)


def test_lerobots_set_can_be_extended(tmp_path: Path) -> None:
    folder = shutil.copytree(FIXTURE, tmp_path / "set")
    before = LeRobotDataset(folder)
    own = {name: before.features[name] for name in list(before.features)[:6]}
    zero = {"observation.state": np.zeros(3), "action": np.ones(2), "next.reward": 0.0}
    with LeRobotWriter(folder, fps=10, features=own, robot_type="fixture") as writer:
        assert len(writer) == 3
        with writer.episode("a third task") as episode:
            episode.add({FRONT: np.zeros((32, 32, 3), np.uint8), **zero, "next.done": True, "next.success": False})
            assert episode.save() == 3
    after = LeRobotDataset(folder)
    assert after.tasks == (*before.tasks, "a third task")
    assert [len(one) for one in after] == [6, 6, 6, 1]
    assert after.stats["action"]["max"].tolist() == [1.0, 1.0]


def test_an_episode_without_save_is_forgotten(filled: Path, framer: Callable[..., dict]) -> None:
    dataset = LeRobotDataset(filled)
    own = {name: dataset.features[name] for name in list(dataset.features)[:9]}
    with LeRobotWriter(filled, fps=10, features=own, robot_type="test") as writer:
        with writer.episode("even") as episode:
            episode.add(framer(0, 0, 4))
        with pytest.raises(ValueError, match="this episode is over"):
            episode.save()
        assert len(writer) == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fps": 20}, r"its fps is 10, that of the new episodes 20: choose another folder"),
        ({"robot_type": "arm"}, r"its robot_type is test, that of the new episodes arm"),
        ({"action": 3}, r"its action is \('float32', \[2\]\), that of the new episodes \('float32', \[3\]\)"),
        ({"expert": False}, r"its expert_action is .*, that of the new episodes absent"),
    ],
)
def test_other_data_sets_are_refused(filled: Path, changed: dict[str, Any], message: str) -> None:
    told = {"fps": 10, "robot_type": "test", "action": 2, "expert": True, **changed}
    sizes = {"proprio": 3, "action": told["action"], "state": 2, "expert": told["expert"]}
    own = demonstration_features(cameras={"front": (8, 12)}, fps=told["fps"], **sizes)
    with pytest.raises(UserError, match=message):
        LeRobotWriter(filled, fps=told["fps"], features=own, robot_type=told["robot_type"])


def test_a_folder_of_something_else_is_refused(tmp_path: Path, filler: Callable[..., Path]) -> None:
    (tmp_path / "photo.jpg").write_text("")
    with pytest.raises(UserError, match=r"holds photo.jpg and no meta/info.json: choose an empty or a new folder"):
        filler(tmp_path)


def test_two_writers_are_refused(tmp_path: Path) -> None:
    own = {"action": Feature("float32", (1,))}
    first = LeRobotWriter(tmp_path, fps=10, features=own)
    with pytest.raises(UserError, match="another process is writing this data set"):
        LeRobotWriter(tmp_path, fps=10, features=own)
    first.close()
    LeRobotWriter(tmp_path, fps=10, features=own).close()


def test_a_recording_that_lerobot_did_not_finish_is_refused(tmp_path: Path) -> None:
    """Its data must not be taken for what Tandem's own writer leaves, and deleted."""
    folder = shutil.copytree(FIXTURE, tmp_path / "set")
    info = json.loads((folder / "meta/info.json").read_text())
    own = dict(list(LeRobotDataset(folder).features.items())[:6])
    (folder / "meta/info.json").write_text(json.dumps(info | {"total_episodes": 5}))
    with pytest.raises(
        UserError, match=r"counts 5 episodes, meta/episodes lists 3: whatever wrote it did not finish"
    ):
        LeRobotWriter(folder, fps=10, features=own, robot_type="fixture")
    (folder / "meta/info.json").write_text(json.dumps(info))
    stray = folder / "data/chunk-000/file-007.parquet"
    stray.write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"file-007.parquet: belongs to no episode"):
        LeRobotWriter(folder, fps=10, features=own, robot_type="fixture")
    assert stray.exists()


# ---------------------------------------------------------------- frames that do not fit


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"action": [0.0, float("nan")]}, r"frame 0: action is not finite: \[0.0, nan\]"),
        ({"action": [0.0]}, r"frame 0: action must be float32 \[2\], got float64 \[1\]"),
        ({"action": ["a", "b"]}, r"frame 0: action must be float32 \[2\]"),
        ({"next.done": 1.0}, r"frame 0: next.done must be bool \[1\], got float64 \[\]"),
        (
            {FRONT: np.zeros((8, 12, 3))},
            r"frame 0: observation.images.front must be uint8 \[8, 12, 3\], got float64",
        ),
        ({FRONT: np.zeros((12, 8, 3), np.uint8)}, r"must be uint8 \[8, 12, 3\], got uint8 \[12, 8, 3\]"),
        ({"tool": 1.0}, r"frame 0: tool is not a feature"),
    ],
)
def test_frames_that_do_not_fit(framer: Callable[..., dict], changed: dict[str, Any], message: str) -> None:
    own = demonstration_features(cameras={"front": (8, 12)}, fps=10, proprio=3, action=2, state=2, expert=True)
    encoder = EpisodeEncoder(own, 10)
    with pytest.raises(UserError, match=message):
        encoder.add(framer(0, 0, 4) | changed)
    encoder.add(framer(0, 0, 4))
    assert encoder.length == 1


def test_frames_that_lack_something(framer: Callable[..., dict]) -> None:
    own = demonstration_features(cameras={"front": (8, 12)}, fps=10, proprio=3, action=2, state=2, expert=True)
    short = framer(0, 0, 4)
    del short["expert_action"]
    with pytest.raises(UserError, match="frame 0: has no expert_action"):
        EpisodeEncoder(own, 10).add(short)
    with pytest.raises(UserError, match="an episode needs at least one frame"):
        EpisodeEncoder(own, 10).finish("")


@pytest.mark.parametrize(
    ("name", "feature", "message"),
    [
        ("a/b", Feature("float32", (1,)), "a name may not contain a slash"),
        ("index", Feature("int64", (1,)), "the writer fills it in"),
        ("x", Feature("float32", (2, 2)), "numbers and strings of one dimension"),
        ("x", Feature("complex64", (2,)), "not complex64"),
        ("x", Feature("video", (31, 32, 3)), "videos need an even height and width"),
        ("x", Feature("image", (3, 32, 32)), r"the shape of pictures is \(height, width, 3\)"),
    ],
)
def test_features_that_cannot_be_written(tmp_path: Path, name: str, feature: Feature, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LeRobotWriter(tmp_path / "set", fps=10, features={name: feature})
    assert not (tmp_path / "set").exists()


def test_strings_and_whole_numbers(tmp_path: Path) -> None:
    own = {"action": Feature("float32", (1,)), "stage": Feature("int64", (1,)), "note": Feature("string", (1,))}
    with LeRobotWriter(tmp_path, fps=5, features=own) as writer, writer.episode("go") as episode:
        for step in range(3):
            episode.add({"action": [step / 2], "stage": step, "note": f"step {step}"})
        episode.save()
    read = LeRobotDataset(tmp_path).read(0)
    assert read.actions.tolist() == [[0.0], [0.5], [1.0]]
    assert read.others["stage"].tolist() == [0, 1, 2]
    assert read.proprio.shape == (3, 0)
    assert read.rewards is None
    assert read.success is None


# ---------------------------------------------------------------- killed


def check_after_kill(folder: Path, at_least: int, filler: Callable[..., Path], video: bool) -> int:
    """What is there is whole, for Tandem and by info.json alone; recording goes on as if nothing had happened."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = LeRobotDataset(folder)
    count = len(dataset)
    assert count >= at_least
    assert count - dataset.info.episodes in (0, 1)
    assert [len(one) for one in dataset] == [4 + number for number in range(count)]
    filler(folder, range(count, count + 2), (16, 16), video=video)
    after = LeRobotDataset(folder)
    assert len(after) == after.info.episodes == count + 2
    assert after.stats["action"]["count"].tolist() == [after.frames]
    assert [entry.from_index for entry in after.episodes] == np.cumsum([0, *range(4, 5 + count)]).tolist()
    assert not list(folder.rglob("*.part"))
    assert [one.instruction for one in after] == [["even", "odd"][number % 2] for number in range(count + 2)]
    return count


@pytest.mark.parametrize("video", [False, True])
def test_killed_between_any_two_renames(tmp_path: Path, filler: Callable[..., Path], video: bool) -> None:
    """The third episode is lost before its row is in meta/episodes, and there afterwards."""
    found = []
    for die_at in range(4 + video):
        folder = filler(tmp_path / str(die_at), range(2), (16, 16), video=video)
        pid = os.fork()
        if pid == 0:
            _die_at(die_at)
            filler(folder, range(2, 4), (16, 16), video=video)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        found.append(check_after_kill(folder, 2, filler, video))
    # (video,) data, episodes, stats, info
    assert found == [2] * (2 + video) + [3, 3]


def _die_at(rename: int) -> None:
    done, replace = 0, Path.replace

    def dying(self: Path, target: Path) -> Path:
        nonlocal done
        if done == rename:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
        return replace(self, target)

    Path.replace = dying  # type: ignore[method-assign,assignment]


def test_killed_during_an_episode(filled: Path, filler: Callable[..., Path], framer: Callable[..., dict]) -> None:
    own = dict(list(LeRobotDataset(filled).features.items())[:9])
    pid = os.fork()
    if pid == 0:
        writer = LeRobotWriter(filled, fps=10, features=own, robot_type="test")
        writer.episode("even").add(framer(3, 0, 7))
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert len(LeRobotDataset(filled)) == 3
    filler(filled, range(3, 4))
    assert [len(one) for one in LeRobotDataset(filled)] == [4, 5, 6, 7]


WRITE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from conftest import fill
print("begin", flush=True)
fill(Path(sys.argv[2]), range(2000), (16, 16))
"""


def test_killed_at_any_time(tmp_path: Path, filler: Callable[..., Path]) -> None:
    rng = random.Random(0)
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        words = [sys.executable, "-c", WRITE, str(Path(__file__).parent), str(folder)]
        child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3])
        assert child.stdout is not None
        assert child.stdout.readline() == "begin\n"
        while not (folder / "data/chunk-000/file-001.parquet").exists():
            assert child.poll() is None
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.2))
        child.kill()
        child.wait()
        child.stdout.close()
        check_after_kill(folder, 1, filler, False)


def test_files_reach_the_disk_before_their_names_do(
    tmp_path: Path, filler: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut, too, a file with its final name is whole: contents, name, folder, in this order."""
    events: list[tuple[str, str]] = []
    replace = Path.replace

    def named(self: Path, target: Path) -> Path:
        events.append(("renamed", Path(target).name))
        return replace(self, target)

    def flushed(descriptor: int) -> None:
        events.append(("flushed", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))

    folder = filler(tmp_path / "set", range(2))
    monkeypatch.setattr(Path, "replace", named)
    monkeypatch.setattr(os, "fsync", flushed)
    filler(folder, range(2, 3))
    part = f".{os.getpid()}.part"
    expected = []
    for name, inside in (
        ("file-002.parquet", "chunk-000"),
        ("file-000.parquet", "chunk-000"),
        ("stats.json", "meta"),
        ("info.json", "meta"),
    ):
        expected += [("flushed", name + part), ("renamed", name), ("flushed", inside)]
    assert events == expected


def test_a_full_disk_leaves_the_episodes_before(
    filled: Path, filler: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full)
        with pytest.raises(UserError, match="no space left on device"):
            filler(filled, range(3, 4))
    assert len(LeRobotDataset(filled)) == 3
    filler(filled, range(3, 4))
    assert len(LeRobotDataset(filled)) == 4
