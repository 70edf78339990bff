"""Hard rules: a completion that breaks one earns a floor at most, whatever the weighted sum of rewards says.

A reward can be bought back by enough of another; a constraint cannot. What a rule is says `rewards/rules.py`; one
that cannot say is not broken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from llm_rlhf.rewards.functions import RewardSet, Scores
from llm_rlhf.rewards.rules import Rule, judge, load_rule


@dataclass(frozen=True)
class SafetyConfig:
    """rules: `file.py:rule` each; floor: the most that a completion earns which breaks one."""

    rules: tuple[str, ...] = ()
    floor: float = -10.0

    def __post_init__(self) -> None:
        if not abs(self.floor) < float("inf"):
            raise ValueError(f"safety.floor must be a finite number, got {self.floor}")
        if len(set(self.rules)) < len(self.rules):
            raise ValueError("safety.rules: a rule is named twice")


class ConstrainedRewards(RewardSet):
    """Reward functions under hard rules.

    A completion that breaks a rule gets the lower of its weighted sum and the floor, so that breaking never pays,
    and counts as scored. Each rule is reported as `rewards/rules/NAME/mean`: the share of completions that kept it.
    """

    def __init__(self, rewards: RewardSet, rules: Mapping[str, Rule], *, floor: float) -> None:
        super().__init__(rewards.functions, rewards.weights, timeout=rewards.timeout)
        self.rewards, self.rules, self.floor = rewards, dict(rules), floor

    def __call__(self, prompts: list[str], completions: list[str], columns: Mapping[str, list[Any]]) -> Scores:
        """As the rewards score, and then the rules. Raises UserError naming a rule that raised or gave no bool."""
        scores = self.rewards(prompts, completions, columns)
        return under_rules(scores, self.rules, prompts, completions, floor=self.floor)


def under_rules(
    scores: Scores, rules: Mapping[str, Rule], prompts: Sequence[str], completions: Sequence[str], *, floor: float
) -> Scores:
    """The scores with the floor for completions that break a rule; the scores themselves without rules.

    Raises UserError naming a rule that raised or gave no bool.
    """
    if not rules:
        return scores
    texts = list(zip(prompts, completions, strict=True))
    breaks = {
        name: torch.tensor([judge(rule, f"safety.rules: {name}", *text) is True for text in texts])
        for name, rule in rules.items()
    }
    broken = torch.stack(list(breaks.values())).any(0)
    total = torch.where(scores.scored, scores.total, floor)
    return replace(
        scores,
        total=torch.where(broken, total.clamp(max=floor), scores.total),
        scored=scores.scored | broken,
        by_name={**scores.by_name, **{f"rules/{name}": (~broke).float() for name, broke in breaks.items()}},
        broken=broken,
    )


def load_rules(names: tuple[str, ...]) -> dict[str, Rule]:
    """`file.py:rule` -> the rule, by its name in the file (by all of it where two share one).

    Raises UserError for one that cannot be loaded.
    """
    rules: dict[str, Rule] = {}
    for name in names:
        rule = load_rule(name, "safety.rules")
        short = name.rpartition(":")[2]
        rules[name if short in rules else short] = rule
    return rules


def constrained(rewards: RewardSet, config: SafetyConfig) -> RewardSet:
    """The rewards under the configuration's rules; the rewards themselves where there are none."""
    if not config.rules:
        return rewards
    return ConstrainedRewards(rewards, load_rules(config.rules), floor=config.floor)
