"""Hard rules: a completion that breaks one earns a floor at most, whatever the weighted sum of rewards says.

A reward can be bought back by enough of another; a constraint cannot. A rule is a Python function, named as
`file.py:rule`, from the text of a completion to whether it is allowed:

    def no_addresses(text: str) -> bool:
        return "@" not in text
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from envs.own import is_own, load_own
from experiment.errors import UserError, user_errors
from llm_rlhf.rewards.functions import RewardSet, Scores

Rule = Callable[[str], bool]


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
        return under_rules(self.rewards(prompts, completions, columns), self.rules, completions, floor=self.floor)


def under_rules(scores: Scores, rules: Mapping[str, Rule], completions: list[str], *, floor: float) -> Scores:
    """The scores with the floor for completions that break a rule; the scores themselves without rules.

    Raises UserError naming a rule that raised or gave no bool.
    """
    if not rules:
        return scores
    kept = {name: check(name, rule, completions) for name, rule in rules.items()}
    broken = torch.zeros(len(completions), dtype=torch.bool)
    for allowed in kept.values():
        broken |= ~allowed
    total = torch.where(scores.scored, scores.total, floor)
    return replace(
        scores,
        total=torch.where(broken, total.clamp(max=floor), scores.total),
        scored=scores.scored | broken,
        by_name={**scores.by_name, **{f"rules/{name}": allowed.float() for name, allowed in kept.items()}},
        broken=broken,
    )


def check(name: str, rule: Rule, completions: list[str]) -> Tensor:
    """Which completions a rule allows, [B] bool. Raises UserError for a rule that raises or gives no bool."""
    allowed = []
    for text in completions:
        try:
            answer = rule(text)
        except Exception as error:  # whatever the user's function raises
            reason = " ".join(str(error).split()) or "no message"
            raise UserError(f"safety.rules: {name} raised {type(error).__name__}: {reason}") from error
        if not isinstance(answer, bool):
            raise UserError(
                f"safety.rules: {name} returned {answer!r} for {text!r}; return True (allowed) or False"
            )
        allowed.append(answer)
    return torch.tensor(allowed, dtype=torch.bool)


def load_rules(names: tuple[str, ...]) -> dict[str, Rule]:
    """`file.py:rule` -> the rule, by its name in the file (by all of it where two share one).

    Raises UserError for one that cannot be loaded.
    """
    rules: dict[str, Rule] = {}
    for name in names:
        if not is_own(name):
            raise UserError(f"safety.rules: {name!r} must be named as path/to/file.py:rule")
        with user_errors("safety.rules"):
            rule = load_own(name)
        if not callable(rule):
            raise UserError(f"safety.rules: {name}: a function is needed, got {type(rule).__name__}")
        short = name.rpartition(":")[2]
        rules[name if short in rules else short] = rule
    return rules


def constrained(rewards: RewardSet, config: SafetyConfig) -> RewardSet:
    """The rewards under the configuration's rules; the rewards themselves where there are none."""
    if not config.rules:
        return rewards
    return ConstrainedRewards(rewards, load_rules(config.rules), floor=config.floor)
