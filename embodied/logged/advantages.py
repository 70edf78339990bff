"""What an IQL run thinks of recorded steps: weights for imitating them, also in a policy that sees pictures only.

IQL's critics read the privileged state, which a simulator recorded beside the pictures; what is imitated in
proportion to exp(advantage) (IQL eq. 7, 2110.06169) reads what its own eyes see. So a policy that looks learns
offline from demonstrations of mixed quality, and the critics are not needed where it acts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from embodied.logged.offline import CriticConfig
from embodied.policies.state_mlp import StatePolicy
from experiment.checkpoint import load_checkpoint
from experiment.config import build_from_dict, read_tree
from experiment.errors import UserError
from policy_core.critics import EnsembleCritic
from policy_core.iql import advantage_weights

AT_ONCE = 4096


@dataclass(frozen=True)
class AdvantageConfig:
    """critic: an embodied/iql run on the same steps' environment_state; None = all steps are imitated alike;
    inverse_temperature, max_weight: a step counts min(exp(inverse_temperature * advantage), max_weight)."""

    critic: str | None = None
    inverse_temperature: float = 10.0
    max_weight: float = 100.0

    def __post_init__(self) -> None:
        if self.inverse_temperature < 0 or self.max_weight <= 0:
            raise ValueError("inverse_temperature must not be negative, max_weight must be positive")


@dataclass(frozen=True)
class StepJudge:
    """An IQL run's value and slow critics."""

    policy: StatePolicy
    critics: EnsembleCritic

    @classmethod
    def load(cls, folder: str | Path, *, states: int, actions: int) -> StepJudge:
        """The judge of the run's last checkpoint. UserError for another recipe's run, or for other sizes."""
        run = Path(folder)
        if not (run / "config.yaml").is_file():
            raise UserError(f"advantage.critic: {run} is no run; train embodied/iql on the same data first")
        values = read_tree(run / "config.yaml").values
        if values.get("recipe") != "embodied/iql":
            raise UserError(f"advantage.critic: {run} is a run of {values.get('recipe')}, not of embodied/iql")
        checkpoint = load_checkpoint(run / "checkpoints" / "last")
        policy = StatePolicy.from_pretrained(checkpoint.folder / "policy")
        found = (policy.spaces.observation_size, policy.spaces.action_size)
        if found != (states, actions):
            raise UserError(
                f"advantage.critic: {run} judges {found[1]} actions in states of {found[0]} numbers, the data set "
                f"has {actions} and {states}; train it with data.observation_keys=[environment_state]"
            )
        config = build_from_dict(values.get("critic") or {}, CriticConfig, str(run / "config.yaml"))
        critics = EnsembleCritic(config.members, states, actions, config.hidden, layer_norm=config.layer_norm)
        critics.load_state_dict(checkpoint.state["parts"]["modules"]["target"])
        return cls(policy, critics)

    @torch.no_grad()
    def advantages(self, states: Tensor, actions: Tensor) -> Tensor:
        """min over critics of Q(s, a), less V(s). states [N, S], actions [N, A] raw -> [N] in the run's units."""
        found = []
        for state, action in zip(states.split(AT_ONCE), actions.split(AT_ONCE), strict=True):
            features = self.policy.normalizer(state)
            taken = self.policy.to_learner(action).clamp(-1.0, 1.0)
            found.append(self.critics(features, taken).amin(0) - self.policy.values_of(features))
        return torch.cat(found)


def step_weights(config: AdvantageConfig, states: Tensor, actions: Tensor) -> Tensor | None:
    """What each step counts when it is imitated, [N]; None where all count alike.

    Raises UserError as `StepJudge.load`, and where no step counts anything.
    """
    if config.critic is None:
        return None
    judge = StepJudge.load(config.critic, states=states.shape[1], actions=actions.shape[1])
    weights = advantage_weights(
        advantages=judge.advantages(states, actions),
        inverse_temperature=config.inverse_temperature,
        max_weight=config.max_weight,
    )
    if not bool(weights.isfinite().all()) or float(weights.sum()) == 0.0:
        raise UserError(f"advantage.critic: {config.critic} has no finite opinion of these steps; see its curves")
    return weights
