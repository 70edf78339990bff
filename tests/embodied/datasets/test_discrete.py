"""Discrete actions stay discrete in every format that is written, and how many there are is not forgotten."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest

from embodied.datasets.check import problems
from embodied.datasets.formats import open_dataset
from embodied.datasets.lerobot_layout import Feature
from embodied.datasets.lerobot_source import LeRobotSource
from embodied.datasets.lerobot_writer import LeRobotWriter
from embodied.datasets.selecting import Joined, Selection
from embodied.datasets.writing import WRITTEN, write_dataset
from experiment.errors import UserError

ACTIONS = ([2, 0, 1], [1, 0], [0, 0, 0, 1], [2, 2])
Maker = Callable[[str, int], Path]


@pytest.fixture
def minari_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    """minari_set(NAME, n): four episodes of Discrete(n), written with Minari itself."""
    import minari
    from gymnasium.spaces import Box, Discrete
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))

    def write(name: str, choices: int) -> Path:
        buffers = []
        for number, actions in enumerate(ACTIONS):
            seen = np.full((len(actions) + 1, 1), number, np.float32)
            ends = np.arange(len(actions)) == len(actions) - 1
            buffers.append(
                EpisodeBuffer(
                    number, None, None, seen, np.array(actions), ends.astype(float), ends, ends & False, infos={}
                )
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spaces = {"observation_space": Box(-9, 9, (1,)), "action_space": Discrete(choices)}
            minari.create_dataset_from_buffers(name, buffers, **spaces)
        return tmp_path / name

    return write


def foreign_d3rlpy(path: Path, actions: Sequence[Sequence[int]]) -> Path:
    """With d3rlpy itself, which does not say how many there are."""
    from d3rlpy.dataset import Episode, InfiniteBuffer, ReplayBuffer

    episodes = [
        Episode(np.ones((len(a), 1), np.float32), np.array(a)[:, None], np.ones((len(a), 1)), True) for a in actions
    ]
    with path.open("w+b") as file:
        ReplayBuffer(InfiniteBuffer(), episodes=episodes).dump(file)
    return path


def foreign_lerobot(path: Path, actions: Sequence[Sequence[int]]) -> Path:
    """As LeRobot has it: whole numbers, and nothing more about them."""
    own = {"observation.state": Feature("float32", (1,)), "action": Feature("int64", (1,))}
    own["next.reward"] = Feature("float32", (1,))
    with LeRobotWriter(path, fps=5, features=own) as writer:
        for chosen in actions:
            with writer.episode("") as episode:
                for action in chosen:
                    episode.add({"observation.state": 1.0, "action": action, "next.reward": 1.0})
                episode.save()
    return path


def actions_of(path: Path) -> list[list[float]]:
    return [one.actions[:, 0].tolist() for one in open_dataset(path)]


@pytest.mark.parametrize("to", WRITTEN)
def test_there_and_back(minari_set: Maker, tmp_path: Path, to: str) -> None:
    """The fourth choice occurs nowhere."""
    write_dataset(open_dataset(minari_set("choice-v0", 4)), tmp_path / "there", to)
    there = open_dataset(tmp_path / "there")
    assert (there.choices, there.choices_inferred) == (4, False)
    assert actions_of(tmp_path / "there") == [list(map(float, one)) for one in ACTIONS]
    assert list(problems(tmp_path / "there")) == []
    write_dataset(there, tmp_path / "back", "minari")
    assert open_dataset(tmp_path / "back").choices == 4
    assert actions_of(tmp_path / "back") == actions_of(tmp_path / "there")


def test_lerobot_holds_whole_numbers(minari_set: Maker, tmp_path: Path) -> None:
    write_dataset(open_dataset(minari_set("choice-v0", 4)), tmp_path / "there", "lerobot")
    source = open_dataset(tmp_path / "there")
    assert isinstance(source, LeRobotSource)
    action = source.dataset.features["action"]
    assert (action.dtype, action.shape) == ("int64", (1,))
    assert source.dataset.table(source.dataset.episodes[0])["action"].to_pylist() == [2, 0, 1]


@pytest.mark.parametrize("to", WRITTEN)
def test_parts_of_a_split_can_be_merged(minari_set: Maker, tmp_path: Path, to: str) -> None:
    """Of a source that was told the number, and of two that could only infer it."""
    foreign = (foreign_d3rlpy(tmp_path / "f.h5", ACTIONS), foreign_lerobot(tmp_path / "f", ACTIONS))
    for name, path, choices in (("m", minari_set("choice-v0", 4), 4), ("d", foreign[0], 3), ("l", foreign[1], 3)):
        source = open_dataset(path)
        parts = (tmp_path / f"{name}1", tmp_path / f"{name}2")
        for part, indices in zip(parts, ((0, 3), (1, 2)), strict=True):
            write_dataset(Selection(source, indices), part, to)
        joined = Joined([open_dataset(part) for part in parts])
        assert (joined.choices, joined.choices_inferred) == (choices, name != "m")
        write_dataset(joined, tmp_path / f"{name}-all", to)
        assert open_dataset(tmp_path / f"{name}-all").choices == choices
        assert actions_of(tmp_path / f"{name}-all") == [list(map(float, ACTIONS[i])) for i in (0, 3, 1, 2)]


@pytest.mark.parametrize("foreign", [foreign_d3rlpy, foreign_lerobot])
def test_a_number_that_is_inferred_gives_way(
    minari_set: Maker, tmp_path: Path, foreign: Callable[[Path, Sequence[Sequence[int]]], Path]
) -> None:
    few, more = (open_dataset(foreign(tmp_path / str(most), [[0, most]])) for most in (1, 4))
    told = open_dataset(minari_set("choice-v0", 4))
    assert (few.choices, few.choices_inferred, told.choices_inferred) == (2, True, False)
    for order in ([few, more], [more, few]):
        assert (Joined(order).choices, Joined(order).choices_inferred) == (5, True)
    for order in ([few, told], [told, few]):
        assert (Joined(order).choices, Joined(order).choices_inferred) == (4, False)
    with pytest.raises(UserError, match=r"4: has 5 discrete actions, .*choice-v0 4"):
        Joined([more, told])  # an action that is not among those that were told
    with pytest.raises(UserError, match=r"other-v0: has 6 discrete actions, .*choice-v0 4"):
        Joined([told, few, open_dataset(minari_set("other-v0", 6))])


def test_discrete_and_continuous_actions_cannot_be_merged(minari_set: Maker, tmp_path: Path) -> None:
    smooth = tmp_path / "smooth.h5"
    with h5py.File(smooth, "w") as file:
        for name in ("observations", "actions"):
            file[name] = np.zeros((3, 1))
        file["rewards"] = np.zeros(3)
        file["terminals"] = np.array([False, False, True])
        file["timeouts"] = np.zeros(3, bool)
    for first in (open_dataset(minari_set("choice-v0", 4)), open_dataset(foreign_d3rlpy(tmp_path / "f.h5", [[0]]))):
        with pytest.raises(UserError, match=r"discrete actions, .* no"):
            Joined([open_dataset(smooth), first])


def test_d3rlpy_opens_what_was_written(minari_set: Maker, tmp_path: Path) -> None:
    from d3rlpy.dataset import InfiniteBuffer, ReplayBuffer

    write_dataset(open_dataset(minari_set("choice-v0", 4)), tmp_path / "there.h5", "d3rlpy")
    with (tmp_path / "there.h5").open("rb") as file:
        buffer = ReplayBuffer.load(file, InfiniteBuffer())
    assert [one.actions[:, 0].tolist() for one in buffer.episodes] == [list(one) for one in ACTIONS]


def test_several_discrete_columns_are_not_one_choice(tmp_path: Path) -> None:
    path = foreign_d3rlpy(tmp_path / "f.h5", [[0, 2]])
    with h5py.File(path, "a") as file:
        del file["actions_0"]
        file["actions_0"] = np.array([[0, 2], [1, 1]])
    source = open_dataset(path)
    assert source.choices is None
    write_dataset(source, tmp_path / "there", "minari")
    assert open_dataset(tmp_path / "there").read(0).actions.tolist() == [[0.0, 2.0], [1.0, 1.0]]
