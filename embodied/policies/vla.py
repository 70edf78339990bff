"""A compact vision-language-action policy: camera images, proprioception and an instruction -> a chunk of actions.

An auxiliary head says where the named object and its target place are; its answer is part of what the action head
reads. The critic judges the simulator's own state and shares nothing with the actor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import Parameter

from embodied.normalization import ObservationNormalizer
from embodied.policies.encoders import HEADS, ImageEncoder, InstructionEncoder
from embodied.policies.words import Words
from experiment.errors import UserError
from policy_core.distributions import DiagonalGaussian
from policy_core.networks import MLP
from policy_core.policy import Evaluation

Observations = Mapping[str, Tensor]
"""image (and CAMERA_image) uint8 [..., H, W, 3], proprio float32 [..., P], words int64 [..., L], state float32
[..., S]; only the critic and the auxiliary error read the state."""


@dataclass(frozen=True)
class VLAConfig:
    """The policy's sizes.

    chunk               actions per decision, k
    channels, blocks    of the image encoder: widths after its two strided convolutions; FiLM blocks
    queries             things that the instruction makes the policy look for
    words, length       width of the instruction's features; most words of an instruction
    hidden              widths of the action head; critic_hidden: of the critic
    localized           first numbers of the state, predicted by the auxiliary head
    log_std             initial log standard deviation; always taken within [min_log_std, max_log_std]
    precision           of the convolutions; everything else computes in float32
    ablate              "image" or "words": a floor, that input is replaced by zeros
    """

    chunk: int = 4
    channels: tuple[int, int] = (16, 32)
    blocks: int = 1
    queries: int = 16
    words: int = 48
    length: int = 16
    hidden: tuple[int, ...] = (256, 256)
    critic_hidden: tuple[int, ...] = (256, 256)
    localized: int = 6
    log_std: float = -1.5
    min_log_std: float = -3.0
    max_log_std: float = 0.0
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    ablate: Literal["none", "image", "words"] = "none"

    def __post_init__(self) -> None:
        for name in ("chunk", "blocks", "queries", "words", "length", "localized"):
            if getattr(self, name) < 1:
                raise ValueError(f"policy.{name} must be at least 1, got {getattr(self, name)}")
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

    perception_stops: the gradient of what is done ends at what is seen, which then learns from the auxiliary head's
    error alone.
    """

    def __init__(self, spaces: VLASpaces, config: VLAConfig, words: Words) -> None:
        """Raises UserError if more numbers are to be localised than the state has."""
        super().__init__()
        if config.localized > spaces.state_size:
            raise UserError(
                f"policy.localized is {config.localized}, but the state has {spaces.state_size} numbers"
            )
        self.spaces, self.config, self.words = spaces, config, words
        self.instruction = InstructionEncoder(len(words), length=config.length, width=config.words)
        self.vision = ImageEncoder(
            len(spaces.cameras),
            size=spaces.image_size,
            channels=config.channels,
            blocks=config.blocks,
            queries=config.queries,
            instruction=config.words,
        )
        features = self.vision.features + config.words
        self.locator = MLP((features, 128, config.localized), activation="relu", output_gain=0.1)
        inputs = features + config.localized + spaces.proprio_size
        outputs = config.chunk * spaces.action_size
        self.actor = MLP((inputs, *config.hidden, outputs), activation="relu", output_gain=0.01)
        self.critic = MLP((spaces.state_size, *config.critic_hidden, 1), activation="relu", output_gain=1.0)
        self.log_std = Parameter(torch.full((spaces.action_size,), config.log_std))
        self.proprio_normalizer = ObservationNormalizer(spaces.proprio_size, limit=5.0, epsilon=1e-4)
        self.state_normalizer = ObservationNormalizer(spaces.state_size, limit=5.0, epsilon=1e-4)
        self.perception_stops = False
        self._dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32

    def critic_parameters(self) -> Iterator[Parameter]:
        """Those that only the value depends on."""
        yield from self.critic.parameters()

    def perception_parameters(self) -> Iterator[Parameter]:
        """Those that tell where things are: all that the auxiliary head's error depends on."""
        for part in (self.vision, self.instruction, self.locator):
            yield from part.parameters()

    def actor_parameters(self) -> Iterator[Parameter]:
        """All but the critic's."""
        critic = {id(parameter) for parameter in self.critic_parameters()}
        yield from (parameter for parameter in self.parameters() if id(parameter) not in critic)

    def locate(self, observations: Observations) -> Tensor:
        """Where the named things are, [..., localized]: the auxiliary head's answer to image and words alone."""
        leading = observations["words"].shape[:-1]
        return self._perceive(observations)[1].view(*leading, -1)

    def _perceive(self, observations: Observations) -> tuple[Tensor, Tensor]:
        """What the instruction makes it see [N, F], and where that puts the named things [N, localized]."""
        words = observations["words"].flatten(0, -2)
        keys = [image_key(camera) for camera in self.spaces.cameras]
        images = [observations[key].flatten(0, -4) for key in keys]
        pixels = images[0] if len(images) == 1 else torch.cat(images, -1)
        if self.config.ablate == "image":
            pixels = torch.zeros_like(pixels)
        if self.config.ablate == "words":
            words = torch.zeros_like(words)
        instruction = self.instruction(words)
        seen = torch.cat([self.vision(pixels, instruction, self._dtype), instruction], -1)
        return seen, self.locator(seen)

    def forward(self, observations: Observations) -> tuple[DiagonalGaussian, Tensor]:
        """The distribution of actions [..., k, A] and the predicted state [..., localized]."""
        leading = observations["words"].shape[:-1]
        seen, located = self._perceive(observations)
        proprio = self.proprio_normalizer(observations["proprio"].flatten(0, -2))
        perceived = torch.cat([seen, located], -1)
        if self.perception_stops:
            perceived = perceived.detach()
        means = self.actor(torch.cat([perceived, proprio], -1))
        chunk = (*leading, self.config.chunk, self.spaces.action_size)
        return DiagonalGaussian(means.view(chunk), self.bounded_log_std()), located.view(*leading, -1)

    def bounded_log_std(self) -> Tensor:
        """[A]; the gradient ignores the bounds, so that a deviation at one of them can come back."""
        bounded = self.log_std.clamp(self.config.min_log_std, self.config.max_log_std)
        return self.log_std + (bounded - self.log_std).detach()

    def distribution(self, observations: Observations) -> DiagonalGaussian:
        """Of actions [..., k, A]."""
        return self(observations)[0]

    @torch.no_grad()
    def act(self, observations: Observations, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Actions [..., k, A] and their log-probs [..., k]. noise: standard normal, as actions; None = the mode."""
        distribution = self.distribution(observations)
        actions = distribution.mean
        if noise is not None:
            actions = actions + noise * distribution.log_std.exp()
        return actions, distribution.log_prob(actions).sum(-1)

    def evaluate(self, observations: Observations, actions: Tensor) -> Evaluation:
        """Judge actions [..., k, A]: log-probs and entropy [..., k], a factor per control step; values [...] and
        auxiliary [...], the mean squared error of the predicted positions, in the state's units."""
        distribution, located = self(observations)
        state = observations["state"]
        return Evaluation(
            log_probs=distribution.log_prob(actions).sum(-1),
            entropy=distribution.entropy().sum(-1),
            values=self.state_values(state),
            auxiliary=(located - state[..., : self.config.localized]).square().mean(-1),
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
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        description = {
            "policy": "vla",
            "spaces": asdict(self.spaces),
            "config": asdict(self.config),
            "vocabulary": self.words.vocabulary,
        }
        (folder / "policy.json").write_text(json.dumps(description, indent=2) + "\n")
        save_file({name: t.contiguous() for name, t in self.state_dict().items()}, folder / "policy.safetensors")

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> VLAPolicy:
        """Read a folder written by `save_pretrained`; UserError if it is none."""
        folder = Path(folder)
        try:
            description = json.loads((folder / "policy.json").read_text())
            if description["policy"] != "vla":
                raise ValueError(f"its kind is {description['policy']!r}, not 'vla'")
            spaces, config = (_tuples(description[key]) for key in ("spaces", "config"))
            policy = cls(VLASpaces(**spaces), VLAConfig(**config), Words(description["vocabulary"]))
            policy.load_state_dict(load_file(folder / "policy.safetensors"))
        except (FileNotFoundError, NotADirectoryError) as error:
            missing = "policy.safetensors" if (folder / "policy.json").is_file() else "policy.json"
            raise UserError(
                f"{folder}: no policy here ({missing} is missing); give a folder that save_pretrained wrote, such"
                " as RUN/checkpoints/best/policy"
            ) from error
        except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{folder}: not a vision-language-action policy, or a damaged one: {reason}") from error
        policy.proprio_normalizer.refresh()
        policy.state_normalizer.refresh()
        return policy


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has no tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
