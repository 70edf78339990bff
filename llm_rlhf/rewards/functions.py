"""Rewards: plain Python functions, named and weighted in the configuration.

A reward function takes `prompts` and `completions` (lists of texts) and, by name, any columns of the data, each a
list of the same length; it returns one number a completion, or None where it cannot judge. For example

    def short(prompts: list[str], completions: list[str], answer: list[str]) -> list[float | None]: ...

It may be an `async def`; all of those run at once. A user's own is named as `file.py:function`, a trained reward
model by its run folder. Besides the data's columns there are `sample_index`, how many completions the run had drawn
before this one, and `finished`, whether the completion ended by itself (False: it was cut at the limit).
"""

from __future__ import annotations

import difflib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from envs.own import is_own, load_own
from experiment.errors import UserError
from llm_rlhf.rewards.calls import AnyRewardFunction, call_all, check_columns
from llm_rlhf.rewards.calls import RewardFunction as RewardFunction

OF_SAMPLES = ("sample_index", "finished")
"""Columns that come with completions, whatever the data has."""


def exact_match(prompts: list[str], completions: list[str], answer: list[str]) -> list[float | None]:
    """1 where the completion is the answer, else 0."""
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def random_reward(prompts: list[str], completions: list[str], sample_index: list[int]) -> list[float | None]:
    """A fair coin for each sample, whatever it says: the control that must teach nothing.

    The coin is a function of the sample's index, so that a resumed run sees the same coins.
    """
    return [float(random.Random(f"coin {index}").random() < 0.5) for index in sample_index]


@dataclass(frozen=True)
class Scores:
    """What a batch of completions earned.

    total       [B] float, the weighted sum over functions (0 where unscored)
    scored      [B] bool; at least one function gave a number
    by_name     [B] float for each function, NaN where it gave None
    broken      [B] bool; broke a hard rule, so that nothing may be paid beside the total; None = there are no rules
    """

    total: Tensor
    scored: Tensor
    by_name: dict[str, Tensor]
    broken: Tensor | None = None

    def metrics(self) -> dict[str, float]:
        """rewards/NAME/mean and /std over what was scored (NaN where nothing was), and the share that was not."""
        result: dict[str, float] = {}
        for name, values in self.by_name.items():
            known = values[~values.isnan()]
            result[f"rewards/{name}/mean"] = float(known.mean())
            result[f"rewards/{name}/std"] = float(known.std(correction=0)) if known.numel() else math.nan
        result["objective/scores"] = float(self.total[self.scored].mean())
        result["rewards/unscored"] = float((~self.scored).float().mean())
        return result


class RewardSet:
    """The reward functions of a run with their weights; resolved, and their columns checked, once at the start."""

    def __init__(
        self,
        functions: Mapping[str, AnyRewardFunction],
        weights: Mapping[str, float],
        *,
        timeout: float | None = None,
    ) -> None:
        self.functions = dict(functions)
        self.weights = dict(weights)
        self.timeout = timeout

    def __call__(self, prompts: list[str], completions: list[str], columns: Mapping[str, list[Any]]) -> Scores:
        """Score completions. Raises UserError naming the function that raised, took too long or returned something
        unusable."""
        count = len(completions)
        total = torch.zeros(count, dtype=torch.float64)
        scored = torch.zeros(count, dtype=torch.bool)
        by_name: dict[str, Tensor] = {}
        answers = call_all(
            self.functions, prompts=prompts, completions=completions, columns=columns, timeout=self.timeout
        )
        for name, answer in answers.items():
            values = torch.tensor(answer, dtype=torch.float64)
            known = ~values.isnan()
            total += self.weights[name] * torch.where(known, values, 0.0)
            scored |= known
            by_name[name] = values.float()
        return Scores(total=total.float(), scored=scored, by_name=by_name)


def resolve(
    weights: Mapping[str, float],
    *,
    own: Mapping[str, AnyRewardFunction],
    columns: Sequence[str],
    timeout: float | None = None,
) -> RewardSet:
    """The functions named by a configuration (name -> weight).

    own         the task's functions by name
    columns     the data's columns
    timeout     seconds that one call of a function may take; None = any

    Raises UserError for an unknown name, a file that cannot be imported, a function that asks for a column that the
    data does not have, or a timeout that is not positive.
    """
    if timeout is not None and timeout <= 0:
        raise UserError(f"rewards_timeout must be positive seconds, or null; got {timeout:g}")
    if not weights:
        raise UserError("rewards: name at least one reward function with its weight, such as {exact_match: 1.0}")
    built_in: dict[str, AnyRewardFunction] = {"exact_match": exact_match, "random": random_reward, **own}
    functions: dict[str, AnyRewardFunction] = {}
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise UserError(f"rewards.{name}: the weight must be a finite number, got {weight}")
        if name in built_in:
            functions[name] = built_in[name]
        elif is_own(name):
            functions[name] = _import(name)
        elif (learned := _reward_model(name)) is not None:
            functions[name] = learned
        else:
            near = difflib.get_close_matches(name, built_in, n=1)
            raise UserError(
                f"rewards.{name}: unknown; {f'did you mean {near[0]}? ' if near else ''}there is "
                f"{', '.join(built_in)}, or your own as path/to/file.py:function, or the folder of a reward "
                "model's run"
            )
        check_columns(name, functions[name], [*columns, *OF_SAMPLES])
    return RewardSet(functions, weights, timeout=timeout)


def _import(name: str) -> AnyRewardFunction:
    """`file.py:function` -> the function."""
    try:
        function = load_own(name)
    except ValueError as error:
        raise UserError(f"rewards.{error}") from error
    if not callable(function):
        raise UserError(f"rewards.{name}: a function is needed, got {type(function).__name__}")
    found: AnyRewardFunction = function
    return found


def _reward_model(name: str) -> RewardFunction | None:
    """The reward function of a reward model that `name` is the run or the folder of; None where it is not."""
    from llm_rlhf.rewards.reward_model import named_reward

    return named_reward(name)
