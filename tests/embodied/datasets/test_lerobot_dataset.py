"""The reader: what LeRobot itself wrote, what Tandem wrote, and the line for each way a data set can be wrong."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embodied.datasets.lerobot import LeRobotDataset
from experiment.errors import UserError

FIXTURES = Path(__file__).parents[2] / "fixtures" / "lerobot_v3"
FRONT = "observation.images.front"


def told_picture(episode: int, frame: int, size: int) -> np.ndarray:
    """As tests/fixtures/make_lerobot_v3.py drew it."""
    y, x = np.mgrid[0:size, 0:size] * 8 * 32 // size
    return np.stack([np.full_like(x, 40 * episode + 6 * frame), y % 256, x % 256], axis=2)


@pytest.mark.parametrize("kind", ["images", "videos"])
def test_what_lerobot_wrote_is_read(kind: str) -> None:
    dataset = LeRobotDataset(FIXTURES / kind)
    assert (len(dataset), dataset.frames, dataset.fps, dataset.robot_type) == (3, 18, 10, "fixture")
    assert dataset.tasks == ("reach the red cube", "push the blue bar to white")
    assert dataset.cameras == {"front": FRONT}
    assert dataset.features["action"].shape == (2,)
    assert [entry.from_index for entry in dataset.episodes] == [0, 6, 12]
    for number, episode in enumerate(dataset):
        steps = np.arange(6)
        assert episode.instruction == dataset.tasks[number % 2]
        expected = np.stack([0.1 * steps - 0.2, np.full(6, -0.25 * number)], axis=1)
        np.testing.assert_allclose(episode.actions, expected, atol=1e-7)
        assert episode.actions.dtype == np.float32
        np.testing.assert_array_equal(episode.proprio, np.stack([np.full(6, number), steps, 0.5 * steps], axis=1))
        assert episode.rewards is not None
        assert episode.rewards.tolist() == [0, 0, 0, 0, 0, 1]
        assert episode.state is None
        assert episode.expert_actions is None
        assert episode.labels is episode.actions
        # LeRobot's `next.done` does not say why; a success ended it, anything else was cut off
        assert episode.success is (number != 1)
        assert (episode.terminated, episode.truncated) == (number != 1, number == 1)
        np.testing.assert_allclose(episode.timestamps, steps / 10, atol=1e-7)
        size, tolerance = (32, 0) if kind == "images" else (64, 12)
        expected_pictures = np.stack([told_picture(number, step, size) for step in range(6)])
        apart = np.abs(episode.images["front"].astype(int) - expected_pictures)
        assert apart.max() <= tolerance
        # The next frame is 6 levels away in red.
        assert apart[..., 0].mean(axis=(1, 2)).max() < 3.0


def test_statistics_are_lerobots() -> None:
    stats = LeRobotDataset(FIXTURES / "images").stats
    assert stats["observation.state"]["max"].tolist() == [2.0, 5.0, 2.5]
    assert stats["observation.state"]["count"].tolist() == [18]
    assert stats[FRONT]["mean"].shape == (3, 1, 1)
    assert stats[FRONT]["max"][0, 0, 0] == pytest.approx(110 / 255)


def test_what_tandem_wrote_is_read(filled: Path, framer: Callable[..., dict]) -> None:
    dataset = LeRobotDataset(filled)
    assert [entry.length for entry in dataset.episodes] == [4, 5, 6]
    for number, episode in enumerate(dataset):
        length = 4 + number
        frames = [framer(number, step, length) for step in range(length)]
        assert episode.instruction == ["even", "odd"][number % 2]
        assert (episode.terminated, episode.truncated) == (number != 1, number == 1)
        assert episode.success is (number != 1)
        assert episode.images["front"].shape == (length, 8, 12, 3)
        for name, values in (
            (FRONT, episode.images["front"]),
            ("observation.state", episode.proprio),
            ("observation.environment_state", episode.state),
            ("action", episode.actions),
            ("expert_action", episode.labels),
            ("next.reward", episode.rewards),
        ):
            assert values is not None
            np.testing.assert_array_equal(values, np.stack([one[name] for one in frames]).astype(values.dtype))
        assert episode.others == {}


def test_videos_come_back_nearly(tmp_path: Path, filler: Callable[..., Path], framer: Callable[..., dict]) -> None:
    dataset = LeRobotDataset(filler(tmp_path / "set", range(2), (64, 96), video=True))
    assert not list((tmp_path / "set" / "data").glob("**/*.png"))
    for number in range(2):
        episode = dataset.read(number)
        shown = np.stack([framer(number, step, 4, (64, 96))[FRONT] for step in range(len(episode))])
        apart = np.abs(episode.images["front"].astype(int) - shown)
        assert apart.mean() < 3.0
        assert apart[..., 0].mean(axis=(1, 2)).max() < 3.0  # the next frame is 10 levels away


def test_pictures_are_left_out_on_request(filled: Path) -> None:
    episode = LeRobotDataset(filled).read(0, images=False)
    assert episode.images == {}
    assert len(episode) == 4


# ---------------------------------------------------------------- what is wrong, in one line


def wrong(folder: Path, index: int = 0) -> str:
    """What opening or reading says."""

    def read() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            LeRobotDataset(folder).read(index)

    with pytest.raises(UserError) as raised:
        read()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def change_info(folder: Path, **keys: object) -> None:
    path = folder / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def change_column(folder: Path, name: str, values: pa.Array, number: int = 0) -> None:
    path = folder / f"data/chunk-000/file-{number:03d}.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index(name), name, values), path)


def test_no_such_folder(tmp_path: Path) -> None:
    assert wrong(tmp_path / "x") == f"{tmp_path / 'x'}: no such folder"


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    assert wrong(tmp_path / "x") == f"{tmp_path / 'x'}: is a file, not a folder"


def test_not_a_dataset(tmp_path: Path) -> None:
    assert wrong(tmp_path) == f"{tmp_path}: not a LeRobot data set (it has no meta/info.json)"


@pytest.mark.parametrize(
    ("version", "hint"),
    [("v2.1", "`tandem data convert OLD NEW --to lerobot` makes one"), ("v4.0", "another Tandem")],
)
def test_another_version(filled: Path, version: str, hint: str) -> None:
    change_info(filled, codebase_version=version)
    assert f"codebase_version is {version}, v3.x is needed here" in wrong(filled)
    assert hint in wrong(filled)


def test_a_garbled_info(filled: Path) -> None:
    (filled / "meta/info.json").write_text('{"codebase_version": "v3.0", "fps"')
    assert "meta/info.json: not a LeRobot meta/info.json, or damaged" in wrong(filled)
    (filled / "meta/info.json").write_text('{"codebase_version": "v3.0", "features": {}}')
    assert "meta/info.json: lacks or garbles 'fps'" in wrong(filled)


def test_no_such_episode(filled: Path) -> None:
    assert wrong(filled, 3) == f"{filled}: has no episode 3; there are 0 to 2"


def test_a_missing_file(filled: Path) -> None:
    path = filled / "data/chunk-000/file-001.parquet"
    path.unlink()
    assert wrong(filled, 1) == f"{path}: no such file; `tandem data validate` lists what is missing"


def test_a_missing_video(tmp_path: Path, filler: Callable[..., Path]) -> None:
    folder = filler(tmp_path / "set", video=True)
    (folder / f"videos/{FRONT}/chunk-000/file-001.mp4").unlink()
    assert "file-001.mp4: no such file" in wrong(folder, 1)


def test_a_damaged_video(tmp_path: Path, filler: Callable[..., Path]) -> None:
    folder = filler(tmp_path / "set", video=True)
    path = folder / f"videos/{FRONT}/chunk-000/file-001.mp4"
    path.write_bytes(path.read_bytes()[:100])
    assert "file-001.mp4: damaged or not a video" in wrong(folder, 1)


def test_a_video_without_the_last_frames(tmp_path: Path, filler: Callable[..., Path]) -> None:
    folder = filler(tmp_path / "set", video=True)
    videos = folder / f"videos/{FRONT}/chunk-000"
    shutil.copy(videos / "file-000.mp4", videos / "file-001.mp4")  # 4 frames where there should be 5
    assert "episode 1: observation.images.front: frame 4 is not in" in wrong(folder, 1)


def test_other_shapes(filled: Path) -> None:
    change_column(filled, "action", pa.array([[1.0, 2.0, 3.0]] * 4))
    assert wrong(filled) == f"{filled}: episode 0: action has shape [3], meta/info.json says [2]"
    change_column(filled, "action", pa.array([[1.0, 2.0]] * 3 + [[1.0]]))
    assert f"{filled}: episode 0: action has rows of different lengths" in wrong(filled)


def test_a_missing_column(filled: Path) -> None:
    path = filled / "data/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(path).drop_columns("expert_action"), path)
    assert wrong(filled) == f"{path}: has no column expert_action, which meta/info.json lists"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_actions_that_are_not_finite(filled: Path, value: float) -> None:
    change_column(filled, "action", pa.array([[0.0, 0.0], [0.0, 0.0], [value, 0.5], [0.0, 0.0]]))
    assert wrong(filled) == f"{filled}: episode 0: action is not finite in frame 2: [{value}, 0.5]"


def test_a_picture_that_cannot_be_decoded(filled: Path) -> None:
    path = filled / "data/chunk-000/file-000.parquet"
    cells = pq.read_table(path)[FRONT].to_pylist()
    cells[2]["bytes"] = cells[2]["bytes"][:40]
    change_column(filled, FRONT, pa.array(cells))
    assert f"{filled}: episode 0: {FRONT}: frame 2 cannot be decoded" in wrong(filled)


def test_pictures_of_another_size(filled: Path) -> None:
    info = json.loads((filled / "meta/info.json").read_text())
    info["features"][FRONT]["shape"] = [8, 8, 3]
    change_info(filled, features=info["features"])
    assert wrong(filled) == f"{filled}: episode 0: {FRONT}: frame 0 has 8 x 12 pixels, meta/info.json says 8 x 8"


def test_a_half_written_last_episode_is_left_out(filled: Path) -> None:
    path = filled / "data/chunk-000/file-002.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.warns(
        UserWarning, match=r"the last episode is left out: .*file-002.parquet: damaged or not finished"
    ):
        dataset = LeRobotDataset(filled)
    assert len(dataset) == 2
    assert len(dataset.read(1)) == 5


def test_a_half_written_episode_in_the_middle_is_an_error(filled: Path) -> None:
    path = filled / "data/chunk-000/file-001.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    dataset = LeRobotDataset(filled)
    with pytest.raises(UserError, match=r"file-001.parquet: damaged or not finished"):
        dataset.read(1)


def test_episodes_that_were_counted_but_never_listed(tmp_path: Path) -> None:
    """What is left of LeRobot's own recording when it is killed before its Parquet files got their ends."""
    folder = shutil.copytree(FIXTURES / "images", tmp_path / "set")
    change_info(folder, total_episodes=5)
    with pytest.warns(UserWarning, match=r"counts 5 episodes, meta/episodes lists 3"):
        assert len(LeRobotDataset(folder)) == 3


def test_a_damaged_only_file(tmp_path: Path) -> None:
    """All episodes lie in it: leaving out the last one would only hide the damage."""
    folder = shutil.copytree(FIXTURES / "images", tmp_path / "set")
    path = folder / "data/chunk-000/file-000.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    assert "file-000.parquet: damaged or not finished" in wrong(folder)
