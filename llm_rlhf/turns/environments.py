"""What answers a policy that writes in turns: the protocol of environments, and asking them safely.

A user's own is named as `file.py:name`. A class is made anew for every episode:

    class Guess:
        def reset(self, row): self.secret = row["answer"]
        def respond(self, text):
            return "higher\\n" if text < self.secret else "lower\\n", 0.0, text == self.secret

A function is asked with the row and all turns that the policy has written, the newest last:

    def respond(row, turns): return "again\\n", 0.0, turns[-1] == row["answer"]

Both answer with a text, what the turn earned, and whether the episode is over. `row` holds the data's columns, the
`prompt`, and `sample_index`: how many episodes the run had played before this one. Randomness should come from
there, so that a resumed run meets the same answers.
"""

from __future__ import annotations

import inspect
import itertools
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

from envs.own import is_own, load_own
from experiment.errors import UserError


@dataclass(frozen=True)
class Reply:
    """What an environment says to a turn.

    text    what the policy reads next; nobody reads it where the episode is over
    reward  what the turn earned
    done    the episode is over
    tool    the tool that the turn called, "" if none
    failed  the call made no sense, and the text says so
    """

    text: str
    reward: float = 0.0
    done: bool = False
    tool: str = ""
    failed: bool = False


class Environment(Protocol):
    """One episode's other side. It may also have `ends_turn(text) -> bool`: whether what the policy has written of
    its turn is a whole turn, besides EOS and the configured stops."""

    def reset(self, row: dict[str, Any]) -> None:
        """The episode begins, on this row of the data."""
        ...

    def respond(self, text: str) -> Reply | tuple[str, float, bool]:
        """The policy's turn, without EOS -> text, reward and whether the episode is over."""
        ...


class _Stateless:
    """A function as an environment."""

    def __init__(self, function: Callable[[dict[str, Any], list[str]], Any]) -> None:
        self.function = function
        self.row: dict[str, Any] = {}
        self.turns: list[str] = []

    def reset(self, row: dict[str, Any]) -> None:
        self.row, self.turns = row, []

    def respond(self, text: str) -> Any:
        self.turns.append(text)
        return self.function(self.row, list(self.turns))


def own_environment(name: str) -> Callable[[], Environment]:
    """`file.py:name` -> what makes an episode's environment.

    Raises UserError where there is nothing of that name, or it is neither a function nor a class with reset and
    respond.
    """
    if not is_own(name):
        raise UserError(f"turns.environment {name}: name your own as path/to/file.py:NAME, or use turns.tools")
    try:
        found = load_own(name)
    except ValueError as error:
        raise UserError(f"turns.environment {error}") from error
    if inspect.isclass(found):
        missing = [method for method in ("reset", "respond") if not callable(getattr(found, method, None))]
        if missing:
            raise UserError(f"turns.environment {name}: the class has no {' and no '.join(missing)}")
        return cast(Callable[[], Environment], found)
    if not callable(found):
        raise UserError(f"turns.environment {name}: a class or a function is needed, got {type(found).__name__}")
    return lambda: _Stateless(found)


@dataclass(frozen=True)
class Outcome:
    """What came of a call: its value, or why there is none. late: it had not returned when its time was up."""

    value: Any = None
    error: BaseException | None = None
    late: bool = False


def _outcome_of(job: Callable[[], Any]) -> Outcome:
    try:
        return Outcome(value=job())
    except (Exception, SystemExit) as error:  # on SystemExit a thread would end without a word
        return Outcome(error=error)


def call_all(jobs: Sequence[Callable[[], Any]], *, workers: int, time_limit: float) -> list[Outcome]:
    """Call all of `jobs`, at most `workers` at a time; a call that takes over `time_limit` seconds is given up.

    Calls run in threads that do not keep the process alive, so one that hangs for ever harms no later one. (Code
    that holds the interpreter's lock for ever, such as a runaway regular expression, cannot be given up.)
    """
    outcomes: dict[int, Outcome] = {}
    waiting = iter(range(len(jobs)))
    running: dict[int, tuple[int, float]] = {}  # worker -> its job, and since when
    lock, finished = threading.Lock(), threading.Event()
    names = itertools.count()

    def work(worker: int) -> None:
        while True:
            with lock:
                index = next(waiting, None)
                if index is None:
                    return
                running[worker] = (index, time.monotonic())
            outcome = _outcome_of(jobs[index])
            with lock:
                if running.pop(worker, None) is None:
                    return  # given up meanwhile, and somebody else took its place
                outcomes[index] = outcome
                if len(outcomes) == len(jobs):
                    finished.set()

    def employ(count: int) -> None:
        for _ in range(count):
            threading.Thread(target=work, args=(next(names),), daemon=True).start()

    employ(min(workers, len(jobs)))
    while len(outcomes) < len(jobs):
        with lock:
            now = time.monotonic()
            late = [worker for worker, (_, since) in running.items() if now - since > time_limit]
            for worker in late:
                outcomes[running.pop(worker)[0]] = Outcome(late=True)
            oldest = min((since for _, since in running.values()), default=now)
        employ(len(late))
        finished.wait(timeout=max(oldest + time_limit - now, 0.0) + 1e-3)
    return [outcomes[index] for index in range(len(jobs))]


@dataclass(frozen=True)
class Referee:
    """Makes environments and asks them, with everything that may go wrong said in one line.

    name            what a message calls the environment
    make            makes the environment of one episode
    time_limit      seconds that a call may take; None = calls are sure to return and are made right here
    workers         calls at a time; above 1 the user's code must bear threads
    failure_text    what the policy reads where the user's code fails; None = the run stops there
    """

    name: str
    make: Callable[[], Environment]
    time_limit: float | None = None
    workers: int = 1
    failure_text: str | None = None

    def begin(self, rows: Sequence[dict[str, Any]]) -> list[Environment]:
        """An environment for each row, reset. Raises UserError where that fails."""

        def begun(row: dict[str, Any]) -> Environment:
            environment = self.make()
            environment.reset(row)
            return environment

        outcomes = self._call([partial(begun, row) for row in rows])
        for outcome in outcomes:
            if outcome.late or outcome.error is not None:
                raise UserError(f"{self.name}: {self._what(outcome, 'reset')}") from outcome.error
        return [outcome.value for outcome in outcomes]

    def respond(self, environments: Sequence[Environment], texts: Sequence[str]) -> list[Reply]:
        """Each environment's reply to its turn. Raises UserError where one fails and there is no failure_text."""
        pairs = zip(environments, texts, strict=True)
        outcomes = self._call([partial(environment.respond, text) for environment, text in pairs])
        return [self._reply(*pair) for pair in zip(environments, outcomes, strict=True)]

    def ends_turn(self, environment: Environment, text: str) -> bool:
        """Whether the environment takes the text as a whole turn. Raises UserError where that fails."""
        judge = getattr(environment, "ends_turn", None)
        if judge is None:
            return False
        try:
            return bool(judge(text))
        except Exception as error:
            raise UserError(f"{self.name}: {self._what(Outcome(error=error), 'ends_turn')}") from error

    def _call(self, jobs: Sequence[Callable[[], Any]]) -> list[Outcome]:
        if self.time_limit is None:
            return [_outcome_of(job) for job in jobs]
        return call_all(jobs, workers=self.workers, time_limit=self.time_limit)

    def _what(self, outcome: Outcome, method: str) -> str:
        if outcome.late:
            return f"{method} did not return within {self.time_limit:g} s"
        message = " ".join(str(outcome.error).split()) or "no message"
        return f"{method} raised {type(outcome.error).__name__}: {message}"

    def _reply(self, environment: Environment, outcome: Outcome) -> Reply:
        name = getattr(environment, "asking", self.name)
        if outcome.late or outcome.error is not None:
            problem, cause = self._what(outcome, "respond"), outcome.error
        else:
            try:
                return checked(outcome.value)
            except ValueError as error:
                problem, cause = str(error), error
        if self.failure_text is not None:
            return Reply(self.failure_text, tool=name, failed=True)
        raise UserError(f"{name}: {problem}") from cause


def checked(value: Any) -> Reply:
    """What `respond` returned as a Reply. Raises ValueError saying what is wrong with it."""
    if isinstance(value, tuple) and len(value) == 3:
        value = Reply(*value)
    if not isinstance(value, Reply):
        raise ValueError(f"respond returned {_shown(value)}; return (text, reward, done)")
    if not isinstance(value.text, str):
        raise ValueError(f"respond returned {_shown(value.text)} as its text, not text")
    try:
        value.text.encode()
    except UnicodeEncodeError:
        raise ValueError("respond returned a text that holds half of a character (a lone surrogate)") from None
    try:
        reward, done = float(value.reward), bool(value.done)
        sound = math.isfinite(reward) and value.done in (True, False)
    except (TypeError, ValueError):
        sound = False
    if not sound:
        raise ValueError(
            f"respond returned reward {_shown(value.reward)} and done {_shown(value.done)}; a finite number and "
            "True or False are needed"
        )
    return Reply(value.text, reward, done, value.tool, value.failed)


def _shown(value: Any, limit: int = 60) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
