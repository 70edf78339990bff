"""The calculator's arithmetic, the protocol of tools, and everything that a user's own code may do wrong."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from experiment.errors import UserError
from llm_rlhf.tasks.examples import Piece
from llm_rlhf.turns.environments import Referee, Reply, call_all, checked, own_environment
from llm_rlhf.turns.tools import (
    Calculator,
    FunctionTools,
    ToolEnvironment,
    ToolError,
    calculate,
    load_tools,
    split_calls,
)

ASKS_NOBODY = Referee("turns.tools", lambda: ToolEnvironment([Calculator()]))


@pytest.mark.parametrize(
    "expression, value",
    [
        ("48/2", "24"),
        ("1+2*3", "7"),
        ("(1+2)*3", "9"),
        ("8-3-2", "3"),
        ("16/4/2", "2"),
        ("-(3+5)*2", "-16"),
        ("2--3", "5"),
        (" 48 / 2 ", "24"),
        ("0.1+0.2", "0.3"),
        (".5*.5", "0.25"),
        ("12/60", "0.2"),
        ("1/1024", "0.0009765625"),
        ("1/3", "0.333333"),
        ("100/3", "33.333333"),
        ("2/3*3", "2"),
        ("1/30000", "0.0000333333"),
        ("99999999999999999999*99999999999999999999", "9999999999999999999800000000000000000001"),
        ("5.", "5"),
        ("0-0", "0"),
    ],
)
def test_calculate(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "nonsense, message",
    [
        ("", "a number is missing"),
        ("5+", "a number is missing"),
        ("()", "a number is missing"),
        ("²", "a number is missing"),
        ("٣+1", "a number is missing"),
        ("2**3", "a number is missing"),
        ("3 4", "'4' was not expected"),
        ("1e5", "'e' was not expected"),
        ("__import__('os')", "a number is missing"),
        ("(1", "not closed"),
        ("1)", r"'\)' was not expected"),
        ("1/(2-2)", "division by 0"),
        ("(" * 41 + "1", "deeper than 40"),
        ("1" * 201, "longer than 200"),
    ],
)
def test_nonsense_is_an_error(nonsense: str, message: str) -> None:
    with pytest.raises(ToolError, match=message):
        calculate(nonsense)
    with pytest.raises(ToolError, match=r"^error>>$"):
        Calculator().answer(nonsense)


def test_a_call_is_answered_as_soon_as_it_is_whole() -> None:
    environment = ToolEnvironment([Calculator()])
    assert not environment.ends_turn("48/2 = <<48/2")
    assert environment.ends_turn("48/2 = <<48/2=")
    assert environment.respond("48/2 = <<48/2=") == Reply("24>>", tool="calculator")
    assert environment.respond("<<48/=") == Reply("error>>", tool="calculator", failed=True)
    assert environment.respond("#### 24") == Reply("", done=True)
    assert not environment.ends_turn("a < b = c")


def test_texts_with_calls_in_pieces() -> None:
    texts = ["48/2 = <<48/2=24>>24\n<<24+1=25>>", "by heart: 24", "<<48/2=25>>25", "<<1+1=2>>2 <<1+2=4>>"]
    first, second, third, fourth = split_calls(texts, [Calculator()], ASKS_NOBODY)
    chosen, given = 0.0, None
    assert first == [
        Piece("48/2 = <<48/2=", chosen),
        Piece("24>>", given),
        Piece("24\n<<24+1=", chosen),
        Piece("25>>", given),
        Piece("", chosen),
    ]
    assert second == [Piece("by heart: 24", chosen)]
    assert third is None
    assert fourth is None


# ---------------------------------------------------------------- one's own tools

OWN = """
import time
from llm_rlhf.turns.tools import ToolError

def search(query: str, limit: int = 1) -> str:
    if query == "hang":
        time.sleep(5)
    if query == "seven":
        return 7
    if query == "break":
        raise KeyError("no such page")
    return f"{limit} about {query}"

class Upper:
    name = "upper"
    pattern = r"\\[upper (.*?)\\]"
    def answer(self, call):
        if not call.isalpha():
            raise ToolError(" (letters only) ")
        return f" {call.upper()} "

class NoGroup:
    pattern = "x"
    def answer(self, call): return ""

class BadPattern:
    pattern = "(x"
    def answer(self, call): return ""

number = 5
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return file


def called(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def test_functions_are_called_in_json(own: Path) -> None:
    environment = ToolEnvironment(load_tools([f"{own}:search", f"{own}:Upper"], answer_format="<r>{}</r>"))
    call = called("search", query="cats", limit=3)
    assert not environment.ends_turn(call[:-1])
    assert environment.ends_turn(f"Let me see. {call}")
    assert environment.respond(call) == Reply("<r>3 about cats</r>", tool="tool_call")
    assert environment.respond("so [upper abc]") == Reply(" ABC ", tool="upper")
    assert environment.respond("so [upper 1]") == Reply(" (letters only) ", tool="upper", failed=True)
    for text, problem in (
        (called("find", query="x"), "there is no tool 'find'; there is search"),
        (called("search"), "search: missing a required argument: 'query'"),
        ("<tool_call>search(1)</tool_call>", "the call is not valid JSON"),
        ("<tool_call>[1]</tool_call>", 'a call is {"name": ..., "arguments": {...}}'),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "the call is not valid JSON"),
    ):
        reply = environment.respond(text)
        assert reply == Reply(f"<r>error: {problem}</r>", tool="tool_call", failed=True)


@pytest.mark.parametrize(
    "query, message",
    [
        ("break", r"turns\.tools search: respond raised KeyError: 'no such page'"),
        ("seven", r"turns\.tools search: .* search returned 7 \(int\), not text"),
        ("hang", r"turns\.tools search: respond did not return within 0\.1 s"),
    ],
)
def test_a_tool_that_fails_is_one_line_that_names_it(own: Path, query: str, message: str) -> None:
    tools = load_tools([f"{own}:search"])
    referee = Referee("turns.tools", lambda: ToolEnvironment(tools), time_limit=0.1)
    (environment,) = referee.begin([{}])
    with pytest.raises(UserError, match=message) as failure:
        referee.respond([environment], [called("search", query=query)])
    assert "\n" not in str(failure.value)


def test_a_failure_may_be_read_by_the_policy_instead(own: Path) -> None:
    tools = load_tools([f"{own}:search"])
    referee = Referee("turns.tools", lambda: ToolEnvironment(tools), time_limit=0.1, failure_text="no answer")
    environments = referee.begin([{}, {}])
    replies = referee.respond(environments, [called("search", query="hang"), called("search", query="cats")])
    assert (replies[0].text, replies[0].failed, replies[0].tool) == ("no answer", True, "turns.tools search")
    assert "1 about cats" in replies[1].text


def test_what_is_no_tool_is_said(own: Path) -> None:
    for name, message in (
        ("abacus", r"abacus: unknown; there is calculator"),
        (f"{own}:nothing", "has no nothing"),
        (f"{own}:number", "is needed, got int"),
        (f"{own}:NoGroup", "needs a group"),
        (f"{own}:BadPattern", "no regular expression"),
    ):
        with pytest.raises(UserError, match=message):
            load_tools([name])
    with pytest.raises(UserError, match="two functions of that name"):
        load_tools([f"{own}:search", f"{own}:search"])
    assert isinstance(load_tools([f"{own}:search"])[0], FunctionTools)


# ---------------------------------------------------------------- asking safely


def test_calls_keep_their_order_and_one_that_hangs_delays_no_other() -> None:
    def job(index: int) -> int:
        time.sleep(3.0 if index == 1 else 0.002 * (7 - index))
        if index == 4:
            raise SystemExit(3)
        return index

    began = time.monotonic()
    outcomes = call_all([lambda i=i: job(i) for i in range(7)], workers=2, time_limit=0.2)  # type: ignore[misc]
    assert time.monotonic() - began < 2.0
    assert [outcome.value for outcome in outcomes] == [0, None, 2, 3, None, 5, 6]
    assert [outcome.late for outcome in outcomes] == [False, True, False, False, False, False, False]
    assert isinstance(outcomes[4].error, SystemExit)
    assert call_all([], workers=1, time_limit=1.0) == []


def test_what_respond_returns_is_checked() -> None:
    assert checked(("a", 1, True)) == Reply("a", 1.0, True)
    assert checked(Reply("a", tool="t")) == Reply("a", tool="t")
    for value, message in (
        ("text", r"respond returned 'text'; return \(text, reward, done\)"),
        ((b"a", 0.0, True), "respond returned b'a' as its text, not text"),
        (("a", float("nan"), True), "reward nan and done True; a finite number"),
        (("a", None, True), "reward None"),
        (("a", 0.0, "yes"), "done 'yes'"),
        (("\ud800", 0.0, False), "lone surrogate"),
    ):
        with pytest.raises(ValueError, match=message):
            checked(value)


ENVIRONMENTS = """
class Half:
    def reset(self, row): pass

class Broken:
    def reset(self, row): raise OSError(f"no page for {row['prompt']}")
    def respond(self, text): return "", 0.0, True

def echo(row, turns):
    return f"{row['prompt']}{len(turns)}{turns[-1]}", 0.5, len(turns) == 2

number = 5
"""


def test_own_environments(tmp_path: Path) -> None:
    file = tmp_path / "game.py"
    file.write_text(ENVIRONMENTS)
    referee = Referee("turns.environment echo", own_environment(f"{file}:echo"), time_limit=5.0)
    first, second = referee.begin([{"prompt": "p"}, {"prompt": "q"}])
    assert referee.respond([first, second], ["a", "b"]) == [Reply("p1a", 0.5), Reply("q1b", 0.5)]
    assert referee.respond([first], ["c"]) == [Reply("p2c", 0.5, done=True)]
    assert not referee.ends_turn(first, "anything")
    with pytest.raises(UserError, match="reset raised OSError: no page for p"):
        Referee("turns.environment x", own_environment(f"{file}:Broken")).begin([{"prompt": "p"}])
    for name, message in (
        ("Half", "the class has no respond"),
        ("number", "a class or a function is needed, got int"),
        ("nobody", "has no nobody"),
    ):
        with pytest.raises(UserError, match=message):
            own_environment(f"{file}:{name}")
    with pytest.raises(UserError, match="name your own as"):
        own_environment("chess")
