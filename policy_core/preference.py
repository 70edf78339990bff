"""Learning a policy straight from preferences: DPO and its relatives on pairs, KTO on single verdicts.

A pair enters as four numbers: what the policy and its reference give the chosen and the rejected completion, in
nats, summed over the completion's tokens (or over a trajectory's decisions). No loss knows what a completion is.

Weights carry the whole optimizer step's denominators (1 / pairs of the step for a mean), so the losses and metrics
of micro-batches add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from policy_core.metrics import Metrics

LossName = Literal["dpo", "ipo", "odpo", "simpo", "orpo", "tso"]


@dataclass(frozen=True)
class PairLogProbs:
    """What the losses read of N pairs; every column is [N] float.

    chosen, rejected                nats under the policy, summed over a completion's tokens
    chosen_length, rejected_length  tokens that were summed
    ref_chosen, ref_rejected        nats under the frozen reference; None where the loss needs none
    offset                          how much better the chosen one is, in units of a score (ODPO, TSO); NaN = not
                                    told of this pair, None = of none
    """

    chosen: Tensor
    rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None
    offset: Tensor | None = None


@dataclass(frozen=True)
class PreferenceConfig:
    """loss             one of `PREFERENCE_LOSSES`
    beta             DPO, ODPO, TSO: strength of the anchor to the reference (nats to reward); IPO: its tau; SimPO:
                     scale of the mean log-probability; ORPO: weight of the odds ratio (the paper's lambda)
    label_smoothing  share of labels taken to be wrong (cDPO), in [0, 0.5); not for "ipo" and "orpo"
    simpo_margin     SimPO's gamma over beta: nats per token that the chosen one shall lead by
    odpo_alpha       ODPO's alpha, which scales the offset
    odpo_offset      "log": alpha * log(offset) as in the paper, offset a difference of scores above 0;
                     "linear": alpha * offset, for margins that are differences of rewards already
    tso_scale        TSO: multiplies the difference of the clipped rewards, times the pair's offset if it has one
    tso_clip_chosen, tso_clip_rejected
                     TSO: a chosen reward counts up to +clip_chosen, a rejected one down to -clip_rejected
    """

    loss: LossName = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_margin: float = 0.5
    odpo_alpha: float = 1.0
    odpo_offset: Literal["log", "linear"] = "log"
    tso_scale: float = 1.0
    tso_clip_chosen: float = 2.0
    tso_clip_rejected: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ValueError(f"preference.beta must be above 0, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"preference.label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        if self.label_smoothing > 0 and self.loss in ("ipo", "orpo"):
            raise ValueError(f"preference.label_smoothing is not defined for preference.loss {self.loss!r}")
        if self.simpo_margin < 0 or self.odpo_alpha < 0:
            raise ValueError("preference.simpo_margin and preference.odpo_alpha must not be negative")
        if min(self.tso_scale, self.tso_clip_chosen, self.tso_clip_rejected) <= 0:
            raise ValueError("preference.tso_scale, tso_clip_chosen and tso_clip_rejected must be above 0")


def implicit_rewards(pairs: PairLogProbs, *, beta: float) -> tuple[Tensor, Tensor]:
    """beta * (log pi - log pi_ref) of the chosen and the rejected (2305.18290 section 4), [N] each.

    Raises ValueError without reference log-probs.
    """
    if pairs.ref_chosen is None or pairs.ref_rejected is None:
        raise ValueError("this preference loss needs the reference's log-probs")
    return beta * (pairs.chosen - pairs.ref_chosen), beta * (pairs.rejected - pairs.ref_rejected)


def smoothed(margin: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) * log sigmoid(margin) - e * log sigmoid(-margin): a share e of labels is wrong. [N] -> [N]."""
    if label_smoothing == 0:
        return -F.logsigmoid(margin)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def pair_metrics(pairs: PairLogProbs, *, chosen: Tensor, rejected: Tensor, weights: Tensor) -> Metrics:
    """TRL's names, under the loss's weights: rewards/chosen, rewards/rejected, rewards/accuracies, rewards/margins,
    logps/chosen, logps/rejected. chosen, rejected [N] are the loss's rewards."""
    chosen, rejected = chosen.detach(), rejected.detach()
    return {
        "rewards/chosen": (weights * chosen).sum(),
        "rewards/rejected": (weights * rejected).sum(),
        "rewards/accuracies": (weights * (chosen > rejected)).sum(),
        "rewards/margins": (weights * (chosen - rejected)).sum(),
        "logps/chosen": (weights * pairs.chosen.detach()).sum(),
        "logps/rejected": (weights * pairs.rejected.detach()).sum(),
    }


def dpo(pairs: PairLogProbs, *, config: PreferenceConfig, weights: Tensor) -> tuple[Tensor, Metrics]:
    """-log sigmoid(r_chosen - r_rejected), r = beta * (log pi - log pi_ref) (Rafailov 2023, 2305.18290 eq. 7).

    With label_smoothing e it is conservative DPO: labels are wrong with probability e (Mitchell 2023, "A note on
    DPO with noisy preferences and relationship to IPO"), and the best margin is finite, log((1 - e) / e).
    """
    chosen, rejected = implicit_rewards(pairs, beta=config.beta)
    loss = (weights * smoothed(chosen - rejected, config.label_smoothing)).sum()
    return loss, pair_metrics(pairs, chosen=chosen, rejected=rejected, weights=weights)


def ipo(pairs: PairLogProbs, *, config: PreferenceConfig, weights: Tensor) -> tuple[Tensor, Metrics]:
    """(h - 1 / (2 beta))^2, h the difference of log-ratios (Azar 2023, 2310.12036 eq. 17; beta is its tau).

    Log-ratios are means over a completion's tokens, not sums: the paper does not say so, its authors confirmed it
    to TRL, which does the same. The target 1 / (2 beta) is therefore in nats per token. The metrics' rewards are
    beta times the means, what the loss reads (TRL logs beta times the sums).
    """
    chosen, rejected = implicit_rewards(pairs, beta=1.0)
    chosen = chosen / pairs.chosen_length.clamp(min=1)
    rejected = rejected / pairs.rejected_length.clamp(min=1)
    loss = (weights * (chosen - rejected - 1 / (2 * config.beta)).square()).sum()
    metrics = pair_metrics(pairs, chosen=config.beta * chosen, rejected=config.beta * rejected, weights=weights)
    return loss, metrics


def odpo(pairs: PairLogProbs, *, config: PreferenceConfig, weights: Tensor) -> tuple[Tensor, Metrics]:
    """DPO whose margin must exceed an offset that grows with how much better the chosen one is (Amini 2024,
    2402.10571): -log sigmoid(r_chosen - r_rejected - alpha * f(offset)), f the logarithm or the identity.

    Adds the metric offset (mean of alpha * f). Raises ValueError without offsets, if one is NaN or, under the
    logarithm, not above 0.
    """
    if pairs.offset is None:
        raise ValueError("preference.loss 'odpo' needs every pair's strength (a margin column)")
    least = pairs.offset.min() if pairs.offset.numel() else pairs.offset.new_ones(())
    if torch.isnan(least) or (config.odpo_offset == "log" and least <= 0):
        above = "above 0 " if config.odpo_offset == "log" else ""
        raise ValueError(f"preference.loss 'odpo' needs a margin {above}for every pair, got {float(least):g}")
    strength = pairs.offset.log() if config.odpo_offset == "log" else pairs.offset
    offset = config.odpo_alpha * strength
    chosen, rejected = implicit_rewards(pairs, beta=config.beta)
    loss = (weights * smoothed(chosen - rejected - offset, config.label_smoothing)).sum()
    metrics = pair_metrics(pairs, chosen=chosen, rejected=rejected, weights=weights)
    return loss, {**metrics, "offset": (weights * offset).sum()}


def simpo(pairs: PairLogProbs, *, config: PreferenceConfig, weights: Tensor) -> tuple[Tensor, Metrics]:
    """-log sigmoid(beta * (mean log pi(chosen) - mean log pi(rejected) - simpo_margin)).

    Meng 2024, 2405.14734 eq. 6, whose gamma is beta * simpo_margin. Means are over a completion's tokens; there is
    no reference.
    """
    chosen = config.beta * pairs.chosen / pairs.chosen_length.clamp(min=1)
    rejected = config.beta * pairs.rejected / pairs.rejected_length.clamp(min=1)
    margin = chosen - rejected - config.beta * config.simpo_margin
    loss = (weights * smoothed(margin, config.label_smoothing)).sum()
    return loss, pair_metrics(pairs, chosen=chosen, rejected=rejected, weights=weights)


def log_odds(mean_log_probs: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(mean_log_probs), precise at both ends; a p that rounds to 1 counts as less."""
    below = mean_log_probs.clamp(max=-torch.finfo(mean_log_probs.dtype).eps)
    near_one = below > -math.log(2.0)
    upper = torch.where(near_one, below, -1.0)
    lower = torch.where(near_one, -1.0, below)
    return below - torch.where(near_one, torch.log(-torch.expm1(upper)), torch.log1p(-torch.exp(lower)))


def orpo(pairs: PairLogProbs, *, config: PreferenceConfig, weights: Tensor) -> tuple[Tensor, Metrics]:
    """NLL of the chosen one - beta * log sigmoid(log odds(chosen) - log odds(rejected)) (Hong 2024, 2403.07691 eqs.
    6 and 7; beta is its lambda), odds = p / (1 - p) with p = exp(mean log pi over the completion's tokens).

    The NLL is the mean over each chosen completion's tokens, then over pairs. Adds the metrics nll_loss,
    log_odds_ratio (mean log sigmoid of it) and log_odds_chosen (mean difference), as TRL names them.
    """
    chosen = pairs.chosen / pairs.chosen_length.clamp(min=1)
    rejected = pairs.rejected / pairs.rejected_length.clamp(min=1)
    difference = log_odds(chosen) - log_odds(rejected)
    ratio = F.logsigmoid(difference)
    nll = -(weights * chosen).sum()
    loss = nll - config.beta * (weights * ratio).sum()
    metrics = pair_metrics(pairs, chosen=config.beta * chosen, rejected=config.beta * rejected, weights=weights)
    metrics["nll_loss"] = nll.detach()
    metrics["log_odds_ratio"] = (weights * ratio.detach()).sum()
    metrics["log_odds_chosen"] = (weights * difference.detach()).sum()
    return loss, metrics


def tso(pairs: PairLogProbs, *, config: PreferenceConfig, weights: Tensor) -> tuple[Tensor, Metrics]:
    """-log sigmoid(scale * (min(r_chosen, clip_chosen) - max(r_rejected, -clip_rejected))), r as in DPO.

    After "TSO: Self-Training with Scaled Preference Optimization" (Chen 2024, 2409.02118). The names are the
    paper's: preference optimization that is scaled, and a dual clip of the rewards that balances it. The equation
    is our reading of its abstract, not a transcription:

        dual clip   DPO's loss can fall by pushing the rejected one down without end, which drags the chosen one
                    along. A chosen reward above clip_chosen and a rejected one below -clip_rejected count as the
                    bound, so a side that has come far enough has no gradient and the other must do the rest.
        scale       tso_scale, times the pair's offset where it has one (NaN: none): the stronger, the steeper

    With both clips infinite, scale 1 and no offsets this is DPO. Adds the metrics clipped/chosen and
    clipped/rejected (shares of pairs). Raises ValueError if an offset is negative.
    """
    chosen, rejected = implicit_rewards(pairs, beta=config.beta)
    difference = chosen.clamp(max=config.tso_clip_chosen) - rejected.clamp(min=-config.tso_clip_rejected)
    if pairs.offset is not None:
        if (pairs.offset < 0).any():
            raise ValueError(
                f"preference.loss 'tso' needs margins of at least 0, got {float(pairs.offset.min()):g}"
            )
        difference = difference * torch.where(torch.isnan(pairs.offset), 1.0, pairs.offset)
    loss = (weights * smoothed(config.tso_scale * difference, config.label_smoothing)).sum()
    metrics = pair_metrics(pairs, chosen=chosen, rejected=rejected, weights=weights)
    metrics["clipped/chosen"] = (weights * (chosen.detach() > config.tso_clip_chosen)).sum()
    metrics["clipped/rejected"] = (weights * (rejected.detach() < -config.tso_clip_rejected)).sum()
    return loss, metrics


PREFERENCE_LOSSES: dict[str, Callable[..., tuple[Tensor, Metrics]]] = {
    "dpo": dpo,
    "ipo": ipo,
    "odpo": odpo,
    "simpo": simpo,
    "orpo": orpo,
    "tso": tso,
}

NEEDS_REFERENCE = frozenset({"dpo", "ipo", "odpo", "tso"})


@dataclass(frozen=True)
class KTOConfig:
    """beta                                 nats to reward
    desirable_weight, undesirable_weight  the paper's lambda_D and lambda_U; it advises that lambda_D * desirable
                                          texts over lambda_U * undesirable ones be in [1, 4 / 3]
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ValueError(f"kto.beta must be above 0, got {self.beta}")
        if min(self.desirable_weight, self.undesirable_weight) < 0:
            raise ValueError("kto.desirable_weight and kto.undesirable_weight must not be negative")


def kto_baseline(*, log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """The z0 of 2402.01306, section 4.1: max(0, mean of log pi(y'|x) - log pi_ref(y'|x)) over mismatched pairs.

    log_probs, ref_log_probs [N] of completions under *another* example's prompt, of the whole optimizer step.
    Returns a scalar without gradient, in nats.
    """
    if log_probs.numel() == 0:
        return log_probs.new_zeros(())
    return (log_probs - ref_log_probs).detach().mean().clamp(min=0)


def kto_loss(
    *,
    log_probs: Tensor,
    ref_log_probs: Tensor,
    desirable: Tensor,
    kl: Tensor,
    config: KTOConfig,
    weights: Tensor,
) -> tuple[Tensor, Metrics]:
    """lambda_y - v(x, y) (Ethayarajh 2024, 2402.01306 eq. 8), with r = log pi - log pi_ref and z0 = max(0, kl):

        desirable     lambda_D * (1 - sigmoid(beta * (r - z0)))
        undesirable   lambda_U * (1 - sigmoid(beta * (z0 - r)))

    log_probs, ref_log_probs, weights   [N] nats summed over a completion's tokens
    desirable                           [N] bool
    kl                                  scalar nats, see `kto_baseline`; neither it nor its clamp has a gradient

    Metrics add up over micro-batches and are finished by `kto_means`: kl, and under rewards/ and logps/ sums over
    the chosen (desirable) and the rejected, with share/chosen and share/rejected to divide by.
    """
    baseline = kl.detach().clamp(min=0)
    log_ratio = log_probs - ref_log_probs
    sign = torch.where(desirable, 1.0, -1.0).to(log_ratio.dtype)
    worth = torch.where(desirable, config.desirable_weight, config.undesirable_weight).to(log_ratio.dtype)
    losses = worth * torch.sigmoid(-sign * config.beta * (log_ratio - baseline))
    metrics: Metrics = {"kl": (weights * baseline).sum()}
    for name, kind in (("chosen", desirable), ("rejected", ~desirable)):
        share = weights * kind
        metrics[f"share/{name}"] = share.sum()
        metrics[f"rewards/{name}"] = (share * config.beta * log_ratio.detach()).sum()
        metrics[f"logps/{name}"] = (share * log_probs.detach()).sum()
    return (weights * losses).sum(), metrics


def kto_means(totals: Metrics) -> Metrics:
    """Metrics of `kto_loss`, added up over a step's micro-batches -> means under TRL's names.

    A kind of verdict that the step has none of has no entries; rewards/margins needs both.
    """
    metrics = {"kl": totals["kl"]}
    for name in ("chosen", "rejected"):
        share = totals[f"share/{name}"]
        if share > 0:
            metrics[f"rewards/{name}"] = totals[f"rewards/{name}"] / share
            metrics[f"logps/{name}"] = totals[f"logps/{name}"] / share
    if "rewards/chosen" in metrics and "rewards/rejected" in metrics:
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics
