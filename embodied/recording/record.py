"""Recording demonstrations: a scripted expert plays at the table, several processes encode, one writes.

A data set of N episodes has N slots. Slot i asks for task i modulo the tasks, and plays until the expert succeeds
once; all of its draws come from (seed, i, attempt). What a folder holds therefore depends neither on the number of
workers nor on how often recording was interrupted: the same command goes on where it was killed, unless a user's
own file that it reads was changed in between.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from embodied.datasets.lerobot_episode import EncodedEpisode, EpisodeEncoder
from embodied.datasets.lerobot_layout import (
    ACTION,
    CAMERA,
    EXPERT_ACTION,
    PROPRIO,
    STATE,
    Feature,
    demonstration_features,
    outcome,
)
from embodied.datasets.lerobot_writer import LeRobotWriter
from envs.own import is_own
from envs.table import observations
from envs.table.env import CAMERA_OF, TIME_LIMIT, TableEnv
from envs.table.expert import Expert, require_experts
from envs.table.language import TASKS
from envs.table.layout import TRAINING_SEEDS
from envs.table.randomization import is_file
from experiment.checkpoint import write_atomically
from experiment.errors import UserError, user_errors

FPS = 10
"""Control steps a second at the table."""
ROBOT = "tandem-table"
HOW = "meta/recording.json"
"""Within a data set: the settings that its episodes follow from."""
_MOST_ATTEMPTS = 100


@dataclass(frozen=True)
class RecordConfig:
    """What the expert shows.

    episodes            that the folder holds in the end
    noise               every episode draws a level from 0 to this; level x normal noise is added to what the expert
                        wants, so that it has to recover; the label stays clean
    cameras             of "front" and "wrist"
    keep_failures       keep an episode in which the expert failed, instead of playing another one
    workers             processes that play; 0: this one

    The rest is what `TableEnv` takes.
    """

    tasks: tuple[str, ...] = TASKS
    episodes: int = 200
    seed: int = 0
    noise: float = 0.2
    image_size: int = 64
    cameras: tuple[str, ...] = ("front",)
    combinations: Literal["train", "held_out", "all"] = "train"
    phrasing: str = "train"
    randomization: str | None = None
    keep_failures: bool = False
    workers: int = 2

    def __post_init__(self) -> None:
        if self.episodes < 1 or self.workers < 0:
            raise UserError(f"episodes must be at least 1 and workers 0, got {self.episodes} and {self.workers}")
        if not 0.0 <= self.noise <= 0.5:
            raise UserError(f"noise must be from 0 to 0.5, got {self.noise}")
        entries = {camera: entry for entry, camera in CAMERA_OF.items()}
        if not self.cameras or set(self.cameras) - set(entries):
            raise UserError(f"cameras must be of {', '.join(entries)}, got {', '.join(self.cameras) or 'none'}")


@dataclass
class RecordReport:
    """What this session played; task -> episodes."""

    attempts: dict[str, int] = field(default_factory=dict)
    successes: dict[str, int] = field(default_factory=dict)
    written: int = 0
    frames: int = 0


@dataclass(frozen=True)
class Played:
    """What came of a slot: the episode that is kept, and how it went."""

    task: str
    attempts: int
    success: bool
    episode: EncodedEpisode


def record_expert(
    folder: str | Path,
    config: RecordConfig,
    on_episode: Callable[[int, RecordReport], None] = lambda held, report: None,
) -> RecordReport:
    """Record until the folder holds `config.episodes` episodes; what it holds already counts.

    on_episode: called after each one that is written with how many the folder holds, and the report so far.

    Raises:
        UserError: the folder holds something else or was recorded with other settings, a setting is wrong, a worker
            was killed, or the expert cannot do a task.
    """
    report = RecordReport()
    features = table_features(config)
    with LeRobotWriter(folder, fps=FPS, features=features, robot_type=ROBOT) as writer:
        _same_settings(Path(folder), config, len(writer))
        slots = range(len(writer), config.episodes)
        with _players(config, features, len(slots)) as play:
            try:
                for played in _in_order(play, slots, config):
                    writer.append(played.episode)
                    _count(report, played)
                    on_episode(len(writer), report)
            except BrokenProcessPool as error:
                raise UserError(
                    f"a process that plays was killed (is there memory for {config.workers}?); {len(writer)}"
                    f" episodes are in {folder}, and the same command goes on from there"
                ) from error
    return report


def table_features(config: RecordConfig) -> dict[str, Feature]:
    """The data set's features. Raises UserError when the table refuses the settings, or a task has no expert."""
    env = table(config)
    with user_errors():
        require_experts(env)
    env.close()
    return demonstration_features(
        cameras=dict.fromkeys(config.cameras, (config.image_size, config.image_size)),
        fps=FPS,
        proprio=observations.PROPRIO,
        action=4,
        state=observations.STATE,
        expert=True,
    )


def table(config: RecordConfig) -> TableEnv:
    """The environment. Raises UserError when it does not take the settings."""
    pictures = [entry for entry, camera in CAMERA_OF.items() if camera in config.cameras]
    with user_errors():
        return TableEnv(
            tasks=config.tasks,
            combinations=config.combinations,
            phrasing=config.phrasing,
            observe=(*pictures, "proprio", "state"),
            image_size=config.image_size,
            randomization=config.randomization,
        )


class Player:
    """Plays slots; lives where the simulator does."""

    def __init__(self, config: RecordConfig, features: dict[str, Feature]) -> None:
        self.config, self.features = config, features
        self.env = table(config)
        self.expert = Expert(self.env)

    def play(self, slot: int) -> Played:
        """Play until one episode is worth keeping.

        Raises UserError when the expert fails all the time, or cannot say what to do.
        """
        task = self.config.tasks[slot % len(self.config.tasks)]
        for attempt in range(_MOST_ATTEMPTS):
            episode, success = self._episode(task, np.random.default_rng([self.config.seed, slot, attempt]))
            if success or self.config.keep_failures:
                return Played(task, attempt + 1, success, episode)
        raise UserError(
            f"the expert failed {_MOST_ATTEMPTS} times in a row at {task!r} (slot {slot}): lower --noise, or record"
            " failures too with --keep-failures"
        )

    def begin(self, task: str, rng: np.random.Generator, *, swap: bool = False) -> dict[str, Any]:
        """A new scene; with `swap`, the environment knows which other thing the words do not mean."""
        if self.env.randomizer is not None:
            self.env.randomizer.forget_start()  # an episode must not depend on those before it
        with user_errors():
            seen, _ = self.env.reset(seed=int(rng.integers(TRAINING_SEEDS)), options={"task": task, "swap": swap})
        return seen

    def _episode(self, task: str, rng: np.random.Generator) -> tuple[EncodedEpisode, bool]:
        encoder = EpisodeEncoder(self.features, FPS)
        level = rng.uniform(0.0, self.config.noise)
        seen, ended = self.begin(task, rng), False
        while not ended:
            with user_errors():
                clean = self.expert.act()
                action = np.clip(clean + level * rng.normal(size=clean.shape), -1.0, 1.0).astype(np.float32)
                after, reward, terminated, _, info = self.env.step(action)
            success, truncated = bool(info["success"]), encoder.length + 1 >= TIME_LIMIT
            encoder.add(
                {
                    **{CAMERA + camera: seen[entry] for entry, camera in CAMERA_OF.items() if entry in seen},
                    PROPRIO: seen["proprio"],
                    STATE: seen["state"],
                    ACTION: action,
                    EXPERT_ACTION: clean,
                    **outcome(reward=reward, terminated=terminated, truncated=truncated, success=success),
                }
            )
            seen, ended = after, terminated or truncated
        return encoder.finish(self.env.instruction), success


def _same_settings(folder: Path, config: RecordConfig, held: int) -> None:
    """Keep the settings and the hashes of own files beside the episodes, or compare them with those there."""
    told = dataclasses.asdict(config)
    told = {"player": "expert", **{name: told[name] for name in told if name not in ("episodes", "workers")}}
    path = folder / HOW
    settings, files = json.loads(json.dumps(told)), own_files(config)
    if not held:
        write_atomically(path, json.dumps(settings | ({"files": files} if files else {}), indent=1))
        return
    there = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name, value in settings.items():
        if there.get(name) != value:
            raise UserError(
                f"{folder}: its {held} episodes were recorded with {name} {there.get(name, 'unknown')}, not"
                f" {value}: give the same settings to go on, or choose another folder"
            )
    for name, value in files.items():
        if there.get("files", {}).get(name, value) != value:  # older recordings do not tell
            raise UserError(
                f"{folder}: {name} was changed since its {held} episodes were recorded: put it back as it was to go"
                " on, or choose another folder"
            )


def own_files(config: RecordConfig) -> dict[str, str]:
    """The user's own files that the settings name -> sha256 of each."""
    named = [name.rpartition(":")[0] for name in (*config.tasks, config.phrasing) if is_own(name)]
    if config.randomization is not None and is_file(config.randomization):
        named.append(config.randomization)
    return {name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in dict.fromkeys(named)}


def _count(report: RecordReport, played: Played) -> None:
    report.attempts[played.task] = report.attempts.get(played.task, 0) + played.attempts
    report.successes[played.task] = report.successes.get(played.task, 0) + played.success
    report.written += 1
    report.frames += played.episode.length


# ---------------------------------------------------------------- processes

_player: Player | None = None
"""The player of a worker process."""


def _begin_playing(config: RecordConfig, features: dict[str, Feature]) -> None:
    global _player
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops, and its workers with it
    _player = Player(config, features)


def _play(slot: int) -> Played:
    assert _player is not None
    return _player.play(slot)


@contextmanager
def _players(config: RecordConfig, features: dict[str, Feature], slots: int) -> Iterator[Callable[[int], Future]]:
    """What plays a slot, at once or in another process."""
    if not config.workers or slots < 2:
        player = Player(config, features)

        def play(slot: int) -> Future:
            done: Future = Future()
            done.set_result(player.play(slot))
            return done

        yield play
        return
    pool = ProcessPoolExecutor(
        min(config.workers, slots),
        mp_context=multiprocessing.get_context("spawn"),  # a forked child inherits a GL context that it cannot use
        initializer=_begin_playing,
        initargs=(config, features),
    )
    try:
        yield lambda slot: pool.submit(_play, slot)
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(play: Callable[[int], Future], slots: range, config: RecordConfig) -> Iterator[Played]:
    """The slots in their order, a few of them ahead of the writer."""
    waiting: deque[Future] = deque()
    for slot in slots:
        waiting.append(play(slot))
        if len(waiting) > 2 * config.workers:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
