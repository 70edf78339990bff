"""Decision Transformer (Chen 2021, 2106.01345): actions as what comes next, given what is still to be earned.

A policy over Rollouts: row by row it reads (return to go, observation, action) of the decisions so far and gives
the distribution of the next action: trained by the same likelihood as any clone, masked like any rollout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from embodied.policies.folder import policy_folder, read_description, read_weights, reading_policy, write_policy
from embodied.policies.normalization import ObservationNormalizer
from embodied.policies.numpy_actor import Spaces
from policy_core.distributions import DiagonalGaussian
from policy_core.policy import Evaluation


@dataclass(frozen=True)
class DecisionTransformerConfig:
    """context      decisions that are read
    width, layers, heads, dropout: of the transformer
    longest      steps of an episode that have a place of their own; later ones share the last
    """

    context: int = 20
    width: int = 128
    layers: int = 3
    heads: int = 1
    dropout: float = 0.1
    longest: int = 1024

    def __post_init__(self) -> None:
        if min(self.context, self.width, self.layers, self.heads, self.longest) < 1 or self.width % self.heads:
            raise ValueError(
                "context, width, layers, heads and longest must be positive, width a multiple of heads"
            )


class DecisionTransformer(nn.Module):
    """Observations are a mapping: "observations" [B, T, D] raw, "returns" [B, T] still to be earned, "steps" [B, T]
    int since the episode's beginning, "present" [B, T] bool (False on padding, which is not read)."""

    def __init__(self, spaces: Spaces, config: DecisionTransformerConfig) -> None:
        super().__init__()
        if spaces.discrete:
            raise ValueError("the decision transformer is for continuous actions")
        self.spaces, self.config = spaces, config
        width = config.width
        self.normalizer = ObservationNormalizer(spaces.observation_size)
        self.register_buffer("return_scale", torch.ones(()))
        self.register_buffer("action_reach", torch.ones(spaces.action_size))
        self.register_buffer("action_centre", torch.zeros(spaces.action_size))
        self.of_return, self.of_observation = nn.Linear(1, width), nn.Linear(spaces.observation_size, width)
        self.of_action, self.of_step = nn.Linear(spaces.action_size, width), nn.Embedding(config.longest, width)
        self.norm = nn.LayerNorm(width)
        layer = nn.TransformerEncoderLayer(
            width, config.heads, 4 * width, config.dropout, "gelu", batch_first=True, norm_first=True
        )
        self.trunk = nn.TransformerEncoder(layer, config.layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, spaces.action_size)
        self.log_std = Parameter(torch.full((spaces.action_size,), -1.0))

    return_scale: Tensor
    action_reach: Tensor
    action_centre: Tensor

    def forward(self, observations: Mapping[str, Tensor], actions: Tensor) -> DiagonalGaussian:
        """Distribution of each decision's action [B, T, A] in units of the bounds, from what came before it.

        actions [B, T, A] of the environment; a decision's own action is not read.
        """
        seen, present = self.normalizer(observations["observations"]), observations["present"]
        batch, length = present.shape
        place = self.of_step(observations["steps"].clamp(max=self.config.longest - 1))
        owed = self.of_return((observations["returns"] / self.return_scale).unsqueeze(-1))
        done = self.of_action((actions - self.action_centre) / self.action_reach)
        triples = torch.stack([owed + place, self.of_observation(seen) + place, done + place], dim=2)
        tokens = self.norm(triples.flatten(1, 2))  # [B, 3T, width]: return, observation, action, return, ...
        absent = ~present.repeat_interleave(3, dim=1)
        causal = torch.ones(3 * length, 3 * length, dtype=torch.bool, device=tokens.device).triu(1)
        blocked = causal | absent.unsqueeze(1)
        blocked = blocked & ~torch.eye(3 * length, dtype=torch.bool, device=tokens.device)  # padding reads itself
        hidden = self.trunk(tokens, mask=blocked.repeat_interleave(self.config.heads, dim=0))
        mean = torch.tanh(self.head(hidden.view(batch, length, 3, -1)[:, :, 1]))
        return DiagonalGaussian(mean, self.log_std)

    def evaluate(self, observations: Mapping[str, Tensor], actions: Tensor) -> Evaluation:
        """Log-probs [B, T, A]; there is no critic."""
        distribution = self(observations, actions)
        normal = (actions - self.action_centre) / self.action_reach
        return Evaluation(distribution.log_prob(normal), distribution.entropy())

    @torch.no_grad()
    def mode(self, observations: Mapping[str, Tensor], actions: Tensor) -> Tensor:
        """The last decision's most likely action [B, A], in the environment's units."""
        chosen = self(observations, actions).mode()[:, -1]
        return chosen * self.action_reach + self.action_centre

    def save_pretrained(self, folder: Path | str) -> None:
        """Write policy.json and policy.safetensors."""
        description = {
            "policy": "decision_transformer",
            "spaces": asdict(self.spaces),
            "config": asdict(self.config),
        }
        write_policy(folder, description, self)

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> DecisionTransformer:
        """Read a folder written by `save_pretrained`, or a run's best policy, to act; UserError if it is none."""
        folder = policy_folder(folder)
        with reading_policy(folder, "a decision transformer"):
            description = read_description(folder)
            policy = cls(Spaces(**description["spaces"]), DecisionTransformerConfig(**description["config"]))
            read_weights(folder, policy)
        policy.normalizer.refresh()
        return policy.eval()


class Conditioned:
    """Acts in N environments: remembers each one's last decisions and asks for `target` in all."""

    def __init__(self, policy: DecisionTransformer, environments: int, target: float) -> None:
        self.policy, self.target = policy, target
        length, spaces = policy.config.context, policy.spaces
        self.observations = torch.zeros(environments, length, spaces.observation_size)
        self.actions = torch.zeros(environments, length, spaces.action_size)
        self.returns = torch.zeros(environments, length)
        self.steps = torch.zeros(environments, length, dtype=torch.long)
        self.present = torch.zeros(environments, length, dtype=torch.bool)
        self.owed = torch.full((environments,), target)
        self.count = torch.zeros(environments, dtype=torch.long)

    def act(self, observations: Tensor) -> Tensor:
        """[N, D] raw -> [N, A] in the environment's units."""
        for memory in (self.observations, self.actions, self.returns, self.steps, self.present):
            memory.copy_(memory.roll(-1, dims=1))
        self.observations[:, -1], self.actions[:, -1] = observations, 0.0
        self.returns[:, -1], self.steps[:, -1], self.present[:, -1] = self.owed, self.count, True
        told = {
            "observations": self.observations,
            "returns": self.returns,
            "steps": self.steps,
            "present": self.present,
        }
        chosen = self.policy.mode(told, self.actions)
        self.actions[:, -1] = chosen
        return chosen

    def observe(self, rewards: Tensor, ended: Tensor) -> None:
        """rewards [N] of the step just made; where an episode ended [N] bool the memory begins anew."""
        self.owed = torch.where(ended, self.target, self.owed - rewards)
        self.count = torch.where(ended, 0, self.count + 1)
        self.present[ended] = False
