"""Calling reward functions: plain ones in turn, `async def` ones all at once, each within a time limit.

A call with a limit runs on a thread that the process does not wait for, so a run whose function hangs can end. One
without runs where it was called, since some code cannot move to another thread (signals, database connections), and
is waited for; one line names it when it is late, as it does rules and judges, which have no limit
(`told_when_late`).

All `async def` functions share one event loop that lives as long as the process, so a client that a function keeps
between calls stays usable.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import inspect
import math
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

from experiment.errors import UserError

RewardFunction = Callable[..., Sequence[float | None]]
AsyncRewardFunction = Callable[..., Awaitable[Sequence[float | None]]]
AnyRewardFunction = RewardFunction | AsyncRewardFunction
Calls = dict[object, tuple[float, Callable[[], str]]]
"""Those under way: since when, by the monotonic clock, and what says whose they are."""

LARGEST = 1e30
"""Of a reward: float32 holds the sum and the square of no larger ones."""

REPLY_SECONDS = 1.0
"""How soon an event loop that no function blocks answers."""

LATE_SECONDS = 60.0
"""After how long a call without an answer is told of."""


def call_all(
    functions: Mapping[str, AnyRewardFunction],
    *,
    prompts: list[str],
    completions: list[str],
    columns: Mapping[str, list[Any]],
    timeout: float | None = None,
) -> dict[str, list[float]]:
    """Rewards [B] of every function by its name, NaN for None.

    timeout     seconds that one call may take; None = any

    Raises UserError naming the function that raised, took too long or returned something unusable.
    """
    arguments = {
        name: {"prompts": prompts, "completions": completions, **_given(function, columns)}
        for name, function in functions.items()
    }
    began = time.monotonic()
    under_way = {
        name: asyncio.run_coroutine_threadsafe(_named(name, function, arguments[name]), _loop(os.getpid()))
        for name, function in functions.items()
        if is_async(function)
    }
    results: dict[str, list[float]] = {}
    try:
        for name, function in functions.items():
            if name not in under_way:
                with told_when_late(functools.partial(_rewards, name)):
                    answer = _call(name, function, arguments[name], timeout)
                results[name] = _checked(name, answer, completions)
        for name, future in under_way.items():
            left = None if timeout is None else max(0.0, began + timeout - time.monotonic())
            with told_when_late(functools.partial(_blocking, name)):
                done = concurrent.futures.wait([future], timeout=left).done
            if not done:
                raise _too_late(_given_up(name), timeout)
            results[name] = _checked(name, _outcome(name, future.result), completions)
    finally:
        for future in under_way.values():
            future.cancel()
    return {name: results[name] for name in functions}


@contextlib.contextmanager
def told_when_late(who: Callable[[], str]) -> Iterator[None]:
    """Within it a user's function is called; if that takes LATE_SECONDS, one line says so, and it goes on.

    who     says then how the user knows the function, as "rewards.file.py:score"
    """
    calls, call = _watched(os.getpid()), object()
    calls[call] = (time.monotonic(), who)
    try:
        yield
    finally:
        calls.pop(call, None)


@functools.cache
def _watched(process: int) -> Calls:
    """The calls of this process that were not told of. One thread looks after all of them: rules are called too
    often for a timer each."""
    calls: Calls = {}
    threading.Thread(target=_watch, args=(calls,), name="late calls", daemon=True).start()
    return calls


def _watch(calls: Calls) -> None:
    while True:
        time.sleep(LATE_SECONDS / 60)
        for call, (since, who) in list(calls.items()):
            if time.monotonic() - since >= LATE_SECONDS and calls.pop(call, None) is not None:
                line = f"{who()} has not answered for {LATE_SECONDS:g} s; still waiting"
                print(line, file=sys.stderr, flush=True)


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling it gives a coroutine: an `async def`, or an object with such a `__call__`."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def check_columns(name: str, function: AnyRewardFunction, columns: Sequence[str]) -> None:
    """Raise UserError if the function asks for a column that is not in `columns`."""
    for wanted in _wanted(function)[0]:
        if wanted not in columns:
            raise UserError(
                f"rewards.{name}: it asks for a column {wanted!r}; the data has {', '.join(sorted(columns))}"
            )


def _wanted(function: AnyRewardFunction) -> tuple[list[str], list[str], bool]:
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


def _given(function: AnyRewardFunction, columns: Mapping[str, list[Any]]) -> Mapping[str, list[Any]]:
    """The columns that a function is handed."""
    required, optional, anything = _wanted(function)
    return columns if anything else {key: columns[key] for key in [*required, *optional] if key in columns}


def _call(name: str, function: AnyRewardFunction, arguments: dict[str, Any], timeout: float | None) -> list[Any]:
    """One plain function's answer. Without a limit it runs right here, else on a thread of its own."""
    if timeout is None:
        return _outcome(name, lambda: function(**arguments))
    answer: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def run() -> None:
        try:
            answer.set_result(_listed(function(**arguments)))  # a generator runs here
        except BaseException as error:  # SystemExit too: it is raised again where the answer is awaited
            answer.set_exception(error)

    threading.Thread(target=run, name=f"reward {name}", daemon=True).start()
    if not concurrent.futures.wait([answer], timeout=timeout).done:
        raise _too_late(_rewards(name), timeout)
    return _outcome(name, answer.result)


def _outcome(name: str, answer: Callable[[], Any]) -> list[Any]:
    """What a function answered, as a list. Raises UserError if it raised, or answered no list."""
    try:
        return _listed(answer())
    except SystemExit as error:  # it would end the run, and nobody would hear of it
        raise UserError(f"rewards.{name}: it called sys.exit({error.code})") from error
    except Exception as error:
        raise UserError(f"rewards.{name}: it raised {type(error).__name__}: {_one_line(error)}") from error


def _listed(answer: Any) -> list[Any]:
    """Rewards as a list. Raises TypeError for what can be gone through but is no list of rewards."""
    if isinstance(answer, (str, bytes, Mapping)):
        raise TypeError(f"it returned a {type(answer).__name__}, not a list of rewards")
    return list(answer)


def _checked(name: str, values: list[Any], completions: list[str]) -> list[float]:
    """One finite number a completion, NaN for None. Raises UserError naming what is neither."""
    if len(values) != len(completions):
        raise UserError(f"rewards.{name}: it returned {len(values)} rewards for {len(completions)} completions")
    for index, value in enumerate(values):
        if value is None:
            continue
        try:
            finite = not isinstance(value, str) and abs(float(value)) <= LARGEST
        except (TypeError, ValueError, OverflowError):
            finite = False
        if not finite:
            raise UserError(
                f"rewards.{name}: it returned {value!r} for completion {completions[index]!r}; "
                "return a finite number, or None where it cannot judge"
            )
    return [math.nan if value is None else float(value) for value in values]


async def _named(name: str, function: AnyRewardFunction, arguments: dict[str, Any]) -> Any:
    """Await the function in a task of its name."""
    task = asyncio.current_task()
    assert task is not None
    task.set_name(name)
    try:
        return await function(**arguments)  # type: ignore[misc]
    except SystemExit as error:  # it would end the event loop's thread, and nobody would hear of it
        raise RuntimeError(f"it called sys.exit({error.code})") from error


@functools.cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """The event loop of this process, on a thread that does not keep it from ending."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop


def _blocked() -> bool:
    """Whether an async function keeps the event loop, and so all others, waiting."""
    replied = threading.Event()
    _loop(os.getpid()).call_soon_threadsafe(replied.set)
    return not replied.wait(REPLY_SECONDS)


def _rewards(name: str) -> str:
    return f"rewards.{name}"


def _blocking(name: str) -> str:
    """Which function is to blame when the async one `name` is late: the one that blocks the event loop, if any."""
    running = asyncio.current_task(_loop(os.getpid())) if _blocked() else None
    return _rewards(name if running is None else running.get_name())


def _given_up(name: str) -> str:
    """As `_blocking`; a later call gets an event loop that is not blocked."""
    found = _blocking(name)
    if _blocked():
        _loop.cache_clear()
    return found


def _too_late(who: str, timeout: float | None) -> UserError:
    return UserError(f"{who}: no answer within {timeout:g} seconds (rewards_timeout)")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or "no message"
