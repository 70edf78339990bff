"""Recording the expert: what a frame holds, that nothing depends on workers or interruptions, what is refused."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from embodied.datasets.lerobot import LeRobotDataset
from embodied.datasets.lerobot_check import problems
from embodied.datasets.lerobot_episode import EncodedEpisode
from embodied.evaluate import TEST_SEEDS, VALIDATION_SEEDS
from embodied.recording import record
from embodied.recording.record import Player, RecordConfig, RecordReport, record_expert, table_features
from envs.stepper import episode_seed
from envs.table.env import TIME_LIMIT
from envs.table.language import parse
from envs.table.layout import TRAINING_SEEDS
from experiment.errors import UserError
from tandem.cli import main

SMALL = RecordConfig(tasks=("reach", "pick"), episodes=4, image_size=16, workers=0, noise=0.3)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RecordReport]:
    folder = tmp_path_factory.mktemp("record") / "set"
    return folder, record_expert(folder, SMALL)


def rows(folder: Path) -> list[object]:
    """Everything that an episode is, in a form that compares."""
    return [
        [one.instruction, *(values.tolist() for values in (one.actions, one.labels, one.images["front"]))]
        for one in LeRobotDataset(folder)
    ]


def test_what_is_recorded(recorded: tuple[Path, RecordReport]) -> None:
    folder, report = recorded
    assert list(problems(folder)) == []
    assert report.written == 4
    assert report.attempts.keys() == {"reach", "pick"}
    assert report.successes == {"reach": 2, "pick": 2}
    dataset = LeRobotDataset(folder)
    assert dataset.robot_type == "tandem-table"
    assert dataset.fps == 10
    assert report.frames == dataset.frames
    assert dataset.successes() == [True] * 4
    for number, episode in enumerate(dataset):
        goal = parse(episode.instruction)
        assert goal is not None
        assert goal.task == SMALL.tasks[number % 2]
        assert episode.images["front"].shape == (len(episode), 16, 16, 3)
        assert episode.images["front"].std() > 5  # something was drawn
        assert episode.state is not None
        assert episode.rewards is not None
        assert episode.rewards.sum() > 0.9
        assert (episode.terminated, episode.truncated, episode.success) == (True, False, True)
        assert np.abs(episode.actions).max() <= 1.0


def test_the_label_is_clean_and_the_action_is_noisy(recorded: tuple[Path, RecordReport]) -> None:
    """The noise of an episode has one level, drawn from 0 to 0.3."""
    levels = []
    for episode in LeRobotDataset(recorded[0]):
        off = episode.actions - episode.labels
        free = np.abs(episode.actions) < 1.0  # not clipped
        levels.append(off[free].std())
    assert max(levels) < 0.4
    assert min(levels) > 0.0
    assert max(levels) > 1.5 * min(levels)


def test_without_noise_the_action_is_the_label(tmp_path: Path) -> None:
    record_expert(tmp_path / "set", replace(SMALL, tasks=("reach",), episodes=1, noise=0.0))
    episode = LeRobotDataset(tmp_path / "set").read(0)
    np.testing.assert_array_equal(episode.actions, episode.labels)


def test_interrupted_and_continued_it_is_the_same(tmp_path: Path, recorded: tuple[Path, RecordReport]) -> None:
    class Enough(Exception):
        pass

    def stop(held: int, report: RecordReport) -> None:
        if held == 2:
            raise Enough

    with pytest.raises(Enough):
        record_expert(tmp_path / "set", SMALL, stop)
    assert len(LeRobotDataset(tmp_path / "set")) == 2
    report = record_expert(tmp_path / "set", SMALL)
    assert report.written == 2
    assert rows(tmp_path / "set") == rows(recorded[0])
    assert record_expert(tmp_path / "set", SMALL).written == 0


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(tmp_path: Path, recorded: tuple[Path, RecordReport]) -> None:
    record_expert(tmp_path / "set", replace(SMALL, workers=2))
    assert rows(tmp_path / "set") == rows(recorded[0])


class Clumsy(Player):
    """Fails whenever the first draw of an attempt says so."""

    def _episode(self, task: str, rng: np.random.Generator) -> tuple[EncodedEpisode, bool]:
        episode, success = super()._episode(task, rng)
        return episode, success and len(episode.numbers["action"]) % 2 == 0


def test_failures_are_counted_and_played_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "Player", Clumsy)
    report = record_expert(tmp_path / "set", replace(SMALL, tasks=("reach",), episodes=6))
    assert report.successes == {"reach": 6}
    assert report.attempts["reach"] > 6
    assert all(len(one) % 2 == 0 for one in LeRobotDataset(tmp_path / "set"))
    kept = record_expert(tmp_path / "kept", replace(SMALL, tasks=("reach",), episodes=6, keep_failures=True))
    assert kept.attempts == {"reach": 6}
    assert kept.successes["reach"] < 6


def test_an_expert_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    player = Player(SMALL, table_features(SMALL))
    monkeypatch.setattr(record, "_MOST_ATTEMPTS", 1)
    monkeypatch.setattr(player.expert, "act", lambda: np.zeros(4, np.float32))
    with pytest.raises(UserError, match=r"the expert failed 1 times in a row at 'pick' \(slot 1\): lower --noise"):
        player.play(1)
    player.config = replace(SMALL, keep_failures=True)
    played = player.play(1)
    assert not played.success
    assert played.episode.length == TIME_LIMIT
    assert played.episode.numbers["next.truncated"].tolist() == [False] * (TIME_LIMIT - 1) + [True]


OWN = """
from envs.table.tasks import TASK, OwnTask

def act(expert):
    {body}

def sentences(goal):
    return [f"go to the {{goal.thing}}"]

MINE = OwnTask(TASK["reach"].done, TASK["reach"].progress, hold=1, name="mine", sentences=sentences, act={act})
"""


@pytest.mark.parametrize(
    ("act", "body", "message"),
    [
        ("None", "pass", "error: task 'mine' has no scripted expert: give its OwnTask an `act`, or record by hand"),
        (
            "act",
            "return [0.0, 0.0, 1.0]",
            "must return an action of 4 finite numbers, got [0.0, 0.0, 1.0]",
        ),
        ("act", "return [0.0, float('nan'), 0.0, 1.0]", "must return an action of 4 finite numbers, got [0.0, nan"),
        ("act", "return {}['way']", "error: task 'mine': its `act` failed: KeyError: 'way' ("),
    ],
)
def test_an_expert_of_ones_own_that_is_missing_or_faulty(
    act: str, body: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(OWN.format(act=act, body=body))
    words = ["data", "record", "--expert", "--out", str(tmp_path / "set"), "--tasks", f"reach,{file}:MINE"]
    assert main([*words, "--episodes", "2", "--image-size", "16", "--workers", "0"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert message in told[-1]
    assert not any("Traceback" in line for line in told)
    assert (tmp_path / "set").exists() == (act == "act")  # what is missing is known before anything is recorded


def test_an_episode_depends_on_none_before_it(tmp_path: Path) -> None:
    """Nor does what a randomization draws once an environment."""
    file = tmp_path / "once.yaml"
    file.write_text(
        "- {field: proprio_noise, operation: set, range: [0.001, 0.1], when: start}\n"
        "- {field: kp, operation: scale, range: [0.5, 1.0], names: 'joint*'}\n"
    )
    config = replace(SMALL, tasks=("reach",), randomization=str(file))
    features = table_features(config)
    fresh, used = Player(config, features), Player(config, features)
    used.play(0)
    one, other = fresh.play(1).episode.numbers, used.play(1).episode.numbers
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)


def test_a_file_of_ones_own_that_was_changed(tmp_path: Path) -> None:
    file, folder = tmp_path / "words.py", tmp_path / "set"
    config = replace(SMALL, tasks=("reach",), episodes=1, phrasing=f"{file}:words")
    text = "def words(goal):\n    return [f'go to the {goal.thing}']\n"
    file.write_text(text)
    record_expert(folder, config)
    more = replace(config, episodes=2)
    file.write_text(text.replace("go to", "find"))
    with pytest.raises(UserError, match=r"words\.py was changed since its 1 episodes were recorded: put it back"):
        record_expert(folder, more)
    file.write_text(text)
    assert record_expert(folder, more).written == 1
    told = json.loads((folder / record.HOW).read_text())
    assert list(told["files"]) == [str(file)]
    del told["files"]  # as recordings were that did not tell
    (folder / record.HOW).write_text(json.dumps(told))
    file.write_text(text.replace("go to", "find"))
    assert record_expert(folder, replace(config, episodes=3)).written == 1


def test_a_worker_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        from concurrent.futures.process import BrokenProcessPool

        raise BrokenProcessPool

    monkeypatch.setattr(record.Player, "play", die)
    with pytest.raises(UserError, match=r"0 episodes are in .*, and the same command goes on from there"):
        record_expert(tmp_path / "set", SMALL)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, r"its 4 episodes were recorded with seed 0, not 1: give the same settings"),
        ({"tasks": ("reach",)}, r"recorded with tasks \['reach', 'pick'\], not \['reach'\]"),
        ({"image_size": 32}, r"its observation.images.front is \('image', \[16, 16, 3\]\), that of the new"),
    ],
)
def test_other_settings_are_refused(
    recorded: tuple[Path, RecordReport], changed: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        record_expert(recorded[0], replace(SMALL, episodes=9, **changed))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"episodes": 0}, "episodes must be at least 1"),
        ({"noise": 0.6}, "noise must be from 0 to 0.5, got 0.6"),
        ({"cameras": ("top",)}, "cameras must be of front, wrist, got top"),
        ({"tasks": ("jump",)}, "there is no task 'jump'"),
        ({"combinations": "some"}, "there is no combinations 'some'"),
        ({"randomization": "wild"}, "wild"),
    ],
)
def test_wrong_settings(tmp_path: Path, changed: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        record_expert(tmp_path / "set", replace(SMALL, **changed))  # type: ignore[arg-type]
    assert not (tmp_path / "set").exists()


def test_scenes_are_not_those_of_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 slots ask for 200 different scenes, and none is among 4,000 that policies are judged on."""

    class Asked(Exception):
        pass

    player = Player(SMALL, table_features(SMALL))
    recorded: list[int] = []

    def reset(*, seed: int, options: dict[str, str]) -> None:
        recorded.append(seed)
        raise Asked

    monkeypatch.setattr(player.env, "reset", reset)
    for slot in range(200):
        with pytest.raises(Asked):
            player.play(slot)
    assert 0 <= min(recorded) < max(recorded) < TRAINING_SEEDS
    assert len(set(recorded)) == 200
    judged = {episode_seed(first + index, 0) for first in (VALIDATION_SEEDS, TEST_SEEDS) for index in range(2000)}
    assert judged.isdisjoint(recorded)


def test_nothing_is_left_behind(recorded: tuple[Path, RecordReport]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LeRobotDataset(recorded[0])
    assert not [name for _, _, files in os.walk(recorded[0]) for name in files if name.endswith(".part")]
