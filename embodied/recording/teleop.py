"""Demonstrations by hand: a user steers the arm in MuJoCo's viewer, and the episodes become a data set.

The clock of an episode starts with the first key that moves the arm, and every control step takes 0.1 s of the
user's time. What is recorded is what the user did: `action` is the label.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Protocol

import mujoco
import numpy as np

from embodied.datasets.lerobot_layout import (
    ACTION,
    CAMERA,
    DONE,
    PROPRIO,
    STATE,
    TRUNCATED,
    Feature,
    demonstration_features,
    outcome,
)
from embodied.datasets.lerobot_writer import LeRobotWriter, OpenEpisode
from embodied.recording.record import FPS, HOW, ROBOT
from envs.table import observations
from envs.table.camera import close_renderers
from envs.table.env import CAMERA_OF, TableEnv
from envs.table.gamepad import PAD_HELP, Gamepad
from envs.table.language import TASKS
from envs.table.layout import TRAINING_SEEDS
from envs.table.scene import CONTROL_STEP
from envs.table.steering import KEYBOARD_HELP, Command, Steering
from envs.table.window import KeyEvent, Lines, Window, require_screen
from experiment.checkpoint import write_atomically
from experiment.errors import UserError, user_errors

_NEXT_SCENE = "next_scene"
DRAWINGS = 3
"""Pictures of the window in a control step, so that it moves smoothly."""
_ENTRIES = {camera: entry for entry, camera in CAMERA_OF.items()}


@dataclass(frozen=True)
class TeleopConfig:
    """out: the data set's folder, new or one recorded by hand before.

    episodes: how many it holds in the end; None: until the user ends. time_limit: control steps of an episode.
    seed: of the scenes; None draws new ones at every sitting. cameras: of "front" and "wrist".

    The rest is what `TableEnv` takes.
    """

    out: str | Path
    tasks: tuple[str, ...] = TASKS
    episodes: int | None = None
    device: Literal["keyboard", "gamepad"] = "keyboard"
    time_limit: int = 300
    seed: int | None = None
    image_size: int = 64
    cameras: tuple[str, ...] = ("front",)
    combinations: Literal["train", "held_out", "all"] = "train"
    phrasing: str = "train"
    randomization: str | None = None


class Screen(Protocol):
    """What is asked of the window; `envs.table.window.Window` says what each is."""

    @property
    def open(self) -> bool: ...
    @property
    def azimuth(self) -> float: ...
    def events(self) -> list[KeyEvent]: ...
    def show(self, data: mujoco.MjData) -> None: ...
    def glide_to(self, data: mujoco.MjData) -> None: ...
    def draw(self, share: float, headline: str, left: Lines, keys: Lines) -> None: ...
    def close(self) -> None: ...


class Clock(Protocol):
    """A clock of the user's time, in seconds."""

    def monotonic(self) -> float: ...
    def sleep(self, seconds: float, /) -> None: ...


class _End(Enum):
    """How an episode ended, as far as the next one depends on it."""

    SAVED = "saved"
    AGAIN = "again"
    NEXT = "next"
    QUIT = "quit"


_END = {Command.AGAIN: _End.AGAIN, Command.NEXT: _End.NEXT, Command.QUIT: _End.QUIT}


def record_by_hand(
    config: TeleopConfig,
    *,
    open_screen: Callable[[mujoco.MjModel, mujoco.MjData], Screen] | None = None,
    clock: Clock = time,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> int:
    """Let the user record until the wanted episodes are saved or the user ends; returns how many were saved.

    open_screen: instead of MuJoCo's viewer, from a model and its data.
    say: told what happens, line by line.

    Raises:
        UserError: no screen, no gamepad, unknown tasks, or a folder that cannot take the episodes.
    """
    if config.time_limit < 1 or (config.episodes is not None and config.episodes < 1):
        raise UserError("the time limit and the number of episodes must be at least 1")
    pad, screen = None, None
    try:
        with user_errors():
            pad = Gamepad() if config.device == "gamepad" else None
            if open_screen is None:
                require_screen()
            env = _table(config)
            env.reset(seed=0)  # draws a picture, which must come before the window
        with LeRobotWriter(config.out, fps=FPS, features=_features(config), robot_type=ROBOT) as writer:
            with user_errors():
                screen = (open_screen or Window)(env.world.model, env.world.data)
            return _Session(config, env, screen, writer, pad, clock, say).run()
    finally:
        if screen is not None:
            screen.close()
        if pad is not None:
            pad.close()
        close_renderers()  # a context that GLFW made must go before GLFW does


def _table(config: TeleopConfig) -> TableEnv:
    if not config.cameras or (unknown := sorted(set(config.cameras) - set(_ENTRIES))):
        named = ", ".join(unknown) if config.cameras else "none"
        raise UserError(f"cameras must be of {', '.join(_ENTRIES)}, got {named}")
    return TableEnv(
        tasks=config.tasks,
        combinations=config.combinations,
        phrasing=config.phrasing,
        observe=(*(_ENTRIES[camera] for camera in config.cameras), "proprio", "state"),
        image_size=config.image_size,
        randomization=config.randomization,
    )


def _features(config: TeleopConfig) -> dict[str, Feature]:
    return demonstration_features(
        cameras=dict.fromkeys(config.cameras, (config.image_size, config.image_size)),
        fps=FPS,
        proprio=observations.PROPRIO,
        action=4,
        state=observations.STATE,
        expert=False,
    )


class _Session:
    """One sitting at the window."""

    def __init__(
        self,
        config: TeleopConfig,
        env: TableEnv,
        screen: Screen,
        writer: LeRobotWriter,
        pad: Gamepad | None,
        clock: Clock,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._env, self._screen, self._writer = config, env, screen, writer
        self._pad, self._clock, self._tell = pad, clock, say
        self._steering = Steering()
        self._keys = KEYBOARD_HELP if pad is None else PAD_HELP
        self._seed = secrets.randbits(32) if config.seed is None else config.seed
        self._saved, self._note = 0, ""
        self._how: dict[str, Any] = {}
        self._due = clock.monotonic()

    def run(self) -> int:
        """Episode after episode; returns the number of saved ones."""
        for key, meaning in self._keys:
            self._tell(f"  {key:<24}{meaning}")
        scene = self._first_scene()
        wanted = self._config.episodes
        while wanted is None or len(self._writer) < wanted:
            end = self._episode(scene)
            if end is _End.QUIT:
                break
            if end is not _End.AGAIN:
                scene += 1
                self._keep(scene)
        self._tell(f"{self._saved} episodes saved; {self._config.out} holds {len(self._writer)}")
        return self._saved

    def _first_scene(self) -> int:
        """The number of this sitting's first scene: after all that earlier ones recorded or skipped."""
        held, path = len(self._writer), Path(self._config.out) / HOW
        told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self._how = told if held or told.get("player") == "user" else {"player": "user"}
        scene = max(held, int(self._how.get(_NEXT_SCENE, held)))
        self._keep(scene)
        return scene

    def _keep(self, scene: int) -> None:
        self._how[_NEXT_SCENE] = scene
        write_atomically(Path(self._config.out) / HOW, json.dumps(self._how, indent=1))

    def _episode(self, scene: int) -> _End:
        env, steering = self._env, self._steering
        seed = int(np.random.default_rng([self._seed, scene]).integers(TRAINING_SEEDS))
        task = self._config.tasks[scene % len(self._config.tasks)]
        if env.randomizer is not None:
            env.randomizer.forget_start()
        with user_errors():
            observation, _ = env.reset(seed=seed, options={"task": task})
        self._screen.show(env.world.data)
        steering.begin()
        self._tell(f"scene {scene}: {env.instruction}")
        while (command := self._poll()) is not None or steering.idle:
            if command is Command.SAVE:
                self._note = "nothing to save yet"
            elif command is not None and command is not Command.AGAIN:
                return _END[command]
            self._pass_step("move to begin")
        self._note = ""
        self._tell("recording")
        with self._writer.episode(env.instruction) as episode:
            return self._record(episode, observation)

    def _record(self, episode: OpenEpisode, observation: dict[str, Any]) -> _End:
        """Step by step until the episode is saved or forgotten."""
        env, limit = self._env, self._config.time_limit
        row: dict[str, Any] = {}
        for step in range(limit):
            command = self._poll() if step else None
            if command is Command.SAVE:
                return self._save(episode, row | {DONE: True, TRUNCATED: True}, "saved by hand")
            if command is not None:
                return self._forget(command)
            if row:
                episode.add(row)
            action = self._steering.action(self._clock.monotonic(), self._screen.azimuth)
            with user_errors():
                following, reward, terminated, _, info = env.step(action)
            told = outcome(reward=reward, terminated=terminated, truncated=False, success=info["success"])
            row, observation = _frame(observation, action) | told, following
            self._screen.glide_to(env.world.data)
            if info["success"]:
                return self._save(episode, row, "success")
            if terminated:
                return self._ask(episode, row, "out of reach")
            self._pass_step(f"recording {step // FPS} s of {limit / FPS:.0f} s", help_shown=False)
        return self._ask(episode, row | {DONE: True, TRUNCATED: True}, "time is up")

    def _ask(self, episode: OpenEpisode, row: dict[str, Any], why: str) -> _End:
        """Whether to keep an episode that ended without success."""
        self._tell(f"{why}: save it or forget it")
        while (command := self._poll()) is None:
            self._pass_step(f"{why}: save it or forget it")
        return self._save(episode, row, why) if command is Command.SAVE else self._forget(command)

    def _save(self, episode: OpenEpisode, last: dict[str, Any], why: str) -> _End:
        episode.add(last)
        length = len(episode)
        index = episode.save()
        self._saved += 1
        self._note = f"episode {index} saved: {why}"
        self._tell(f"episode {index} saved ({why}, {length} steps): {self._env.instruction}")
        return _End.SAVED

    def _forget(self, command: Command) -> _End:
        self._note = "episode forgotten"
        self._tell(self._note)
        return _END[command]

    def _poll(self) -> Command | None:
        """Pass keys and sticks on; what the user asks for, if anything."""
        if not self._screen.open:
            return Command.QUIT
        for event in self._screen.events():
            if event.down:
                self._steering.press(event.key, self._clock.monotonic(), released_later=event.released_later)
            else:
                self._steering.release(event.key)
        if self._pad is not None:
            with user_errors():
                self._pad.poll(self._steering)
        return self._steering.take()

    def _pass_step(self, doing: str, *, help_shown: bool = True) -> None:
        """Draw until the control step is over. A step that took too long is not made up for by shorter ones.

        help_shown: the key map covers a part of the table, so it goes while the arm moves.
        """
        keys = self._keys if help_shown else ()
        start = self._clock.monotonic()
        self._due = max(self._due + CONTROL_STEP, start)
        wanted = "" if self._config.episodes is None else f" of {self._config.episodes}"
        lines = (
            ("now", doing),
            ("gripper", "closed" if self._steering.closed else "open"),
            ("pace", "slow" if self._steering.slow else "fast"),
            ("saved", f"{len(self._writer)}{wanted}"),
            ("", self._note),
        )
        for drawing in range(1, DRAWINGS + 1):
            self._screen.draw(drawing / DRAWINGS, self._env.instruction, lines, keys)
            until = start + (self._due - start) * drawing / DRAWINGS
            self._clock.sleep(max(0.0, until - self._clock.monotonic()))


def _frame(observation: dict[str, Any], action: np.ndarray) -> dict[str, Any]:
    """What was seen before an action, and the action."""
    return {
        **{CAMERA + camera: observation[entry] for camera, entry in _ENTRIES.items() if entry in observation},
        PROPRIO: observation["proprio"],
        STATE: observation["state"],
        ACTION: action,
    }
