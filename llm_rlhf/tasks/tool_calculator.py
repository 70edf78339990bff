"""Word problems whose worked answers ask a calculator: `<<48/2=` is answered with `24>>`.

From GSM8K (Cobbe 2021, 2110.14168) or, without a file, short generated problems in its form: a question, lines of a
solution with annotated calculations, and `#### 72` at the end. What counts is the number after `####`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from experiment.errors import UserError
from llm_rlhf.data.files import read_rows, text_column
from llm_rlhf.tasks.examples import Example

MARK = "####"
ANNOTATION = re.compile(r"<<([^<>=\n]*)=([^<>\n]*)>>")
TOOL_CHARACTERS = "0123456789+-*/().=<>error"
THINGS = ("pens", "cups", "nuts", "hats", "eggs", "toys")


@dataclass(frozen=True)
class ToolCalculatorConfig:
    """problems, steps     of generated problems: how many, and calculations in the longest solution
    by_heart            share of the demonstrations that write results without asking (the annotations left out)
    longest             characters of question and solution; what is longer is left out
    validation, test    problems kept out of training
    max_new_tokens      longest completion in tokens, the tool's included; None = the longest demonstration's
                        characters and a quarter
    """

    problems: int = 4000
    steps: int = 2
    by_heart: float = 0.0
    longest: int = 1000
    validation: int = 200
    test: int = 500
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.by_heart <= 1:
            raise ValueError(f"task.tool_calculator.by_heart is a share between 0 and 1, got {self.by_heart}")
        limit = 1 if self.max_new_tokens is None else self.max_new_tokens
        if min(self.problems, self.steps, self.longest, self.validation, self.test, limit) < 1:
            raise ValueError(
                "task.tool_calculator: problems, steps, longest, validation, test and max_new_tokens must be at "
                "least 1"
            )


@dataclass(frozen=True)
class Problem:
    """A question, its solution with annotated calculations, and the number that is asked for."""

    question: str
    solution: str
    answer: str


def number_in(text: str) -> Decimal | None:
    """`$1,200` -> 1200; None where there is no number alone."""
    try:
        value = Decimal(text.strip().replace(",", "").replace("$", "").rstrip("."))
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def final_answer(prompts: list[str], completions: list[str], answer: list[str]) -> list[float | None]:
    """1 where the number after the last #### is the answer, else 0."""
    found = [number_in(text.rpartition(MARK)[2]) if MARK in text else None for text in completions]
    return [
        float(value is not None and value == number_in(right)) for value, right in zip(found, answer, strict=True)
    ]


def read_problems(path: str | Path) -> list[Problem]:
    """The problems of a GSM8K file.

    Raises UserError naming file and line for a row without question, answer or a number after ####.
    """
    problems: dict[str, Problem] = {}
    for row in read_rows(path):
        question, solution = (text_column(row.columns, name, row.place) for name in ("question", "answer"))
        answer = solution.rpartition(MARK)[2].strip()
        if MARK not in solution or number_in(answer) is None:
            raise UserError(f"{row.place}: column 'answer' does not end with {MARK} and a number; is this GSM8K?")
        problems[question] = Problem(question, solution, answer)
    if not problems:
        raise UserError(f"{path}: there is no problem in it")
    return list(problems.values())


def generated_problems(config: ToolCalculatorConfig, rng: random.Random) -> list[Problem]:
    """Distinct problems of 1 to `steps` calculations on numbers below a hundred, each used once."""
    problems: dict[str, Problem] = {}
    for _ in range(100 * config.problems):
        problem = _generated(rng.randint(1, config.steps), rng)
        problems[problem.question] = problem
        if len(problems) == config.problems:
            return list(problems.values())
    raise UserError(
        f"task.tool_calculator.problems: there are no {config.problems} different ones of {config.steps} steps"
    )


def _generated(steps: int, rng: random.Random) -> Problem:
    """`There are 34 pens. 18 more come. How many?` -> `<<34+18=52>>52` and `#### 52`."""
    value = rng.randint(11, 99)
    question, lines = f"There are {value} {rng.choice(THINGS)}.", []
    for _ in range(steps):
        divisors = [divisor for divisor in range(2, 10) if value % divisor == 0]
        kind = rng.choice("+-*/" if divisors else "+-*")
        if kind == "+":
            change = rng.randint(11, 99)
            text, result = f"{change} more come.", value + change
        elif kind == "-":
            change = rng.randint(2, value - 1) if value > 2 else 1
            text, result = f"{change} are lost.", value - change
        elif kind == "*":
            change = rng.randint(2, 9)
            text, result = f"They become {change} times as many.", value * change
        else:
            change = rng.choice(divisors)
            text, result = f"They are split by {change}.", value // change
        question += f" {text}"
        lines.append(f"<<{value}{kind}{change}={result}>>{result}")
        value = result
    return Problem(f"{question} How many?", "\n".join([*lines, f"{MARK} {value}"]), str(value))


def without_annotations(solution: str) -> str:
    """The solution as somebody writes it who calculates by heart."""
    return ANNOTATION.sub("", solution)


def build(config: ToolCalculatorConfig, *, data: str | None, seed: int) -> dict[str, Any]:
    """The parts of the task; see `task.Task`. `data` None: generated problems.

    Raises UserError if the file is absent or damaged, or holds too few problems that are short enough.
    """
    rng = random.Random(f"tool calculator {seed}")
    problems = generated_problems(config, rng) if data is None else read_problems(data)
    short = [problem for problem in problems if len(problem.question) + len(problem.solution) < config.longest]
    held_out = config.validation + config.test
    if len(short) <= held_out:
        raise UserError(
            f"task.tool_calculator: {len(short)} problems of at most {config.longest} characters are too few to "
            f"keep {held_out} out"
        )
    rng.shuffle(short)
    train = short[held_out:]
    by_heart = set(rng.sample(range(len(train)), round(config.by_heart * len(train))))
    longest = max(len(problem.solution) for problem in train)
    where = "generated problems" if data is None else f"problems from {data}"
    texts = "".join(problem.question + problem.solution for problem in short)
    return {
        "demonstrations": _examples(train, by_heart),
        "train": _examples(train, set()),
        "splits": {
            "validation": _examples(short[: config.validation], set()),
            "test": _examples(short[config.validation : held_out], set()),
        },
        "rewards": {"final_answer": final_answer},
        "gold": {"final_answer": 1.0},
        "max_new_tokens": config.max_new_tokens or longest + longest // 4 + 1,
        "limited_by": "task.tool_calculator.max_new_tokens",
        "alphabet": "".join(sorted({*texts, *TOOL_CHARACTERS, "\n"})),
        "notes": [
            f"tool_calculator: {len(problems)} {where}, {len(problems) - len(short)} too long; {len(train)} to "
            f"train on ({len(by_heart)} demonstrated by heart), {config.validation} validation, {config.test} test"
        ],
    }


def _examples(problems: Sequence[Problem], by_heart: set[int]) -> list[Example]:
    return [
        Example(
            f"{problem.question}\n",
            without_annotations(problem.solution) if index in by_heart else problem.solution,
            {"answer": problem.answer},
        )
        for index, problem in enumerate(problems)
    ]
