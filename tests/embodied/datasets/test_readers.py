"""What is particular to a format: LeRobot v2.1, Minari, robomimic, LIBERO, D4RL, d3rlpy.

LeRobot's, Minari's and d3rlpy's files were made by those libraries; the others follow their documentation.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from embodied.datasets.d4rl import D4RLSource
from embodied.datasets.formats import open_dataset, read_dataset
from embodied.datasets.lerobot_source import LeRobotSource
from embodied.datasets.lerobot_v21 import LeRobotV21Dataset
from embodied.datasets.writing import write_dataset
from experiment.errors import UserError

Make = Callable[..., Path]
Told = tuple[Callable[[int], np.ndarray], ...]
V21 = Path(__file__).parents[2] / "fixtures" / "lerobot_v21"
V3 = Path(__file__).parents[2] / "fixtures" / "lerobot_v3"
FRONT = "observation.images.front"


def wrong(path: Path, index: int = 0) -> str:
    """What opening or reading says, without the path."""
    with pytest.raises(UserError) as raised:
        open_dataset(path).read(index)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# ---------------------------------------------------------------- LeRobot v2.1


@pytest.mark.parametrize("kind", ["images", "videos"])
def test_the_older_lerobot_holds_what_the_newer_one_does(kind: str) -> None:
    """Both fixtures were written from the same frames, by two versions of the library."""
    older, newer = open_dataset(V21 / kind), open_dataset(V3 / kind)
    assert isinstance(older, LeRobotSource)
    assert isinstance(older.dataset, LeRobotV21Dataset)
    assert isinstance(newer, LeRobotSource)
    assert (older.lengths, older.fps, older.robot_type) == (newer.lengths, newer.fps, newer.robot_type)
    assert older.dataset.successes() == [True, False, True]
    for dataset in (older.dataset, newer.dataset):
        assert dataset.statistic("next.reward", "mean") == pytest.approx([1 / 6] * 3)
        assert dataset.statistic("next.done", "max") == [1.0] * 3
    assert older.dataset.statistic("next.truncated", "max") == [None] * 3
    assert older.names["observation.state"] == ["x", "y", "z"]
    for one, other in zip(older, newer, strict=True):
        assert (one.instruction, one.terminated, one.success) == (
            other.instruction,
            other.terminated,
            other.success,
        )
        for here, there in (
            (one.actions, other.actions),
            (one.proprio, other.proprio),
            (one.rewards, other.rewards),
        ):
            assert here is not None
            assert there is not None
            np.testing.assert_array_equal(here, there)
        apart = np.abs(one.images["front"].astype(int) - other.images["front"])
        assert apart.max() <= (0 if kind == "images" else 24)
        assert apart.mean() < 3
    for name in ("action", "observation.state"):
        for key in ("min", "max", "mean", "std", "count"):
            np.testing.assert_allclose(
                older.dataset.stats[name][key], newer.dataset.stats[name][key], atol=1e-6, err_msg=f"{name} {key}"
            )


def test_an_older_lerobot_without_a_video(tmp_path: Path) -> None:
    folder = shutil.copytree(V21 / "videos", tmp_path / "set")
    (folder / f"videos/chunk-000/{FRONT}/episode_000001.mp4").unlink()
    assert "episode_000001.mp4: no such file" in wrong(folder, 1)
    assert len(open_dataset(folder).read(0).images["front"]) == 6
    (folder / f"videos/chunk-000/{FRONT}/episode_000002.mp4").unlink()
    with pytest.warns(UserWarning, match="the last episode is left out: .*episode_000002.mp4: no such file"):
        assert len(open_dataset(folder)) == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("episodes.jsonl", '{"episode_index": 0, "tasks": ["a"], "le', "damaged or cut off"),
        ("episodes.jsonl", '{"episode_index": 1, "tasks": ["a"], "length": 6}', "episode_index is not 0, 1, 2"),
        ("episodes.jsonl", '{"episode_index": 0, "tasks": ["a"]}', "episode 0 lacks or garbles 'length'"),
        ("tasks.jsonl", '{"task": "a"}', "tasks.jsonl: damaged or cut off ('task_index')"),
        ("tasks.jsonl", "", "task_index 0, but meta/tasks.jsonl has 0 tasks"),
    ],
)
def test_a_damaged_older_lerobot(tmp_path: Path, name: str, text: str, message: str) -> None:
    folder = shutil.copytree(V21 / "images", tmp_path / "set")
    (folder / "meta" / name).write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert message in wrong(folder)


# ---------------------------------------------------------------- Minari


@pytest.mark.parametrize("data_format", ["hdf5", "arrow", "parquet"])
def test_minari_from_its_folder_its_data_and_its_id(make: Make, told: Told, data_format: str) -> None:
    folder = make("minari", data_format=data_format)
    for path in (folder, folder / "data", "minari-v0"):
        source = open_dataset(path)
        assert source.lengths == (4, 5, 1)
        episode = source.read(1)
        assert (episode.terminated, episode.truncated, episode.success) == (False, True, False)
        assert source.read(0).success is True
        assert episode.final["observation.state"].tolist() == told[0](1)[-1].tolist()
        assert source.details["dataset_id"] == "minari-v0"


def test_leaves_of_minari_observations_in_the_order_of_the_space(make: Make) -> None:
    path = make("minari", nested=True)
    episode = open_dataset(path).read(1)
    assert list(episode.vectors) == ["observation.arm.a", "observation.arm.b", "observation.goal"]
    assert {name: values.shape for name, values in episode.images.items()} == {"eye": (5, 32, 33, 3)}
    flat = read_dataset(path)[1]
    assert flat.observations[2].tolist() == [2.0, 0.25, 0.25, 0.25, 0.25, 10.0, 2.0, -1.0]
    assert flat.final_observation is not None
    assert flat.final_observation.tolist() == [2.0, 0.25, 0.25, 0.25, 0.25, 10.0, 5.0, -2.5]
    assert open_dataset(path).read(1, images=False).images == {}


@pytest.mark.parametrize("data_format", ["hdf5", "arrow", "parquet"])
def test_minari_pictures_are_decoded_on_demand(
    make: Make, monkeypatch: pytest.MonkeyPatch, data_format: str
) -> None:
    from PIL import Image

    source = open_dataset(make("minari", nested=True, data_format=data_format))
    whole = [source.read(index) for index in range(3)]

    def decode(*_: object) -> None:
        raise AssertionError("a picture was decoded")

    monkeypatch.setattr(Image, "open", decode)
    for index, expected in enumerate(whole):
        episode = source.read(index, images=False)
        assert episode.images == {}
        assert list(episode.vectors) == list(expected.vectors)
        for name, values in expected.vectors.items():
            np.testing.assert_array_equal(episode.vectors[name], values)
            np.testing.assert_array_equal(episode.final[name], expected.final[name])
        np.testing.assert_array_equal(episode.actions, expected.actions)
        np.testing.assert_array_equal(np.asarray(episode.rewards), np.asarray(expected.rewards))
        assert (episode.terminated, episode.success) == (expected.terminated, expected.success)


@pytest.mark.parametrize("exact", [False, True])
def test_a_minari_picture_that_is_damaged_matters_to_who_wants_it(make: Make, tmp_path: Path, exact: bool) -> None:
    """exact: pictures as Tandem writes them, not as JPEG."""
    path = make("minari", nested=True)
    if exact:
        write_dataset(open_dataset(path), tmp_path / "exact-v0", "minari")
        path = tmp_path / "exact-v0"
    with h5py.File(path / "data/main_data.hdf5", "a") as file:
        eye = file["episode_1/observations/eye"]
        assert (eye.ndim == 4) == exact
        assert isinstance(eye, h5py.Dataset)
        del file["episode_1/observations/eye"]
        file["episode_1/observations/eye"] = np.zeros((2, 7), np.uint8)
    source = open_dataset(path)
    assert source.read(1, images=False).vectors["observation.goal"].shape == (5, 3)
    assert "episode 1" in wrong(path, 1)


def test_minari_pictures_of_one_channel_are_vectors(make: Make) -> None:
    """Minari keeps them as JPEG; they are read beside a coloured picture that is not."""
    import minari
    from gymnasium.spaces import Box, Dict
    from gymnasium.spaces import Tuple as TupleSpace
    from minari.data_collector import EpisodeBuffer

    path = make("minari")
    grey, colour = Box(0, 255, (32, 32), np.uint8), Box(0, 255, (32, 32, 3), np.uint8)
    seen = {"a": (np.full((3, 32, 32), 70, np.uint8), np.zeros((3, 32, 32, 3), np.uint8)), "b": np.ones((3, 2))}
    space = Dict({"a": TupleSpace([grey, colour]), "b": Box(-1, 1, (2,))})
    ends = np.array([False, True])
    buffer = EpisodeBuffer(0, None, None, seen, np.zeros((2, 1)), np.ones(2), ends, ~ends & False, infos={})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(
            "grey-v0", [buffer], observation_space=space, action_space=Box(-1, 1, (1,))
        )
    source = open_dataset(path.with_name("grey-v0"))
    for images in (True, False):
        episode = source.read(0, images=images)
        assert list(episode.images) == (["a.1"] if images else [])
        assert {name: values.shape for name, values in episode.vectors.items()} == {
            "observation.a.0": (2, 1024),
            "observation.b": (2, 2),
        }
        np.testing.assert_allclose(episode.vectors["observation.a.0"], 70, atol=2)


def test_minari_ends(make: Make) -> None:
    path = make("minari")
    file = path / "data" / "main_data.hdf5"
    with h5py.File(file, "a") as opened:
        opened["episode_0/truncations"][3] = True  # and terminated
        opened["episode_1/truncations"][4] = False  # neither: collecting stopped
        opened["episode_2/terminations"][0] = True
    ends = [(one.terminated, one.truncated) for one in read_dataset(path)]
    assert ends == [(True, False), (False, True), (True, False)]
    with h5py.File(file, "a") as opened:
        opened["episode_1/terminations"][2] = True
    assert "terminations is true at step 2, before the end" in wrong(path, 1)


def test_discrete_minari_actions_are_a_column(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import minari
    from gymnasium.spaces import Box, Discrete
    from minari.data_collector import EpisodeBuffer

    make("minari")
    seen, ends = np.zeros((3, 1), np.float32), np.array([False, True])
    buffer = EpisodeBuffer(0, None, None, seen, np.array([2, 0]), np.ones(2), ends, ~ends & False, infos={})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spaces = {"observation_space": Box(-1, 1, (1,)), "action_space": Discrete(4)}
        minari.create_dataset_from_buffers("choice-v0", [buffer], **spaces)
    source = open_dataset("choice-v0")
    assert source.choices == 4
    assert source.read(0).actions.tolist() == [[2.0], [0.0]]


# ---------------------------------------------------------------- robomimic and LIBERO


def test_robomimic_with_cameras(make: Make) -> None:
    source = open_dataset(make("robomimic"))
    assert source.fps == 15
    episode = source.read(1)
    assert {name: values.shape for name, values in episode.images.items()} == {"front_image": (5, 8, 12, 3)}
    assert episode.images["front_image"][3, 0, 0].tolist() == [30, 20, 50]
    assert list(episode.vectors) == ["observation.eef", "observation.object"]  # no depth
    assert episode.success is None
    assert source.read(1, images=False).images == {}


def test_robomimic_ends_are_what_the_caller_says(make: Make) -> None:
    path = make("robomimic")
    for done_means, terminated in ((None, False), ("truncated", False), ("terminated", True)):
        for episode in read_dataset(path, done_means=done_means):  # type: ignore[arg-type]
            assert (episode.terminated, episode.truncated) == (terminated, not terminated)
    for kind in ("libero", "d4rl", "d3rlpy", "minari", "lerobot"):
        with pytest.raises(UserError, match="says itself how its episodes ended"):
            open_dataset(make(kind), done_means="terminated")


def test_robomimic_next_obs_that_disagrees(make: Make) -> None:
    path = make("robomimic")
    with h5py.File(path, "a") as file:
        del file["data/demo_0/next_obs/eef"]
        file["data/demo_0/next_obs/eef"] = np.zeros((4, 3))
    assert "next_obs/eef is [4, 3], obs/eef [4, 2]" in wrong(path)


def test_libero(make: Make, told: Told) -> None:
    source = open_dataset(make("libero"))
    episodes = list(source)
    assert {one.instruction for one in episodes} == {"put the bowl on the plate"}
    assert [(one.terminated, one.success) for one in episodes] == [(True, True), (False, False), (True, True)]
    assert list(episodes[1].images) == ["agentview_rgb", "eye_in_hand_rgb"]
    assert list(episodes[1].vectors) == [
        "observation.environment_state",
        "observation.ee_states",
        "observation.gripper_states",
        "observation.joint_states",
        "observation.robot_states",
    ]
    state = read_dataset(source.path, observation_keys=["ee_states", "gripper_states"])[1]
    np.testing.assert_array_equal(state.observations, told[0](1)[:-1])
    assert state.final_observation is None


def test_libero_that_is_damaged(make: Make) -> None:
    path = make("libero")
    with h5py.File(path, "a") as file:
        file["data"].attrs["problem_info"] = '{"language_instr'
    assert "problem_info of data is damaged" in wrong(path)
    with h5py.File(path, "a") as file:
        file["data"].attrs["problem_info"] = json.dumps({"language_instruction": list("go")})
        del file["data/demo_0/states"]
        file["data/demo_0/states"] = np.zeros((2, 4))
    assert "4 actions but 2 rows of states" in wrong(path)
    assert open_dataset(path).read(1).instruction == "go"


# ---------------------------------------------------------------- D4RL


def test_d4rl_with_next_observations(make: Make, told: Told) -> None:
    episode = read_dataset(make("d4rl", ahead=True))[1]
    assert episode.truncated
    assert episode.final_observation is not None
    assert episode.final_observation.tolist() == told[0](1)[-1].tolist()


def test_d4rl_without_timeouts(make: Make) -> None:
    """Where next_observations are there, the jump to the next episode shows; otherwise only terminals separate."""
    assert D4RLSource(make("d4rl", timeouts=False, ahead=True)).lengths == (4, 5, 1)
    path = make("d4rl", timeouts=False)
    with pytest.warns(UserWarning, match="neither timeouts nor next_observations: only terminals separate"):
        source = D4RLSource(path)
    assert source.lengths == (4, 6)
    assert source.read(1).terminated


def test_d4rl_that_stops_in_the_middle(make: Make) -> None:
    path = make("d4rl")
    with h5py.File(path, "a") as file:
        file["terminals"][-1] = False
        file["timeouts"][3] = True  # and terminated
    ends = [(one.terminated, one.truncated) for one in read_dataset(path)]
    assert ends == [(True, False), (False, True), (False, True)]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rewards", None, "has no rewards: not D4RL's layout; it has ['actions', 'infos'"),
        ("terminals", np.zeros(9), "10 actions but [9] terminals"),
        ("observations", np.zeros(10), "observations is float64 [10], expected [T, d] numbers"),
        ("actions", np.array([[b"a"]] * 10), "actions is |S1 [10, 1], expected [T, d] numbers"),
    ],
)
def test_d4rl_that_is_wrong(make: Make, key: str, value: Any, message: str) -> None:
    path = make("d4rl")
    with h5py.File(path, "a") as file:
        del file[key]
        if value is not None:
            file[key] = value
    assert message in wrong(path)


# ---------------------------------------------------------------- d3rlpy


def dump(path: Path, observations: Any, actions: np.ndarray) -> Path:
    """One terminated episode, with d3rlpy itself."""
    from d3rlpy.dataset import Episode, InfiniteBuffer, ReplayBuffer

    rewards = np.ones((len(actions), 1), np.float32)
    with path.open("w+b") as file:
        ReplayBuffer(InfiniteBuffer(), episodes=[Episode(observations, actions, rewards, terminated=True)]).dump(
            file
        )
    return path


def test_d3rlpy_with_pixels_and_choices(tmp_path: Path) -> None:
    pixels = np.arange(3 * 3 * 8 * 9, dtype=np.uint8).reshape(3, 3, 8, 9)
    source = open_dataset(dump(tmp_path / "a.h5", pixels, np.array([[0], [4], [1]])))
    assert source.choices == 5
    episode = source.read(0)
    assert episode.images["pixels"].shape == (3, 8, 9, 3)
    assert episode.images["pixels"][1, 2, 3].tolist() == pixels[1, :, 2, 3].tolist()
    assert episode.actions.tolist() == [[0.0], [4.0], [1.0]]
    assert source.read(0, images=False).images == {}


def test_d3rlpy_with_tuples(tmp_path: Path) -> None:
    parts = [np.zeros((2, 3), np.float32), np.ones((2, 1), np.float32)]
    path = dump(tmp_path / "a.h5", parts, np.zeros((2, 1), np.float32))
    assert read_dataset(path)[0].observations.tolist() == [[0.0, 0.0, 0.0, 1.0]] * 2
    assert read_dataset(path, observation_keys=["1"])[0].observations.tolist() == [[1.0]] * 2


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", "2.0", "d3rlpy's version 2.0, Tandem reads 2.1: dump it again"),
        ("actions_2", None, "has no actions_2, though it counts 3 episodes"),
        ("terminated_0", None, "has no terminated_0; was it cut off?"),
        ("observations_0", None, "has no observations_0; was it cut off?"),
        ("observations_0", np.zeros((4, 1, 8, 8), np.uint8), "pictures are [1, 8, 8], expected [3, H, W]"),
        ("version", None, "has no version: not d3rlpy's layout, or cut off"),
    ],
)
def test_d3rlpy_that_is_wrong(make: Make, key: str, value: Any, message: str) -> None:
    path = make("d3rlpy")
    with h5py.File(path, "a") as file:
        del file[key]
        if value is not None:
            file[key] = value
    assert message in wrong(path)
