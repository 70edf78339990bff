import asyncio
import functools
import io
import math
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch

from experiment.errors import UserError
from llm_rlhf.evaluation.win_rate import one_by_one
from llm_rlhf.rewards import calls as reward_calls
from llm_rlhf.rewards.calls import AnyRewardFunction, call_all, is_async
from llm_rlhf.rewards.functions import RewardSet, exact_match, random_reward, resolve
from llm_rlhf.rewards.rules import judge


def length(prompts: list[str], completions: list[str]) -> list[float | None]:
    return [float(len(text)) for text in completions]


def sometimes(prompts: list[str], completions: list[str]) -> list[float | None]:
    return [None if text == "?" else 1.0 for text in completions]


def write(folder: Path, body: str) -> str:
    file = folder / "mine.py"
    file.write_text(body)
    return f"{file}:score"


def test_weighted_sum_and_metrics() -> None:
    rewards = RewardSet({"exact_match": exact_match, "length": length}, {"exact_match": 2.0, "length": -0.5})
    scores = rewards(["a", "b"], ["xx", "yyyy"], {"answer": ["xx", "y"], "other": [1, 2]})
    assert scores.total.tolist() == [2.0 - 1.0, -2.0]
    assert scores.scored.all()
    metrics = scores.metrics()
    assert metrics["rewards/exact_match/mean"] == 0.5
    assert metrics["rewards/length/mean"] == 3.0
    assert metrics["rewards/length/std"] == 1.0
    assert metrics["objective/scores"] == -0.5


def test_none_is_unscored_only_where_every_function_says_none() -> None:
    both = RewardSet({"length": length, "sometimes": sometimes}, {"length": 1.0, "sometimes": 1.0})
    scores = both(["", ""], ["?", "ab"], {})
    assert scores.total.tolist() == [1.0, 3.0]
    assert scores.scored.all()
    alone = RewardSet({"sometimes": sometimes}, {"sometimes": 1.0})(["", ""], ["?", "ab"], {})
    assert alone.scored.tolist() == [False, True]
    assert alone.metrics()["rewards/unscored"] == 0.5
    assert math.isnan(float(alone.by_name["sometimes"][0]))
    assert alone.metrics()["objective/scores"] == 1.0


def test_random_reward_depends_on_the_sample_alone() -> None:
    first = random_reward(["a"] * 2000, ["x"] * 2000, list(range(2000)))
    again = random_reward(["b"] * 2000, ["y"] * 2000, list(range(2000)))
    assert first == again
    mean = float(torch.tensor([float(value or 0.0) for value in first]).mean())
    assert abs(mean - 0.5) < 0.05
    assert set(first) == {0.0, 1.0}


def test_own_function_from_a_file_with_columns(tmp_path: Path) -> None:
    name = write(
        tmp_path,
        "def score(prompts, completions, answer, bonus=(), **rest):\n"
        "    assert 'sample_index' in rest\n"
        "    return [float(a == c) for a, c in zip(answer, completions)]\n",
    )
    rewards = resolve({name: 3.0}, own={}, columns=["answer"])
    scores = rewards(["p", "q"], ["1", "2"], {"answer": ["1", "1"], "sample_index": [0, 1]})
    assert scores.total.tolist() == [3.0, 0.0]


@pytest.mark.parametrize(
    "body, message",
    [
        ("import nothing_of_that_name\n", "importing .* failed: ModuleNotFoundError"),
        ("def score(:\n", "importing .* failed: SyntaxError"),
        ("def other(prompts, completions):\n    return []\n", "has no score"),
        (
            "def score(prompts, completions, label):\n    return []\n",
            "asks for a column 'label'; the data has answer",
        ),
    ],
)
def test_functions_that_cannot_be_used_are_named_at_the_start(tmp_path: Path, body: str, message: str) -> None:
    name = write(tmp_path, body)
    with pytest.raises(UserError, match=message) as caught:
        resolve({name: 1.0}, own={}, columns=["answer"])
    assert "mine.py:score" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "result, message",
    [
        ("[1.0]", "returned 1 rewards for 2 completions"),
        ("[1.0, float('nan')]", "returned nan for completion 'b'"),
        ("[float('inf'), 0.0]", "returned inf for completion 'a'"),
        ("['good', 0.0]", "returned 'good' for completion 'a'"),
        ("[1 / 0, 0.0]", "raised ZeroDivisionError: division by zero"),
        ("None", "raised TypeError"),
        ("exit(3)", r"called sys\.exit\(3\)"),
        ("{0: 1.0, 1: 2.0}", "it returned a dict, not a list of rewards"),
        ("'11'", "it returned a str, not a list of rewards"),
        ("['0.5', 0.0]", "returned '0.5' for completion 'a'"),
        ("[10**400, 0.0]", "returned 1000"),
        ("[0.0, 1e39]", r"returned 1e\+39 for completion 'b'"),
    ],
)
def test_bad_results_name_the_function(tmp_path: Path, result: str, message: str) -> None:
    name = write(tmp_path, f"def score(prompts, completions):\n    return {result}\n")
    rewards = resolve({name: 1.0}, own={}, columns=[])
    with pytest.raises(UserError, match=message) as caught:
        rewards(["p", "p"], ["a", "b"], {})
    assert "mine.py:score" in str(caught.value)


def test_names_and_weights_are_checked() -> None:
    with pytest.raises(
        UserError, match=r"unknown; did you mean optimality\? there is exact_match, random, optimality"
    ):
        resolve({"optimalty": 1.0}, own={"optimality": length}, columns=[])
    with pytest.raises(UserError, match="at least one"):
        resolve({}, own={}, columns=[])
    with pytest.raises(UserError, match="finite"):
        resolve({"random": math.inf}, own={}, columns=[])
    with pytest.raises(UserError, match="no file"):
        resolve({"nowhere.py:score": 1.0}, own={}, columns=[])


# ---------------------------------------------------------------- async functions and time limits

Texts = list[str]
Numbers = list[float | None]


def test_async_functions_run_at_once_and_mix_with_plain_ones() -> None:
    """The first waits for the second, which waits for the plain one: called in turn, they would wait for ever."""
    done: list[str] = []

    async def first(prompts: Texts, completions: Texts) -> Numbers:
        while "second" not in done:
            await asyncio.sleep(0.001)
        return [1.0 for _ in completions]

    async def second(prompts: Texts, completions: Texts, answer: Texts) -> Numbers:
        while "plain" not in done:
            await asyncio.sleep(0.001)
        done.append("second")
        return [float(a == c) for a, c in zip(answer, completions, strict=True)]

    def plain(prompts: Texts, completions: Texts) -> Numbers:
        done.append("plain")
        return [None, 4.0]

    weights = {"first": 1.0, "second": 10.0, "plain": 100.0}
    functions: dict[str, AnyRewardFunction] = {"first": first, "second": second, "plain": plain}
    scores = RewardSet(functions, weights, timeout=20.0)(["", ""], ["a", "b"], {"answer": ["x", "b"]})
    assert scores.total.tolist() == [1.0, 411.0]
    assert list(scores.by_name) == ["first", "second", "plain"]
    again = RewardSet({"second": second}, {"second": 1.0})(["", ""], ["a", "b"], {"answer": ["a", "x"]})
    assert again.total.tolist() == [1.0, 0.0]


def test_what_counts_as_async() -> None:
    class Judge:
        async def __call__(self, prompts: Texts, completions: Texts) -> Numbers:
            return [0.5 for _ in completions]

    async def scaled(prompts: Texts, completions: Texts, factor: float = 1.0) -> Numbers:
        return [factor for _ in completions]

    judge, partial = Judge(), functools.partial(scaled, factor=3.0)
    assert is_async(judge)
    assert is_async(partial)
    assert not is_async(length)
    assert not is_async(Judge)
    answers = call_all({"judge": judge, "partial": partial}, prompts=[""], completions=["a"], columns={})
    assert answers == {"judge": [0.5], "partial": [3.0]}


def forever(prompts: Texts, completions: Texts) -> Numbers:
    threading.Event().wait()
    return []


async def forever_async(prompts: Texts, completions: Texts) -> Numbers:
    await asyncio.Event().wait()
    return []


async def patient(prompts: Texts, completions: Texts) -> Numbers:
    await asyncio.sleep(0.01)
    return [0.0 for _ in completions]


async def quick(prompts: Texts, completions: Texts) -> Numbers:
    return [0.0 for _ in completions]


@pytest.mark.parametrize("function", [forever, forever_async])
def test_a_function_that_hangs_is_named(function: AnyRewardFunction) -> None:
    functions = {"quick": quick, "slow": function, "length": length}
    rewards = RewardSet(functions, dict.fromkeys(functions, 1.0), timeout=0.05)
    with pytest.raises(UserError, match=r"^rewards\.slow: no answer within 0\.05 seconds \(rewards_timeout\)$"):
        rewards(["p"], ["a"], {})


def test_an_async_function_that_blocks_the_others_is_the_one_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_calls, "REPLY_SECONDS", 0.05)
    release = threading.Event()

    async def blocks(prompts: Texts, completions: Texts) -> Numbers:
        release.wait()
        return [0.0 for _ in completions]

    rewards = RewardSet({"patient": patient, "blocks": blocks}, {"patient": 1.0, "blocks": 1.0}, timeout=0.1)
    try:
        with pytest.raises(UserError, match=r"rewards\.blocks: no answer within 0\.1 seconds"):
            rewards(["p"], ["a"], {})
        fine = RewardSet({"quick": quick}, {"quick": 1.0}, timeout=20.0)  # on a loop that is not blocked
        assert fine(["p"], ["a"], {}).total.tolist() == [0.0]
    finally:
        release.set()


class Ear(io.StringIO):
    """A stderr that says when it was written to."""

    def __init__(self) -> None:
        super().__init__()
        self.heard = threading.Event()

    def flush(self) -> None:
        self.heard.set()


def test_what_is_late_is_named_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain and async functions without a limit, rules and judges: each answers only once it was told of."""
    monkeypatch.setattr(reward_calls, "LATE_SECONDS", 0.05)

    def said(call: Callable[[Ear], object]) -> str:
        ear = Ear()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", ear)
            call(ear)
        return ear.getvalue()

    def rewarded(ear: Ear) -> None:
        def slow(prompts: Texts, completions: Texts) -> Numbers:
            assert threading.current_thread() is threading.main_thread()
            return [float(ear.heard.wait(20.0))]

        assert call_all({"slow": slow}, prompts=[""], completions=["a"], columns={}) == {"slow": [1.0]}

    def rewarded_later(ear: Ear) -> None:
        async def slow(prompts: Texts, completions: Texts) -> Numbers:
            while not ear.heard.is_set():
                await asyncio.sleep(0.001)
            return [2.0]

        assert call_all({"slow": slow}, prompts=[""], completions=["a"], columns={}) == {"slow": [2.0]}

    def ruled(ear: Ear) -> None:
        assert judge(lambda prompt, completion: ear.heard.wait(20.0), "rules.py:slow", "p", "a") is True

    def compared(ear: Ear) -> None:
        decide = one_by_one(lambda prompt, a, b: "a" if ear.heard.wait(20.0) else None, "judges.py:slow")
        assert decide(["p"], ["a"], ["b"]) == ["a"]

    for call, who in (
        (rewarded, "rewards.slow"),
        (rewarded_later, "rewards.slow"),
        (ruled, "rules.py:slow"),
        (compared, "judge: judges.py:slow"),
    ):
        assert said(call) == f"{who} has not answered for 0.05 s; still waiting\n"


def test_an_async_function_that_blocks_is_the_one_that_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_calls, "REPLY_SECONDS", 0.05)
    monkeypatch.setattr(reward_calls, "LATE_SECONDS", 0.05)
    ear = Ear()
    monkeypatch.setattr(sys, "stderr", ear)

    async def blocks(prompts: Texts, completions: Texts) -> Numbers:
        return [float(ear.heard.wait(20.0))]

    answers = call_all({"patient": patient, "blocks": blocks}, prompts=[""], completions=["a"], columns={})
    assert answers == {"patient": [0.0], "blocks": [1.0]}
    assert ear.getvalue().startswith("rewards.blocks has not answered for 0.05 s; still waiting\n")


def test_a_process_whose_reward_function_hangs_can_end() -> None:
    program = """
import asyncio, threading
from experiment.errors import UserError
from llm_rlhf.rewards.calls import call_all
def hangs(prompts, completions):
    threading.Event().wait()
async def waits(prompts, completions):
    await asyncio.Event().wait()
for function in (hangs, waits):
    try:
        call_all({"mine": function}, prompts=[""], completions=[""], columns={}, timeout=0.05)
    except UserError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "rewards.mine: no answer within 0.05 seconds (rewards_timeout)\n" * 2
    assert done.stderr == ""


def raising(error: BaseException) -> list[Callable[..., Numbers | Awaitable[Numbers]]]:
    def plain(prompts: Texts, completions: Texts) -> Numbers:
        raise error

    async def later(prompts: Texts, completions: Texts) -> Numbers:
        await asyncio.sleep(0)
        raise error

    return [plain, later]


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_errors_are_the_same_with_and_without_a_limit(timeout: float | None) -> None:
    """A TimeoutError of the function's own is its own, not the limit's."""
    for error, message in (
        (KeyError("k"), "raised KeyError: 'k'"),
        (TimeoutError("mine"), "raised TimeoutError: mine"),
    ):
        for function in raising(error):
            with pytest.raises(UserError, match=rf"^rewards\.bad: it {message}$"):
                call_all({"bad": function}, prompts=[""], completions=[""], columns={}, timeout=timeout)  # type: ignore[dict-item]

    async def short(prompts: Texts, completions: Texts) -> Numbers:
        return [1.0]

    with pytest.raises(UserError, match=r"rewards\.short: it returned 1 rewards for 2 completions"):
        call_all({"short": short}, prompts=["", ""], completions=["", ""], columns={}, timeout=timeout)
    plain, later = raising(SystemExit(3))
    with pytest.raises(UserError, match=r"rewards\.exits: it called sys\.exit\(3\)"):
        call_all({"exits": plain}, prompts=[""], completions=[""], columns={}, timeout=timeout)  # type: ignore[dict-item]
    with pytest.raises(UserError, match=r"rewards\.exits: it raised RuntimeError: it called sys\.exit\(3\)"):
        call_all({"exits": later}, prompts=[""], completions=[""], columns={}, timeout=timeout)  # type: ignore[dict-item]


def test_async_functions_come_from_files_too(tmp_path: Path) -> None:
    name = write(
        tmp_path,
        "import asyncio\n"
        "async def score(prompts, completions, answer):\n"
        "    await asyncio.sleep(0)\n"
        "    return [float(a == c) for a, c in zip(answer, completions)]\n",
    )
    rewards = resolve({name: 2.0}, own={}, columns=["answer"], timeout=20.0)
    assert rewards(["p", "q"], ["1", "2"], {"answer": ["1", "1"], "sample_index": [0, 1]}).total.tolist() == [
        2.0,
        0.0,
    ]
    with pytest.raises(UserError, match="asks for a column 'answer'"):
        resolve({name: 1.0}, own={}, columns=[])


def test_a_generator_that_hangs_is_within_the_time_limit(tmp_path: Path) -> None:
    body = "import threading\ndef score(prompts, completions):\n    threading.Event().wait()\n    yield 1.0\n"
    rewards = resolve({write(tmp_path, body): 1.0}, own={}, columns=[], timeout=0.05)
    with pytest.raises(UserError, match=r"no answer within 0\.05 seconds"):
        rewards(["p"], ["a"], {})
