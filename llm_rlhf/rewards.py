"""Rewards: plain Python functions, named and weighted in the configuration.

A reward function takes `prompts` and `completions` (lists of texts) and, by name, any columns of the data, each a
list of the same length; it returns one number a completion, or None where it cannot judge. For example

    def short(prompts: list[str], completions: list[str], answer: list[str]) -> list[float | None]: ...

A user's own is named as `file.py:function`. Besides the data's columns there is `sample_index`: how many
completions the run had drawn before this one.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from envs.own import is_own, load_own
from experiment.errors import UserError

RewardFunction = Callable[..., Sequence[float | None]]


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
    """

    total: Tensor
    scored: Tensor
    by_name: dict[str, Tensor]

    def metrics(self) -> dict[str, float]:
        """rewards/NAME/mean and /std over what was scored, and the share that was not."""
        result: dict[str, float] = {}
        for name, values in self.by_name.items():
            known = values[~values.isnan()]
            if known.numel():
                result[f"rewards/{name}/mean"] = float(known.mean())
                result[f"rewards/{name}/std"] = float(known.std(correction=0))
        if self.scored.any():
            result["objective/scores"] = float(self.total[self.scored].mean())
        result["rewards/unscored"] = float((~self.scored).float().mean())
        return result


class RewardSet:
    """The reward functions of a run with their weights; resolved, and their columns checked, once at the start."""

    def __init__(self, functions: Mapping[str, RewardFunction], weights: Mapping[str, float]) -> None:
        self.functions = dict(functions)
        self.weights = dict(weights)

    def __call__(self, prompts: list[str], completions: list[str], columns: Mapping[str, list[Any]]) -> Scores:
        """Score completions. Raises UserError naming the function that raised or returned something unusable."""
        count = len(completions)
        total = torch.zeros(count, dtype=torch.float64)
        scored = torch.zeros(count, dtype=torch.bool)
        by_name: dict[str, Tensor] = {}
        for name, function in self.functions.items():
            values = _call(name, function, prompts, completions, columns)
            known = ~values.isnan()
            total += self.weights[name] * torch.where(known, values, 0.0)
            scored |= known
            by_name[name] = values.float()
        return Scores(total=total.float(), scored=scored, by_name=by_name)


def resolve(
    weights: Mapping[str, float], *, own: Mapping[str, RewardFunction], columns: Sequence[str]
) -> RewardSet:
    """The functions named by a configuration (name -> weight).

    own         the task's functions by name
    columns     the data's columns

    Raises UserError for an unknown name, a file that cannot be imported, or a function that asks for a column that
    the data does not have.
    """
    if not weights:
        raise UserError("rewards: name at least one reward function with its weight, such as {exact_match: 1.0}")
    built_in: dict[str, RewardFunction] = {"exact_match": exact_match, "random": random_reward, **own}
    functions: dict[str, RewardFunction] = {}
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise UserError(f"rewards.{name}: the weight must be a finite number, got {weight}")
        if name in built_in:
            functions[name] = built_in[name]
        elif is_own(name):
            functions[name] = _import(name)
        else:
            raise UserError(
                f"rewards.{name}: unknown; there is {', '.join(built_in)}, or your own as path/to/file.py:function"
            )
        _check_columns(name, functions[name], [*columns, "sample_index"])
    return RewardSet(functions, weights)


def _import(name: str) -> RewardFunction:
    """`file.py:function` -> the function."""
    try:
        function = load_own(name)
    except ValueError as error:
        raise UserError(f"rewards.{error}") from error
    if not callable(function):
        raise UserError(f"rewards.{name}: a function is needed, got {type(function).__name__}")
    found: RewardFunction = function
    return found


def _wanted(function: RewardFunction) -> tuple[list[str], list[str], bool]:
    """Required column names, optional ones, and whether the function takes any column (**kwargs)."""
    required: list[str] = []
    optional: list[str] = []
    anything = False
    for parameter in list(inspect.signature(function).parameters.values()):
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            anything = True
        elif parameter.name not in ("prompts", "completions"):
            (required if parameter.default is inspect.Parameter.empty else optional).append(parameter.name)
    return required, optional, anything


def _check_columns(name: str, function: RewardFunction, columns: Sequence[str]) -> None:
    for wanted in _wanted(function)[0]:
        if wanted not in columns:
            raise UserError(
                f"rewards.{name}: it asks for a column {wanted!r}; the data has {', '.join(sorted(columns))}"
            )


def _call(
    name: str,
    function: RewardFunction,
    prompts: list[str],
    completions: list[str],
    columns: Mapping[str, list[Any]],
) -> Tensor:
    """One function's rewards, [B] float64, NaN for None."""
    required, optional, anything = _wanted(function)
    given = columns if anything else {key: columns[key] for key in [*required, *optional] if key in columns}
    try:
        values = list(function(prompts=prompts, completions=completions, **given))
    except Exception as error:
        raise UserError(f"rewards.{name}: it raised {type(error).__name__}: {_one_line(error)}") from error
    if len(values) != len(completions):
        raise UserError(f"rewards.{name}: it returned {len(values)} rewards for {len(completions)} completions")
    for index, value in enumerate(values):
        if value is None:
            continue
        try:
            finite = math.isfinite(float(value))
        except (TypeError, ValueError):
            finite = False
        if not finite:
            raise UserError(
                f"rewards.{name}: it returned {value!r} for completion {completions[index]!r}; "
                "return a finite number, or None where it cannot judge"
            )
    return torch.tensor([math.nan if value is None else float(value) for value in values], dtype=torch.float64)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or "no message"
