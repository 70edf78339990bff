"""Our losses against TRL's own, on the same numbers: tests/golden/ has what TRL computed and what asked it.

Where TRL is known to compute something else, the test shows both: TRL's number, by its formula, and the right one.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from policy_core.comparisons import bradley_terry_loss, centring_loss
from policy_core.grpo import overlong_punishment
from policy_core.kl import KLConfig, kl_rewards
from policy_core.masking import Aggregation, aggregation_weights, normalize
from policy_core.policy import Evaluation
from policy_core.ppo import Batch, PPOConfig, make_batches, policy_loss, ppo_loss, value_loss
from policy_core.preference import (
    PREFERENCE_LOSSES,
    KTOConfig,
    LossName,
    PairLogProbs,
    PreferenceConfig,
    kto_baseline,
    kto_loss,
    kto_means,
)
from policy_core.returns import gae
from tests.policy_core.helpers import close, make_rollout

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
TIGHT = 1e-9
SINGLE = 1e-6
"""Of numbers that TRL computes in float32 on the way: shares of wins, ORPO's odds."""


@cache
def cases(version: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDEN / f"trl_{version}.json").read_text())
    assert found["versions"]["trl"] == version
    return dict(found["cases"])


class Case:
    """One of TRL's cases: settings, inputs as tensors, outputs."""

    def __init__(self, name: str, version: str = "1.16.0") -> None:
        case = cases(version)[name]
        self.settings: dict[str, Any] = case["settings"]
        self.inputs = {key: torch.tensor(value) for key, value in case["inputs"].items()}
        self.outputs: dict[str, Any] = case["outputs"]
        self.metrics: dict[str, float] = self.outputs.get("metrics", {})

    def __getitem__(self, name: str) -> Tensor:
        return self.inputs[name]

    def check(self, loss: Tensor, *, leaf: Tensor | None = None, atol: float = TIGHT) -> None:
        close(loss.detach(), self.outputs["loss"], atol=atol)
        if leaf is not None:
            (gradient,) = torch.autograd.grad(loss, leaf)
            close(gradient, self.outputs["gradient"], atol=atol)

    def check_metrics(self, metrics: dict[str, Tensor], names: list[str], *, atol: float = TIGHT) -> None:
        for name in names:
            close(metrics[name], self.metrics[name], atol=atol)


REWARDS = ["rewards/chosen", "rewards/rejected", "rewards/margins"]
LOGPS = ["logps/chosen", "logps/rejected"]


def pairs_of(case: Case, log_probs: Tensor) -> PairLogProbs:
    """Per-token log-probs [2N, T] of the chosen, then the rejected -> sums over completion tokens."""
    mask = case["mask"]
    chosen, rejected = (log_probs * mask).sum(1).chunk(2)
    lengths = mask.sum(1).double().chunk(2)
    ref = case["ref_log_probs"].sum(1).chunk(2) if "ref_log_probs" in case.inputs else (None, None)
    return PairLogProbs(chosen, rejected, *lengths, *ref)


def preference(case: Case, loss: LossName, **settings: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The loss, its per-token leaf and its metrics."""
    leaf = case["log_probs"].clone().requires_grad_()
    pairs = pairs_of(case, leaf)
    count = len(pairs.chosen)
    config = PreferenceConfig(loss=loss, beta=case.settings["beta"], **settings)
    value, metrics = PREFERENCE_LOSSES[loss](pairs, config=config, weights=torch.full((count,), 1 / count))
    return value, leaf, metrics


# ---------------------------------------------------------------- policies from pairs


@pytest.mark.parametrize("name", ["dpo", "dpo_at_reference"])
def test_dpo(name: str) -> None:
    case = Case(name)
    loss, leaf, metrics = preference(case, "dpo")
    case.check(loss, leaf=leaf)
    case.check_metrics(metrics, [*REWARDS, *LOGPS])
    case.check_metrics(metrics, ["rewards/accuracies"], atol=SINGLE)


def test_trl_has_no_conservative_dpo() -> None:
    """TRL's "sigmoid" does not read label_smoothing; a wrong label's share of the loss is missing."""
    case = Case("dpo_label_smoothing")
    assert case.settings["label_smoothing"] == 0.2
    plain, leaf, _ = preference(case, "dpo")
    case.check(plain, leaf=leaf)
    smoothed, _, metrics = preference(case, "dpo", label_smoothing=0.2)
    # -log sigmoid(-m) = m - log sigmoid(m): the smoothed loss is the plain one plus 0.2 times the mean margin
    close(smoothed, plain + 0.2 * metrics["rewards/margins"], atol=TIGHT)
    assert abs(float((smoothed - plain).detach())) > 0.1


def test_ipo() -> None:
    case = Case("ipo")
    loss, leaf, metrics = preference(case, "ipo")
    case.check(loss, leaf=leaf)
    case.check_metrics(metrics, LOGPS)
    # TRL trains on means over tokens and logs sums; our rewards are what the loss reads
    pairs = pairs_of(case, case["log_probs"])
    assert pairs.ref_chosen is not None
    ratios = pairs.chosen - pairs.ref_chosen
    assert case.metrics["rewards/chosen"] == pytest.approx(0.3 * float(ratios.mean()), abs=TIGHT)
    close(metrics["rewards/chosen"], 0.3 * (ratios / pairs.chosen_length).mean(), atol=TIGHT)


@pytest.mark.parametrize("name", ["simpo", "simpo_label_smoothing"])
def test_simpo(name: str) -> None:
    case = Case(name)
    beta, gamma = case.settings["beta"], case.settings["gamma"]
    smoothing = case.settings["label_smoothing"]
    loss, _, metrics = preference(case, "simpo", simpo_margin=gamma / beta, label_smoothing=smoothing)
    case.check(loss)
    case.check_metrics(metrics, REWARDS)
    case.check_metrics(metrics, ["rewards/accuracies"], atol=SINGLE)


def test_orpo() -> None:
    """Completions of one length without a prompt: all means are one."""
    case = Case("orpo_without_prompts")
    loss, _, metrics = preference(case, "orpo")
    case.check(loss, atol=SINGLE)
    case.check_metrics(metrics, [*REWARDS, "nll_loss", "log_odds_ratio", "log_odds_chosen"], atol=SINGLE)


def test_trl_teaches_orpo_the_prompt() -> None:
    """TRL's likelihood term is the mean over all chosen tokens, prompts included: long prompts then are what is
    learned. The paper's is that of the answer (2403.07691 eq. 2: the mean over its tokens)."""
    case = Case("orpo")
    loss, _, metrics = preference(case, "orpo")
    case.check_metrics(metrics, [*REWARDS, "log_odds_ratio", "log_odds_chosen"], atol=SINGLE)
    chosen, attended = case["log_probs"].chunk(2)[0], case["attention_mask"].chunk(2)[0]
    over_all = -(chosen * attended).sum() / attended.sum()
    assert case.metrics["nll_loss"] == pytest.approx(float(over_all), abs=TIGHT)
    mask = case["mask"].chunk(2)[0]
    of_answers = -((chosen * mask).sum(1) / mask.sum(1)).mean()
    close(metrics["nll_loss"], of_answers, atol=TIGHT)
    assert abs(float(of_answers - over_all)) > 0.1
    close(loss - of_answers + over_all, case.outputs["loss"], atol=SINGLE)  # the rest agrees


# ---------------------------------------------------------------- KTO


@pytest.mark.parametrize("name", ["kto", "kto_weighted", "kto_clamped"])
def test_kto(name: str) -> None:
    case = Case(name)
    leaf = case["log_probs"].clone().requires_grad_()
    kl = kto_baseline(log_probs=case["other_log_probs"].sum(1), ref_log_probs=case["other_ref_log_probs"].sum(1))
    loss, metrics = kto_loss(
        log_probs=(leaf * case["mask"]).sum(1),
        ref_log_probs=case["ref_log_probs"].sum(1),
        desirable=case["desirable"],
        kl=kl,
        config=KTOConfig(**case.settings),
        weights=torch.full((4,), 1 / 4),
    )
    case.check(loss, leaf=leaf)
    assert (kl == 0) == (name == "kto_clamped")
    case.check_metrics(kto_means(metrics), ["kl", *REWARDS, *LOGPS])


# ---------------------------------------------------------------- reward models


@pytest.mark.parametrize("name", ["reward", "reward_margin", "reward_margin_centring"])
def test_bradley_terry(name: str) -> None:
    case = Case(name)
    leaf = case["scores"].clone().requires_grad_()
    chosen, rejected = leaf.squeeze(1).chunk(2)
    weights = torch.full((4,), 1 / 4)
    margin = case["margin"] if case.settings["with_margin"] else None
    loss, metrics = bradley_terry_loss(chosen=chosen, rejected=rejected, weights=weights, margin=margin)
    if case.settings["centring"] is not None:
        centre, _ = centring_loss(chosen=chosen, rejected=rejected, weights=weights, coef=case.settings["centring"])
        loss = loss + centre
    case.check(loss, leaf=leaf)
    case.check_metrics(metrics, ["accuracy", "margin", "mean_reward"])


# ---------------------------------------------------------------- GRPO's losses

AGGREGATIONS: dict[str, Aggregation] = {
    "grpo": "episode",
    "bnpo": "decision",
    "dr_grpo": "constant",
    "dapo": "decision",
}


def grpo_loss(
    case: Case, leaf: Tensor, *, aggregation: Aggregation, parts: int = 1
) -> tuple[Tensor, dict[str, Any]]:
    """Our `ppo_loss` on the case's answers, in `parts` micro-batches of rows under one step's weights."""
    mask = case["mask"].bool()
    settings = case.settings
    config = PPOConfig(
        clip_range=settings["clip_low"],
        clip_range_high=settings["clip_high"],
        dual_clip=settings["delta"],
        aggregation=aggregation,
        aggregation_constant=float(settings["longest"]),
    )
    weights = aggregation_weights(
        mask=mask,
        episode=torch.zeros_like(mask, dtype=torch.long),
        aggregation=aggregation,
        constant=config.aggregation_constant,
    )
    total = torch.zeros(())
    metrics: dict[str, Any] = {}
    for rows in torch.arange(len(mask)).chunk(parts):
        batch = Batch(
            observations=leaf[rows],
            actions=leaf[rows],
            old_log_probs=case["old_log_probs"][rows],
            advantages=case["advantages"][rows].unsqueeze(1).expand_as(mask[rows]),
            weights=weights[rows],
            decision_weights=weights[rows],
            mask=mask[rows],
            ref_log_probs=case["ref_log_probs"][rows],
        )
        loss, metrics = ppo_loss(
            evaluation=Evaluation(leaf[rows], torch.zeros_like(leaf[rows])),
            batch=batch,
            config=config,
            kl=KLConfig(coef=0.1, placement="loss", estimator="k3"),
            kl_coef=settings["beta"],
        )
        total = total + loss
    return total, metrics


@pytest.mark.parametrize("name", ["grpo", "grpo_kl", "grpo_delta", "bnpo", "dr_grpo", "dapo"])
def test_grpo_and_its_variants(name: str) -> None:
    case = Case(name)
    leaf = case["log_probs"].clone().requires_grad_()
    aggregation = AGGREGATIONS[name.removesuffix("_kl").removesuffix("_delta")]
    loss, metrics = grpo_loss(case, leaf, aggregation=aggregation)
    case.check(loss, leaf=leaf)
    if aggregation == "decision":  # TRL's statistics are means over tokens whatever the loss
        case.check_metrics({"kl": metrics["reference_kl"]}, ["kl"])
        case.check_metrics(
            {"clip_ratio/region_mean": metrics["clip_fraction"]}, ["clip_ratio/region_mean"], atol=SINGLE
        )
        assert case.metrics["clip_ratio/low_mean"] > 0
        assert case.metrics["clip_ratio/high_mean"] > 0


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo"])
def test_micro_batches_where_trl_agrees(name: str) -> None:
    case = Case(f"{name}_two_parts")
    leaf = case["log_probs"].clone().requires_grad_()
    loss, _ = grpo_loss(case, leaf, aggregation=AGGREGATIONS[name], parts=2)
    case.check(loss, leaf=leaf)
    close(loss, Case("grpo_kl" if name == "grpo" else name).outputs["loss"], atol=TIGHT)


def test_trls_bnpo_changes_with_the_micro_batches() -> None:
    """TRL averages the token means of the accumulated parts (7 and 5 tokens here), so a token of the shorter part
    weighs more. Ours has the whole step's denominator, in one part or two."""
    whole, halves = Case("bnpo"), Case("bnpo_two_parts")
    leaf = whole["log_probs"].clone().requires_grad_()
    for parts in (1, 2):
        loss, _ = grpo_loss(whole, leaf, aggregation="decision", parts=parts)
        whole.check(loss, leaf=leaf)
    assert abs(halves.outputs["loss"] - whole.outputs["loss"]) > 0.01
    mask = whole["mask"]
    means = []
    for rows in torch.arange(4).chunk(2):
        first = Case("bnpo")
        first.inputs = {key: value[rows] for key, value in first.inputs.items()}
        means.append(grpo_loss(first, leaf[rows], aggregation="decision")[0])
    assert mask.sum(1).tolist() == [5, 2, 4, 1]
    close(torch.stack(means).mean(), halves.outputs["loss"], atol=TIGHT)


def test_overlong_punishment() -> None:
    case = Case("overlong")
    punishment = overlong_punishment(
        case["lengths"], max_length=case.settings["longest"], cache=case.settings["cache"]
    )
    close(punishment.double(), case.outputs["rewards"], atol=SINGLE)


# ---------------------------------------------------------------- PPO, the last that TRL had


def ppo_part(part: dict[str, Any]) -> dict[str, Tensor]:
    return {key: torch.tensor(value) for key, value in part.items()}


def shares(mask: Tensor) -> Tensor:
    """The weights of a mean over the mask."""
    return mask / mask.sum()


def ppo_losses(part: dict[str, Tensor], *, weights: Tensor, value_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Our two losses; TRL's value loss has the half, ours has not."""
    settings = Case("ppo", "1.12.0").settings
    policy, _ = policy_loss(
        log_probs=part["log_probs"],
        old_log_probs=part["old_log_probs"],
        advantages=part["advantages"],
        weights=weights,
        clip_range=settings["clip_range"],
    )
    value, _ = value_loss(
        values=part["values"],
        returns=part["returns"],
        weights=value_weights,
        old_values=part["old_values"],
        clip_range=settings["value_clip_range"],
    )
    return policy, value / 2


def test_ppo() -> None:
    """The third epoch over one batch, where ratios and values are clipped on both sides."""
    case = Case("ppo", "1.12.0")
    (raw,) = case.outputs["parts"]
    part = ppo_part(raw)
    log_probs, values = part["log_probs"].requires_grad_(), part["values"].requires_grad_()
    policy, value = ppo_losses(part, weights=shares(part["mask"]), value_weights=shares(part["value_mask"]))
    close(policy.detach(), raw["policy_loss"], atol=TIGHT)
    close(value.detach(), raw["value_loss"], atol=TIGHT)
    total = policy + case.settings["value_coef"] * value
    close(total.detach(), raw["loss"], atol=TIGHT)
    gradients = torch.autograd.grad(total, (log_probs, values))
    close(gradients[0], raw["log_prob_gradient"], atol=TIGHT)
    close(gradients[1], raw["value_gradient"], atol=TIGHT)
    ratio, gains = (log_probs - part["old_log_probs"]).detach().exp(), part["advantages"] > 0
    assert ((ratio > 1.1) & gains & part["mask"]).any()
    assert ((ratio < 0.9) & ~gains & part["mask"]).any()


def test_gae_on_padded_text() -> None:
    """Answers of several lengths in one batch: our returns and whitened advantages are TRL's where one counts."""
    case = Case("ppo", "1.12.0")
    mask = case["value_mask"]
    assert len(set(mask.sum(1).tolist())) > 2
    last = mask & (torch.arange(mask.shape[1]) == mask.sum(1, keepdim=True) - 1)
    rollout = make_rollout(
        case["rewards"],
        mask=mask,
        terminated=last,
        values=case["values"],
        next_values=torch.roll(case["values"], -1, dims=1),
        episode=torch.where(mask, 0, -1),
        discount=case.settings["gamma"],
    )
    advantages, returns = gae(rollout, gae_lambda=case.settings["lambda"])
    close(returns[mask], case["returns"][mask], atol=TIGHT)
    close(normalize(advantages, case["mask"])[case["mask"]], case["advantages"][case["mask"]], atol=1e-6)


def test_trl_pays_the_score_one_token_late() -> None:
    """TRL's reward of an answer that ended falls on the first *padding* token, whose value then enters the returns
    and is trained. Ours falls on the last token: the end is known there, and nothing is discounted once more."""
    case = Case("ppo", "1.12.0")
    mask, lengths = case["mask"], case["mask"].sum(1)
    penalty, _ = kl_rewards(
        rewards=torch.zeros_like(case["rewards"]),
        old_log_probs=case["logprobs"],
        ref_log_probs=case["ref_logprobs"],
        mask=mask,
        coef=case.settings["kl"],
    )
    late = torch.where(lengths < mask.shape[1], lengths, lengths - 1)
    paid = torch.zeros_like(penalty).scatter(1, late.unsqueeze(1), case["scores"].unsqueeze(1))
    close(penalty + paid, case["rewards"], atol=TIGHT)
    assert (lengths < mask.shape[1]).sum() >= 2
    # of an answer that ended, the token that ended it: TRL's return has gamma, and the value of a padding token
    gamma, decay = case.settings["gamma"], case.settings["lambda"]
    row = int((lengths < mask.shape[1]).nonzero()[0, 0])
    end, score = int(lengths[row]) - 1, case["scores"][row]
    beyond = case["values"][row, end + 1]
    theirs = penalty[row, end] + gamma * beyond + gamma * decay * (score - beyond)
    close(case["returns"][row, end], theirs, atol=TIGHT)
    assert abs(float(theirs - (penalty[row, end] + score))) > 0.1


def test_trls_ppo_changes_with_the_micro_batches() -> None:
    """Two parts of one optimizer step: TRL takes the mean of their means, so tokens of the shorter part weigh more.
    The mean over the step's tokens is what our weights make, in one part or two."""
    case = Case("ppo_two_parts", "1.12.0")
    assert [part["steps"] for part in case.outputs["parts"]] == [False, True]
    parts = [ppo_part(part) for part in case.outputs["parts"]]
    tokens = [int(part["mask"].sum()) for part in parts]
    assert tokens[0] != tokens[1]
    means = torch.tensor([part["policy_loss"] for part in case.outputs["parts"]])
    whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0] if parts[0][key].dim() == 2}
    weights, value_weights = shares(whole["mask"]), shares(whole["value_mask"])
    right, _ = ppo_losses(whole, weights=weights, value_weights=value_weights)
    halves = [
        ppo_losses(part, weights=weight, value_weights=value_weight)[0]
        for part, weight, value_weight in zip(parts, weights.chunk(2), value_weights.chunk(2), strict=True)
    ]
    close(halves[0] + halves[1], right, atol=TIGHT)
    close(right, (means * torch.tensor(tokens)).sum() / sum(tokens), atol=TIGHT)
    assert abs(float(right - means.mean())) > 1e-3


def test_trls_minibatches_are_not_optimizer_steps() -> None:
    """num_mini_batches 2 with gradients accumulated over 2: TRL still waits for both and takes one step an epoch.
    Our minibatch is a step, whatever its micro-batches."""
    case = Case("ppo_two_minibatches", "1.12.0")
    assert [part["steps"] for part in case.outputs["parts"]] == [False, True]
    rollout = make_rollout(case["rewards"], mask=case["mask"])
    steps = make_batches(
        rollout,
        advantages=case["advantages"],
        returns=None,
        config=PPOConfig(minibatch_size=2, micro_batch_size=1),
        order=torch.arange(4),
    )
    assert [step.weights.sum() for step in steps] == [pytest.approx(1.0), pytest.approx(1.0)]
