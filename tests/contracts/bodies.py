"""Small real rollouts of both bodies, gathered by the recipes' own code, and what the contracts do to them."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from embodied.policies.numpy_actor import StatePolicyConfig
from embodied.policies.state_mlp import StatePolicy
from embodied.rollouts.rollout import Collector, judge, spaces_of
from embodied.rollouts.workers import EnvironmentConfig, environment_spec
from llm_rlhf.models.causal import build_policy
from llm_rlhf.models.generation import generate, to_rollout
from llm_rlhf.models.loading import ModelConfig
from policy_core.policy import Evaluation
from policy_core.ppo import PPOConfig, update
from policy_core.returns import gae
from policy_core.rollout import Rollout, map_nested

GAMMA, LAMBDA = 0.97, 0.9
NAN = float("nan")


@dataclass(frozen=True)
class Body:
    """A policy, what it gathered, and what is real beyond an episode's cut.

    policy          in float64; contracts move copies of it
    reference       another one, near it
    rollout         [B, T], gamma GAMMA, with ref_log_probs, values and next_values
    choices         of a categorical policy
    """

    policy: nn.Module
    reference: nn.Module
    rollout: Rollout
    choices: int | None


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def jittered(policy: Any, scale: float) -> Any:
    """A copy with normal noise on every parameter."""
    copied = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return copied


def robot(environment: str, *, limit: int) -> Body:
    """Four environments, 36 steps each: several episodes in a row, cut by the time limit or (CartPole) ended."""
    torch.manual_seed(1)
    config = EnvironmentConfig(id=environment, max_episode_steps=limit, count=4, workers=0)
    spaces = spaces_of(environment_spec(config))
    policy = jittered(StatePolicy(spaces, StatePolicyConfig(hidden=(8, 8))), 0.3)
    reference = jittered(policy, 0.1)
    with Collector(config, policy, steps=36, seed=3) as collector:
        gathered = collector.collect(policy)
    exact = replace(
        gathered,
        observations=gathered.observations.double(),
        actions=gathered.actions if spaces.discrete else gathered.actions.double(),
        rewards=gathered.rewards.double(),
        next_observations=gathered.next_observations.double(),
    )
    rollout = judge(exact, policy, gamma=GAMMA, rewards=exact.rewards, reference=reference)
    return Body(policy, reference, rollout, spaces.action_size if spaces.discrete else None)


def language() -> Body:
    """Three prompts of three lengths, two completions each, some ended by EOS and some cut and bootstrapped.

    A random penalty for every token beside the reward at the end makes the columns of a row differ.
    """
    torch.manual_seed(2)
    policy, tokenizer = build_policy(
        ModelConfig(layers=2, width=16, heads=2, context=32), alphabet="0123456789+", value_head=True
    )
    policy = jittered(policy, 0.2)
    reference = jittered(policy, 0.05)
    prompts = [[4, 5, 6, 7], [8, 9], [10, 11, 12]]
    samples = generate(
        policy,
        prompts,
        samples_per_prompt=2,
        max_new_tokens=7,
        ends={int(tokenizer.eos_token_id)},
        pad=int(tokenizer.pad_token_id),
        generator=torch.Generator().manual_seed(7),
        bootstrap=True,
    )
    with torch.no_grad():
        ref_log_probs = reference.evaluate(samples.observations(), samples.input_ids).log_probs
    rollout = to_rollout(
        samples,
        torch.randn(6),
        scored=torch.ones(6, dtype=torch.bool),
        ref_log_probs=ref_log_probs,
        cut_is_end=False,
        gamma=GAMMA,
    )
    rollout = replace(rollout, rewards=rollout.rewards - torch.where(rollout.mask, torch.rand(6, 11), 0.0))
    return Body(policy, reference, rollout, len(tokenizer))


def once(build: Callable[[], Body]) -> Callable[[], Body]:
    """The body, gathered in float64 when it is first asked for."""

    @functools.cache
    def built() -> Body:
        with double_precision(), torch.random.fork_rng():
            return build()

    return built


BODIES: dict[str, Callable[[], Body]] = {
    "robot_pendulum": once(lambda: robot("Pendulum-v1", limit=10)),
    "robot_cartpole": once(lambda: robot("CartPole-v1", limit=15)),
    "language": once(language),
}
CATEGORICAL = ["robot_cartpole", "language"]


# ---------------------------------------------------------------- what the contracts compare


def trained(
    policy: nn.Module, rollout: Rollout, config: PPOConfig, *, rate: float = 0.01, **options: Any
) -> tuple[Tensor, dict[str, float]]:
    """Advantages, then one update of a copy: its new weights and the metrics.

    Plain gradient descent without clipping, so that a gradient of the wrong scale shows.
    """
    moved = copy.deepcopy(policy)
    advantages, returns = gae(rollout, gae_lambda=LAMBDA)
    metrics = update(
        policy=moved,  # type: ignore[arg-type]
        optimizer=torch.optim.SGD(moved.parameters(), lr=rate),
        rollout=rollout,
        config=replace(config, max_grad_norm=1e9),
        generator=torch.Generator().manual_seed(11),
        **{"advantages": advantages, "returns": returns, **options},
    )
    return weights_of(moved), metrics


def weights_of(policy: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in policy.parameters()])


def same(one: Tensor, other: Tensor, *, atol: float = 1e-11) -> None:
    torch.testing.assert_close(one, other, rtol=0.0, atol=atol)


# ---------------------------------------------------------------- more columns


def widened(rollout: Rollout, columns: Sequence[int | None], *, inside: bool) -> Rollout:
    """The rollout with a column of rubbish for every None; the others are the old columns in order.

    inside    the new columns belong to the episode of the column before (an observation), else to none (padding)
    """
    source = torch.tensor([-1 if column is None else column for column in columns])
    new = source < 0
    before = source.cummax(0).values.clamp(min=0)

    def widen(tensor: Tensor, rubbish: Any) -> Tensor:
        wide = tensor[:, before].clone()
        wide[:, new] = rubbish
        return wide

    def widen_nested(nested: Any) -> Any:
        return map_nested(lambda leaf: widen(leaf, 7.5 if leaf.is_floating_point() else 0), nested)

    episode = widen(rollout.episode, -1)
    if inside:
        episode = torch.where(new, rollout.episode[:, before], episode)
    optional = {
        name: widen(tensor, NAN)
        for name in ("ref_log_probs", "values", "next_values")
        if (tensor := getattr(rollout, name)) is not None
    }
    return Rollout(
        observations=widen_nested(rollout.observations),
        actions=widen_nested(rollout.actions),
        rewards=widen(rollout.rewards, 0.0 if inside else NAN),
        terminated=widen(rollout.terminated, False),
        truncated=widen(rollout.truncated, False),
        mask=widen(rollout.mask, False),
        discount=widen(rollout.discount, 0.25),
        old_log_probs=widen(rollout.old_log_probs, NAN),
        episode=episode,
        group=None if rollout.group is None else widen(rollout.group, -5),
        **optional,
    )


class Interleaved(nn.Module):
    """A policy whose adapter has put columns of its own among the decisions: it judges the old columns, and what
    it says of the new ones is NaN."""

    def __init__(self, policy: Any, columns: Sequence[int | None]) -> None:
        super().__init__()
        self.policy = policy
        self.kept = [index for index, column in enumerate(columns) if column is not None]
        self.width = len(columns)

    def critic_parameters(self) -> Iterator[Parameter]:
        parameters: Iterator[Parameter] = self.policy.critic_parameters()
        return parameters

    def evaluate(self, observations: Any, actions: Any) -> Evaluation:
        def narrow(nested: Any) -> Any:
            return map_nested(lambda leaf: leaf[:, self.kept], nested)

        def spread(tensor: Tensor) -> Tensor:
            wide = torch.full((tensor.shape[0], self.width, *tensor.shape[2:]), NAN)
            return wide.index_copy(1, torch.tensor(self.kept), tensor)

        evaluation = self.policy.evaluate(narrow(observations), narrow(actions))
        return Evaluation(*(spread(part) for part in (evaluation.log_probs, evaluation.entropy, evaluation.values)))


class ByFactor(nn.Module):
    """A policy whose decision is a chunk of one step: log-probs [B, T, 1] where they were [B, T]."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy

    def critic_parameters(self) -> Iterator[Parameter]:
        parameters: Iterator[Parameter] = self.policy.critic_parameters()
        return parameters

    def evaluate(self, observations: Any, actions: Any) -> Evaluation:
        evaluation = self.policy.evaluate(observations, actions)
        return Evaluation(by_factor(evaluation.log_probs), by_factor(evaluation.entropy), evaluation.values)


def by_factor(tensor: Tensor) -> Tensor:
    """[B, T] -> [B, T, 1]; what has factors keeps them."""
    return tensor.unsqueeze(-1) if tensor.dim() == 2 else tensor
