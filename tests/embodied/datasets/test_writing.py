"""Conversions: ends, rewards and final observations keep their meaning, other libraries open the files, kills cost
one episode at most, and what is wrong leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embodied.datasets.check import problems
from embodied.datasets.episode import Episode, dataset_statistics
from embodied.datasets.formats import detect, open_dataset, read_dataset
from embodied.datasets.lerobot_layout import Feature, outcome
from embodied.datasets.lerobot_source import LeRobotSource
from embodied.datasets.lerobot_writer import LeRobotWriter
from embodied.datasets.selecting import Joined, Selection, split_indices
from embodied.datasets.staging import staging_folder
from embodied.datasets.writing import WRITTEN, write_dataset
from embodied.logged.played import PlayedSource
from embodied.policies.words import Words
from embodied.vla.control_steps import ControlSteps
from experiment.errors import UserError
from tandem import cli

Make = Callable[..., Path]
Told = tuple[Callable[[int], np.ndarray], ...]
ROOT = Path(__file__).parents[3]


def same(one: Episode, other: Episode) -> None:
    """All but the name."""
    np.testing.assert_array_equal(one.observations, other.observations)
    np.testing.assert_array_equal(one.actions, other.actions)
    np.testing.assert_array_equal(one.rewards, other.rewards)
    assert (one.terminated, one.truncated, one.success) == (other.terminated, other.truncated, other.success)
    assert (one.final_observation is None) == (other.final_observation is None)
    if one.final_observation is not None:
        assert one.final_observation.tolist() == np.asarray(other.final_observation).tolist()


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("kind", ["robomimic", "libero", "d4rl", "d3rlpy", "minari", "lerobot"])
@pytest.mark.parametrize("to", WRITTEN)
def test_nothing_changes_its_meaning(make: Make, tmp_path: Path, kind: str, to: str) -> None:
    path = make(kind)
    expected = read_dataset(path)
    report = write_dataset(open_dataset(path), tmp_path / "there", to)
    assert detect(tmp_path / "there") == to
    keys = [name.removeprefix("observation.") for name in open_dataset(path).read(0).vectors]
    found = read_dataset(tmp_path / "there", observation_keys=None if to == "d3rlpy" else keys)
    for one, other in zip(found, expected, strict=True):
        same(one, other)
    assert list(problems(tmp_path / "there")) == []
    assert not staging_folder(tmp_path / "there").exists()
    assert report.episodes == 3
    assert report.not_bootstrapped == sum(one.truncated and one.final_observation is None for one in expected)
    mean = dataset_statistics(expected).observation_mean
    np.testing.assert_allclose(dataset_statistics(found).observation_mean, mean)


@pytest.mark.parametrize("middle", WRITTEN)
def test_there_and_back(make: Make, tmp_path: Path, middle: str) -> None:
    """Minari's truncated episode comes back with its true final observation, whatever it went through."""
    path = make("minari")
    write_dataset(open_dataset(path), tmp_path / "there", middle)
    write_dataset(open_dataset(tmp_path / "there"), tmp_path / "back", "minari")
    for one, other in zip(read_dataset(tmp_path / "back"), read_dataset(path), strict=True):
        same(one, other)


def test_pictures_and_words_travel(make: Make, tmp_path: Path) -> None:
    source = open_dataset(make("libero"))
    for to, further in (("lerobot", "minari"), ("minari", "lerobot")):
        write_dataset(source, tmp_path / to, to, fps=7)
        write_dataset(open_dataset(tmp_path / to), tmp_path / f"{to}-{further}", further)
        for path in (tmp_path / to, tmp_path / f"{to}-{further}"):
            for one, other in zip(open_dataset(path), source, strict=True):
                assert one.instruction == "put the bowl on the plate"
                assert set(one.images) == set(other.images)
                for name, pictures in one.images.items():
                    np.testing.assert_array_equal(pictures, other.images[name])
    assert open_dataset(tmp_path / "lerobot").fps == 7


def test_lerobots_statistics_are_those_of_the_source(make: Make, tmp_path: Path) -> None:
    source = open_dataset(make("d4rl"))
    write_dataset(source, tmp_path / "there", "lerobot")
    written = open_dataset(tmp_path / "there")
    assert isinstance(written, LeRobotSource)
    expected = dataset_statistics(read_dataset(source.path))
    np.testing.assert_allclose(written.dataset.stats["observation.state"]["mean"], expected.observation_mean)
    np.testing.assert_allclose(written.dataset.stats["action"]["std"], expected.action_std, atol=1e-7)
    assert not [name for name in written.dataset.features if name.startswith("next.observ")]  # nobody knows them


def test_what_has_no_place_is_told(make: Make, tmp_path: Path) -> None:
    lerobot = open_dataset(make("lerobot"))
    assert write_dataset(lerobot, tmp_path / "a", "minari").left_out == ("the teacher's actions",)
    assert write_dataset(lerobot, tmp_path / "b", "lerobot").left_out == ()
    told = ("instructions", "pictures", "the teacher's actions")
    assert write_dataset(lerobot, tmp_path / "c", "d3rlpy").left_out == told


@pytest.mark.parametrize("to", WRITTEN)
@pytest.mark.parametrize("said", [(None, True, False), (True, None, False), (None, None), (False, True)])
def test_success_is_kept_where_only_some_say(tmp_path: Path, to: str, said: tuple[bool | None, ...]) -> None:
    rows = np.zeros((5, 2), np.float32)
    episodes = [Episode(rows, rows, rows[:, 0], terminated=False, truncated=True, success=one) for one in said]
    report = write_dataset(PlayedSource(episodes, tmp_path / "run", {}), tmp_path / "there", to)
    assert report.left_out == ()
    assert tuple(one.success for one in read_dataset(tmp_path / "there")) == said
    assert list(problems(tmp_path / "there")) == []
    written = open_dataset(tmp_path / "there")
    if isinstance(written, LeRobotSource):
        assert tuple(written.dataset.successes()) == said
        mixed = len({one is None for one in said}) > 1  # LeRobot's own column could not say so
        assert ("next.success_if_known" in written.dataset.features) == mixed
        assert ("next.success" in written.dataset.features) == (None not in said)
    write_dataset(written, tmp_path / "again", "lerobot")
    assert tuple(one.success for one in read_dataset(tmp_path / "again")) == said


def test_success_is_kept_where_one_of_two_sets_says(make: Make, tmp_path: Path) -> None:
    sources = [open_dataset(make(kind)) for kind in ("d4rl", "minari")]
    for order in (sources, sources[::-1]):
        target = tmp_path / f"{order[0].kind}-first"
        assert write_dataset(Joined(order), target, "lerobot").left_out == ()
        expected = [episode.success for source in order for episode in source]
        assert {None, True, False} == set(expected)
        assert [one.success for one in read_dataset(target)] == expected


def test_what_one_of_two_sets_lacks_is_told(make: Make, tmp_path: Path) -> None:
    full = open_dataset(make("lerobot"))
    write_dataset(full, tmp_path / "plain", "minari")
    joined = Joined([full, open_dataset(tmp_path / "plain")])
    assert write_dataset(joined, tmp_path / "all", "lerobot").left_out == ("the teacher's actions",)


def plain_lerobot(folder: Path, **others: Feature) -> Path:
    """One episode of four frames with the features `others` beside the action."""
    told = outcome(reward=1.0, terminated=False, truncated=False, success=False)
    ends = {name: Feature("float32" if name == "next.reward" else "bool", (1,)) for name in told}
    own = {"action": Feature("float32", (1,)), **others, **ends}
    with LeRobotWriter(folder, fps=5, features=own) as writer, writer.episode("pick up the cup") as episode:
        for step in range(4):
            rows: dict[str, Any] = {name: [float(ord(name[-1]))] for name in others}
            rows |= {name: "lift" for name, one in others.items() if one.dtype == "string"}
            told = outcome(reward=1.0, terminated=False, truncated=step == 3, success=False)
            episode.add({"action": [0.0], **rows, **told})
        episode.save()
    return folder


def test_what_frames_say_beyond_the_episode_is_told(tmp_path: Path) -> None:
    """Texts of their own, and another instruction on the way, which nobody may learn as if it were the first."""
    note = {"observation.state": Feature("float32", (1,)), "language_note": Feature("string", (1,))}
    path = plain_lerobot(tmp_path / "set", **note)
    assert write_dataset(open_dataset(path), tmp_path / "texts", "lerobot").left_out == ("texts (language_note)",)
    file = path / "data/chunk-000/file-000.parquet"
    table = pq.read_table(file)
    place = table.column_names.index("task_index")
    pq.write_table(table.set_column(place, "task_index", pa.array([0, 0, 1, 1], pa.int64())), file)
    tasks = pa.table({"task_index": [0, 1], "task": ["pick up the cup", "pour the water"]})
    pq.write_table(tasks, path / "meta/tasks.parquet")
    report = write_dataset(open_dataset(path), tmp_path / "both", "lerobot")
    assert report.left_out == ("instructions after an episode's first", "texts (language_note)")
    with pytest.raises(UserError, match=r"set: episode 0: its instruction changes on the way"):
        ControlSteps.of(list(open_dataset(path)), [], Words.of(["pick up the cup"]), 4)


def test_vectors_of_two_sets_are_merged_by_name(tmp_path: Path) -> None:
    """Whatever their order in each: d3rlpy's files have one vector, that of the first set's order."""
    names = ("observation.x", "observation.y")
    one, other = (
        open_dataset(plain_lerobot(tmp_path / order[0][-1], **{name: Feature("float32", (1,)) for name in order}))
        for order in (names, names[::-1])
    )
    assert list(one.read(0).vectors) != list(other.read(0).vectors)
    write_dataset(Joined([one, other]), tmp_path / "both.h5", "d3rlpy")
    for episode in read_dataset(tmp_path / "both.h5"):
        np.testing.assert_array_equal(episode.observations, np.tile([float(ord("x")), float(ord("y"))], (4, 1)))


def test_the_verb_says_how_robomimics_episodes_ended(make: Make, tmp_path: Path) -> None:
    words = ["data", "convert", str(make("robomimic")), str(tmp_path / "there"), "--to", "minari"]
    assert cli.main([*words, "--done-means", "terminated"]) == 0
    assert [one.terminated for one in read_dataset(tmp_path / "there")] == [True] * 3


# ---------------------------------------------------------------- opened by the formats' own libraries


def test_minari_opens_what_was_written(make: Make, tmp_path: Path, told: Told) -> None:
    import minari
    from gymnasium.spaces import Box

    write_dataset(open_dataset(make("minari")), tmp_path / "copy-v3", "minari")
    dataset = minari.load_dataset("copy-v3")  # where MINARI_DATASETS_PATH points
    assert (dataset.total_episodes, dataset.total_steps, dataset.id) == (3, 10, "copy-v3")
    assert dataset.observation_space == Box(-np.inf, np.inf, (3,), np.float32)
    assert dataset.action_space == Box(-1, 1, (2,), np.float32)
    for number, episode in enumerate(dataset):
        np.testing.assert_array_equal(episode.observations, told[0](number))
        np.testing.assert_array_equal(episode.actions, told[1](number))
        np.testing.assert_array_equal(episode.rewards, told[2](number))
        assert episode.terminations.tolist() == [False] * (len(episode) - 1) + [number != 1]
        assert episode.truncations.tolist() == [False] * (len(episode) - 1) + [number == 1]


def test_minari_opens_pictures(make: Make, tmp_path: Path) -> None:
    import minari

    source = open_dataset(make("robomimic"))
    write_dataset(source, tmp_path / "seen", "minari")
    episode = minari.MinariDataset(tmp_path / "seen" / "data")[1]
    assert episode.observations["front_image"].shape == (6, 8, 12, 3)
    np.testing.assert_array_equal(episode.observations["front_image"][:-1], source.read(1).images["front_image"])
    assert dict(episode.observations)["eef"].shape == (6, 2)


@pytest.mark.parametrize("kind", ["minari", "d4rl"])
def test_d3rlpy_opens_what_was_written(make: Make, tmp_path: Path, told: Told, kind: str) -> None:
    from d3rlpy.dataset import InfiniteBuffer, ReplayBuffer

    write_dataset(open_dataset(make(kind)), tmp_path / "there.h5", "d3rlpy")
    with (tmp_path / "there.h5").open("rb") as file:
        buffer = ReplayBuffer.load(file, InfiniteBuffer())
    assert [bool(one.terminated) for one in buffer.episodes] == [True, False, True]
    assert buffer.transition_count == 4 + 4 + 1  # a stopped episode's last step is not used
    for number, episode in enumerate(buffer.episodes):
        np.testing.assert_array_equal(episode.observations, told[0](number)[:-1])
        np.testing.assert_array_equal(episode.actions, told[1](number))
        np.testing.assert_array_equal(episode.rewards[:, 0], told[2](number))


@pytest.mark.skipif("TANDEM_LEROBOT" not in os.environ, reason="TANDEM_LEROBOT names no Python that has LeRobot")
def test_lerobot_opens_what_was_written(make: Make, tmp_path: Path) -> None:
    write_dataset(open_dataset(make("libero")), tmp_path / "there", "lerobot")
    command = [os.environ["TANDEM_LEROBOT"], str(ROOT / "tests/fixtures/open_with_lerobot.py")]
    done = subprocess.run([*command, str(tmp_path / "there")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- parts and wholes


def test_split_and_merge(make: Make, tmp_path: Path) -> None:
    source = open_dataset(make("minari"))
    first, second = split_indices(3, [0.67, 0.33], seed=0)
    assert sorted(first + second) == [0, 1, 2]
    for name, indices in (("a", first), ("b", second)):
        write_dataset(Selection(source, indices), tmp_path / name, "d3rlpy")
    joined = Joined([open_dataset(tmp_path / "a"), open_dataset(tmp_path / "b")])
    write_dataset(joined, tmp_path / "all", "lerobot")
    expected = read_dataset(source.path)
    for one, number in zip(read_dataset(tmp_path / "all"), first + second, strict=True):
        same(one, expected[number])


def test_merging_what_knows_its_final_observations_with_what_does_not(make: Make, tmp_path: Path) -> None:
    joined = Joined([open_dataset(make("d4rl")), open_dataset(make("minari"))])
    for to in WRITTEN:
        write_dataset(joined, tmp_path / to, to)
        known = [one.final_observation is not None for one in read_dataset(tmp_path / to)]
        assert known == [False] * 3 + [True] * 3


def test_one_source_of_which_only_later_episodes_know_their_final_observations(make: Make, tmp_path: Path) -> None:
    """A merged set is one data set: what its first episode lacks, another may have."""
    write_dataset(Joined([open_dataset(make("d4rl")), open_dataset(make("minari"))]), tmp_path / "one", "minari")
    for to in WRITTEN:
        report = write_dataset(open_dataset(tmp_path / "one"), tmp_path / to, to)
        episodes = read_dataset(tmp_path / to)
        assert [one.final_observation is not None for one in episodes] == [False] * 3 + [True] * 3
        lost = sum(one.truncated and one.final_observation is None for one in episodes)
        assert report.not_bootstrapped == lost


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ([0.9, 0.2], "must be positive and add up to at most 1, got 0.9 0.2"),
        ([0.5, -0.1], "must be positive"),
        ([0.99, 0.01], r"10 episodes cannot be split so that every part has one \(they would have 10, 0\)"),
    ],
)
def test_fractions_that_cannot_be(fractions: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        split_indices(10, fractions, 0)


def test_splits_by_hand() -> None:
    parts = split_indices(10, [0.5, 0.25], 3)
    assert [len(part) for part in parts] == [5, 3]  # round(7.5) is 8
    assert parts == split_indices(10, [0.5, 0.25], 3)
    assert parts != split_indices(10, [0.5, 0.25], 4)


def test_data_sets_that_cannot_be_merged(make: Make, tmp_path: Path) -> None:
    joined = Joined([open_dataset(make("minari")), open_dataset(make("libero"))])
    with pytest.raises(
        UserError, match=r"libero-v0: data/demo_0: environment_state is \[4\], that of .* absent|state"
    ):
        write_dataset(joined, tmp_path / "all", "lerobot")
    assert not (tmp_path / "all").exists()
    assert not staging_folder(tmp_path / "all").exists()
    lerobot = open_dataset(make("lerobot"))
    with pytest.raises(UserError, match=r"has 15 steps a second, .*lerobot 10"):
        Joined([lerobot, open_dataset(make("robomimic"))])
    with pytest.raises(UserError, match="there is nothing to merge"):
        Joined([])


# ---------------------------------------------------------------- what is wrong leaves nothing behind


@pytest.mark.parametrize("to", WRITTEN)
def test_a_damaged_episode_leaves_nothing_behind(make: Make, tmp_path: Path, to: str) -> None:
    path = make("robomimic")
    with h5py.File(path, "a") as file:
        file["data/demo_2/actions"][0, 0] = np.nan
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="data/demo_2: actions row 0 is not finite"):
        write_dataset(open_dataset(path), tmp_path / "there", to)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("to", WRITTEN)
def test_shapes_that_change(make: Make, tmp_path: Path, to: str) -> None:
    path = make("robomimic")
    with h5py.File(path, "a") as file:
        del file["data/demo_1/obs/eef"], file["data/demo_1/next_obs/eef"]
        file["data/demo_1/obs/eef"] = np.zeros((5, 4))
    with pytest.raises(UserError, match=r"demo_1: eef is \[4\], that of .*demo_0 \[2\]"):
        write_dataset(open_dataset(path), tmp_path / "there", to)
    assert any("demo_1: eef is [4], that of" in line for line in problems(path))


def test_what_is_there_is_not_overwritten(make: Make, tmp_path: Path) -> None:
    source = open_dataset(make("d4rl"))
    (tmp_path / "there").write_text("mine")
    with pytest.raises(UserError, match="there: exists already; choose another name"):
        write_dataset(source, tmp_path / "there", "minari")
    assert (tmp_path / "there").read_text() == "mine"
    with pytest.raises(UserError, match="there is no writer for 'robomimic': choose from lerobot, minari, d3rlpy"):
        write_dataset(source, tmp_path / "other", "robomimic")


def test_a_full_disk_keeps_what_is_finished(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from embodied.datasets import lerobot_state

    source, real, calls = open_dataset(make("d4rl")), lerobot_state.sync, []

    def sync(path: Path) -> None:
        calls.append(path)
        if len(calls) == 6:
            raise OSError(28, "No space left on device")
        real(path)

    monkeypatch.setattr(lerobot_state, "sync", sync)
    with pytest.raises(UserError, match="cannot write \\(no space left on device\\)"):
        write_dataset(source, tmp_path / "there", "minari")
    assert len(list((staging_folder(tmp_path / "there") / "episodes").iterdir())) >= 1
    seen: list[int] = []
    write_dataset(source, tmp_path / "there", "minari", on_episode=seen.append)
    assert len(read_dataset(tmp_path / "there")) == 3


def test_another_command_does_not_go_on(make: Make, tmp_path: Path) -> None:
    source = open_dataset(make("d4rl"))

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(source, tmp_path / "there", "minari", on_episode=stop)
    said = list(problems(tmp_path / "there"))
    assert said == [
        f"{tmp_path / 'there'}: was not finished: {tmp_path / 'there'}.unfinished holds what is there of its 3 "
        "episodes; the same command goes on, or delete it"
    ]
    with pytest.raises(UserError, match="holds what another command began"):
        write_dataset(source, tmp_path / "there", "d3rlpy")
    write_dataset(source, tmp_path / "there", "minari")
    assert list(problems(tmp_path / "there")) == []


# ---------------------------------------------------------------- kills


@pytest.mark.parametrize("to", WRITTEN)
def test_kills_cost_one_episode_at_most(make: Make, tmp_path: Path, to: str) -> None:
    """Real SIGKILLs of processes inside the writing of a file; each life goes on where the one before died."""
    path = make("robomimic")
    driver = Path(__file__).with_name("kill_writer.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(driver), str(path), str(tmp_path / "killed"), to, "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    lives = json.loads(done.stdout)
    assert lives
    for life in lives:
        assert life["left"] >= life["claimed"]
        assert any("was not finished" in line for line in life["validate"])
    assert [life["left"] for life in lives] == sorted(life["left"] for life in lives)
    write_dataset(open_dataset(path), tmp_path / "whole", to)
    for one, other in zip(open_dataset(tmp_path / "killed"), open_dataset(tmp_path / "whole"), strict=True):
        assert (one.terminated, one.truncated, one.final.keys()) == (
            other.terminated,
            other.truncated,
            other.final.keys(),
        )
        np.testing.assert_array_equal(one.actions, other.actions)
        for name, pictures in one.images.items():
            np.testing.assert_array_equal(pictures, other.images[name])
    assert list(problems(tmp_path / "killed")) == []
    assert not staging_folder(tmp_path / "killed").exists()
