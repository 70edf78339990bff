"""The sitting, with a window and a clock that do as the test says."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest

from embodied.datasets.lerobot import LeRobotDataset
from embodied.recording import teleop
from embodied.recording.teleop import TeleopConfig, record_by_hand
from envs.table.env import TableEnv
from envs.table.expert import Expert
from envs.table.language import parse
from envs.table.observations import PROPRIO, STATE
from envs.table.steering import BACKSPACE, ENTER, ESCAPE, RIGHT, SPACE, Steering
from envs.table.window import KeyEvent, Lines
from experiment.errors import UserError

NEXT = ord("N")


class Clock:
    """Passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Script:
    """A window whose user acts at given polls: {number of the poll: keys}; a negative key is released."""

    def __init__(self, keys: dict[int, Sequence[int]], closed_at: int = 10_000) -> None:
        self.keys, self.closed_at = keys, closed_at
        self.polls, self.shut = 0, False
        self.drawn: list[tuple[float, str, Lines, Lines]] = []
        self.azimuth = 180.0
        self.tools: list[float] = []

    def __call__(self, model: mujoco.MjModel, data: mujoco.MjData) -> "Script":
        return self

    @property
    def open(self) -> bool:
        assert self.polls < 5000, "the session does not end"
        return self.polls < self.closed_at

    def events(self) -> list[KeyEvent]:
        asked = self.keys.get(self.polls, ())
        self.polls += 1
        return [KeyEvent(abs(key), down=key > 0, released_later=True) for key in asked]

    def show(self, data: mujoco.MjData) -> None:
        pass

    def glide_to(self, data: mujoco.MjData) -> None:
        self.tools.append(float(data.site("tool").xpos[1]))

    def draw(self, share: float, headline: str, left: Lines, keys: Lines) -> None:
        self.drawn.append((share, headline, left, keys))

    def close(self) -> None:
        self.shut = True


def silent(line: str) -> None:
    del line


@pytest.fixture(autouse=True)
def keep_the_renderer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making a GL context takes longer than a test."""
    monkeypatch.setattr(teleop, "close_renderers", lambda: None)


@pytest.fixture
def play(tmp_path: Path) -> Callable[..., tuple[Script, list[str], LeRobotDataset | None]]:
    def played(keys: dict[int, Sequence[int]], closed_at: int = 10_000, **config: Any) -> Any:
        script, clock = Script(keys, closed_at), Clock()
        told: list[str] = []
        settings: dict[str, Any] = {"tasks": ("reach",), "image_size": 16, "seed": 3, "time_limit": 20} | config
        record_by_hand(
            TeleopConfig(out=tmp_path / "set", **settings), open_screen=script, clock=clock, say=told.append
        )
        assert script.shut
        data = LeRobotDataset(tmp_path / "set")
        return script, told, data

    return played


def test_what_was_steered_is_what_is_recorded(play: Callable[..., Any]) -> None:
    # Polls 0 and 1 wait. The key goes down at 2, which is the first step's; poll 3 is the second step's, and so on.
    script, told, data = play({2: [RIGHT], 5: [-RIGHT], 6: [SPACE], 8: [ENTER], 9: [ESCAPE]})
    assert len(data) == 1
    episode = data.read(0)
    assert episode.actions.tolist() == [[0, 0.5, 0, -1]] * 3 + [[0, 0, 0, -1]] + [[0, 0, 0, 1]] * 2
    assert episode.expert_actions is None
    np.testing.assert_array_equal(episode.labels, episode.actions)
    assert (episode.terminated, episode.truncated, episode.success) == (False, True, False)
    assert episode.instruction in told[len(teleop.KEYBOARD_HELP)]
    # Row t is what was seen before action t: the tool (units of 10 cm) is where the step before left it.
    seen = episode.proprio[:, 8] * 0.1
    np.testing.assert_allclose(seen[1:], script.tools[:-1], atol=1e-6)
    assert seen[3] - seen[0] > 0.02
    assert episode.images["front"].shape == (6, 16, 16, 3)
    assert episode.images["front"].std() > 1.0
    assert episode.proprio.shape == (6, PROPRIO)
    assert episode.state is not None
    assert episode.state.shape == (6, STATE)
    assert "episode 0 saved (saved by hand, 6 steps)" in told[-3]
    assert told[-1].startswith("1 episodes saved")


def test_what_is_drawn_at_the_start_is_drawn_anew_for_every_episode(
    play: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "once.yaml"
    file.write_text("- {field: kp, operation: scale, range: [0.5, 1.0], names: 'joint*', when: start}\n")
    strengths: list[float] = []
    begin = teleop._Session._episode

    def watched(session: Any, scene: int) -> Any:
        end = begin(session, scene)
        strengths.append(float(session._env.world.model.actuator_gainprm[0, 0]))
        return end

    monkeypatch.setattr(teleop._Session, "_episode", watched)
    play({2: [RIGHT], 5: [ENTER], 8: [RIGHT], 11: [ENTER], 14: [ESCAPE]}, randomization=str(file))
    assert len(set(strengths)) == len(strengths) >= 2


def test_a_step_takes_a_tenth_of_a_second(play: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(f"{__name__}.Clock", lambda: clock)
    script, _, _ = play({0: [RIGHT], 10: [ESCAPE]})
    assert clock.now == pytest.approx(101.0, abs=1e-9)
    assert len(script.drawn) == 10 * teleop.DRAWINGS
    assert [share for share, *_ in script.drawn[:3]] == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_success_is_saved_without_a_key(play: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[TableEnv] = []

    class Kept(TableEnv):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            made.append(self)

    monkeypatch.setattr(teleop, "TableEnv", Kept)
    monkeypatch.setattr(Steering, "action", lambda *_: Expert(made[0]).act().astype(np.float32))
    _, told, data = play({0: [RIGHT, -RIGHT]}, episodes=1, time_limit=60)
    episode = data.read(0)
    assert (episode.terminated, episode.truncated, episode.success) == (True, False, True)
    assert f"episode 0 saved (success, {len(episode)} steps)" in told[-2]


def test_forgetting_gives_the_same_scene_or_another(play: Callable[..., Any]) -> None:
    _, told, data = play({0: [RIGHT], 5: [BACKSPACE], 6: [RIGHT], 8: [NEXT], 9: [NEXT], 10: [ESCAPE]})
    scenes = [line for line in told if line.startswith("scene")]
    assert [line.partition(":")[0] for line in scenes] == ["scene 0", "scene 0", "scene 1", "scene 2"]
    assert scenes[0] == scenes[1]
    assert told.count("episode forgotten") == 2
    assert len(data) == 0


def test_a_key_still_down_does_not_begin_the_next_episode(play: Callable[..., Any]) -> None:
    _, told, data = play({0: [RIGHT], 3: [ENTER], 9: [ENTER], 12: [-RIGHT], 13: [RIGHT], 15: [ENTER], 16: [ESCAPE]})
    assert [len(data.read(index)) for index in range(2)] == [3, 2]
    assert told.count("recording") == 2


@pytest.mark.parametrize("key, kept", [(ENTER, 1), (BACKSPACE, 0), (NEXT, 0)])
def test_when_time_is_up_the_user_decides(play: Callable[..., Any], key: int, kept: int) -> None:
    script, told, data = play({0: [RIGHT, -RIGHT], 30: [key], 31: [ESCAPE]}, time_limit=4)
    assert "time is up: save it or forget it" in told
    assert len(script.tools) == 4
    assert len(data) == kept
    for index in range(kept):
        episode = data.read(index)
        assert (len(episode), episode.terminated, episode.truncated) == (4, False, True)


def test_what_was_thrown_off_the_table_is_the_users_to_decide(
    play: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TableEnv, "_lost", lambda self: self.elapsed == 3)
    _, told, data = play({0: [RIGHT], 9: [ENTER], 10: [ESCAPE]})
    assert "out of reach: save it or forget it" in told
    episode = data.read(0)
    assert (len(episode), episode.terminated, episode.truncated, episode.success) == (3, True, False, False)


@pytest.mark.parametrize("at", [0, 1, 6])
def test_closing_the_window_ends_and_forgets(play: Callable[..., Any], at: int) -> None:
    _, told, data = play({2: [RIGHT]}, closed_at=at)
    assert len(data) == 0
    assert told[-1].startswith("0 episodes saved")


def test_enough_episodes_end_the_sitting(play: Callable[..., Any]) -> None:
    keys = {poll: [RIGHT, -RIGHT] if poll % 3 == 0 else [ENTER] for poll in range(99)}
    _, told, data = play(keys, episodes=2)
    assert len(data) == 2
    assert told[-1].startswith("2 episodes saved")
    script, told, _ = play(keys, episodes=2)  # it holds them already
    assert script.polls == 0
    assert told[-1].startswith("0 episodes saved")


def test_tasks_take_turns_and_all_cameras_are_recorded(play: Callable[..., Any]) -> None:
    _, told, data = play(
        {0: [RIGHT], 2: [ENTER], 3: [NEXT], 4: [ESCAPE]}, tasks=("pick", "push"), cameras=("wrist", "front")
    )
    asked = [parse(line.partition(": ")[2]) for line in told if line.startswith("scene")]
    assert [goal.task for goal in asked if goal] == ["pick", "push", "pick"]
    images = data.read(0).images
    assert {name: pictures.shape for name, pictures in images.items()} == dict.fromkeys(
        ("wrist", "front"), (2, 16, 16, 3)
    )
    assert not np.array_equal(images["wrist"], images["front"])


def test_a_second_sitting_goes_on_with_new_scenes(play: Callable[..., Any]) -> None:
    keys = {0: [RIGHT], 3: [ENTER], 4: [ESCAPE]}
    play(keys)
    _, told, data = play(keys)
    assert len(data) == 2
    assert any(line.startswith("scene 1:") for line in told)
    assert told[-1].endswith("holds 2")
    assert not np.array_equal(data.read(0).state[0], data.read(1).state[0])


def test_skipped_scenes_are_not_shown_again(play: Callable[..., Any]) -> None:
    _, told, _ = play({0: [NEXT], 1: [ESCAPE]})  # nothing is saved at all
    assert any(line.startswith("scene 1:") for line in told)
    _, told, data = play({0: [NEXT], 1: [RIGHT], 4: [ENTER], 5: [ESCAPE]})
    assert len(data) == 1
    scenes = [line for line in told if line.startswith("scene")]
    assert [line.partition(":")[0] for line in scenes] == ["scene 1", "scene 2", "scene 3"]
    _, told, _ = play({0: [ESCAPE]})
    assert scenes[-1] in told  # the one that was on the screen when the user left


@pytest.mark.parametrize("method", ["reset", "step"])
def test_what_the_table_refuses_is_one_line(
    play: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    real, calls = getattr(TableEnv, method), []

    def refuse(self: TableEnv, *given: Any, **named: Any) -> Any:
        calls.append(method)
        if len(calls) > 1:
            raise ValueError("the sentences must be a list of one at least")
        return real(self, *given, **named)

    monkeypatch.setattr(TableEnv, method, refuse)
    with pytest.raises(UserError, match="the sentences must be a list of one at least"):
        play({0: [RIGHT]})


def test_an_interrupt_loses_the_episode_in_progress_only(tmp_path: Path) -> None:
    class Interrupted(Script):
        def events(self) -> list[KeyEvent]:
            if self.polls == 6:
                raise KeyboardInterrupt
            return super().events()

    script = Interrupted({0: [RIGHT], 3: [ENTER], 4: [SPACE]})
    with pytest.raises(KeyboardInterrupt):
        record_by_hand(
            TeleopConfig(tmp_path, tasks=("reach",), image_size=16), open_screen=script, clock=Clock(), say=silent
        )
    assert script.shut
    assert len(LeRobotDataset(tmp_path)) == 1


def test_the_window_tells_what_is_going_on(play: Callable[..., Any]) -> None:
    script, _, _ = play({1: [ENTER], 2: [RIGHT, ord("Q"), SPACE], 5: [ENTER], 7: [ESCAPE]}, episodes=4)
    waiting, refused, recording, saved = (dict(script.drawn[step * teleop.DRAWINGS][2]) for step in (0, 1, 2, 5))
    assert (waiting["now"], waiting["gripper"], waiting["pace"]) == ("move to begin", "open", "fast")
    assert refused[""] == "nothing to save yet"
    assert (recording["now"], recording["gripper"]) == ("recording 0 s of 2 s", "closed")
    assert recording["pace"] == "slow"
    assert (saved["saved"], saved[""]) == ("1 of 4", "episode 0 saved: saved by hand")
    help_shown = [bool(keys) for _, _, _, keys in script.drawn[:: teleop.DRAWINGS]]
    assert help_shown == [True, True, False, False, False, True]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tasks": ("reech",)}, "did you mean 'reach'"),
        ({"device": "gamepad"}, "no gamepad at /nowhere/js0"),
        ({"cameras": ("front", "side")}, "cameras must be of front, wrist, got side"),
        ({"cameras": ()}, "got none"),
        ({"time_limit": 0}, "must be at least 1"),
        ({"episodes": 0}, "must be at least 1"),
    ],
)
def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str) -> None:
    opened = teleop.Gamepad
    monkeypatch.setattr(teleop, "Gamepad", lambda: opened("/nowhere/js0"))
    with pytest.raises(UserError, match=message):
        record_by_hand(TeleopConfig(tmp_path / "set", **change), open_screen=Script({}), clock=Clock(), say=silent)
    assert not (tmp_path / "set").exists()


def test_without_a_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"cannot open a window to steer in .*DISPLAY"):
        record_by_hand(TeleopConfig(tmp_path / "set"), say=silent)
    assert not (tmp_path / "set").exists()
