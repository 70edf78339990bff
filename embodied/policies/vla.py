"""A compact vision-language-action policy: camera images, proprioception and an instruction -> a chunk of actions.

It has eyes, a hand and, for training, a judge. The eyes (`Perception`) read the words and look at the images: they
say what is asked for and where it is, in the few numbers that the simulator's state begins with, and the state
teaches them that. The hand reads these numbers and proprioception, no picture and no word, so what it learns from
few demonstrations or from rewards holds for every scene and sentence that the eyes can read. The judge (the critic)
reads the simulator's own state and shares nothing with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from embodied.policies.encoders import HEADS, Perception
from embodied.policies.folder import policy_folder, read_description, read_weights, reading_policy, write_policy
from embodied.policies.normalization import ObservationNormalizer
from embodied.policies.words import Words
from experiment.errors import UserError
from policy_core.distributions import DiagonalGaussian
from policy_core.networks import MLP
from policy_core.policy import Evaluation

Observations = Mapping[str, Tensor]
"""image (and CAMERA_image) uint8 [..., H, W, 3], proprio float32 [..., P], words int64 [..., L], state float32
[..., S], which only the critic reads; and percept [..., n] where the eyes have looked already, which then is read
instead of images and words."""


@dataclass(frozen=True)
class VLAConfig:
    """The policy's sizes.

    chunk               actions per decision, k
    channels, blocks    of the image encoder: widths after its two strided convolutions; residual ones that follow
    queries             things that the instruction makes the eyes look for
    words, length       width of the instruction's features; most words of an instruction
    hidden              widths of the action head; critic_hidden: of the critic
    percept             n: so many first numbers of the state are all that the eyes tell the hand
    log_std             initial log standard deviation; always taken within [min_log_std, max_log_std]
    precision           of the convolutions; everything else computes in float32
    ablate              "image" or "words": a floor, that input is replaced by zeros
    """

    chunk: int = 4
    channels: tuple[int, int] = (16, 32)
    blocks: int = 2
    queries: int = 8
    words: int = 48
    length: int = 16
    hidden: tuple[int, ...] = (256, 256)
    critic_hidden: tuple[int, ...] = (256, 256)
    percept: int = 17
    log_std: float = -1.5
    min_log_std: float = -3.0
    max_log_std: float = 0.0
    precision: Literal["bf16", "float32"] = "bf16"
    ablate: Literal["none", "image", "words"] = "none"

    def __post_init__(self) -> None:
        for name in ("chunk", "blocks", "queries", "words", "length", "percept"):
            if getattr(self, name) < 1:
                raise ValueError(f"policy.{name} must be at least 1, got {getattr(self, name)}")
        if self.precision not in ("bf16", "float32"):
            raise ValueError(f"policy.precision must be bf16 or float32, got {self.precision}")
        if self.words % HEADS:
            raise ValueError(f"policy.words must be a multiple of {HEADS}, got {self.words}")
        if not self.min_log_std <= self.log_std <= self.max_log_std:
            raise ValueError(
                f"policy.log_std must be within [{self.min_log_std}, {self.max_log_std}], got {self.log_std}"
            )


@dataclass(frozen=True)
class VLASpaces:
    """image_size: height and width in pixels; cameras: in the order in which their channels are stacked; the
    other sizes: lengths of proprio, privileged state and one action."""

    image_size: int
    cameras: tuple[str, ...]
    proprio_size: int
    state_size: int
    action_size: int


def image_key(camera: str) -> str:
    """Name of a camera's image among the observations: "image" for the front camera, else CAMERA_image."""
    return "image" if camera == "front" else f"{camera}_image"


class VLAPolicy(nn.Module):
    """Observations [...] -> actions [..., k, A], log-probs [..., k] and values [...].

    Sampling and judging go through the same `distribution`: the convolutions' results do not depend on the size
    of the batch, so log-probs taken while acting are those of an update under the same weights.
    """

    def __init__(self, spaces: VLASpaces, config: VLAConfig, words: Words) -> None:
        """Raises UserError if the percept is longer than the state."""
        super().__init__()
        if config.percept > spaces.state_size:
            raise UserError(f"policy.percept is {config.percept}, but the state has {spaces.state_size} numbers")
        self.spaces, self.config, self.words = spaces, config, words
        self.perception = Perception(
            len(words),
            cameras=len(spaces.cameras),
            image_size=spaces.image_size,
            proprio=spaces.proprio_size,
            percept=config.percept,
            length=config.length,
            width=config.words,
            channels=config.channels,
            blocks=config.blocks,
            queries=config.queries,
            dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
        )
        inputs = config.percept + spaces.proprio_size
        outputs = config.chunk * spaces.action_size
        self.actor = MLP((inputs, *config.hidden, outputs), activation="relu", output_gain=0.01)
        self.critic = MLP((spaces.state_size, *config.critic_hidden, 1), activation="relu", output_gain=1.0)
        self._seen = ("words", "proprio", *map(image_key, spaces.cameras))
        self.log_std = Parameter(torch.full((spaces.action_size,), config.log_std))
        self.proprio_normalizer = ObservationNormalizer(spaces.proprio_size, limit=5.0, epsilon=1e-4)
        self.state_normalizer = ObservationNormalizer(spaces.state_size, limit=5.0, epsilon=1e-4)

    def critic_parameters(self) -> Iterator[Parameter]:
        """The parameters that only the value depends on."""
        yield from self.critic.parameters()

    def actor_parameters(self) -> Iterator[Parameter]:
        """The parameters of the hand."""
        yield from self.actor.parameters()
        yield self.log_std

    def perceive(self, observations: Observations) -> Tensor:
        """What is asked for and where it is, [..., n], from images, words and proprioception."""
        leading = observations["words"].shape[:-1]
        flat = {name: observations[name].flatten(0, len(leading) - 1) for name in self._seen}
        return self.perceive_each({**flat, "words": flat["words"].unsqueeze(1)}).view(*leading, -1)

    def perceive_each(self, observations: Observations) -> Tensor:
        """As `perceive` for S sentences about each of N pictures: words [N, S, L] -> [N, S, n].

        Only the eyes may be on another device: what they read is brought there, what they say is brought back.
        """
        words = observations["words"]
        home, there = words.device, self.perception.grid.device
        images = [observations[image_key(camera)].to(there) for camera in self.spaces.cameras]
        if self.config.ablate == "image":
            images = [torch.zeros_like(pixels) for pixels in images]
        if self.config.ablate == "words":
            words = torch.zeros_like(words)
        proprio = self.proprio_normalizer(observations["proprio"])
        percept: Tensor = self.perception(images, words.to(there), proprio.to(there))
        return percept.to(home)

    def distribution(self, observations: Observations) -> DiagonalGaussian:
        """The distribution of actions [..., k, A]. No gradient reaches the eyes."""
        percept = observations.get("percept")
        if percept is None:
            with torch.no_grad():
                percept = self.perceive(observations)
        proprio = self.proprio_normalizer(observations["proprio"])
        means = self.actor(torch.cat([percept.detach(), proprio], -1))
        return DiagonalGaussian(means.unflatten(-1, (self.config.chunk, -1)), self.bounded_log_std())

    def bounded_log_std(self) -> Tensor:
        """[A]; the gradient ignores the bounds, so that a deviation at one of them can come back."""
        bounded = self.log_std.clamp(self.config.min_log_std, self.config.max_log_std)
        return self.log_std + (bounded - self.log_std).detach()

    @torch.no_grad()
    def act(self, observations: Observations, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Actions [..., k, A] and their log-probs [..., k]. noise: standard normal, as actions; None = the mode."""
        distribution = self.distribution(observations)
        actions = distribution.mean
        if noise is not None:
            actions = actions + noise * distribution.log_std.exp()
        return actions, distribution.log_prob(actions).sum(-1)

    def evaluate(self, observations: Observations, actions: Tensor) -> Evaluation:
        """Judge actions [..., k, A]: log-probs and entropy [..., k], a factor per control step; values [...]."""
        distribution = self.distribution(observations)
        return Evaluation(
            log_probs=distribution.log_prob(actions).sum(-1),
            entropy=distribution.entropy().sum(-1),
            values=self.state_values(observations["state"]),
        )

    def state_values(self, state: Tensor) -> Tensor:
        """[..., S] -> [...], with gradients."""
        return self.critic(self.state_normalizer(state)).squeeze(-1)

    @torch.no_grad()
    def values(self, observations: Observations) -> Tensor:
        """[...]; of the observations only the state is read."""
        return self.state_values(observations["state"])

    def learn_normalization(self, *, proprio: Tensor, state: Tensor) -> None:
        """Take raw proprio [N, P] and state [N, S] into the normalisers."""
        self.proprio_normalizer.update(proprio)
        self.state_normalizer.update(state)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write policy.json and policy.safetensors."""
        description = {
            "policy": "vla",
            "spaces": asdict(self.spaces),
            "config": asdict(self.config),
            "vocabulary": self.words.vocabulary,
        }
        write_policy(folder, description, self)

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> VLAPolicy:
        """Read a folder written by `save_pretrained`, or a run's best policy; UserError if it is none."""
        folder = policy_folder(folder)
        with reading_policy(folder, "a vision-language-action policy"):
            description = read_description(folder)
            if description["policy"] != "vla":
                raise ValueError(f"its kind is {description['policy']!r}, not 'vla'")
            spaces, config = (_tuples(description[key]) for key in ("spaces", "config"))
            policy = cls(VLASpaces(**spaces), VLAConfig(**config), Words(description["vocabulary"]))
            read_weights(folder, policy)
        policy.proprio_normalizer.refresh()
        policy.state_normalizer.refresh()
        return policy


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """The same fields with tuples for lists: JSON has no tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
