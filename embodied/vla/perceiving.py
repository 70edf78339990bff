"""Teaching a policy's eyes: the simulator's state says what an instruction asks for and where that is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from embodied.policies.vla import Observations, VLAPolicy
from embodied.vla.chunk_rollout import ChunkExperience
from embodied.vla.grounding import GroundingConfig, GroundingScenes
from policy_core.optimizer import NonFiniteLoss


def percept_loss(percept: Tensor, state: Tensor) -> Tensor:
    """Mean squared error of percepts [..., n] beside the first n numbers of the state [..., S], in its units."""
    return (percept - state[..., : percept.shape[-1]]).square().mean()


@dataclass(frozen=True)
class PerceptionConfig:
    """How the eyes go on learning while the policy plays.

    learning_rate   0 = not at all: they stay as they were cloned
    pictures        so many of those that were seen since the last update, drawn at random
    minibatch_size  pictures of one step
    grounding       scenes of a hand that plays, of which each step has a batch, too
    device          where they learn: "auto" (a CUDA card if there is one), "cpu", "cuda", "cuda:1"; whoever plays
                    has a copy in the processor
    """

    learning_rate: float = 0.0
    pictures: int = 512
    minibatch_size: int = 128
    grounding: GroundingConfig = field(default_factory=GroundingConfig)
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.learning_rate < 0 or min(self.pictures, self.minibatch_size) < 1:
            raise ValueError(
                "perception: learning_rate must not be negative, pictures and minibatch_size at least 1"
            )


def fit_perception(
    policy: VLAPolicy,
    optimizer: torch.optim.Optimizer,
    experience: ChunkExperience,
    scenes: GroundingScenes | None,
    config: PerceptionConfig,
    generator: torch.Generator,
) -> dict[str, float]:
    """A pass over some of what was seen while playing, each step with a batch of `scenes`. The hand is not moved.

    Metrics: percept_loss and grounding_loss, means over the pass. Raises NonFiniteLoss.
    """
    rows, columns = (experience.executed > 0).nonzero(as_tuple=True)
    drawn = torch.randperm(len(rows), generator=generator)[: config.pictures]
    losses: dict[str, list[Tensor]] = {"percept_loss": []}
    for some in drawn.split(config.minibatch_size):
        at = (rows[some], columns[some])
        batch: Observations = {name: tensor[at] for name, tensor in experience.observations.items()}
        loss = percept_loss(policy.perceive(batch), batch["state"])
        losses["percept_loss"].append(loss.detach())
        if scenes is not None:
            grounding = scenes.loss(policy, scenes.draw(generator))
            losses.setdefault("grounding_loss", []).append(grounding.detach())
            loss = loss + grounding
        if not math.isfinite(loss.item()):
            raise NonFiniteLoss("NaN or infinity in what the eyes say", setting="perception.learning_rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return {name: float(torch.stack(values).mean()) for name, values in losses.items()}
