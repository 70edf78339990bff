"""Workers of any kind: shared rows, dealt hands, answers in order, states, and failures that are told."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from embodied.rollouts.processes import ProcessWorker, SharedArrays, Workers
from experiment.errors import UserError


class Clerk:
    """Writes its rows' numbers into the shared array, adds what it is told, and fails when asked to."""

    def __init__(self, rows: range, arrays: SharedArrays, broken: int = -1) -> None:
        if broken in rows:
            raise OSError("the desk is on fire")
        self.rows, self.total = rows, 0
        self.numbers = arrays.view("numbers")[rows.start : rows.stop]

    def write(self, factor: int) -> int:
        self.numbers[:] = factor * np.array(self.rows)
        return os.getpid()

    def doubled(self, hand: list[int], plus: int) -> list[int]:
        self.total += sum(hand)
        return [2 * card + plus for card in hand]

    def fail(self, how: str) -> None:
        if how == "die":
            os._exit(7)
        raise UserError("no such form") if how == "user" else OSError("out of ink")

    def state(self) -> dict[str, Any]:
        return {"total": self.total}

    def set_state(self, state: dict[str, Any]) -> None:
        self.total = state["total"]

    def capture_obstacle(self) -> str | None:
        return f"the clerk of row {self.rows.start} forgets"

    def close(self) -> None:
        self.numbers[:] = -1


LAYOUT = {"numbers": ((5,), "int64"), "empty": ((0, 3), "float32")}


@pytest.fixture(scope="module")
def staffed() -> Iterator[tuple[Workers, SharedArrays]]:
    arrays = SharedArrays(LAYOUT)
    workers = Workers(Clerk, 5, 2, arrays)
    yield workers, arrays
    workers.close()


def test_rows_are_shared_evenly_and_written_in_place(staffed: tuple[Workers, SharedArrays]) -> None:
    workers, arrays = staffed
    pids = workers.ask("write", 10)
    assert arrays.view("numbers").tolist() == [0, 10, 20, 30, 40]
    assert arrays.view("empty").shape == (0, 3)
    assert len({*pids, os.getpid()}) == 3
    assert pids == [member.pid for member in workers.members if isinstance(member, ProcessWorker)]


@pytest.mark.parametrize("items", [[], [1], [1, 2, 3, 4, 5]])
def test_answers_come_in_the_order_of_what_was_dealt(
    items: list[int], staffed: tuple[Workers, SharedArrays]
) -> None:
    assert staffed[0].deal("doubled", items, 100) == [100 + 2 * item for item in items]


def test_each_worker_gets_its_own_state_back(staffed: tuple[Workers, SharedArrays]) -> None:
    workers, _ = staffed
    workers.set_state({"workers": [{"total": 0}, {"total": 50}]})
    workers.deal("doubled", [1, 2, 3], 0)
    assert workers.state() == {"workers": [{"total": 4}, {"total": 52}]}
    with pytest.raises(
        UserError, match=r"^the checkpoint is of 1 rollout workers, there are 2: .*environment.workers"
    ):
        workers.set_state({"workers": [{"total": 0}]})
    assert workers.capture_obstacle() == "the clerk of row 0 forgets"


def test_a_worker_that_dies_while_nobody_asks_is_told_of() -> None:
    """Not as a broken pipe, which a program takes for its reader's end."""
    workers = Workers(Clerk, 5, 2, SharedArrays(LAYOUT))
    member = workers.members[0]
    assert isinstance(member, ProcessWorker)
    os.kill(member.pid, signal.SIGKILL)
    member._process.join(10)
    with pytest.raises(RuntimeError, match=r"a rollout worker died \(exit code -9\)"):
        workers.ask("write", 1)
    workers.close()


def test_without_processes_all_rows_are_worked_on_here() -> None:
    arrays = SharedArrays(LAYOUT)
    workers = Workers(Clerk, 5, 0, arrays)
    assert workers.ask("write", 1) == [os.getpid()]
    assert arrays.view("numbers").tolist() == [0, 1, 2, 3, 4]
    assert workers.deal("doubled", [7, 8], 1) == [15, 17]
    workers.close()
    assert arrays.view("numbers").tolist() == [-1] * 5


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("user", UserError, "^no such form$"),
        ("raise", RuntimeError, r"^a rollout worker failed:[\s\S]*OSError: out of ink"),
        ("die", RuntimeError, r"^a rollout worker died \(exit code 7\)$"),
    ],
)
def test_failures_are_told(how: str, error: type[Exception], message: str) -> None:
    worker = ProcessWorker(Clerk, range(5), SharedArrays(LAYOUT))
    worker.end()
    worker.begin("fail", how)
    with pytest.raises(error, match=message):
        worker.end()
    worker.close()


def test_one_that_cannot_begin_takes_the_others_with_it() -> None:
    arrays = SharedArrays(LAYOUT)
    with pytest.raises(RuntimeError, match="the desk is on fire"):
        Workers(Clerk, 5, 2, arrays, 4)
