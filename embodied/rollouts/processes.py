"""Worker processes that answer one exchange a rollout, and the arrays in shared memory that they fill.

Nothing here knows what a worker does: `make(*arguments)` builds one, in a process of its own or in this one, and
`begin` and `end` call its methods.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import RawArray
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiment.errors import UserError

Layout = Mapping[str, tuple[tuple[int, ...], str]]
"""Name -> shape and numpy type of a shared array."""


class SharedArrays:
    """Named arrays that the parent and the workers see; made before the workers start."""

    def __init__(self, layout: Layout) -> None:
        self._layout = dict(layout)
        self._memory = {
            name: RawArray("b", max(1, math.prod(shape) * np.dtype(kind).itemsize))
            for name, (shape, kind) in self._layout.items()
        }

    @property
    def names(self) -> set[str]:
        """The names of the arrays."""
        return set(self._layout)

    def view(self, name: str) -> NDArray[Any]:
        """The named array, in place."""
        shape, kind = self._layout[name]
        return np.frombuffer(self._memory[name], dtype=kind, count=math.prod(shape)).reshape(shape)


def serve(pipe: Connection, make: Callable[..., Any], *arguments: Any) -> None:
    """A worker process: answer (method, arguments) with (True, result) or (False, problem) to the pipe's end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the run, and its workers with it
    try:
        worker = make(*arguments)
        pipe.send((True, None))
        while True:
            method, args = pipe.recv()
            pipe.send((True, getattr(worker, method)(*args)))
    except (EOFError, ConnectionError):  # the parent is gone
        return
    except UserError as error:
        pipe.send((False, error))
    except Exception:
        pipe.send((False, traceback.format_exc()))


class ProcessWorker:
    """A worker in a process of its own: `begin` a call, `end` it with its result."""

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")  # a forked child inherits a GL context that it cannot use
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, make, *arguments), daemon=True)
        with _one_thread_each():
            self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """The number of the process."""
        assert self._process.pid is not None
        return self._process.pid

    def begin(self, method: str, *arguments: Any) -> None:
        """Ask for a method of the worker. Raises RuntimeError if it has died."""
        try:
            self._pipe.send((method, arguments))
        except ConnectionError as error:
            raise self._died() from error

    def end(self) -> Any:
        """Wait for the answer. Raises the worker's UserError; RuntimeError with its traceback, or if it died."""
        try:
            fine, answer = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise self._died() from error
        if isinstance(answer, UserError):
            raise answer
        if not fine:
            raise RuntimeError(f"a rollout worker failed:\n{answer}")
        return answer

    def _died(self) -> RuntimeError:
        self._process.join(5)
        return RuntimeError(f"a rollout worker died (exit code {self._process.exitcode})")

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.terminate()


class LocalWorker:
    """A worker in this process, behind the same two calls."""

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        self._worker = make(*arguments)
        self._answers: list[Any] = [None]

    def begin(self, method: str, *arguments: Any) -> None:
        """Do it at once."""
        self._answers.append(getattr(self._worker, method)(*arguments))

    def end(self) -> Any:
        """The oldest answer that was not taken."""
        return self._answers.pop(0)

    def close(self) -> None:
        """Close the worker."""
        self._worker.close()


class Workers:
    """Workers of one kind that share `rows` rows of work evenly, in `processes` processes or (0) in this one.

    make(range of rows, *arguments) builds one. It has methods state, set_state, capture_obstacle and close.
    """

    def __init__(self, make: Callable[..., Any], rows: int, processes: int, *arguments: Any) -> None:
        bounds = np.linspace(0, rows, max(1, processes) + 1).astype(int).tolist()
        kind = ProcessWorker if processes else LocalWorker
        self.members: list[ProcessWorker | LocalWorker] = [
            kind(make, range(low, high), *arguments) for low, high in itertools.pairwise(bounds)
        ]
        try:
            self._end()  # their first answer: ready
        except BaseException:
            self.close()
            raise

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every worker at once, with the same arguments."""
        for worker in self.members:
            worker.begin(method, *arguments)
        return self._end()

    def deal(self, method: str, items: Sequence[Any], *arguments: Any) -> list[Any]:
        """Deal `items` out, call a method of every worker with its hand and `arguments`; an answer an item, in
        their order."""
        count = len(self.members)
        for index, worker in enumerate(self.members):
            worker.begin(method, list(items[index::count]), *arguments)
        answers = self._end()
        return [answers[index % count][index // count] for index in range(len(items))]

    def state(self) -> dict[str, Any]:
        """The state of all workers, for a checkpoint."""
        return {"workers": self.ask("state")}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`. UserError if it is of another number of workers."""
        saved = state["workers"]
        if len(saved) != len(self.members):
            raise UserError(
                f"the checkpoint is of {len(saved)} rollout workers, there are {len(self.members)}: go on with its"
                " environment.workers"
            )
        for worker, its_state in zip(self.members, saved, strict=True):
            worker.begin("set_state", its_state)
        self._end()

    def capture_obstacle(self) -> str | None:
        """Why a resumed run would begin new episodes, None if it goes on bit for bit."""
        obstacle: str | None = self.ask("capture_obstacle")[0]
        return obstacle

    def close(self) -> None:
        """End the workers."""
        for worker in self.members:
            worker.close()

    def _end(self) -> list[Any]:
        return [worker.end() for worker in self.members]


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Start a child with one BLAS thread: its matrices are tiny, and the other cores have workers of their own."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
