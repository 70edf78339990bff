"""What a worker process does at the table: look, decide on a chunk of actions, execute it, for a whole rollout.

One exchange a rollout: the parent writes the weights into shared memory, every worker plays its environments with
its own copy of the policy and fills its rows of shared arrays. Pictures are drawn at the starts of chunks only.
Resets and noise are drawn per environment, so the number of workers does not change what is played.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from embodied.policies.vla import VLAPolicy, image_key
from embodied.rollouts.processes import Layout, SharedArrays
from embodied.rollouts.workers import environment_seed
from envs import capture
from envs.stepper import EpisodeRecord, episode_seed
from envs.table.env import TIME_LIMIT, TableEnv
from envs.table.language import TASKS
from experiment.errors import UserError

Array = NDArray[np.float32]
Play = tuple[int, Mapping[str, Any] | None]
"""An episode to play: the seed and the options of its reset."""


@dataclass(frozen=True)
class TableConfig:
    """The table that is played at; what is seen of it (cameras, picture size) is the policy's affair.

    tasks, combinations, phrasing, reward, end_on_success   as `TableEnv`'s
    randomization   a preset of `envs.table.randomization` or a file.yaml; None for the plain table
    count           environments played together
    workers         processes to share them (0 = this one; at most `count`)
    """

    tasks: tuple[str, ...] = TASKS
    combinations: Literal["train", "held_out", "all"] = "train"
    phrasing: str = "train"
    reward: Literal["dense", "sparse"] = "dense"
    end_on_success: bool = True
    randomization: str | None = None
    count: int = 32
    workers: int = 2

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.workers <= self.count:
            raise ValueError(f"environment.workers must be 0..count, got {self.workers} for {self.count}")


def make_table(config: TableConfig, image_size: int, kind: type[TableEnv] = TableEnv) -> TableEnv:
    """A table that draws nothing unless asked. UserError if the configuration names what is not there."""
    try:
        return kind(
            tasks=config.tasks,
            combinations=config.combinations,
            phrasing=config.phrasing,
            reward=config.reward,
            end_on_success=config.end_on_success,
            randomization=config.randomization,
            observe=(),
            image_size=image_size,
        )
    except ValueError as error:
        raise UserError(f"environment: {error}") from error


class TableEpisode(NamedTuple):
    """A finished episode: its record, what was asked, and whether another goal was met that was not asked for.

    success_of_original is for `swap` resets, None in all others.
    """

    record: EpisodeRecord
    task: str
    goal: str
    instruction: str
    success_of_original: bool | None


@dataclass(frozen=True)
class ChunkReport:
    """What one worker reports beside the shared arrays.

    final_states    (row, column, privileged state [S]) where an episode ended or was cut
    next_states     [n, S] after the last column
    episodes        those that ended, in order of time
    """

    final_states: list[tuple[int, int, Array]]
    next_states: Array
    episodes: list[TableEpisode]


def layout_of(policy: VLAPolicy, count: int, chunks: int, *, step_states: bool = False) -> Layout:
    """The shared arrays [count, chunks, ...] of a rollout, and the policy's flat weights.

    step_states: also the privileged state before each control step of a chunk.
    """
    k, lead = policy.config.chunk, (count, chunks)
    each_step: Layout = {"step_states": ((*lead, k, policy.spaces.state_size), "float32")} if step_states else {}
    return {
        **each_step,
        **{name: ((*lead, *shape), kind) for name, (shape, kind) in observed(policy).items()},
        "percept": ((*lead, policy.config.percept), "float32"),
        "actions": ((*lead, k, policy.spaces.action_size), "float32"),
        "log_probs": ((*lead, k), "float32"),
        "rewards": ((*lead, k), "float32"),
        "executed": (lead, "int64"),
        "terminated": (lead, "bool"),
        "truncated": (lead, "bool"),
        "weights": ((sum(tensor.numel() for tensor in floats_of(policy)),), "float32"),
    }


def observed(policy: VLAPolicy) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of each entry of an observation that the policy asks for; the state is the critic's."""
    spaces = policy.spaces
    picture = ((spaces.image_size, spaces.image_size, 3), "uint8")
    return {
        **{image_key(camera): picture for camera in spaces.cameras},
        "proprio": ((spaces.proprio_size,), "float32"),
        "words": ((policy.config.length,), "int64"),
        "state": ((spaces.state_size,), "float32"),
    }


def floats_of(policy: torch.nn.Module) -> Iterator[torch.Tensor]:
    """The float32 parameters and buffers: all that acting depends on."""
    for tensor in (*policy.parameters(), *policy.buffers()):
        if tensor.dtype == torch.float32:
            yield tensor


@torch.no_grad()
def export_weights(policy: torch.nn.Module, weights: Array) -> None:
    """Write the policy into a flat vector."""
    torch.cat([tensor.flatten().cpu() for tensor in floats_of(policy)], out=torch.from_numpy(weights))


@torch.no_grad()
def load_weights(policy: torch.nn.Module, weights: Array) -> None:
    """Read the policy from a flat vector, in place."""
    tensors = list(floats_of(policy))
    pieces = torch.from_numpy(weights).split([tensor.numel() for tensor in tensors])
    for tensor, piece in zip(tensors, pieces, strict=True):
        tensor.copy_(piece.view_as(tensor))


class Seat:
    """One environment and the episode that is played in it; chunks are executed open loop."""

    def __init__(self, env: TableEnv) -> None:
        self.env = env
        self.number, self.seed, self.length, self.episode_return = -1, 0, 0, 0.0
        self.success, self.success_once = False, False
        self.success_of_original: bool | None = None

    def begin(self, seed: int, options: Mapping[str, Any] | None = None) -> None:
        """The next episode, from that reset."""
        self.env.reset(seed=seed, options=options)
        self.seed, self.number = seed, self.number + 1
        self.length, self.episode_return = 0, 0.0
        self.success = self.success_once = False
        self.success_of_original = None

    def execute(
        self, chunk: NDArray[np.floating], rewards: Array, states: Array | None = None
    ) -> tuple[int, bool, bool]:
        """Up to k actions [k, A], fewer where the episode ends; writes rewards [k], and the states [k, S] before.

        Returns how many were executed, terminated and truncated (at the time limit).
        """
        step, executed, terminated, truncated = self.env.step, 0, False, False
        for action in chunk:
            if states is not None:
                states[executed] = self.env.observe(("state",))["state"]
            _, reward, terminated, truncated, info = step(action)
            rewards[executed] = reward
            executed += 1
            self.episode_return += reward
            self.length += 1
            self.success = bool(info["success"])
            self.success_once |= self.success
            if "success_of_original" in info:
                self.success_of_original = bool(info["success_of_original"] or self.success_of_original)
            truncated = truncated or self.length >= TIME_LIMIT
            if terminated or truncated:
                break
        return executed, terminated, truncated

    def episode(self, terminated: bool, truncated: bool) -> TableEpisode:
        """What was played since `begin`. Success is None where the instruction was not understood."""
        env = self.env
        record = EpisodeRecord(
            episode_return=self.episode_return,
            length=self.length,
            success_once=self.success_once if env.judged else None,
            success_at_end=self.success if env.judged else None,
            terminated=terminated,
            truncated=truncated,
            number=self.number,
            seed=self.seed,
        )
        return TableEpisode(record, env.goal.task, env.goal.key, env.instruction, self.success_of_original)

    def state(self) -> dict[str, Any]:
        """The episode so far, without the environment."""
        return {name: value for name, value in vars(self).items() if name != "env"}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`."""
        vars(self).update(state)


class Seats:
    """Environments that one process plays together, and what it sees in them now.

    `seen` [n, ...] is looked at when an episode begins and after each chunk: contacts that an observation tells are
    those of the last physics step, which cannot be found again later.
    """

    def __init__(self, config: TableConfig, policy: VLAPolicy, count: int) -> None:
        self.policy = policy
        self.seats = [Seat(make_table(config, policy.spaces.image_size)) for _ in range(count)]
        layout = observed(policy)
        self._names = tuple(name for name in layout if name != "words")
        self.seen = {name: np.zeros((count, *shape), kind) for name, (shape, kind) in layout.items()}
        self._tensors = {name: torch.from_numpy(array) for name, array in self.seen.items()}

    def begin(self, index: int, seed: int, options: Mapping[str, Any] | None = None) -> None:
        """An episode at one seat, and the first look at it."""
        self.seats[index].begin(seed, options)
        instruction = self.seats[index].env.instruction
        self.seen["words"][index] = self.policy.words.encode(instruction, self.policy.config.length).numpy()
        self.look(index)

    def look(self, index: int) -> None:
        """At one seat, now."""
        for name, value in self.seats[index].env.observe(self._names).items():
            self.seen[name][index] = value

    def act(self, active: Sequence[int], noise: Sequence[Array] | None) -> tuple[Array, Array, Array]:
        """Decide at the active seats: actions [n, k, A], not clipped yet, their log-probs [n, k], and the percepts
        that they follow from.

        noise: standard normal [k, A] of each, None for the policy's mode.
        """
        observations = self._tensors
        if len(active) < len(self.seats):
            rows = torch.tensor(active)
            observations = {name: tensor[rows] for name, tensor in observations.items()}
        percept = self.policy.perceive(observations)
        actions, log_probs = self.policy.act(
            {**observations, "percept": percept}, None if noise is None else torch.from_numpy(np.stack(noise))
        )
        return actions.numpy(), log_probs.numpy(), percept.numpy()

    def close(self) -> None:
        """Close the environments."""
        for seat in self.seats:
            seat.env.close()


class ChunkWorker:
    """Plays the environments of rows `rows` of the shared arrays.

    Rows of one group (`group_size` neighbours) have the same resets and differ in their noise.
    """

    def __init__(
        self,
        rows: range,
        environment: TableConfig,
        policy_folder: Path,
        arrays: SharedArrays,
        seed: int,
        group_size: int = 1,
    ) -> None:
        self.rows, self.environment = rows, environment
        self.policy = VLAPolicy.from_pretrained(policy_folder).requires_grad_(False).eval()
        names = arrays.names - {"weights"}
        self.arrays = {name: arrays.view(name)[rows.start : rows.stop] for name in names}
        self.step_states = self.arrays.get("step_states")
        self.weights = arrays.view("weights")
        self.seeds = [environment_seed(seed, row // group_size) for row in rows]
        self.generators = [np.random.default_rng([environment_seed(seed, row), 1]) for row in rows]
        self.table = Seats(environment, self.policy, len(rows))
        self._nominal = capture.nominal_fields(self.table.seats[0].env)
        for index in range(len(rows)):
            self._next_episode(index)
        self._evaluation: dict[tuple[TableConfig, int], Seats] = {}

    def collect(self, episodes: int | None = None) -> ChunkReport:
        """Fill this worker's rows with the present weights: every column, or until `episodes` have ended in a row.

        What is left of a row after its episodes has `executed` 0.
        """
        load_weights(self.policy, self.weights)
        arrays, table = self.arrays, self.table
        finals: list[tuple[int, int, Array]] = []
        ended: list[TableEpisode] = []
        left = [episodes or arrays["executed"].shape[1]] * len(self.rows)
        for name in ("executed", "terminated", "truncated", "rewards", "actions", "log_probs", "percept"):
            arrays[name][:] = 0
        for column in range(arrays["executed"].shape[1]):
            active = [index for index, more in enumerate(left) if more]
            if not active:
                break
            for name, seen in table.seen.items():
                arrays[name][:, column] = seen
            noise = [self._noise(self.generators[index]) for index in active]
            actions, log_probs, percept = table.act(active, noise)
            arrays["actions"][active, column], arrays["log_probs"][active, column] = actions, log_probs
            arrays["percept"][active, column] = percept
            chunks = np.clip(actions, -1.0, 1.0)
            for index, chunk in zip(active, chunks, strict=True):
                seat, rewards = table.seats[index], arrays["rewards"][index, column]
                states = self.step_states[index, column] if self.step_states is not None else None
                executed, terminated, truncated = seat.execute(chunk, rewards, states)
                arrays["executed"][index, column] = executed
                arrays["terminated"][index, column] = terminated
                arrays["truncated"][index, column] = truncated
                if terminated or truncated:
                    finals.append((self.rows.start + index, column, seat.env.observe(("state",))["state"]))
                    ended.append(seat.episode(terminated, truncated))
                    left[index] -= 1
                    self._next_episode(index)
                else:
                    table.look(index)
        return ChunkReport(finals, table.seen["state"].copy(), ended)

    def evaluate(
        self, plays: Sequence[Play], environment: TableConfig | None = None, deterministic: bool = True
    ) -> list[TableEpisode]:
        """One episode of each play, in environments of their own (of training's kind where none is given)."""
        if not plays:  # fewer episodes than workers
            return []
        load_weights(self.policy, self.weights)
        table = self._evaluation_seats(environment or self.environment, len(plays))
        found: dict[int, TableEpisode] = {}
        waiting = iter(range(len(plays)))
        playing: dict[int, int] = {}  # seat -> play
        generators: dict[int, np.random.Generator] = {}

        def take_a_seat(index: int) -> None:
            play = next(waiting, None)
            playing.pop(index, None)
            if play is not None:
                seed, options = plays[play]
                playing[index], generators[index] = play, np.random.default_rng([seed, 2])
                table.seats[index].number = -1  # every one of them is its seed's first
                table.begin(index, episode_seed(seed, 0), options)

        for index in range(len(table.seats)):
            take_a_seat(index)
        unused = np.zeros(self.policy.config.chunk, np.float32)
        while playing:
            active = sorted(playing)
            noise = None if deterministic else [self._noise(generators[index]) for index in active]
            for index, chunk in zip(active, np.clip(table.act(active, noise)[0], -1.0, 1.0), strict=True):
                seat = table.seats[index]
                _, terminated, truncated = seat.execute(chunk, unused)
                if terminated or truncated:
                    found[playing[index]] = seat.episode(terminated, truncated)
                    take_a_seat(index)
                else:
                    table.look(index)
        return [found[play] for play in range(len(plays))]

    def _evaluation_seats(self, environment: TableConfig, plays: int) -> Seats:
        """Kept from one evaluation to the next."""
        key = (environment, min(plays, max(1, len(self.rows))))
        if key not in self._evaluation:
            self._evaluation[key] = Seats(environment, self.policy, key[1])
        return self._evaluation[key]

    def _next_episode(self, index: int) -> None:
        number = self.table.seats[index].number + 1
        self.table.begin(index, episode_seed(self.seeds[index], number))

    def _noise(self, generator: np.random.Generator) -> Array:
        """Independent from control step to control step, [k, A]."""
        shape = (self.policy.config.chunk, self.policy.spaces.action_size)
        return generator.standard_normal(shape, dtype=np.float32)

    def state(self) -> dict[str, Any]:
        """Environments, episodes, what is seen of them, and noise, for a checkpoint."""
        seats = self.table.seats
        return {
            "environments": [capture.capture(seat.env, self._nominal) for seat in seats],
            "seats": [seat.state() for seat in seats],
            "seen": {name: seen.copy() for name, seen in self.table.seen.items()},
            "generators": [generator.bit_generator.state for generator in self.generators],
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`."""
        for index, seat in enumerate(self.table.seats):
            capture.restore(seat.env, state["environments"][index], self._nominal)
            seat.set_state(state["seats"][index])
            self.generators[index].bit_generator.state = state["generators"][index]
        for name, seen in self.table.seen.items():
            seen[:] = state["seen"][name]

    def capture_obstacle(self) -> str | None:
        """Why the environments cannot be captured, None if they can."""
        return capture.obstacle(self.table.seats[0].env)

    def close(self) -> None:
        """Close the environments."""
        for table in (self.table, *self._evaluation.values()):
            table.close()
