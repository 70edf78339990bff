"""Faults of what learns from preferences, for `tests/mutants.py`: a literal table."""

from __future__ import annotations

from tests.fault import Fault

PREFERENCE_FAULTS = (
    # ------------------------------------------------------------ preference
    Fault(
        "preference",
        "return beta * (pairs.chosen - pairs.ref_chosen), beta * (pairs.rejected - pairs.ref_rejected)",
        "return beta * (pairs.chosen - pairs.ref_rejected), beta * (pairs.rejected - pairs.ref_chosen)",
        "the reference's log-probs are crossed",
    ),
    Fault(
        "preference",
        "return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)",
        "return -(1 - label_smoothing) * F.logsigmoid(margin) + label_smoothing * F.logsigmoid(-margin)",
        "robust DPO's sign in conservative DPO",
    ),
    Fault(
        "preference",
        '"rewards/accuracies": (weights * (chosen > rejected)).sum(),',
        '"rewards/accuracies": (weights * (chosen >= rejected)).sum(),',
        "equal rewards count as right",
    ),
    Fault(
        "preference",
        '"rewards/margins": (weights * (chosen - rejected)).sum(),',
        '"rewards/margins": (chosen - rejected).mean(),',
        "a metric that micro-batches do not add up to",
    ),
    Fault(
        "preference",
        '"logps/rejected": (weights * pairs.rejected.detach()).sum(),',
        '"logps/rejected": (weights * pairs.chosen.detach()).sum(),',
        "the rejected one's log-prob is the chosen one's",
    ),
    Fault(
        "preference",
        "loss = (weights * smoothed(chosen - rejected, config.label_smoothing)).sum()",
        "loss = smoothed(chosen - rejected, config.label_smoothing).mean()",
        "DPO forgets the step's denominator",
    ),
    Fault(
        "preference",
        "rejected = rejected / pairs.rejected_length.clamp(min=1)",
        "rejected = rejected / pairs.chosen_length.clamp(min=1)",
        "IPO divides by the other one's length",
    ),
    Fault(
        "preference",
        "loss = (weights * (chosen - rejected - 1 / (2 * config.beta)).square()).sum()",
        "loss = (weights * (chosen - rejected - 1 / config.beta).square()).sum()",
        "IPO's target is twice too far",
    ),
    Fault(
        "preference",
        "chosen=config.beta * chosen, rejected=config.beta * rejected, weights=weights)\n"
        "    return loss, metrics\n",
        "chosen=chosen, rejected=rejected, weights=weights)\n    return loss, metrics\n",
        "IPO's rewards without beta",
    ),
    Fault(
        "preference",
        'strength = pairs.offset.log() if config.odpo_offset == "log" else pairs.offset',
        'strength = pairs.offset.log1p() if config.odpo_offset == "log" else pairs.offset',
        "another scale of the offset",
    ),
    Fault(
        "preference",
        "loss = (weights * smoothed(chosen - rejected - offset, config.label_smoothing)).sum()",
        "loss = (weights * smoothed(chosen - rejected - config.beta * offset, config.label_smoothing)).sum()",
        "the offset is scaled by beta",
    ),
    Fault(
        "preference",
        'if torch.isnan(least) or (config.odpo_offset == "log" and least <= 0):',
        'if config.odpo_offset == "log" and least <= 0:',
        "a NaN margin reaches the loss",
    ),
    Fault(
        "preference",
        "margin = chosen - rejected - config.beta * config.simpo_margin",
        "margin = chosen - rejected - config.simpo_margin",
        "SimPO's margin is not in units of beta",
    ),
    Fault(
        "preference",
        "chosen = config.beta * pairs.chosen / pairs.chosen_length.clamp(min=1)",
        "chosen = config.beta * pairs.chosen",
        "SimPO sums over the chosen one's tokens",
    ),
    Fault(
        "preference",
        "below = mean_log_probs.clamp(max=-torch.finfo(mean_log_probs.dtype).eps)",
        "below = mean_log_probs",
        "odds of a certain completion are infinite",
    ),
    Fault(
        "preference",
        "return below - torch.where(near_one, torch.log(-torch.expm1(upper)), torch.log1p(-torch.exp(lower)))",
        "return below - torch.log1p(-torch.exp(below))",
        "odds near 1 lose their digits",
    ),
    Fault(
        "preference",
        "loss = nll - config.beta * (weights * ratio).sum()",
        "loss = nll + config.beta * (weights * ratio).sum()",
        "ORPO prefers the rejected",
    ),
    Fault(
        "preference",
        "nll = -(weights * chosen).sum()",
        "nll = -(weights * pairs.chosen).sum()",
        "ORPO sums its NLL",
    ),
    Fault(
        "preference",
        "chosen.clamp(max=config.tso_clip_chosen) - rejected.clamp(min=-config.tso_clip_rejected)",
        "chosen.clamp(max=config.tso_clip_chosen) - rejected.clamp(max=config.tso_clip_rejected)",
        "the clip of the rejected reward is on the wrong side",
    ),
    Fault(
        "preference",
        "difference = difference * torch.where(torch.isnan(pairs.offset), 1.0, pairs.offset)",
        "difference = difference * pairs.offset",
        "a pair without an offset makes the loss NaN",
    ),
    Fault(
        "preference",
        "return (log_probs - ref_log_probs).detach().mean().clamp(min=0)",
        "return (log_probs - ref_log_probs).detach().mean()",
        "KTO's baseline may be negative",
    ),
    Fault(
        "preference",
        "return (log_probs - ref_log_probs).detach().mean().clamp(min=0)",
        "return (log_probs - ref_log_probs).mean().clamp(min=0)",
        "KTO's baseline has a gradient",
    ),
    Fault(
        "preference", "baseline = kl.detach().clamp(min=0)", "baseline = kl.detach()", "a negative KL is believed"
    ),
    Fault(
        "preference", "baseline = kl.detach().clamp(min=0)", "baseline = kl.clamp(min=0)", "the KL has a gradient"
    ),
    Fault(
        "preference",
        "losses = worth * torch.sigmoid(-sign * config.beta * (log_ratio - baseline))",
        "losses = worth * torch.sigmoid(-config.beta * (sign * log_ratio - baseline))",
        "KTO's baseline has one sign for both kinds",
    ),
    Fault(
        "preference",
        "worth = torch.where(desirable, config.desirable_weight, config.undesirable_weight)",
        "worth = torch.where(desirable, config.undesirable_weight, config.desirable_weight)",
        "KTO's weights are crossed",
    ),
    Fault(
        "preference",
        'metrics[f"logps/{name}"] = totals[f"logps/{name}"] / share',
        'metrics[f"logps/{name}"] = totals[f"logps/{name}"]',
        "KTO's log-probs are not means of their kind",
    ),
    # ------------------------------------------------------------ comparisons
    Fault("comparisons", "logits = logits - torch.where(", "logits = logits + torch.where(", "the margin helps"),
    Fault(
        "comparisons",
        "torch.where(torch.isnan(margin), 0.0, margin)",
        "margin",
        "a comparison without a margin makes the loss NaN",
    ),
    Fault(
        "comparisons",
        "losses = losses - label_smoothing * F.logsigmoid(-logits)",
        "losses = losses - label_smoothing * F.logsigmoid(logits)",
        "smoothing that smooths nothing",
    ),
    Fault(
        "comparisons",
        '"mean_reward": (weights * (chosen + rejected) / 2).sum(),',
        '"mean_reward": (weights * chosen).sum(),',
        "the mean reward is of the chosen only",
    ),
    Fault(
        "comparisons",
        "torch.log(torch.expm1(2 * level)) + win + lose",
        "torch.log(torch.expm1(level)) + win + lose",
        "Rao and Kupper's outcomes do not add up to 1",
    ),
    Fault(
        "comparisons",
        "weight.log().expand_as(difference)",
        "weight.expand_as(difference)",
        "Davidson's nu is taken for its logarithm",
    ),
    Fault("comparisons", "happened = tied.long()", "happened = 2 * tied.long()", "a tie is taken for a loss"),
    Fault(
        "comparisons",
        '"tie_probability": (weights * guessed[..., 1].exp()).sum(),',
        '"tie_probability": (weights * guessed[..., 0].exp()).sum(),',
        "the reported probability is that of winning",
    ),
    Fault(
        "comparisons",
        "(weights * (chosen + rejected).square()).sum()",
        "(weights * (chosen - rejected).square()).sum()",
        "centring shrinks margins",
    ),
    # ------------------------------------------------------------ calibration
    Fault(
        "calibration",
        "return torch.cat([logits, -logits]), torch.cat([ones, torch.zeros_like(ones)])",
        "return torch.cat([logits, logits]), torch.cat([ones, torch.zeros_like(ones)])",
        "the other order has the same logit",
    ),
    Fault("calibration", ".long().clamp(max=bins - 1)", ".long()", "probability 1 has a bin of its own"),
    Fault(
        "calibration",
        "return sum(row.count * abs(row.confidence - row.frequency) for row in rows) / total",
        "return sum(abs(row.confidence - row.frequency) for row in rows) / len(rows)",
        "bins weigh the same whatever they hold",
    ),
    Fault("calibration", "if slope(low) >= 0:", "if slope(low) > 0:", "logits that say nothing are called perfect"),
    Fault(
        "calibration",
        "(middle, high) if slope(middle) < 0 else (low, middle)",
        "(low, middle) if slope(middle) < 0 else (middle, high)",
        "bisection goes the wrong way",
    ),
    Fault(
        "calibration", "return 2 / (low + high)", "return (low + high) / 2", "the inverse temperature is returned"
    ),
    # ------------------------------------------------------------ selection
    Fault("selection", "return math.log(n) - (n - 1) / n", "return math.log(n) - 1 / n", "another KL"),
    Fault(
        "selection",
        "share = (within[not_above] - within[below]) / (not_above - below)",
        "share = within[not_above] - within[below]",
        "samples that score alike count several times",
    ),
    Fault(
        "selection",
        "not_above = torch.searchsorted(ordered, scores, right=True)",
        "not_above = torch.searchsorted(ordered, scores, right=False) + 1",
        "the choice among equals is not by lot",
    ),
    # ------------------------------------------------------------ grpo
    Fault(
        "grpo",
        "return (values - values.mean()) / values.std().clamp(min=1e-4)",
        "return (values - values.mean()) / (values.std() + 1e-8)",
        "the rounding of equal returns becomes an advantage",
    ),
    Fault(
        "grpo",
        "return (values - values.mean()) / values.std().clamp(min=1e-4)",
        "return values / values.std().clamp(min=1e-4)",
        "REINFORCE++ without a baseline",
    ),
    Fault(
        "grpo",
        "return _over_batch(dr_grpo(returns, group))",
        "return _over_batch(grpo(returns, group))",
        "two scales",
    ),
    Fault(
        "grpo",
        "return ((max_length - cache - lengths) / cache).clamp(-1.0, 0.0)",
        "return ((max_length - lengths) / cache).clamp(-1.0, 0.0)",
        "the punishment begins where the answer is cut",
    ),
)
