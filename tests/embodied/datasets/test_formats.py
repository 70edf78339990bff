"""Every format is recognized, and gives the same three episodes where it can say so much."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from embodied.datasets.episode import dataset_statistics
from embodied.datasets.formats import detect, open_dataset, read_dataset
from embodied.datasets.recorded import RecordedEpisode
from embodied.datasets.source import flat
from embodied.logged.demonstrations import EpisodesConfig, read_demonstrations
from envs.make import describe, make_environment
from experiment.errors import UserError

Make = Callable[..., Path]
Told = tuple[Callable[[int], np.ndarray], ...]
KINDS = ("robomimic", "libero", "d4rl", "d3rlpy", "minari", "lerobot")


def wrong(path: Path | str, **how: object) -> str:
    """What reading says: one line that begins with the path."""
    with pytest.raises(UserError) as raised:
        read_dataset(path, **how)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(str(path))
    return str(raised.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_is_lazy_and_says_its_lengths(make: Make, kind: str) -> None:
    path = make(kind)
    assert detect(path) == kind
    source = open_dataset(path)
    assert (source.kind, source.path, len(source)) == (kind, path, 3)
    assert source.lengths == ((4, 5, 6) if kind == "lerobot" else (4, 5, 1))
    assert [len(episode) for episode in source] == list(source.lengths)
    with pytest.raises(UserError, match="has no episode 3; there are 0 to 2"):
        source.read(3)
    damaged = [found for found in path.rglob("*.parquet") if "episodes" not in str(found)] or [path]
    damaged += list(path.rglob("*.hdf5"))
    for file in damaged:
        if file.is_file():
            file.unlink()
    with pytest.raises(UserError):  # nothing was read before it was asked for
        source.read(0)


@pytest.mark.parametrize("kind", ["robomimic", "d4rl", "d3rlpy", "minari"])
def test_the_flat_view_is_the_same_in_every_format(make: Make, told: Told, kind: str) -> None:
    observed, acted, rewarded = told
    keys = ["eef", "object"] if kind == "robomimic" else None
    for number, episode in enumerate(read_dataset(make(kind), observation_keys=keys)):
        np.testing.assert_array_equal(episode.observations, observed(number)[:-1])
        np.testing.assert_array_equal(episode.actions, acted(number))
        np.testing.assert_array_equal(episode.rewards, rewarded(number))
        assert {one.dtype for one in (episode.observations, episode.actions, episode.rewards)} == {
            np.dtype(np.float32)
        }
        ended = number != 1 and kind != "robomimic"  # whose `dones` cannot tell
        assert (episode.terminated, episode.truncated) == (ended, not ended)
        if kind in ("d4rl", "d3rlpy"):
            assert episode.final_observation is None
        else:
            assert episode.final_observation is not None
            assert episode.final_observation.tolist() == observed(number)[-1].tolist()


def test_statistics_of_what_was_read(make: Make, told: Told) -> None:
    episodes = read_dataset(make("d4rl"))
    stats = dataset_statistics(episodes)
    actions = np.concatenate([told[1](number) for number in range(3)]).astype(np.float64)
    np.testing.assert_allclose(stats.action_mean, actions.mean(axis=0))
    assert [len(episode) for episode in episodes] == [len(told[1](number)) for number in range(3)]
    assert {episode.success for episode in episodes} == {None}


# ---------------------------------------------------------------- which observations


def test_vectors_are_chosen_by_name(make: Make, told: Told) -> None:
    path = make("robomimic")
    both = read_dataset(path, observation_keys=["object", "observation.eef"])[1]
    assert both.observations[2].tolist() == [-1.0, 10.0, 2.0]
    assert wrong(path, observation_keys=["arm"]) == (
        f"{path}: data/demo_0: has no observation 'arm'; it has eef, object"
    )
    assert "observation_keys is empty" in wrong(path, observation_keys=[])


def test_all_vectors_by_default_state_first() -> None:
    columns = {name: np.full((2, 1), value) for name, value in (("b", 1), ("a", 2))}
    others = {f"observation.{name}": values for name, values in columns.items()} | {"next.pain": np.ones(2)}
    recorded = RecordedEpisode(
        images={},
        proprio=np.full((2, 1), 3.0),
        state=np.full((2, 1), 4.0),
        actions=np.zeros((2, 1), np.float32),
        rewards=np.zeros(2, np.float32),
        terminated=True,
        truncated=False,
        others=others,
        final={"observation.b": np.array([7.0])},
    )
    assert flat(recorded).observations[0].tolist() == [3.0, 4.0, 1.0, 2.0]
    assert flat(recorded).final_observation is None
    chosen = flat(recorded, ["b"]).final_observation
    assert chosen is not None
    assert chosen.tolist() == [7.0]


def test_rewards_are_needed_or_zero(filled: Path, tmp_path: Path) -> None:
    from embodied.datasets.lerobot_layout import Feature
    from embodied.datasets.lerobot_writer import LeRobotWriter

    own = {"action": Feature("float32", (1,)), "observation.state": Feature("float32", (1,))}
    with LeRobotWriter(tmp_path / "bare", fps=5, features=own) as writer, writer.episode("") as episode:
        episode.add({"action": [1.0], "observation.state": [2.0]})
        episode.save()
    assert "has no rewards, which learning from values needs" in wrong(tmp_path / "bare")
    assert read_dataset(tmp_path / "bare", need_rewards=False)[0].rewards.tolist() == [0.0]


def test_pictures_alone_are_no_state(make: Make) -> None:
    path = make("robomimic")
    with h5py.File(path, "a") as file:
        for number in range(3):
            del file[f"data/demo_{number}/obs/eef"], file[f"data/demo_{number}/obs/object"]
    assert "has no observations that are vectors" in wrong(path)


def test_demonstrations_come_from_any_format(make: Make) -> None:
    pendulum = describe(make_environment("Pendulum-v1"))
    with pytest.raises(
        UserError, match="observations have 3 dimensions and actions 2, but Pendulum-v1 has 3 and 1"
    ):
        read_demonstrations(EpisodesConfig(path=str(make("minari"))), pendulum)


# ---------------------------------------------------------------- subsets


def test_subsets(make: Make) -> None:
    assert [len(one) for one in read_dataset(make("robomimic"), subset="train")] == [4, 1]
    folder = make("lerobot")
    info = json.loads((folder / "meta/info.json").read_text())
    (folder / "meta/info.json").write_text(json.dumps(info | {"splits": {"train": "0:2", "test": "2:3"}}))
    assert [len(one) for one in read_dataset(folder, subset="test")] == [6]
    assert "has no subset 'val'; it has train, test" in wrong(folder, subset="val")
    assert "has no subsets" in wrong(make("d4rl"), subset="train")


# ---------------------------------------------------------------- what is wrong


def test_unknown_formats(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    known = "no data set that Tandem reads (LeRobot v2.1 and v3, Minari, robomimic, LIBERO, D4RL, d3rlpy)"
    assert wrong(tmp_path / "notes.txt") == f"{tmp_path / 'notes.txt'}: this file is {known}"
    assert wrong(tmp_path) == f"{tmp_path}: this folder is {known}"
    assert "no such file or folder" in wrong(tmp_path / "absent")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["weights"] = np.zeros(3)
    assert wrong(tmp_path / "other.h5") == f"{tmp_path / 'other.h5'}: this file is {known}"
    with h5py.File(tmp_path / "old.h5", "w") as file:
        file["observations"] = file["actions"] = file["episode_terminals"] = np.zeros((3, 1))
    assert "d3rlpy's version 1" in wrong(tmp_path / "old.h5")


@pytest.mark.parametrize("kind", ["robomimic", "libero", "d4rl", "d3rlpy"])
@pytest.mark.parametrize("kept", [0.3, 0.95])
def test_hdf5_files_that_are_cut_off(make: Make, kind: str, kept: float) -> None:
    path = make(kind)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert "damaged or cut off" in wrong(path)


def test_a_minari_file_that_is_cut_off(make: Make) -> None:
    path = make("minari")
    file = path / "data" / "main_data.hdf5"
    file.write_bytes(file.read_bytes()[:2000])
    assert "damaged or cut off" in wrong(path)
    (path / "data" / "metadata.json").write_text('{"total_episodes": 3')
    assert "not a Minari data set, or damaged" in wrong(path)


ACTIONS = {
    "robomimic": ("", "data/demo_1/actions"),
    "libero": ("", "data/demo_1/actions"),
    "d4rl": ("", "actions"),
    "d3rlpy": ("", "actions_1"),
    "minari": ("data/main_data.hdf5", "episode_1/actions"),
}


@pytest.mark.parametrize("kind", ACTIONS)
def test_actions_that_are_not_finite(make: Make, kind: str) -> None:
    path, (inside, key) = make(kind), ACTIONS[kind]
    with h5py.File(path / inside if inside else path, "a") as file:
        file[key][-2 if kind == "d4rl" else 4, 1] = np.nan
    assert re.search(r"actions(_1)? row 4 is not finite", wrong(path))


@pytest.mark.parametrize("kind", sorted(set(ACTIONS) - {"d4rl"}))
def test_shapes_that_change_between_episodes(make: Make, kind: str) -> None:
    path, (inside, key) = make(kind), ACTIONS[kind]
    with h5py.File(path / inside if inside else path, "a") as file:
        del file[key]
        file[key] = np.zeros((5, 3), np.float32)
    assert "actions have 3 dimensions, those of" in wrong(path)


@pytest.mark.parametrize("kind", sorted(set(ACTIONS) - {"d4rl"}))
def test_lengths_that_disagree(make: Make, kind: str) -> None:
    path, (inside, key) = make(kind), ACTIONS[kind]
    with h5py.File(path / inside if inside else path, "a") as file:
        del file[key]
        file[key] = np.zeros((2, 2), np.float32)
    assert ": 2 actions but " in wrong(path)


def test_empty_data_sets(make: Make) -> None:
    minari = make("minari")
    metadata = json.loads((minari / "data/metadata.json").read_text())
    (minari / "data/metadata.json").write_text(json.dumps(metadata | {"total_episodes": 0}))
    d4rl, d3rlpy = make("d4rl"), make("d3rlpy")
    with h5py.File(d4rl, "w") as file:
        for name, shape in (("observations", (0, 3)), ("actions", (0, 2)), ("rewards", (0,)), ("terminals", (0,))):
            file[name] = np.zeros(shape)
        file["timeouts"] = np.zeros(0)
    with h5py.File(d3rlpy, "a") as file:
        file["num_episodes"][()] = 0
    lerobot = make("lerobot")
    shutil.rmtree(lerobot / "meta/episodes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in (minari, d4rl, d3rlpy, lerobot):
            assert wrong(path) == f"{path}: has no episodes"
