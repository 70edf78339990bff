"""The robomimic reader: what it reads, and the line it gives for each way a file can be wrong."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest

from embodied.datasets.episode import Episode, check_against
from embodied.datasets.formats import check_shapes
from embodied.datasets.robomimic import DoneMeaning, RobomimicSource
from envs.make import describe, make_environment
from experiment.errors import UserError

_DOOR = (
    Path(os.environ.get("TANDEM_DATA", Path(__file__).parents[4] / "shared" / "data")) / "adroit_door_human.hdf5"
)


def _write(path: Path, lengths: tuple[int, ...] = (4, 3), numbers: tuple[int, ...] = (0, 1)) -> Path:
    """Demonstrations whose step t of demo i observes [100 i + t, 0.5, -t] and acts [t, i]."""
    with h5py.File(path, "w") as file:
        file.create_group("data").attrs["env_args"] = "{}"
        for number, length in zip(numbers, lengths, strict=True):
            demo, steps = file["data"].create_group(f"demo_{number}"), np.arange(length, dtype=np.float64)
            demo["actions"] = np.stack([steps, np.full(length, number)], axis=1)
            demo["rewards"] = steps
            demo["dones"] = np.arange(length) == length - 1
            demo["obs/state"] = np.stack([100.0 * number + steps, np.full(length, 0.5), -steps], axis=1)
    return path


def read_episodes(
    path: Path,
    *,
    observation_keys: Sequence[str] = ("state",),
    subset: str | None = None,
    done_means: DoneMeaning = "truncated",
) -> list[Episode]:
    """All episodes in the flat view, as `read_dataset` makes it of a file that it takes for robomimic's."""
    source = RobomimicSource(path, subset, done_means)
    episodes = [source.episode(index, observation_keys) for index in range(len(source))]
    for episode in episodes:
        check_shapes(episodes[0], episode)
    assert source.lengths == tuple(map(len, episodes))
    return episodes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return _write(tmp_path / "demos.hdf5")


def test_what_is_read(path: Path) -> None:
    with h5py.File(path, "a") as file:
        file["data/demo_1/initial_state/qpos"] = np.array([1.0, 2.0])
        file["data/demo_1"].attrs["success"] = True
    first, second = read_episodes(path)
    assert (len(first), len(second)) == (4, 3)
    for array in (second.observations, second.actions, second.rewards):
        assert array.dtype == np.float32
    assert second.observations.tolist() == [[100.0, 0.5, 0.0], [101.0, 0.5, -1.0], [102.0, 0.5, -2.0]]
    assert second.actions.tolist() == [[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]]
    assert second.rewards.tolist() == [0.0, 1.0, 2.0]
    assert (second.terminated, second.truncated) == (False, True)
    assert second.final_observation is None
    assert (first.success, second.success) == (None, True)
    assert first.initial_state is None
    assert second.initial_state is not None
    assert second.initial_state["qpos"].tolist() == [1.0, 2.0]
    assert second.name == f"{path}: data/demo_1"
    assert first.rewards.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_demonstrations_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.hdf5", (1, 1, 1), (10, 9, 2))
    assert [episode.observations[0, 0] for episode in read_episodes(path)] == [200.0, 900.0, 1000.0]


def test_the_final_observation_from_an_extra_row(path: Path) -> None:
    with h5py.File(path, "a") as file:
        del file["data/demo_1/obs/state"]
        file["data/demo_1/obs/state"] = np.arange(12.0).reshape(4, 3)
    second = read_episodes(path)[1]
    assert second.observations.tolist() == np.arange(9.0).reshape(3, 3).tolist()
    assert second.final_observation is not None
    assert second.final_observation.tolist() == [9.0, 10.0, 11.0]


def test_the_final_observation_from_next_obs(path: Path) -> None:
    with h5py.File(path, "a") as file:
        for name, length in (("demo_0", 4), ("demo_1", 3)):
            file[f"data/{name}/next_obs/state"] = np.full((length, 3), 7.0)
    second = read_episodes(path, done_means="terminated")[1]
    assert second.final_observation is not None
    assert second.final_observation.tolist() == [7.0, 7.0, 7.0]
    assert (second.terminated, second.truncated) == (True, False)


def test_several_keys_are_concatenated_in_their_order(path: Path) -> None:
    with h5py.File(path, "a") as file:
        for name, length in (("demo_0", 4), ("demo_1", 3)):
            file[f"data/{name}/obs/gripper"] = np.full((length, 1), 9.0)
    second = read_episodes(path, observation_keys=("gripper", "state"))[1]
    assert second.observations[1].tolist() == [9.0, 101.0, 0.5, -1.0]


def test_a_subset(path: Path) -> None:
    with h5py.File(path, "a") as file:
        file["mask/valid"] = np.array([b"demo_1"])
        file["mask/none"] = np.array([], dtype="S8")
        file["mask/odd"] = np.array([b"demo_7"])
    assert [episode.name for episode in read_episodes(path, subset="valid")] == [f"{path}: data/demo_1"]
    with pytest.raises(UserError, match=r"no subset mask/train; it has \['none', 'odd', 'valid'\]"):
        read_episodes(path, subset="train")
    with pytest.raises(UserError, match="mask/none is empty"):
        read_episodes(path, subset="none")
    with pytest.raises(UserError, match="lists demo_7, which is not in data"):
        read_episodes(path, subset="odd")


def test_what_is_of_another_kind_is_named(path: Path) -> None:
    with h5py.File(path, "a") as file:
        file.create_group("mask/nested")
        file["mask/numbers"] = np.arange(2)
        file["mask/scalar"] = np.bytes_(b"demo_1")
    for subset in ("nested", "numbers", "scalar"):
        with pytest.raises(UserError, match=f"mask/{subset}: is no list of names"):
            read_episodes(path, subset=subset)
    with h5py.File(path, "a") as file:
        del file["mask"]
        file["mask"] = np.zeros(3)
    with pytest.raises(UserError, match=r"no subset mask/train; it has none"):
        read_episodes(path, subset="train")
    with h5py.File(path, "a") as file:
        file["data/demo_9"] = np.zeros(3)
    with pytest.raises(UserError, match=r"data/demo_9 is no group: not robomimic's layout"):
        read_episodes(path)


def _replace(key: str, value: np.ndarray) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[key]
        file[key] = value

    return change


def _delete(*keys: str) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        for key in keys:
            del file[key]

    return change


def _not_finite(key: str, row: int) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file[key][row, ..., -1:] = np.nan

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (_delete("data"), "has no groups data/demo_0"),
        (_delete("data/demo_0", "data/demo_1"), "has no groups data/demo_0"),
        (_delete("data/demo_1/obs/state"), "data/demo_1: has no observation 'state'; it has none"),
        (_delete("data/demo_1/obs"), "data/demo_1: has no observation 'state'; it has none"),
        (
            _delete("data/demo_0/actions"),
            "data/demo_0: has no actions; the demonstration has ['dones', 'obs', 'rewards']",
        ),
        (_delete("data/demo_0/rewards"), "data/demo_0: has no rewards"),
        (_replace("data/demo_1/actions", np.zeros((0, 2))), "data/demo_1: has no steps"),
        (_replace("data/demo_1/actions", np.zeros((5, 2))), "data/demo_1: 5 actions but 3 rewards"),
        (_replace("data/demo_1/obs/state", np.zeros((2, 3))), "data/demo_1: 3 actions but 2 rows of obs/state"),
        (_replace("data/demo_1/obs/state", np.zeros((5, 3))), "data/demo_1: 3 actions but 5 rows of obs/state"),
        (
            _replace("data/demo_1/obs/state", np.zeros((3, 8, 8, 3), np.uint8)),  # a picture, then
            "data/demo_1: has no observation 'state'",
        ),
        (_replace("data/demo_1/actions", np.zeros(3)), "actions is float64 [3], expected [T, d]"),
        (_replace("data/demo_1/rewards", np.zeros((3, 2))), "rewards is float64 [3, 2], expected [T]"),
        (_replace("data/demo_1/actions", np.array([[b"a"]] * 3)), "actions is |S1 [3, 1]"),
        (_replace("data/demo_1/actions", np.zeros((3, 5))), "data/demo_1: actions have 5 dimensions, those of"),
        (_replace("data/demo_1/obs/state", np.zeros((3, 4))), "data/demo_1: observations have 4 dimensions"),
        (_not_finite("data/demo_1/actions", 2), "data/demo_1: actions row 2 is not finite: [2.0, nan]"),
        (_not_finite("data/demo_0/obs/state", 1), "data/demo_0: obs/state row 1 is not finite"),
        (_replace("data/demo_0/rewards", np.array([0, 1, np.inf, 2])), "rewards row 2 is not finite: inf"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(path: Path, change: Callable[[h5py.File], None], message: str) -> None:
    with h5py.File(path, "a") as file:
        change(file)
    with pytest.raises(UserError) as error:
        read_episodes(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_next_obs_that_disagrees(path: Path) -> None:
    with h5py.File(path, "a") as file:
        file["data/demo_0/next_obs/state"] = np.zeros((2, 3))
    with pytest.raises(UserError, match=r"data/demo_0: next_obs/state is \[2, 3\], obs/state \[4, 3\]"):
        read_episodes(path)
    with h5py.File(path, "a") as file:
        _replace("data/demo_0/next_obs/state", np.zeros((4, 2)))(file)
    with pytest.raises(UserError, match=r"next_obs/state is \[4, 2\], obs/state \[4, 3\]"):
        read_episodes(path)


def test_files_that_are_no_hdf5(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_episodes(tmp_path / "absent.hdf5")
    with pytest.raises(UserError, match="is a folder"):
        read_episodes(tmp_path)
    (tmp_path / "text.hdf5").write_text("hello")
    with pytest.raises(UserError, match=r"text\.hdf5: not an HDF5 file"):
        read_episodes(tmp_path / "text.hdf5")
    (tmp_path / "empty.hdf5").write_bytes(b"")
    with pytest.raises(UserError, match=r"empty\.hdf5: (not an HDF5 file|damaged)"):
        read_episodes(tmp_path / "empty.hdf5")


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9, 0.999])
def test_files_that_are_cut_off(path: Path, kept: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(UserError, match="damaged or cut off") as error:
        read_episodes(path)
    assert "\n" not in str(error.value)


def test_no_keys(path: Path) -> None:
    with pytest.raises(UserError, match="observation_keys is empty"):
        read_episodes(path, observation_keys=())


@pytest.mark.needs_data
@pytest.mark.skipif(not _DOOR.exists(), reason=f"{_DOOR} is absent; TANDEM_DATA names its folder")
def test_the_published_door_demonstrations() -> None:
    episodes = read_episodes(_DOOR)
    check_against(episodes, describe(make_environment("tandem/AdroitDoor-v0")), str(_DOOR))
    assert (len(episodes), sum(map(len, episodes))) == (25, 6729)
    assert (min(map(len, episodes)), max(map(len, episodes))) == (223, 300)
    assert np.mean([episode.rewards.sum() for episode in episodes]) == pytest.approx(794, abs=1)
    assert max(episode.actions.max() for episode in episodes) > 1.0  # recorded unclipped
    assert episodes[0].initial_state is not None
    assert sorted(episodes[0].initial_state) == ["door_body_pos", "qpos", "qvel"]
