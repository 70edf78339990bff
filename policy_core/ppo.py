"""Proximal policy optimization (Schulman 2017, 1707.06347), the update under both bodies.

Config, losses, update, in that order. A recipe gathers a `Rollout`, computes advantages (`returns.gae`, or
`grpo`'s for a policy without a critic) and calls `update`. Policies that judge decisions one by one are given
`rollout.decisions()` ([N, 1]: a row is a decision); sequence models are given whole rows.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from policy_core.kl import KLConfig, kl_estimate, per_decision
from policy_core.masking import Aggregation, aggregation_weights, normalize
from policy_core.metrics import Metrics, average
from policy_core.mismatch import importance_weights, weighted
from policy_core.optimizer import clipped_step
from policy_core.policy import Evaluation, Policy
from policy_core.rollout import Nested, Rollout, map_nested, split_rows
from policy_core.schedules import Schedule
from policy_core.traced import TracedGradient

AuxiliaryLoss = Callable[[], tuple[Tensor, Metrics]]

MAX_LOG_RATIO = 20.0
"""exp(20) = 5e8: beyond it a ratio says nothing and overflows."""


@dataclass(frozen=True)
class PPOConfig:
    """PPO's own numbers.

    learning_rate, schedule, warmup     Adam's rate, its course over the run, share of the run to rise over
    epochs, minibatch_size              passes over a rollout; rows per optimizer step, at most
    micro_batch_size                    rows per backward pass; None = the minibatch at once
    gamma, gae_lambda                   discount per step or token; GAE's lambda
    clip_range, clip_range_high         ratio within [1 - clip_range, 1 + clip_range_high]; None = symmetric
    dual_clip                           lower bound of the surrogate for negative advantages (1912.09729), e.g. 3
    value_clip_range                    value prediction within this of the old one; None = no clip
    value_coef, entropy_coef            weights of the value loss and the entropy bonus
    max_grad_norm                       global norm of an optimizer step's gradient
    target_kl                           stop the epochs when a minibatch's KL passes 1.5 times this
    normalize_advantages                over all decisions of the rollout
    mismatch_cap                        of the weights of what another engine sampled (`mismatch`); None = none
    ratio_level                         "decision": one ratio a decision; "factor": one an action dimension
    aggregation, aggregation_constant   see `masking.aggregation_weights`
    critic_warmup                       first rollouts on which only the critic learns
    """

    learning_rate: float = 3e-4
    schedule: Schedule = "constant"
    warmup: float = 0.0
    epochs: int = 10
    minibatch_size: int = 256
    micro_batch_size: int | None = None
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    clip_range_high: float | None = None
    dual_clip: float | None = None
    value_clip_range: float | None = None
    value_coef: float = 0.5
    entropy_coef: float = 0.0
    max_grad_norm: float = 0.5
    target_kl: float | None = None
    normalize_advantages: bool = True
    mismatch_cap: float | None = 2.0
    ratio_level: Literal["decision", "factor"] = "decision"
    aggregation: Aggregation = "decision"
    aggregation_constant: float | None = None
    critic_warmup: int = 0

    def __post_init__(self) -> None:
        if self.learning_rate < 0 or self.max_grad_norm <= 0 or self.clip_range <= 0:
            raise ValueError("ppo.learning_rate must not be negative, max_grad_norm and clip_range must be above 0")
        if self.minibatch_size < 1 or self.epochs < 1:
            raise ValueError("ppo.minibatch_size and ppo.epochs must be at least 1")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ValueError("ppo.micro_batch_size must be at least 1")
        if self.mismatch_cap is not None and self.mismatch_cap < 1:
            raise ValueError(f"ppo.mismatch_cap must be at least 1, got {self.mismatch_cap}")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"ppo.dual_clip must be above 1, got {self.dual_clip}")
        if not 0 < self.gamma <= 1 or not 0 <= self.gae_lambda <= 1:
            raise ValueError("ppo.gamma must be in (0, 1] and ppo.gae_lambda in [0, 1]")
        if self.aggregation == "constant" and self.aggregation_constant is None:
            raise ValueError("ppo.aggregation 'constant' needs ppo.aggregation_constant")
        for name in ("clip_range_high", "value_clip_range", "target_kl", "aggregation_constant"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"ppo.{name} must be above 0, got {value}")
        if self.value_coef < 0 or self.critic_warmup < 0 or not 0 <= self.warmup < 1:
            raise ValueError("ppo.value_coef and critic_warmup must not be negative, ppo.warmup in [0, 1)")

    def critic_only(self, updates: int) -> int:
        """How many of a run's `updates` teach the critic alone; the last is the policy's, however short a run."""
        return min(self.critic_warmup, updates - 1)


def policy_loss(
    *,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    clip_range: float,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[Tensor, Metrics]:
    """PPO's clipped surrogate (1707.06347 eq. 7), to be minimised.

    log_probs, old_log_probs, weights   [B, T] (a ratio a decision) or [B, T, F] (a ratio a factor)
    advantages                          [B, T], or of single factors [B, T, F]
    clip_range_high                     upper half of the band where it differs ("clip-higher", 2503.14476)
    dual_clip                           where the advantage is negative, at least dual_clip * advantage
                                        (Ye 2020, 1912.09729 eq. 5)

    Metrics, under the same weights: approx_kl (k3, nats), clip_fraction (where the clip takes the gradient away).
    """
    high = clip_range if clip_range_high is None else clip_range_high
    if advantages.dim() < log_probs.dim():
        advantages = advantages.unsqueeze(-1)
    log_ratio = (log_probs - old_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = torch.exp(log_ratio)
    unclipped = ratio * advantages
    with torch.no_grad():  # where a bound holds, the surrogate is that constant: min() without its costly gradient
        bound = ratio.clamp(1.0 - clip_range, 1.0 + high) * advantages
        clips = bound < unclipped
        if dual_clip is not None:
            floor = dual_clip * advantages
            sinks = (advantages < 0) & (torch.minimum(unclipped, bound) < floor)
            bound, clips = torch.where(sinks, floor, bound), clips | sinks
        metrics = {
            "approx_kl": ((ratio - 1.0 - log_ratio) * weights).sum(),
            "clip_fraction": (clips * weights).sum(),
        }
    loss = -(torch.where(clips, bound, unclipped) * weights).sum()
    return loss, metrics


def value_loss(
    *,
    values: Tensor,
    returns: Tensor,
    weights: Tensor,
    old_values: Tensor | None = None,
    clip_range: float | None = None,
) -> tuple[Tensor, Metrics]:
    """Squared error of the value, without the half (SB3's scale); all tensors [B, T].

    With `clip_range` the larger of the plain error and that of the prediction clipped to within it of `old_values`
    (as in the original PPO code). Metrics: value_clip_fraction where it clips.
    """
    error = F.mse_loss(values, returns, reduction="none")
    if clip_range is None:
        return (error * weights).sum(), {}
    if old_values is None:
        raise ValueError("value clipping needs old_values")
    moved = (values - old_values).clamp(-clip_range, clip_range)
    clipped_error = F.mse_loss(old_values + moved, returns, reduction="none")
    fraction = ((clipped_error > error) * weights).sum()
    return (torch.maximum(error, clipped_error) * weights).sum(), {"value_clip_fraction": fraction}


def counted(tensor: Tensor, mask: Tensor | None, factor_mask: Tensor | None) -> Tensor:
    """0 on masked decisions and, of a tensor [B, T, F], on factors that were not executed.

    A weight of 0 is not enough there: a policy may call a masked action impossible (log-probability -inf), and NaN
    or a gradient of it survives a product with 0.
    """
    keep = mask
    if tensor.dim() == 3:
        keep = None if mask is None else mask.unsqueeze(-1)
        if factor_mask is not None:
            keep = factor_mask if keep is None else keep & factor_mask
    return tensor if keep is None else torch.where(keep, tensor, 0.0)


@dataclass(frozen=True)
class Batch:
    """What the losses read of a rollout: the rows of one optimizer step, or a micro-batch of them.

    weights (at the ratio level) and decision_weights have the whole step's denominators, so the losses and metrics
    of micro-batches add up. [B, T] but where said; `level` is [B, T] or [B, T, F]. What is masked is finite here,
    whatever the rollout held; mask is None where every decision counts.
    """

    observations: Nested
    actions: Nested
    old_log_probs: Tensor  # level
    advantages: Tensor
    weights: Tensor  # level
    decision_weights: Tensor
    mask: Tensor | None = None
    returns: Tensor | None = None
    old_values: Tensor | None = None
    factor_mask: Tensor | None = None  # [B, T, F]
    ref_log_probs: Tensor | None = None  # [B, T] or [B, T, F], per factor where the policy's are


def ppo_loss(
    *,
    evaluation: Evaluation,
    batch: Batch,
    config: PPOConfig,
    kl: KLConfig | None = None,
    kl_coef: float | Tensor = 0.0,
    train_policy: bool = True,
) -> tuple[Tensor, Metrics]:
    """The whole loss of one micro-batch: policy + value_coef * value - entropy_coef * entropy + kl_coef * KL.

    With train_policy False only the value term is left (critic warm-up). Metrics: policy_loss, approx_kl,
    clip_fraction, entropy (nats per decision, or per factor at that ratio level), reference_kl, value_loss.
    """
    loss = batch.advantages.new_zeros(())
    metrics: Metrics = {}
    if train_policy:
        by_factor = batch.weights.dim() == 3
        log_probs = counted(evaluation.log_probs, batch.mask, batch.factor_mask)

        def level(tensor: Tensor) -> Tensor:
            return tensor if by_factor else per_decision(tensor, batch.factor_mask)

        loss, metrics = policy_loss(
            log_probs=level(log_probs),
            old_log_probs=batch.old_log_probs,
            advantages=batch.advantages,
            weights=batch.weights,
            clip_range=config.clip_range,
            clip_range_high=config.clip_range_high,
            dual_clip=config.dual_clip,
        )
        metrics["policy_loss"] = loss.detach()
        with contextlib.nullcontext() if config.entropy_coef != 0.0 else torch.no_grad():
            entropies = counted(evaluation.entropy, batch.mask, batch.factor_mask)
            entropy = (level(entropies) * batch.weights).sum()
        metrics["entropy"] = entropy.detach()
        if config.entropy_coef != 0.0:
            loss = loss - config.entropy_coef * entropy
        if kl is not None and kl.placement == "loss" and (isinstance(kl_coef, Tensor) or kl_coef != 0.0):
            if batch.ref_log_probs is None:
                raise ValueError("a KL term in the loss needs ref_log_probs")
            estimate = kl_estimate(log_probs=log_probs, ref_log_probs=batch.ref_log_probs, estimator=kl.estimator)
            reference_kl = (per_decision(estimate, batch.factor_mask) * batch.decision_weights).sum()
            metrics["reference_kl"] = reference_kl.detach()
            loss = loss + kl_coef * reference_kl
    if evaluation.values is not None and batch.returns is not None:
        value, value_metrics = value_loss(
            values=counted(evaluation.values, batch.mask, None),
            returns=batch.returns,
            weights=batch.decision_weights,
            old_values=batch.old_values,
            clip_range=config.value_clip_range,
        )
        metrics.update(value_metrics, value_loss=value.detach())
        loss = loss + config.value_coef * value
    return loss, metrics


def make_batches(
    rollout: Rollout,
    *,
    advantages: Tensor,
    returns: Tensor | None,
    config: PPOConfig,
    order: Tensor,
    with_reference: bool = False,
) -> list[Batch]:
    """One epoch's optimizer steps: the rows in `order` ([B] int), cut into minibatches of the same size, or of one
    row less: as few as `config.minibatch_size` allows.

    Weights are over each step's own decisions; old log-probs are brought to the ratio level; masked columns are
    cleared.
    """
    old_log_probs, factor_mask = rollout.old_log_probs, rollout.factor_mask
    if config.ratio_level == "decision":
        old_log_probs = per_decision(old_log_probs, factor_mask)
    elif old_log_probs.dim() == 3 and factor_mask is None:
        factor_mask = torch.ones_like(old_log_probs, dtype=torch.bool)
    mask = None if rollout.mask.all() else rollout.mask

    def cleared(column: Tensor | None) -> Tensor | None:
        return None if column is None else counted(column, mask, factor_mask)

    columns: dict[str, Nested | None] = {
        "observations": rollout.observations,
        "actions": rollout.actions,
        "old_log_probs": cleared(old_log_probs),
        "advantages": cleared(advantages),
        "returns": cleared(returns),
        "old_values": cleared(rollout.values) if config.value_clip_range is not None else None,
        "factor_mask": factor_mask,
        "ref_log_probs": cleared(rollout.ref_log_probs) if with_reference else None,
        "mask": mask,
        "decisions": rollout.mask,
        "episode": rollout.episode,
    }
    shuffled = {
        name: map_nested(lambda tensor: tensor.index_select(0, order), column)
        for name, column in columns.items()
        if column is not None
    }
    batches = []
    steps = max(1, math.ceil(len(order) / config.minibatch_size))
    least, more = divmod(len(order), steps)
    for part in split_rows(shuffled, [least + (step < more) for step in range(steps)]):
        decisions, episode = part.pop("decisions"), part.pop("episode")

        def weights_of(factors: Tensor | None, decisions: Tensor = decisions, episode: Tensor = episode) -> Tensor:
            return aggregation_weights(
                mask=decisions,
                episode=episode,
                aggregation=config.aggregation,
                constant=config.aggregation_constant,
                factor_mask=factors,
            )

        decision_weights = weights_of(None)
        by_factor = part["old_log_probs"].dim() == 3
        weights = weights_of(part["factor_mask"]) if by_factor else decision_weights
        batches.append(Batch(**part, weights=weights, decision_weights=decision_weights))
    return batches


def micro_batches(batch: Batch, size: int | None) -> list[Batch]:
    """The batch in pieces of at most `size` rows, or whole."""
    if size is None or size >= batch.advantages.shape[0]:
        return [batch]
    return [Batch(**part) for part in split_rows(_present(batch), size)]


def update(
    *,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    advantages: Tensor,
    returns: Tensor | None,
    config: PPOConfig,
    generator: torch.Generator | None = None,
    kl: KLConfig | None = None,
    kl_coef: float = 0.0,
    train_policy: bool = True,
    auxiliary: AuxiliaryLoss | None = None,
    traced: TracedGradient | None = None,
) -> dict[str, float]:
    """Improve the policy on one rollout: `config.epochs` passes of shuffled minibatches.

    advantages, returns     [B, T] as `gae` gives them; returns None for a policy without a critic; at ratio level
                            "factor" advantages may be [B, T, F], say of the control steps of a chunk
    generator               of the shuffling (CPU)
    kl, kl_coef             a KL term in the loss, when kl.placement is "loss"; kl_coef is the controller's
    train_policy            False = critic warm-up: only `policy.critic_parameters()` move
    auxiliary               a supervised loss added to every optimizer step but critic warm-up's (PPO-ptx, DAPG)
    traced                  replays the gradient's operations (`traced_gradient(policy)`, kept by the caller)
                            instead of autograd's: the same numbers, faster for small networks

    A minibatch of which no decision counts makes no step, unless `auxiliary` does: momentum would move the weights.
    Returns metrics averaged over the optimizer steps. Raises NonFiniteLoss before a step that spoils the weights.
    """
    if not train_policy and returns is None:
        raise ValueError("critic warm-up needs returns: without them there is nothing to learn")
    counts = rollout.mask
    if advantages.dim() == 3:
        if config.ratio_level != "factor" or rollout.factor_mask is None:
            raise ValueError("advantages of single factors need ppo.ratio_level 'factor' and a factor_mask")
        counts = rollout.factor_mask & rollout.mask.unsqueeze(-1)
    if config.normalize_advantages:
        advantages = normalize(advantages, counts)
    if config.mismatch_cap is not None:
        unlike = importance_weights(rollout, level=config.ratio_level, cap=config.mismatch_cap)
        advantages = advantages if unlike is None else weighted(advantages, unlike)
    with_reference = kl is not None and kl.placement == "loss" and kl_coef != 0.0
    kl = kl if with_reference else None
    taught = train_policy and auxiliary is not None
    history: list[Metrics] = []
    with contextlib.nullcontext() if train_policy else only_critic(policy):
        for _ in range(config.epochs):
            order = torch.randperm(rollout.shape[0], generator=generator).to(rollout.mask.device)
            done = 0
            batches = make_batches(
                rollout,
                advantages=advantages,
                returns=returns,
                config=config,
                order=order,
                with_reference=with_reference,
            )
            for batch in batches:
                if not taught and batch.mask is not None and not bool(batch.mask.any()):
                    done += 1
                    continue
                optimizer.zero_grad(set_to_none=True)
                metrics = _accumulate(policy, batch, config, kl, kl_coef, train_policy, traced)
                if train_policy:
                    if auxiliary is not None:
                        metrics.update(_backward_auxiliary(auxiliary))
                    if config.target_kl is not None and metrics["approx_kl"] > 1.5 * config.target_kl:
                        break
                metrics["grad_norm"] = clipped_step(optimizer, max_grad_norm=config.max_grad_norm, losses=metrics)
                history.append(metrics)
                done += 1
            if done < len(batches):
                break
    summary = average(history)
    summary["updates"] = float(len(history))
    return summary


@contextlib.contextmanager
def only_critic(policy: Policy) -> Iterator[None]:
    """Within it, only `policy.critic_parameters()` require gradients; what required them before does after."""
    critic = {id(parameter) for parameter in policy.critic_parameters()}
    if not critic:
        raise ValueError("critic warm-up needs a policy with a critic (critic_parameters() is empty)")
    others = [p for p in policy.parameters() if p.requires_grad and id(p) not in critic]
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _backward_auxiliary(auxiliary: AuxiliaryLoss) -> Metrics:
    loss, metrics = auxiliary()
    loss.backward()
    return metrics


def _accumulate(
    policy: Policy,
    batch: Batch,
    config: PPOConfig,
    kl: KLConfig | None,
    kl_coef: float,
    train_policy: bool,
    traced: TracedGradient | None,
) -> Metrics:
    """Backward over the micro-batches of one optimizer step; the weights make the sum exact."""

    def loss_of(evaluation: Evaluation, part: Batch, coef: float | Tensor) -> tuple[Tensor, Metrics]:
        return ppo_loss(
            evaluation=evaluation, batch=part, config=config, kl=kl, kl_coef=coef, train_policy=train_policy
        )

    totals: Metrics = {}
    for part in micro_batches(batch, config.micro_batch_size):
        if traced is None:
            loss, metrics = loss_of(policy.evaluate(part.observations, part.actions), part, kl_coef)
            loss.backward()
        else:
            kind = (config, kl, train_policy, *_present(part))
            metrics = traced(part, loss_of, kind=kind, scalar=kl_coef)
        for name, value in metrics.items():
            totals[name] = totals[name] + value if name in totals else value
    return totals


def traced_gradient(policy: torch.nn.Module) -> TracedGradient:
    """For `update(traced=...)`: of a policy whose `evaluate` has no randomness, dropout or branches on data."""
    return TracedGradient(policy)


def _present(batch: Batch) -> dict[str, Any]:
    """The columns that a batch has."""
    columns = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: column for name, column in columns.items() if column is not None}
