"""Learning where words point to, from simulated scenes that need no demonstrations.

Few demonstrations teach a policy to know their scenes by heart. Scenes with sentences about everything in them cost
milliseconds each, and the policy's auxiliary head learns from them beside whatever else it learns:

    scenes = GroundingScenes.collect(config, policy, seed=0)
    loss, metrics = scenes.loss(policy, scenes.batch(update), change)
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from embodied.control_steps import Disturbance, Shuffled
from embodied.policies.vla import VLAPolicy, image_key
from embodied.processes import Layout, SharedArrays, Workers
from embodied.vla_judge import check_policy
from envs.table.env import TableEnv
from envs.table.grounding import LOCATED, look
from envs.table.randomization import specs_of
from envs.table.scene import OBJECTS
from experiment.errors import UserError
from policy_core.ppo import AuxiliaryLoss, Metrics

METRES = 0.1
"""In the unit of positions."""
CLOSE = 0.03
"""Metres within which an object counts as found."""
_ROUND = 64
"""Scenes of a worker between two lines of progress at the most often."""
_LINE_EVERY = 5.0
"""Seconds."""


@dataclass(frozen=True)
class GroundingConfig:
    """Scenes to learn from where words point to.

    scenes          how many (a picture each, four sentences); 0 = off
    batch_size      sentences of one update
    held_out        share of the scenes that only judge
    workers         processes to draw the scenes in before training begins; 0 = this one
    randomization   a preset of `envs.table.randomization`
    """

    scenes: int = 0
    batch_size: int = 160
    held_out: float = 0.025
    workers: int = 2
    randomization: str = "none"

    def __post_init__(self) -> None:
        if self.scenes < 0 or self.scenes == 1 or self.batch_size < 1 or self.workers < 0:
            raise ValueError(
                "grounding: scenes must be 0 (off) or at least 2, batch_size at least 1 and workers at least 0"
            )
        if not 0 < self.held_out < 1:
            raise ValueError(f"grounding.held_out must be in (0, 1), got {self.held_out}")
        specs_of(self.randomization)


class SceneWorker:
    """Draws scenes `rows` of the shared arrays. Scene i depends on the seed and i alone."""

    def __init__(
        self, rows: range, randomization: str, entries: tuple[str, ...], size: int, arrays: SharedArrays, seed: int
    ) -> None:
        self._rows, self._entries, self._seed = iter(rows), entries, seed
        self._images = {entry: arrays.view(entry) for entry in entries}
        self._positions = arrays.view("positions")
        with _for_the_user():
            self._env = TableEnv(observe=(), image_size=size, randomization=randomization)

    def draw(self, count: int) -> list[tuple[str, ...]]:
        """The next so many scenes, fewer at the end; their sentences. UserError if this machine cannot draw."""
        sentences = []
        for row in itertools.islice(self._rows, count):
            with _for_the_user():
                seen = look(self._env, np.random.default_rng([self._seed, row]), images=self._entries)
            for entry in self._entries:
                self._images[entry][row] = seen.images[entry]
            self._positions[row] = seen.positions
            sentences.append(seen.sentences)
        return sentences

    def close(self) -> None:
        """Close the table."""
        self._env.close()


class GroundingScenes:
    """Scenes in memory, each with four sentences: row 4 i + j is the sentence about object j of scene i.

    images      name among the observations -> uint8 [N, H, W, 3]
    words       int64 [4 N, L]
    positions   float32 [4 N, 6]
    sentences   [4 N]
    training    rows to learn from; those of the last scenes, held out, only judge
    """

    def __init__(
        self,
        config: GroundingConfig,
        images: Mapping[str, Tensor],
        words: Tensor,
        positions: Tensor,
        sentences: tuple[str, ...],
        seed: int,
    ) -> None:
        self.images, self.words, self.positions, self.sentences = images, words, positions, sentences
        scenes = len(words) // OBJECTS
        judging = min(max(1, round(config.held_out * scenes)), scenes - 1)
        self.training = OBJECTS * (scenes - judging)
        self._shuffled = Shuffled(self.training, config.batch_size, seed)

    @classmethod
    def collect(
        cls, config: GroundingConfig, policy: VLAPolicy, *, seed: int, source: object = "grounding"
    ) -> GroundingScenes:
        """Draw `config.scenes` scenes as the policy would see them; the number of workers does not matter.

        UserError if the policy (of `source`) is not one for the table, or predicts other numbers than positions.
        """
        check_grounding(policy, source)
        size, entries = policy.spaces.image_size, tuple(map(image_key, policy.spaces.cameras))
        layout: Layout = dict.fromkeys(entries, ((config.scenes, size, size, 3), "uint8"))
        arrays = SharedArrays({**layout, "positions": ((config.scenes, OBJECTS, LOCATED), "float32")})
        workers = Workers(
            SceneWorker, config.scenes, config.workers, config.randomization, entries, size, arrays, seed
        )
        try:
            sentences = _drawn(workers, config.scenes)
        finally:
            workers.close()
        return cls(
            config,
            {entry: torch.from_numpy(arrays.view(entry)) for entry in entries},
            policy.words.encode_all(sentences, policy.config.length),
            torch.from_numpy(arrays.view("positions")).flatten(0, 1),
            tuple(sentences),
            seed,
        )

    def batch(self, index: int) -> Tensor:
        """Rows [batch_size] to learn from; every one once an epoch. They depend on the seed and `index` alone."""
        return self._shuffled.batch(index)

    def observations(self, rows: Tensor) -> dict[str, Tensor]:
        """What `VLAPolicy.locate` reads."""
        seen = {name: images[rows // OBJECTS] for name, images in self.images.items()}
        return {**seen, "words": self.words[rows]}

    def loss(self, policy: VLAPolicy, rows: Tensor, change: Disturbance) -> tuple[Tensor, Metrics]:
        """Mean squared error of the positions that the policy finds, in the state's units. Metrics: grounding_loss.

        Only perception learns from it: instruction, vision and locator. change: what is done to the observations
        before, such as augmentation.
        """
        located = policy.locate(change(self.observations(rows)))
        loss = (located - self.positions[rows, : located.shape[-1]]).square().mean()
        return loss, {"grounding_loss": loss.detach()}

    def auxiliary(
        self, policy: VLAPolicy, *, coef: float, generator: torch.Generator, change: Disturbance
    ) -> AuxiliaryLoss:
        """For `policy_core.ppo.update(auxiliary=...)`: coef times the loss on rows that the generator draws."""

        def draw() -> tuple[Tensor, Metrics]:
            rows = torch.randint(self.training, (self._shuffled.size,), generator=generator)
            loss, metrics = self.loss(policy, rows, change)
            return coef * loss, metrics

        return draw

    @torch.no_grad()
    def judge(self, policy: VLAPolicy) -> dict[str, float]:
        """On the held-out scenes, horizontally: grounding_within_3cm, the share of the objects that are found that
        closely, and grounding_error_cm, the median error."""
        rows = torch.arange(self.training, len(self.words))
        located = torch.cat([policy.locate(self.observations(some))[:, :2] for some in rows.split(512)])
        distances = METRES * (located - self.positions[rows, :2]).norm(dim=-1)
        return {
            "grounding_within_3cm": float((distances < CLOSE).float().mean()),
            "grounding_error_cm": 100 * float(distances.median()),
        }


def check_grounding(policy: VLAPolicy, source: object) -> None:
    """UserError if the policy is not one for the table, whose environments alone tell where words point to."""
    try:
        check_policy(policy, source)
    except UserError as error:
        raise UserError(f"{error}; grounding.scenes are of the table, leave them at 0 for others") from error
    if not 2 <= policy.config.localized <= LOCATED:
        raise UserError(
            f"policy.localized is {policy.config.localized}: with grounding.scenes it must be 2 to {LOCATED}, the"
            " positions that the scenes tell"
        )


@contextlib.contextmanager
def _for_the_user() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UserError(f"grounding: {error}") from error


def _drawn(workers: Workers, scenes: int) -> list[str]:
    """Let the workers draw; all sentences in the scenes' order. Tells of its progress."""
    of_worker: list[list[tuple[str, ...]]] = [[] for _ in workers.members]
    began = told = time.monotonic()
    while True:
        for mine, new in zip(of_worker, workers.ask("draw", _ROUND), strict=True):
            mine.extend(new)
        done = sum(map(len, of_worker))
        now = time.monotonic()
        if done == scenes or now - told >= _LINE_EVERY:
            told = now
            print(f"grounding: {done:,} of {scenes:,} scenes, {now - began:.0f} s", file=sys.stderr, flush=True)
        if done == scenes:
            return [sentence for mine in of_worker for scene in mine for sentence in scene]
