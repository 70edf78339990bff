"""Calculating: complete `012+034=` with the result, on the expressions of GSM8K's worked answers.

GSM8K (Cobbe 2021, 2110.14168) annotates its answers with `<<48/2=24>>`. Kept are annotations with one operator,
integers below 1000 and a correct result of at most four digits. The split goes by canonical form (`a+b` is `b+a`),
so that no held-out expression is seen in training in either order.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiment.errors import UserError
from llm_rlhf.data.files import read_rows, text_column
from llm_rlhf.rewards.functions import exact_match
from llm_rlhf.tasks.examples import Example

LIMIT = 1000  # operands lie below it
RESULT_LIMIT = 10_000
GENERATED = 5000
ANNOTATION = re.compile(r"<<(\d+)([-+*/])(\d+)=(\d+)>>")
COMMUTATIVE = "+*"


@dataclass(frozen=True)
class CalculatorConfig:
    """How expressions are written, and what the demonstrator gets wrong.

    padding             numbers padded to equal width, so that digits stand in fixed places, or not
    digits              "plain"; "reversed": all numbers, lowest digit first; "reversed_answer": the result only
    slip                share of the demonstrations whose result is wrong by +10 (the verifier is always exact)
    validation, test    expressions (canonical forms) kept out of training
    commutative_swaps   train on b+a wherever a+b is trained on
    """

    padding: Literal["zero", "space", "none"] = "zero"
    digits: Literal["plain", "reversed", "reversed_answer"] = "reversed"
    slip: float = 0.0
    validation: int = 200
    test: int = 500
    commutative_swaps: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.slip <= 1:
            raise ValueError(f"task.calculator.slip is a share between 0 and 1, got {self.slip}")
        if self.validation < 1 or self.test < 1:
            raise ValueError("task.calculator.validation and test must be at least 1")


@dataclass(frozen=True, order=True)
class Expression:
    """`left operator right`, of which the result is a non-negative integer."""

    left: int
    operator: str
    right: int

    def result(self) -> int | None:
        """The exact result, None if it is negative or no integer."""
        if self.operator == "+":
            return self.left + self.right
        if self.operator == "-":
            return self.left - self.right if self.left >= self.right else None
        if self.operator == "*":
            return self.left * self.right
        if self.right == 0 or self.left % self.right:
            return None
        return self.left // self.right

    def canonical(self) -> Expression:
        """The form that commutative twins share."""
        if self.operator in COMMUTATIVE and self.left > self.right:
            return self.swapped()
        return self

    def swapped(self) -> Expression:
        """right operator left."""
        return Expression(self.right, self.operator, self.left)


def is_kept(expression: Expression) -> bool:
    """Operands below 1000 and an integer result of at most four digits."""
    result = expression.result()
    in_range = max(expression.left, expression.right) < LIMIT
    return in_range and result is not None and result < RESULT_LIMIT


def read_expressions(path: str | Path) -> list[Expression]:
    """Distinct kept expressions of a GSM8K file, in order of first appearance.

    Raises UserError for damaged lines (with file and line) or a file without a single annotation.
    """
    found: dict[Expression, None] = {}
    for row in read_rows(path):
        for left, operator, right, written in ANNOTATION.findall(text_column(row.columns, "answer", row.place)):
            expression = Expression(int(left), operator, int(right))
            if is_kept(expression) and expression.result() == int(written):
                found[expression] = None
    if not found:
        raise UserError(f"{path}: no <<expression=result>> annotation in it; is this GSM8K's train file?")
    return list(found)


def generated_expressions(count: int, rng: random.Random) -> list[Expression]:
    """`count` distinct expressions of the same form: GSM8K's mix of operators, small numbers more often."""
    found: dict[Expression, None] = {}
    while len(found) < count:
        operator = rng.choices("+-*/", weights=(32, 30, 25, 13))[0]
        left, right = (int(10 ** rng.uniform(0, 3)) for _ in range(2))
        if operator == "/":
            left = left * right
        expression = Expression(left, operator, right)
        if is_kept(expression):
            found[expression] = None
    return list(found)


def split_expressions(
    expressions: Iterable[Expression], *, validation: int, test: int, rng: random.Random
) -> tuple[list[Expression], list[Expression], list[Expression]]:
    """Train, validation and test expressions; commutative twins land on one side.

    A held-out form is kept once, in the order it was first written; in training both orders are kept as written.
    Raises UserError if there are too few forms.
    """
    by_form: dict[Expression, list[Expression]] = {}
    for expression in expressions:
        by_form.setdefault(expression.canonical(), []).append(expression)
    forms = sorted(by_form)
    if len(forms) <= validation + test:
        raise UserError(
            f"task.calculator: {len(forms)} different expressions are too few to keep {validation + test} out"
        )
    rng.shuffle(forms)
    held_out = [by_form[form][0] for form in forms[: validation + test]]
    train = [expression for form in forms[validation + test :] for expression in by_form[form]]
    return train, held_out[:validation], held_out[validation:]


def write_number(value: int, *, width: int, padding: str, reverse: bool) -> str:
    """Digits of a number in the chosen format, e.g. 34 -> "430" (width 3, zeros, reversed)."""
    text = str(value)
    if padding != "none":
        text = text.rjust(width, "0" if padding == "zero" else " ")
    return text[::-1] if reverse else text


def write_prompt(expression: Expression, config: CalculatorConfig) -> str:
    """`012+034=` in the chosen format."""
    reverse = config.digits == "reversed"
    left, right = (
        write_number(value, width=3, padding=config.padding, reverse=reverse)
        for value in (expression.left, expression.right)
    )
    return f"{left}{expression.operator}{right}="


def write_answer(result: int, config: CalculatorConfig) -> str:
    """The result in the chosen format; spaces that would only pad it are left out."""
    padding = "zero" if config.padding == "zero" else "none"
    return write_number(result, width=4, padding=padding, reverse=config.digits != "plain")


def slipped(result: int) -> int:
    """A demonstrator's slip: 10 too many (10 too few where a fifth digit would be needed)."""
    return result + 10 if result + 10 < RESULT_LIMIT else result - 10


def build(config: CalculatorConfig, *, data: str | None, seed: int) -> dict[str, Any]:
    """The parts of the task; see `task.Task`. `data` None: generated expressions. UserError if it is not there."""
    rng = random.Random(f"calculator {seed}")
    if data is not None:
        if not Path(data).is_file():
            raise UserError(f"task.data: {data} is not there; leave task.data out for generated expressions")
        expressions = read_expressions(data)
        note = f"calculator: {len(expressions)} distinct expressions from {data}"
    else:
        expressions = generated_expressions(GENERATED, rng)
        note = f"calculator: no task.data given, so {len(expressions)} generated expressions are used"
    train, validation, test = split_expressions(
        expressions, validation=config.validation, test=config.test, rng=rng
    )
    if config.commutative_swaps:
        twins = [expression.swapped() for expression in train if expression.operator in COMMUTATIVE]
        train = list(dict.fromkeys([*train, *twins]))
    wrong = set(rng.sample(range(len(train)), round(config.slip * len(train))))
    return {
        "demonstrations": _examples(train, config, wrong),
        "train": _examples(train, config, set()),
        "splits": {"validation": _examples(validation, config, set()), "test": _examples(test, config, set())},
        "rewards": {"exact_match": exact_match},
        "gold": {"exact_match": 1.0},
        "max_new_tokens": 5,
        "alphabet": "0123456789+-*/= ",
        "notes": [
            f"{note}; {len(train)} to train on ({len(wrong)} demonstrated wrong), "
            f"{len(validation)} validation, {len(test)} test"
        ],
    }


def _examples(expressions: Sequence[Expression], config: CalculatorConfig, wrong: set[int]) -> list[Example]:
    examples = []
    for index, expression in enumerate(expressions):
        result = expression.result()
        assert result is not None
        answer = write_answer(result, config)
        shown = write_answer(slipped(result), config) if index in wrong else answer
        examples.append(Example(write_prompt(expression, config), shown, {"answer": answer}))
    return examples
