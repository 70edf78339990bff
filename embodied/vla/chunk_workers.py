"""What a worker process does at the table: look, decide on a chunk of actions, execute it, for a whole rollout.

One exchange a rollout: the parent writes the weights into shared memory, every worker plays its environments with
its own copy of the policy and fills its rows of shared arrays. Pictures are drawn at the starts of chunks only.
Resets and noise are drawn per environment, so the number of workers does not change what is played.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embodied.policies.vla import VLAPolicy
from embodied.rollouts.processes import Layout, SharedArrays
from embodied.rollouts.workers import environment_seed
from embodied.vla.seats import Array, Play, Seats, TableConfig, TableEpisode, observed
from envs import capture
from envs.stepper import episode_seed
from experiment.errors import UserError


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


class Player:
    """Plays what it is given, up to one play for each of `rows` together.

    environment     the table where a call names no other
    """

    def __init__(self, rows: range, environment: TableConfig, policy_folder: Path, arrays: SharedArrays) -> None:
        self.count, self.environment = len(rows), environment
        self.policy = VLAPolicy.from_pretrained(policy_folder).requires_grad_(False).eval()
        self.weights = arrays.view("weights")
        self._evaluation: dict[tuple[TableConfig, int], Seats] = {}

    def evaluate(
        self, plays: Sequence[Play], environment: TableConfig | None = None, deterministic: bool = True
    ) -> list[TableEpisode]:
        """One episode of each play, in environments of their own (of its own kind where none is given)."""
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
                table.begin(index, episode_seed(seed, 0), options, first=True)

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
        key = (environment, min(plays, max(1, self.count)))
        if key not in self._evaluation:
            self._evaluation[key] = Seats(environment, self.policy, key[1])
        return self._evaluation[key]

    def _noise(self, generator: np.random.Generator) -> Array:
        """Independent from control step to control step, [k, A]."""
        shape = (self.policy.config.chunk, self.policy.spaces.action_size)
        return generator.standard_normal(shape, dtype=np.float32)

    def close(self) -> None:
        """Close the environments."""
        for table in self._evaluation.values():
            table.close()


class ChunkWorker(Player):
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
        super().__init__(rows, environment, policy_folder, arrays)
        self.rows = rows
        names = arrays.names - {"weights"}
        self.arrays = {name: arrays.view(name)[rows.start : rows.stop] for name in names}
        self.step_states = self.arrays.get("step_states")
        self.seeds = [environment_seed(seed, row // group_size) for row in rows]
        self.generators = [np.random.default_rng([environment_seed(seed, row), 1]) for row in rows]
        self.table = Seats(environment, self.policy, len(rows))
        self._nominal = capture.nominal_fields(self.table.seats[0].env)
        for index in range(len(rows)):
            self._next_episode(index)

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

    def _next_episode(self, index: int) -> None:
        number = self.table.seats[index].number + 1
        self.table.begin(index, episode_seed(self.seeds[index], number))

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
        """Continue from `state()`. UserError if it is of another number of environments."""
        if len(state["seats"]) != len(self.table.seats):
            raise UserError(
                f"a worker had {len(state['seats'])} environments and has {len(self.table.seats)}: go on with the"
                " environment.count of the checkpoint"
            )
        for index, seat in enumerate(self.table.seats):
            capture.restore(seat.env, state["environments"][index], self._nominal)
            seat.set_state(state["seats"][index])
            self.generators[index].bit_generator.state = state["generators"][index]
        for name, seen in self.table.seen.items():
            seen[:] = state["seen"][name]

    def capture_obstacle(self) -> str | None:
        """Why the environments cannot be captured, None if they can."""
        return capture.obstacle(self.table.seats[0].env, self._nominal)

    def close(self) -> None:
        """Close the environments."""
        self.table.close()
        super().close()
