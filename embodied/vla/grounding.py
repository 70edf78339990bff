"""Learning where words point to, from simulated scenes that need no demonstrations.

Few demonstrations teach a policy to know their scenes by heart. Scenes with sentences about everything in them cost
milliseconds each, and the policy's eyes learn from them beside whatever else it learns:

    scenes = GroundingScenes.collect(config, policy, seed=0)
    loss = scenes.loss(policy, scenes.batch(update))
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from embodied.policies.vla import VLAPolicy, image_key
from embodied.rollouts.processes import Layout, SharedArrays, Workers
from embodied.vla.control_steps import Disturbance, Shuffled
from embodied.vla.judge import check_policy
from envs.own import is_own
from envs.table.env import TableEnv, own_ways, sentences_of
from envs.table.grounding import LOOKS, looks
from envs.table.language import PHRASINGS, TASKS, TRAINING_WORDS, phrases
from envs.table.layout import goals
from envs.table.observations import PERCEPT, PROPRIO
from envs.table.randomization import specs_of
from envs.table.scene import OBJECTS
from experiment.errors import UserError, user_errors

METRES = 0.1
"""Metres in the unit of positions."""
CLOSE = 0.03
"""Metres within which an object counts as found."""
DRY_SCENES = 8
"""Scenes of a dry run."""
_ROUND = 16
"""Scenes of a worker between two looks at the clock."""
_LINE_EVERY = 5.0
"""Seconds between two lines of progress, at the least."""


@dataclass(frozen=True)
class GroundingConfig:
    """Scenes to learn from where words point to.

    scenes          how many, four pictures of each and four sentences about each picture; 0 = off
    batch_size      pictures of one update
    held_out        share of the scenes, the last ones, that only judge
    workers         processes to draw the scenes in before training begins; 0 = this one
    randomization   a preset of `envs.table.randomization` or a file.yaml
    phrasing        of the sentences, as `TableEnv`'s; your own, `file.py:function`, must know all five tasks
    """

    scenes: int = 0
    batch_size: int = 96
    held_out: float = 0.025
    workers: int = 2
    randomization: str = "none"
    phrasing: str = "train"

    def __post_init__(self) -> None:
        if self.scenes < 0 or self.scenes == 1 or self.batch_size < 1 or self.workers < 0:
            raise ValueError(
                "grounding: scenes must be 0 (off) or at least 2, batch_size at least 1 and workers at least 0"
            )
        if not 0 < self.held_out < 1:
            raise ValueError(f"grounding.held_out must be in (0, 1), got {self.held_out}")
        specs_of(self.randomization)
        if not is_own(self.phrasing) and self.phrasing not in PHRASINGS:
            raise ValueError(
                f"grounding.phrasing must be {' or '.join(PHRASINGS)}, or file.py:function, got {self.phrasing!r}"
            )

    def texts(self) -> tuple[str, ...]:
        """What the scenes' sentences consist of, for a vocabulary: the package's words, or one's own sentences.

        Nothing where there are no scenes. UserError where one's own function is missing or fails.
        """
        if not self.scenes:
            return ()
        with user_errors("grounding"):
            own, name = sentences_of(self.phrasing)
            if name == "train":
                return TRAINING_WORDS
            say = partial(phrases, phrasing="synonyms") if own is None else partial(own_ways, own)
            return tuple(text for task in TASKS for goal in goals(task, "train") for text in say(goal))


class SceneWorker:
    """Draws scenes `rows` of the shared arrays. Scene i depends on the seed and i alone."""

    def __init__(
        self,
        rows: range,
        config: GroundingConfig,
        entries: tuple[str, ...],
        size: int,
        arrays: SharedArrays,
        seed: int,
    ) -> None:
        self._rows, self._entries, self._seed = iter(rows), entries, seed
        self._images = {entry: arrays.view(entry) for entry in entries}
        self._percepts, self._proprio = arrays.view("percepts"), arrays.view("proprio")
        with user_errors("grounding"):
            self._env = TableEnv(
                observe=(), image_size=size, randomization=config.randomization, phrasing=config.phrasing
            )

    def draw(self, count: int) -> list[tuple[str, ...]]:
        """The next so many scenes, fewer at the end: the sentences of their pictures. UserError if this machine
        cannot draw."""
        sentences = []
        for number in itertools.islice(self._rows, count):
            with user_errors("grounding"):
                seen = looks(self._env, np.random.default_rng([self._seed, number]), images=self._entries)
            for row, one in enumerate(seen, LOOKS * number):
                for entry in self._entries:
                    self._images[entry][row] = one.images[entry]
                self._percepts[row], self._proprio[row] = one.percepts, one.proprio
                sentences.append(one.sentences)
        return sentences

    def close(self) -> None:
        """Close the table."""
        self._env.close()


class GroundingScenes:
    """Pictures of scenes in memory, [N] of them with a sentence about each of the 4 objects.

    images      name among the observations -> uint8 [N, H, W, 3]
    proprio     float32 [N, P]
    words       int64 [N, 4, L]
    percepts    float32 [N, 4, 17]
    sentences   [N][4]
    training    so many pictures to learn from; those after them, of the scenes held out, only judge
    """

    def __init__(
        self,
        config: GroundingConfig,
        images: Mapping[str, Tensor],
        proprio: Tensor,
        words: Tensor,
        percepts: Tensor,
        sentences: Sequence[Sequence[str]],
        seed: int,
    ) -> None:
        self.images, self.proprio, self.words, self.percepts = images, proprio, words, percepts
        self.sentences = sentences
        scenes = len(words) // LOOKS
        judging = min(max(1, round(config.held_out * scenes)), scenes - 1)
        self.training = LOOKS * (scenes - judging)
        self._shuffled = Shuffled(self.training, config.batch_size, seed)

    @classmethod
    def collect(
        cls,
        config: GroundingConfig,
        policy: VLAPolicy,
        *,
        seed: int,
        source: object = "grounding",
        dry_run: bool = False,
    ) -> GroundingScenes:
        """Draw `config.scenes` scenes as the policy would see them, DRY_SCENES at the most in a dry run; the number
        of workers does not matter.

        UserError if the policy (of `source`) is not one for the table, or its percept is not the table's.
        """
        check_grounding(policy, source)
        if dry_run:
            config = replace(config, scenes=min(config.scenes, DRY_SCENES))
        size, entries = policy.spaces.image_size, tuple(map(image_key, policy.spaces.cameras))
        count = LOOKS * config.scenes
        layout: Layout = {
            **dict.fromkeys(entries, ((count, size, size, 3), "uint8")),
            "proprio": ((count, PROPRIO), "float32"),
            "percepts": ((count, OBJECTS, PERCEPT), "float32"),
        }
        arrays = SharedArrays(layout)
        workers = Workers(SceneWorker, config.scenes, config.workers, config, entries, size, arrays, seed)
        try:
            sentences = _drawn(workers, count)
        finally:
            workers.close()
        words = policy.words.encode_all([text for four in sentences for text in four], policy.config.length)
        return cls(
            config,
            {entry: torch.from_numpy(arrays.view(entry)) for entry in entries},
            torch.from_numpy(arrays.view("proprio")),
            words.unflatten(0, (count, OBJECTS)),
            torch.from_numpy(arrays.view("percepts")),
            sentences,
            seed,
        )

    def batch(self, index: int) -> Tensor:
        """Rows [batch_size] to learn from; every one once an epoch. They depend on the seed and `index` alone."""
        return self._shuffled.batch(index)

    def draw(self, generator: torch.Generator) -> Tensor:
        """Rows [batch_size] to learn from, drawn with the generator."""
        return torch.randint(self.training, (self._shuffled.size,), generator=generator)

    def observations(self, rows: Tensor) -> dict[str, Tensor]:
        """What `VLAPolicy.perceive_each` reads."""
        seen = {name: images[rows] for name, images in self.images.items()}
        return {**seen, "proprio": self.proprio[rows], "words": self.words[rows]}

    def loss(self, policy: VLAPolicy, rows: Tensor, change: Disturbance | None = None) -> Tensor:
        """Mean squared error of what the policy's eyes say, in the state's units; only they learn.

        change: what is done to the observations before, such as augmentation.
        """
        seen = self.observations(rows)
        percept = policy.perceive_each(seen if change is None else change(seen))
        return (percept - self.percepts[rows, :, : percept.shape[-1]]).square().mean()

    @torch.no_grad()
    def judge(self, policy: VLAPolicy) -> dict[str, float]:
        """On the held-out scenes, horizontally: grounding_within_3cm, the share of the objects that are found that
        closely, and grounding_error_cm, the median error."""
        rows = torch.arange(self.training, len(self.words))
        percept = torch.cat([policy.perceive_each(self.observations(some))[..., :2] for some in rows.split(128)])
        distances = METRES * (percept - self.percepts[rows, :, :2]).norm(dim=-1)
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
    if not 2 <= policy.config.percept <= PERCEPT:
        raise UserError(
            f"policy.percept is {policy.config.percept}: with grounding.scenes it must be 2 to {PERCEPT}, what the"
            " scenes tell"
        )


def _drawn(workers: Workers, pictures: int) -> list[tuple[str, ...]]:
    """Let the workers draw; the sentences of all pictures in their order. Tells of its progress."""
    of_worker: list[list[tuple[str, ...]]] = [[] for _ in workers.members]
    began = told = time.monotonic()
    while True:
        for mine, new in zip(of_worker, workers.ask("draw", _ROUND), strict=True):
            mine.extend(new)
        done = sum(map(len, of_worker))
        now = time.monotonic()
        if done == pictures or now - told >= _LINE_EVERY:
            told = now
            print(f"grounding: {done:,} of {pictures:,} pictures, {now - began:.0f} s", file=sys.stderr, flush=True)
        if done == pictures:
            return [sentences for mine in of_worker for sentences in mine]
