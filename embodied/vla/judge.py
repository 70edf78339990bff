"""Tables to judge a policy at: the loop of training's workers, without training.

with Judge(policy, workers=2) as judge:
    played = judge.evaluate(policy, plays, environment=TableConfig(combinations="held_out"))
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from embodied.policies.vla import VLAPolicy, image_key
from embodied.policies.words import split_words
from embodied.rollouts.processes import SharedArrays, Workers
from embodied.vla.chunk_workers import Player, export_weights, layout_of
from embodied.vla.seats import Play, TableConfig, TableEpisode
from envs.table.env import CAMERA_OF
from envs.table.observations import PROPRIO, STATE
from experiment.errors import UserError

ACTION = 4


def check_policy(policy: VLAPolicy, source: object) -> None:
    """UserError if the policy does not see and do what a table gives and takes."""
    spaces = policy.spaces
    table = f"the table has proprio {PROPRIO}, state {STATE}, actions of {ACTION}"
    if (spaces.proprio_size, spaces.state_size, spaces.action_size) != (PROPRIO, STATE, ACTION):
        raise UserError(
            f"{source}: a policy with proprio {spaces.proprio_size}, state {spaces.state_size}, actions of "
            f"{spaces.action_size}; {table}"
        )
    for camera in spaces.cameras:
        if image_key(camera) not in CAMERA_OF:
            cameras = ", ".join(CAMERA_OF.values())
            raise UserError(f"{source}: the policy looks through a camera {camera!r}; the table's are {cameras}")


def unknown_words(policy: VLAPolicy, texts: Sequence[str]) -> list[str]:
    """The words of `texts` that the policy never met, in alphabetical order; it reads each as "unknown"."""
    return sorted({word for text in texts for word in split_words(text)} - set(policy.words.vocabulary))


class Judge:
    """A policy's kind of tables in `workers` processes (0 = this one), `count` of them played together."""

    def __init__(self, policy: VLAPolicy, *, workers: int = 2, count: int = 32) -> None:
        arrays = SharedArrays(layout_of(policy, count, 1))
        self._weights = arrays.view("weights")
        with tempfile.TemporaryDirectory() as folder:  # the workers have read it when they are ready
            policy.save_pretrained(folder)
            table = TableConfig(count=count, workers=workers)
            self.workers = Workers(Player, count, workers, table, Path(folder), arrays)

    def evaluate(
        self,
        policy: VLAPolicy,
        plays: Sequence[Play],
        *,
        environment: TableConfig | None = None,
        deterministic: bool = True,
    ) -> list[TableEpisode]:
        """One episode of each play, in the order of the plays: what `ChunkCollector.evaluate` does."""
        export_weights(policy, self._weights)
        return self.workers.deal("evaluate", plays, environment, deterministic)

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *exception: object) -> None:
        self.workers.close()
