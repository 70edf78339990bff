"""Losses on preferences: by hand, at their limits, their gradients, and in micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, cast, get_args

import pytest
import torch
from torch import Tensor

from policy_core.preference import (
    NEEDS_REFERENCE,
    PREFERENCE_LOSSES,
    KTOConfig,
    LossName,
    PairLogProbs,
    PreferenceConfig,
    kto_baseline,
    kto_loss,
    kto_means,
    log_odds,
)
from tests.policy_core.helpers import NAN, close

LOSSES = list(PREFERENCE_LOSSES)

# Log-ratios of the chosen: 2, -1; of the rejected: -1, 1. Their differences: 3, -2.
# Means per token: -1, -3 of the chosen; -2.5, -1 of the rejected.
PAIRS = PairLogProbs(
    chosen=torch.tensor([-4.0, -6.0], dtype=torch.float64),
    rejected=torch.tensor([-5.0, -3.0], dtype=torch.float64),
    ref_chosen=torch.tensor([-6.0, -5.0], dtype=torch.float64),
    ref_rejected=torch.tensor([-4.0, -4.0], dtype=torch.float64),
    chosen_length=torch.tensor([4.0, 2.0], dtype=torch.float64),
    rejected_length=torch.tensor([2.0, 3.0], dtype=torch.float64),
    offset=torch.tensor([2.0, 0.5], dtype=torch.float64),
)
WEIGHTS = torch.tensor([0.25, 0.75], dtype=torch.float64)


def softplus(value: float) -> float:
    """-log sigmoid(-value)."""
    return math.log1p(math.exp(value))


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def loss_of(pairs: PairLogProbs, weights: Tensor, **settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
    config = PreferenceConfig(**settings)
    return PREFERENCE_LOSSES[config.loss](pairs, config=config, weights=weights)


def by_pair(pairs: PairLogProbs = PAIRS, **settings: Any) -> list[float]:
    """The loss of each pair alone."""
    return [float(loss_of(rows(pairs, [n]), torch.ones(1), **settings)[0]) for n in range(len(pairs.chosen))]


def changed(pairs: PairLogProbs, change: Callable[[Tensor], Tensor]) -> PairLogProbs:
    """Every column that is there, changed."""
    columns = {field.name: getattr(pairs, field.name) for field in fields(pairs)}
    new: dict[str, Any] = {name: change(column) for name, column in columns.items() if column is not None}
    return PairLogProbs(**new)


def rows(pairs: PairLogProbs, index: list[int]) -> PairLogProbs:
    return changed(pairs, lambda column: column[index])


def random_pairs(count: int) -> PairLogProbs:
    generator = torch.Generator().manual_seed(7)

    def draw() -> Tensor:
        return -1 - 9 * torch.rand(count, generator=generator)

    return PairLogProbs(
        chosen=draw(),
        rejected=draw(),
        chosen_length=torch.randint(1, 9, (count,), generator=generator).double(),
        rejected_length=torch.randint(1, 9, (count,), generator=generator).double(),
        ref_chosen=draw(),
        ref_rejected=draw(),
        offset=torch.rand(count, generator=generator) + 0.1,
    )


def same_as_reference(pairs: PairLogProbs) -> PairLogProbs:
    return replace(pairs, ref_chosen=pairs.chosen, ref_rejected=pairs.rejected)


# ---------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"loss": "dpo", "beta": 0.5}, [softplus(-1.5), softplus(1.0)]),
        (
            {"loss": "dpo", "beta": 0.5, "label_smoothing": 0.1},
            [0.9 * softplus(-1.5) + 0.1 * softplus(1.5), 0.9 * softplus(1.0) + 0.1 * softplus(-1.0)],
        ),
        # per token: 2 / 4 + 1 / 2 = 1 and -1 / 2 - 1 / 3; the target is 1 / (2 * 0.25) = 2
        ({"loss": "ipo", "beta": 0.25}, [1.0, (5 / 6 + 2) ** 2]),
        ({"loss": "odpo", "beta": 0.5}, [softplus(math.log(2) - 1.5), softplus(math.log(0.5) + 1.0)]),
        (
            {"loss": "odpo", "beta": 0.5, "odpo_alpha": 3.0, "odpo_offset": "linear"},
            [softplus(6 - 1.5), softplus(1.5 + 1.0)],
        ),
        # per token: -1 + 2.5 = 1.5 and -3 + 1 = -2, each less 0.5, times 2
        ({"loss": "simpo", "beta": 2.0, "simpo_margin": 0.5}, [softplus(-2.0), softplus(5.0)]),
        # clipped at 0.75 and -0.25: 1 + 0.5 is cut to 0.75 + 0.25; -0.5 - 0.5 is not; times 2, times the offset
        (
            {"loss": "tso", "beta": 0.5, "tso_scale": 2.0, "tso_clip_chosen": 0.75, "tso_clip_rejected": 0.25},
            [softplus(-4.0), softplus(1.0)],
        ),
    ],
)
def test_by_hand(settings: dict[str, Any], expected: list[float]) -> None:
    assert by_pair(**settings) == pytest.approx(expected, abs=1e-14)
    total, _ = loss_of(PAIRS, WEIGHTS, **settings)
    close(total, 0.25 * expected[0] + 0.75 * expected[1])


def test_orpo_by_hand() -> None:
    def odds(mean: float) -> float:
        return math.exp(mean) / (1 - math.exp(mean))

    ratios = [odds(-1.0) / odds(-2.5), odds(-3.0) / odds(-1.0)]
    expected = [
        1.0 - 0.3 * math.log(sigmoid(math.log(ratios[0]))),
        3.0 - 0.3 * math.log(sigmoid(math.log(ratios[1]))),
    ]
    assert by_pair(loss="orpo", beta=0.3) == pytest.approx(expected, abs=1e-13)
    _, metrics = loss_of(PAIRS, WEIGHTS, loss="orpo", beta=0.3)
    close(metrics["nll_loss"], 0.25 * 1 + 0.75 * 3)
    close(metrics["log_odds_chosen"], 0.25 * math.log(ratios[0]) + 0.75 * math.log(ratios[1]))
    close(metrics["log_odds_ratio"], -sum(w * math.log1p(1 / r) for w, r in zip((0.25, 0.75), ratios, strict=True)))


@pytest.mark.parametrize(
    "settings, chosen, rejected",
    [
        ({"loss": "dpo", "beta": 0.5}, (1.0, -0.5), (-0.5, 0.5)),
        ({"loss": "odpo", "beta": 0.5}, (1.0, -0.5), (-0.5, 0.5)),
        ({"loss": "tso", "beta": 0.5, "tso_clip_chosen": 0.1}, (1.0, -0.5), (-0.5, 0.5)),
        ({"loss": "ipo", "beta": 0.5}, (0.25, -0.25), (-0.25, 1 / 6)),
        ({"loss": "simpo", "beta": 0.5}, (-0.5, -1.5), (-1.25, -0.5)),
        ({"loss": "orpo", "beta": 0.5}, (-0.5, -1.5), (-1.25, -0.5)),
    ],
)
def test_metrics(settings: dict[str, Any], chosen: tuple[float, float], rejected: tuple[float, float]) -> None:
    """The weighted means of what the loss calls rewards; only the first pair is in the right order."""
    _, metrics = loss_of(PAIRS, WEIGHTS, **settings)
    wins, losses = (0.25 * side[0] + 0.75 * side[1] for side in (chosen, rejected))
    close(metrics["rewards/chosen"], wins)
    close(metrics["rewards/rejected"], losses)
    close(metrics["rewards/margins"], wins - losses)
    close(metrics["rewards/accuracies"], 0.25)
    close(metrics["logps/chosen"], 0.25 * -4 + 0.75 * -6)
    close(metrics["logps/rejected"], 0.25 * -5 + 0.75 * -3)


# ---------------------------------------------------------------- where training starts, and the limits


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_dpo_starts_at_log_2(beta: float) -> None:
    start = same_as_reference(random_pairs(5))
    weights = torch.full((5,), 0.2)
    for loss in ("dpo", "tso"):
        close(loss_of(start, weights, loss=loss, beta=beta)[0], math.log(2))
    close(loss_of(start, weights, loss="dpo", beta=beta, label_smoothing=0.3)[0], math.log(2))
    close(loss_of(replace(start, offset=torch.ones(5)), weights, loss="odpo", beta=beta)[0], math.log(2))
    total, metrics = loss_of(start, weights, loss="ipo", beta=beta)
    close(total, 1 / (4 * beta**2), atol=1e-9)
    close(metrics["rewards/accuracies"], 0.0)  # equal is not above
    close(metrics["rewards/margins"], 0.0)


def test_without_an_anchor_dpo_is_a_straight_push() -> None:
    """beta -> 0: the loss is log 2 - beta / 2 times the mean difference of log-ratios, here 0.25 * 3 - 0.75 * 2."""
    total, _ = loss_of(PAIRS, WEIGHTS, loss="dpo", beta=1e-6)
    close((total - math.log(2)) / 1e-6, 0.75 / 2, atol=1e-5)


def gradients(pairs: PairLogProbs, **settings: Any) -> tuple[Tensor, Tensor]:
    """Of the summed loss, with respect to the chosen and the rejected log-probs."""
    leaves = pairs.chosen.clone().requires_grad_(), pairs.rejected.clone().requires_grad_()
    total, _ = loss_of(replace(pairs, chosen=leaves[0], rejected=leaves[1]), torch.ones(len(leaves[0])), **settings)
    return cast(tuple[Tensor, Tensor], torch.autograd.grad(total, leaves))


def at_margin(margin: float, *, beta: float) -> PairLogProbs:
    """One pair whose implicit rewards differ by `margin`, of one token each."""
    zero, one = torch.zeros(1), torch.ones(1)
    return PairLogProbs(zero - 1 + margin / beta, zero - 1, one, one, zero - 1, zero - 1, one)


def test_a_noisy_label_makes_the_best_margin_finite() -> None:
    best = math.log(0.9 / 0.1)
    smoothed = {"loss": "dpo", "beta": 0.2, "label_smoothing": 0.1}
    close(gradients(at_margin(best, beta=0.2), **smoothed)[0], [0.0])
    assert gradients(at_margin(best - 0.1, beta=0.2), **smoothed)[0] < 0  # descending raises the chosen one
    assert gradients(at_margin(best + 0.1, beta=0.2), **smoothed)[0] > 0
    assert gradients(at_margin(best + 9.0, beta=0.2), loss="dpo", beta=0.2)[0] < 0  # plain DPO never stops


def test_ipo_stops_at_its_target() -> None:
    close(gradients(at_margin(1 / (2 * 0.2), beta=1.0), loss="ipo", beta=0.2)[0], [0.0])


def test_dpo_gradient_is_the_papers() -> None:
    """-beta * sigmoid(r_rejected - r_chosen) for the chosen, the opposite for the rejected (section 4)."""
    chosen, rejected = gradients(PAIRS, loss="dpo", beta=0.5)
    close(chosen, [-0.5 * sigmoid(-1.5), -0.5 * sigmoid(1.0)])
    close(rejected, -chosen)


def test_a_clipped_side_has_no_gradient() -> None:
    clips = {"loss": "tso", "beta": 0.5, "tso_clip_chosen": 0.75, "tso_clip_rejected": 0.25}
    chosen, rejected = gradients(PAIRS, **clips)
    close(chosen[0], 0.0)
    close(rejected[0], 0.0)
    close(chosen[1], -0.5 * 0.5 * sigmoid(0.5))  # its offset 0.5 times beta
    close(rejected[1], -chosen[1])
    _, metrics = loss_of(PAIRS, WEIGHTS, **clips)
    close(metrics["clipped/chosen"], 0.25)
    close(metrics["clipped/rejected"], 0.25)
    chosen, rejected = gradients(PAIRS, **{**clips, "tso_clip_rejected": 9.0})  # the chosen side alone is clipped
    close(chosen[0], 0.0)
    assert rejected[0] > 0


def test_tso_without_clips_and_offsets_is_dpo() -> None:
    pairs = random_pairs(6)
    weights = torch.full((6,), 1 / 6)
    far = {"beta": 0.3, "tso_clip_chosen": math.inf, "tso_clip_rejected": math.inf, "label_smoothing": 0.05}
    expected, _ = loss_of(pairs, weights, loss="dpo", beta=0.3, label_smoothing=0.05)
    for offset in (None, torch.full((6,), NAN), torch.ones(6)):
        close(loss_of(replace(pairs, offset=offset), weights, loss="tso", **far)[0], expected)


def test_odpo_asks_for_more_where_the_preference_is_stronger() -> None:
    weak, strong = by_pair(
        replace(rows(PAIRS, [0, 0]), offset=torch.tensor([1.5, 6.0])), loss="odpo", beta=0.5, odpo_alpha=1.0
    )
    assert strong > weak
    even = replace(rows(PAIRS, [0]), offset=torch.tensor([math.exp(1.5)]))  # the margin equals the offset
    assert by_pair(even, loss="odpo", beta=0.5) == pytest.approx([math.log(2)], abs=1e-14)
    assert by_pair(loss="odpo", beta=0.5, odpo_alpha=0.0) == by_pair(loss="dpo", beta=0.5)


@pytest.mark.parametrize("loss", ["ipo", "simpo", "orpo"])
def test_length_does_not_count_twice(loss: str) -> None:
    """The same text said three times, at the same nats per token, is worth the same."""
    pairs = replace(random_pairs(4), offset=None)
    tripled = changed(pairs, lambda column: 3 * column)
    assert by_pair(tripled, loss=loss) == pytest.approx(by_pair(pairs, loss=loss), rel=1e-13)


def test_log_odds_at_both_ends() -> None:
    # p = 1 / 2 is even; p -> 0: log p; p -> 1: -log(1 - p), here of p = exp(-1e-12), where 1 - p rounds away digits
    means = torch.tensor([-math.log(2), -60.0, -1e-12, -1.0])
    close(log_odds(means), [0.0, -60.0, math.log(1e12), -1 - math.log(1 - math.exp(-1))], atol=1e-12)


def test_log_odds_of_what_is_certain_are_finite_and_have_no_gradient() -> None:
    means = torch.tensor([0.0, -1e-8, -0.5, -40.0], dtype=torch.float32, requires_grad=True)
    odds = log_odds(means)
    (gradient,) = torch.autograd.grad(odds.sum(), means)
    assert torch.isfinite(odds).all()
    assert torch.isfinite(gradient).all()
    close(gradient[:2], [0.0, 0.0])


# ---------------------------------------------------------------- for all of them


def settings_of(loss: str) -> dict[str, Any]:
    """Numbers under which no term of the loss is idle, and no random pair lies on a corner of the clip."""
    smoothing = {} if loss in ("ipo", "orpo") else {"label_smoothing": 0.1}
    return {"loss": loss, "beta": 0.3, "tso_clip_chosen": 0.4, "tso_clip_rejected": 0.4, **smoothing}


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_by_finite_differences(loss: str) -> None:
    pairs, weights = random_pairs(5), torch.rand(5, generator=torch.Generator().manual_seed(1))

    def function(chosen: Tensor, rejected: Tensor) -> Tensor:
        return loss_of(replace(pairs, chosen=chosen, rejected=rejected), weights, **settings_of(loss))[0]

    assert torch.autograd.gradcheck(function, (pairs.chosen.requires_grad_(), pairs.rejected.requires_grad_()))


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_add_up(loss: str) -> None:
    pairs, weights = random_pairs(7), torch.full((7,), 1 / 7)
    whole, metrics = loss_of(pairs, weights, **settings_of(loss))
    parts = [loss_of(rows(pairs, part), weights[part], **settings_of(loss)) for part in ([0, 1, 2], [3], [4, 5, 6])]
    close(torch.stack([part for part, _ in parts]).sum(), whole)
    assert {name for _, part in parts for name in part} == set(metrics)
    for name, value in metrics.items():
        close(torch.stack([part[name] for _, part in parts]).sum(), value)
        assert not value.requires_grad


@pytest.mark.parametrize("loss", LOSSES)
def test_descending_prefers_the_chosen(loss: str) -> None:
    chosen, rejected = gradients(same_as_reference(random_pairs(4)), loss=loss)
    assert (chosen < 0).all()
    assert (rejected > 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_reference_is_asked_for_where_it_is_needed(loss: str) -> None:
    without = replace(PAIRS, ref_chosen=None, ref_rejected=None)
    if loss in NEEDS_REFERENCE:
        with pytest.raises(ValueError, match=r"^this preference loss needs the reference's log-probs$"):
            loss_of(without, WEIGHTS, loss=loss)
    else:
        close(loss_of(without, WEIGHTS, loss=loss)[0], loss_of(PAIRS, WEIGHTS, loss=loss)[0])


def test_names_agree() -> None:
    assert tuple(PREFERENCE_LOSSES) == get_args(LossName)
    assert set(PREFERENCE_LOSSES) >= NEEDS_REFERENCE


# ---------------------------------------------------------------- KTO

LOG_PROBS = torch.tensor([-4.0, -6.0, -3.0], dtype=torch.float64)
REF_LOG_PROBS = torch.tensor([-6.0, -5.0, -4.0], dtype=torch.float64)  # log-ratios 2, -1, 1
DESIRABLE = torch.tensor([True, True, False])


def kto(weights: Tensor | None = None, *, kl: float = 0.4, **settings: float) -> tuple[Tensor, dict[str, Tensor]]:
    return kto_loss(
        log_probs=LOG_PROBS,
        ref_log_probs=REF_LOG_PROBS,
        desirable=DESIRABLE,
        kl=torch.tensor(kl),
        config=KTOConfig(**{"beta": 0.5, **settings}),
        weights=torch.full((3,), 1 / 3) if weights is None else weights,
    )


def test_kto_by_hand() -> None:
    total, metrics = kto(desirable_weight=2.0, undesirable_weight=0.5)
    # beta * (log-ratio - 0.4), the sign turned for the undesirable one: 0.8, -0.7, -0.3
    expected = (2 * (1 - sigmoid(0.8)) + 2 * (1 - sigmoid(-0.7)) + 0.5 * (1 - sigmoid(-0.3))) / 3
    close(total, expected)
    means = kto_means(metrics)
    close(means["kl"], 0.4)
    close(means["rewards/chosen"], 0.5 * (2 - 1) / 2)
    close(means["rewards/rejected"], 0.5)
    close(means["rewards/margins"], -0.25)
    close(means["logps/chosen"], -5.0)
    close(means["logps/rejected"], -3.0)


def test_kto_starts_at_half() -> None:
    for desirable in (DESIRABLE, ~DESIRABLE):
        total, _ = kto_loss(
            log_probs=LOG_PROBS,
            ref_log_probs=LOG_PROBS,
            desirable=desirable,
            kl=torch.tensor(0.0),
            config=KTOConfig(),
            weights=torch.full((3,), 1 / 3),
        )
        close(total, 0.5)


def test_kto_baseline_is_never_negative_and_has_no_gradient() -> None:
    close(kto(kl=-3.0)[0], kto(kl=0.0)[0])
    close(kto_means(kto(kl=-3.0)[1])["kl"], 0.0)
    policy = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    baseline = kto_baseline(log_probs=policy, ref_log_probs=torch.tensor([0.0, 0.0, 3.0]))
    close(baseline, 2.0)
    assert not baseline.requires_grad
    close(kto_baseline(log_probs=torch.zeros(2), ref_log_probs=torch.ones(2)), 0.0)
    close(kto_baseline(log_probs=torch.zeros(0), ref_log_probs=torch.zeros(0)), 0.0)
    kl = torch.tensor(0.4, requires_grad=True)
    scores = LOG_PROBS.clone().requires_grad_()
    total, _ = kto_loss(
        log_probs=scores,
        ref_log_probs=REF_LOG_PROBS,
        desirable=DESIRABLE,
        kl=kl,
        config=KTOConfig(),
        weights=torch.ones(3),
    )
    total.backward()
    assert kl.grad is None
    assert scores.grad is not None
    assert (scores.grad * torch.tensor([-1.0, -1.0, 1.0]) > 0).all()  # up where desirable, down where not


def test_kto_gradient_by_finite_differences() -> None:
    def function(log_probs: Tensor) -> Tensor:
        return kto_loss(
            log_probs=log_probs,
            ref_log_probs=REF_LOG_PROBS,
            desirable=DESIRABLE,
            kl=torch.tensor(0.4),
            config=KTOConfig(beta=0.7, desirable_weight=1.5),
            weights=torch.tensor([0.2, 0.3, 0.5]),
        )[0]

    assert torch.autograd.gradcheck(function, (LOG_PROBS.clone().requires_grad_(),))


def test_kto_micro_batches_add_up() -> None:
    """Under the step's own baseline; the means are taken once all parts are in, since a part may lack one kind."""
    whole, metrics = kto()
    totals = {name: torch.zeros(()) for name in metrics}
    loss = torch.zeros(())
    for part in ([0, 2], [1]):
        value, parts = kto_loss(
            log_probs=LOG_PROBS[part],
            ref_log_probs=REF_LOG_PROBS[part],
            desirable=DESIRABLE[part],
            kl=torch.tensor(0.4),
            config=KTOConfig(beta=0.5),
            weights=torch.full((len(part),), 1 / 3),
        )
        loss = loss + value
        totals = {name: totals[name] + parts[name] for name in totals}
    close(loss, whole)
    expected = kto_means(metrics)
    assert {name: pytest.approx(float(value)) for name, value in kto_means(totals).items()} == expected


def test_kto_without_one_kind_reports_the_other_only() -> None:
    _, metrics = kto_loss(
        log_probs=LOG_PROBS,
        ref_log_probs=REF_LOG_PROBS,
        desirable=torch.zeros(3, dtype=torch.bool),
        kl=torch.tensor(0.0),
        config=KTOConfig(),
        weights=torch.full((3,), 1 / 3),
    )
    assert set(kto_means(metrics)) == {"kl", "rewards/rejected", "logps/rejected"}


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: PreferenceConfig(beta=0.0), r"^preference\.beta must be above 0, got 0\.0$"),
        (lambda: PreferenceConfig(beta=NAN), r"^preference\.beta must be above 0, got nan$"),
        (lambda: PreferenceConfig(beta=math.inf), r"^preference\.beta must be above 0, got inf$"),
        (
            lambda: PreferenceConfig(label_smoothing=0.5),
            r"^preference\.label_smoothing must be in \[0, 0\.5\), got 0\.5$",
        ),
        (
            lambda: PreferenceConfig(loss="ipo", label_smoothing=0.1),
            r"^preference\.label_smoothing is not defined for preference\.loss 'ipo'$",
        ),
        (
            lambda: PreferenceConfig(odpo_alpha=-1.0),
            r"^preference\.simpo_margin and preference\.odpo_alpha must not be negative$",
        ),
        (
            lambda: PreferenceConfig(tso_scale=0.0),
            r"^preference\.tso_scale, tso_clip_chosen and tso_clip_rejected must be above 0$",
        ),
        (lambda: KTOConfig(beta=-1.0), r"^kto\.beta must be above 0, got -1\.0$"),
        (
            lambda: KTOConfig(desirable_weight=-0.1),
            r"^kto\.desirable_weight and kto\.undesirable_weight must not be negative$",
        ),
    ],
)
def test_settings_are_checked(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "loss, offset, message",
    [
        ("odpo", None, r"^preference\.loss 'odpo' needs every pair's strength \(a margin column\)$"),
        ("odpo", [2.0, 0.0], r"^preference\.loss 'odpo' needs a margin above 0 for every pair, got 0$"),
        ("odpo", [2.0, NAN], r"^preference\.loss 'odpo' needs a margin above 0 for every pair, got nan$"),
        ("tso", [2.0, -1.0], r"^preference\.loss 'tso' needs margins of at least 0, got -1$"),
    ],
)
def test_offsets_are_checked(loss: str, offset: list[float] | None, message: str) -> None:
    pairs = replace(PAIRS, offset=None if offset is None else torch.tensor(offset))
    with pytest.raises(ValueError, match=message):
        loss_of(pairs, WEIGHTS, loss=loss)
