"""Tools that a policy calls by writing: the calculator, one's own, and texts with calls as pieces to learn from.

A tool has a `name`, a `pattern` (a regular expression whose first group is the call) and `answer(call) -> text`. As
soon as what the policy has written of its turn matches the pattern, the tool answers and the policy goes on behind
the answer. `answer` raises ToolError with the text to read where the call makes no sense; anything else that it
raises is a mistake in the tool and stops the run.

A user's own is named as `file.py:name`: an object or class like that, or any plain function. Functions are called
in the JSON that instruction-tuned models are trained to write, and return text:

    <tool_call>{"name": "search", "arguments": {"query": "..."}}</tool_call>
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Sequence
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any, Protocol

from envs.own import is_own, load_own
from experiment.errors import UserError
from llm_rlhf.tasks.examples import Piece
from llm_rlhf.turns.environments import Referee, Reply

LONGEST_EXPRESSION = 200  # characters
DEEPEST_NESTING = 40
DECIMALS = 6  # of a quotient that has no end
ANSWER_FORMAT = "\n<tool_response>\n{}\n</tool_response>\n"

_NUMBER = re.compile(r"\d+\.?\d*|\.\d+")


class ToolError(Exception):
    """The call makes no sense; the message is what the policy reads instead of an answer."""


class Tool(Protocol):
    """See the module."""

    name: str
    pattern: str

    def answer(self, call: str) -> str:
        """What the policy reads. Raises ToolError for a call that makes no sense."""
        ...


# ---------------------------------------------------------------- the calculator


def calculate(expression: str) -> str:
    """The value of an expression of decimal numbers, + - * / and parentheses, e.g. "48/2" -> "24".

    Computed with fractions: integers and decimals that end are exact, others are rounded to 6 decimals (6
    significant ones below 1). Raises ToolError for anything else, division by 0 included.
    """
    if len(expression) > LONGEST_EXPRESSION:
        raise ToolError(f"the expression is longer than {LONGEST_EXPRESSION} characters")
    parser = _Parser(expression)
    value = parser.sum(0)
    if parser.peek():
        raise ToolError(f"{parser.peek()!r} was not expected")
    return write_number(value)


class _Parser:
    """Recursive descent over one expression."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0

    def peek(self) -> str:
        """The next character that is no space, "" at the end."""
        while self.text[self.position : self.position + 1].isspace():
            self.position += 1
        return self.text[self.position : self.position + 1]

    def take(self, choices: str) -> str:
        """The next character if it is one of `choices`, else ""."""
        found = self.peek()
        if not found or found not in choices:
            return ""
        self.position += 1
        return found

    def sum(self, depth: int) -> Fraction:
        """product (+|- product)*"""
        value = self.product(depth)
        while operator := self.take("+-"):
            right = self.product(depth)
            value = value + right if operator == "+" else value - right
        return value

    def product(self, depth: int) -> Fraction:
        """factor (*|/ factor)*"""
        value = self.factor(depth)
        while operator := self.take("*/"):
            right = self.factor(depth)
            if operator == "/" and right == 0:
                raise ToolError("division by 0")
            value = value * right if operator == "*" else value / right
        return value

    def factor(self, depth: int) -> Fraction:
        """A number, or a sum in parentheses; either may have signs."""
        sign = 1
        while operator := self.take("+-"):
            sign = -sign if operator == "-" else sign
        if self.take("("):
            if depth == DEEPEST_NESTING:
                raise ToolError(f"parentheses are nested deeper than {DEEPEST_NESTING}")
            value = self.sum(depth + 1)
            if not self.take(")"):
                raise ToolError("a parenthesis is not closed")
            return sign * value
        number = _NUMBER.match(self.text, self.position)
        if number is None or not number[0].isascii():
            raise ToolError("a number is missing")
        self.position = number.end()
        return sign * Fraction(number[0])


def write_number(value: Fraction) -> str:
    """An integer or a decimal, never an exponent; see `calculate`."""
    if value.denominator == 1:
        return str(value.numerator)
    rest, twos, fives = value.denominator, 0, 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    whole = str(abs(value.numerator) // value.denominator)
    with localcontext() as context:
        digits_before = 0 if whole == "0" else len(whole)
        context.prec = digits_before + (max(twos, fives) if rest == 1 else DECIMALS)
        quotient = Decimal(value.numerator) / Decimal(value.denominator)
    text = f"{quotient:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


class Calculator:
    """`<<48/2=` is answered with `24>>`, as in GSM8K's worked answers (Cobbe 2021, 2110.14168); nonsense with
    `error>>`."""

    name = "calculator"
    pattern = r"<<([^<>=\n]*)="

    def answer(self, call: str) -> str:
        """`48/2` -> `24>>`."""
        try:
            return f"{calculate(call)}>>"
        except ToolError as error:
            raise ToolError("error>>") from error


# ---------------------------------------------------------------- one's own


class FunctionTools:
    """Plain functions, called by name in JSON; all of them are one tool, since they share the way of calling."""

    name = "tool_call"
    pattern = r"<tool_call>(.*?)</tool_call>"

    def __init__(self, functions: dict[str, Callable[..., Any]], *, answer_format: str) -> None:
        self.functions = functions
        self.answer_format = answer_format

    def label(self, call: str) -> str:
        """The function that a call asks for, for messages."""
        try:
            name = str(json.loads(call)["name"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return self.name
        return name if name in self.functions else self.name

    def answer(self, call: str) -> str:
        """The function's text in the configured frame."""
        try:
            return self._framed(self._called(call))
        except ToolError as error:
            raise ToolError(self._framed(f"error: {error}")) from error

    def _framed(self, text: str) -> str:
        return self.answer_format.replace("{}", text)

    def _called(self, call: str) -> str:
        try:
            wanted = json.loads(call)
        except (ValueError, RecursionError) as error:
            raise ToolError("the call is not valid JSON") from error
        if not isinstance(wanted, dict) or not isinstance(wanted.get("arguments", {}), dict):
            raise ToolError('a call is {"name": ..., "arguments": {...}}')
        name, arguments = wanted.get("name"), wanted.get("arguments", {})
        if not isinstance(name, str) or name not in self.functions:
            raise ToolError(f"there is no tool {name!r}; there is {', '.join(self.functions)}")
        function = self.functions[name]
        try:
            inspect.signature(function).bind(**arguments)
        except TypeError as error:
            raise ToolError(f"{name}: {error}") from error
        text = function(**arguments)
        if not isinstance(text, str):
            raise TypeError(f"{name} returned {text!r} ({type(text).__name__}), not text")
        return text


def load_tools(names: Sequence[str], *, answer_format: str = ANSWER_FORMAT) -> list[Tool]:
    """Tools by name: `calculator`, or one's own as `file.py:name`.

    Raises UserError for a name that means nothing, or something that is no tool.
    """
    tools: list[Tool] = []
    functions: dict[str, Callable[..., Any]] = {}
    for name in names:
        found = Calculator if name == "calculator" else _own(name)
        tool: Any = found() if inspect.isclass(found) else found
        if hasattr(tool, "pattern") and callable(getattr(tool, "answer", None)):
            _check_pattern(name, tool)
            tools.append(tool)
        elif inspect.isroutine(tool):
            called = name.rpartition(":")[2]
            if called in functions:
                raise UserError(f"turns.tools {name}: there are two functions of that name")
            functions[called] = tool
        else:
            raise UserError(
                f"turns.tools {name}: a function, or an object with `pattern` and `answer(call)`, is needed, "
                f"got {type(tool).__name__}"
            )
    if functions:
        tools.append(FunctionTools(functions, answer_format=answer_format))
    return tools


def _own(name: str) -> Any:
    if not is_own(name):
        raise UserError(f"turns.tools {name}: unknown; there is calculator, or your own as path/to/file.py:NAME")
    try:
        return load_own(name)
    except ValueError as error:
        raise UserError(f"turns.tools {error}") from error


def _check_pattern(name: str, tool: Any) -> None:
    try:
        groups = re.compile(tool.pattern).groups
    except (re.error, TypeError) as error:
        raise UserError(f"turns.tools {name}: its pattern is no regular expression: {error}") from error
    if groups < 1:
        raise UserError(f"turns.tools {name}: its pattern needs a group, the call: {tool.pattern!r}")


# ---------------------------------------------------------------- tools as an environment, and texts with calls


class ToolEnvironment:
    """Answers calls; a turn that ends without one is the last. `asking` names the tool that works at present."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        self.tools = [(tool, re.compile(tool.pattern, re.DOTALL)) for tool in tools]
        self.asking = "turns.tools"

    def reset(self, row: dict[str, Any]) -> None:
        """Tools know nothing of the row."""

    def ends_turn(self, text: str) -> bool:
        """Whether a call is complete."""
        return self.first_call(text) is not None

    def respond(self, text: str) -> Reply:
        """The answer to the first call in the text, or the end of the episode."""
        found = self.first_call(text)
        if found is None:
            return Reply("", done=True)
        tool, match = found
        name = getattr(tool, "name", type(tool).__name__)
        self.asking = f"turns.tools {tool.label(match[1]) if isinstance(tool, FunctionTools) else name}"
        try:
            return Reply(tool.answer(match[1]), tool=name)
        except ToolError as error:
            return Reply(str(error), tool=name, failed=True)

    def first_call(self, text: str) -> tuple[Tool, re.Match[str]] | None:
        """The call that is complete first, and its tool."""
        matches = [(tool, match) for tool, pattern in self.tools if (match := pattern.search(text))]
        return min(matches, key=lambda found: found[1].end(), default=None)


def split_calls(completions: Sequence[str], tools: Sequence[Tool], referee: Referee) -> list[list[Piece] | None]:
    """Demonstrated completions as what their writer chose (reward 0) and what the tools answered (reward None).

    None where a call in one is followed by something else than what the tool answers: the model would learn to read
    answers that it will never get. Raises UserError where a tool fails.
    """
    environment = ToolEnvironment(tools)
    pieces: list[list[Piece] | None] = [[] for _ in completions]
    rest = list(completions)
    while calls := {i: found[1].end() for i, text in enumerate(rest) if (found := environment.first_call(text))}:
        asked = [rest[i][:end] for i, end in calls.items()]
        replies = referee.respond([ToolEnvironment(tools) for _ in asked], asked)
        for (i, end), reply in zip(calls.items(), replies, strict=True):
            known = pieces[i]
            if known is None or not rest[i].startswith(reply.text, end):
                pieces[i], rest[i] = None, ""
            else:
                known += [Piece(rest[i][:end], 0.0), Piece(reply.text, None)]
                rest[i] = rest[i][end + len(reply.text) :]
    return [None if known is None else [*known, Piece(text, 0.0)] for known, text in zip(pieces, rest, strict=True)]
