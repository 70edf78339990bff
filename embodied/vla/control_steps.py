"""Recorded control steps in memory, as a vision-language-action policy is trained on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from embodied.datasets.recorded import OTHER_INSTRUCTIONS, RecordedEpisode
from embodied.policies.augment import AugmentConfig, augment
from embodied.policies.vla import VLASpaces, image_key
from embodied.policies.words import PADDING, UNKNOWN, Words
from experiment.errors import UserError

Disturbance = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Observations [N, ...] -> the same with random changes."""


@dataclass(frozen=True)
class Chunks:
    """Decisions to imitate: observations [N, ...], actions [N, k, A], and executed [N, k], False beyond an
    episode's end. weights [N, k]: what each step of them counts; None = all alike."""

    observations: Mapping[str, Tensor]
    actions: Tensor
    executed: Tensor
    weights: Tensor | None = None


@dataclass(frozen=True)
class ControlSteps:
    """Every control step of some episodes, one after the other: N steps of E episodes.

    images      name among the observations -> uint8 [N, H, W, 3]
    proprio, state, labels      float32 [N, P], [N, S], [N, A]
    episode     int64 [N]: which episode a step belongs to
    ends        int64 [E]: the step after an episode's last
    words       int64 [E, L]
    weights     float32 [N], what a step counts when it is imitated; None = all alike
    """

    images: Mapping[str, Tensor]
    proprio: Tensor
    state: Tensor
    labels: Tensor
    episode: Tensor
    ends: Tensor
    words: Tensor
    weights: Tensor | None = None

    @classmethod
    def of(
        cls, episodes: Sequence[RecordedEpisode], cameras: Sequence[str], words: Words, length: int
    ) -> ControlSteps:
        """Copy the steps of `episodes` together, the instructions cut or padded to `length` words.

        Raises UserError for an episode that lacks something, or in which the instruction changes.
        """
        for episode in episodes:
            if OTHER_INSTRUCTIONS in episode.left_out:
                raise UserError(
                    f"{episode.name}: its instruction changes on the way, and the policy is told one an episode; "
                    "make one episode of each"
                )
        lengths = torch.tensor([len(episode) for episode in episodes])

        def joined(parts: Iterator[np.ndarray]) -> Tensor:
            return torch.from_numpy(np.concatenate(list(parts)))

        return cls(
            images={image_key(name): joined(episode.images[name] for episode in episodes) for name in cameras},
            proprio=joined(episode.proprio for episode in episodes),
            state=joined(_state(episode) for episode in episodes),
            labels=joined(episode.labels for episode in episodes),
            episode=torch.repeat_interleave(torch.arange(len(episodes)), lengths),
            ends=lengths.cumsum(0),
            words=words.encode_all([episode.instruction for episode in episodes], length),
        )

    def __len__(self) -> int:
        """N."""
        return len(self.labels)

    def spaces(self) -> VLASpaces:
        """What a policy for these steps sees and does. UserError if the images are not square and of one size."""
        sizes = {name: (images.shape[2], images.shape[1]) for name, images in self.images.items()}
        (width, height), *others = dict.fromkeys(sizes.values())
        if height != width:
            raise UserError(f"the images are {width}x{height}: the policy takes square ones")
        if others:
            named = ", ".join(f"{name} {width}x{height}" for name, (width, height) in sizes.items())
            raise UserError(
                f"the cameras' pictures differ in size ({named}): the policy takes one size; set cameras"
            )
        cameras = tuple("front" if key == "image" else key.removesuffix("_image") for key in self.images)
        return VLASpaces(height, cameras, self.proprio.shape[1], self.state.shape[1], self.labels.shape[1])

    def chunks(self, steps: Tensor, length: int) -> Chunks:
        """The decisions at `steps` (int64 [B]): what was seen there, the labels of `length` steps from there on."""
        rows = steps[:, None] + torch.arange(length)
        episode = self.episode[steps]
        executed = rows < self.ends[episode][:, None]
        observations = {name: images[steps] for name, images in self.images.items()}
        observations |= {"proprio": self.proprio[steps], "state": self.state[steps], "words": self.words[episode]}
        rows = rows.clamp(max=len(self) - 1)
        weights = None if self.weights is None else self.weights[rows]
        return Chunks(observations, self.labels[rows], executed, weights)


def _state(episode: RecordedEpisode) -> np.ndarray:
    if episode.state is None:
        raise UserError(
            f"{episode.name}: no environment state was recorded, and the policy learns from it where things are"
        )
    return episode.state


def disturb(
    observations: Mapping[str, Tensor], config: AugmentConfig, *, word_dropout: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Observations [N, ...] with changed images and some words made the unknown one, to give it a meaning."""
    disturbed = dict(observations)
    for name, tensor in observations.items():
        if name == "image" or name.endswith("_image"):
            disturbed[name] = augment(tensor, config, generator)
    if word_dropout:
        words = observations["words"]
        dropped = torch.rand(words.shape, generator=generator) < word_dropout
        disturbed["words"] = torch.where(dropped & (words != PADDING), UNKNOWN, words)
    return disturbed


class Shuffled:
    """Batches of row numbers, every row once an epoch. Which rows batch i has depends on the seed alone."""

    def __init__(self, rows: int, size: int, seed: int) -> None:
        self.rows, self.size, self.seed = rows, min(size, rows), seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def batch(self, index: int) -> Tensor:
        """int64 [size]; an epoch's last rows that fill no batch are left out."""
        epoch, position = divmod(index, self.rows // self.size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.rows, generator=generator)
        return self._order[position * self.size : (position + 1) * self.size]
