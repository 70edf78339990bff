"""Running a program that a model wrote, in a process of its own with what can be taken away taken away.

A program runs in a fresh `python -I`, in a temporary folder that is deleted afterwards, without the caller's
environment, under limits of CPU time, memory, file size, open files and processes, and is killed with its whole
process group after a wall-clock limit. Where Linux's `unshare` works, it also runs in user, network and process
namespaces of its own: no network, and whatever it left behind dies with it. Where the caller is root, the program
runs as `nobody`, since root is held by no limit of processes and may write everywhere; only if Python itself lies
where `nobody` cannot read does it run as root, and `Protection` says so.

It is no security boundary. The program can read whatever the user running it can read, write wherever that user can
write, and a hole in the kernel is a hole in this. `Protection` says what is in force; show it beside a result.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiment.errors import UserError

Outcome = Literal["passed", "failed", "timeout", "broken"]
MEBIBYTE = 2**20
MOST_SAID = 2000  # characters of a program's complaint that are kept

# The runner: takes limits and a password from its first line of input, then the program. It answers with the
# password only if the program ran to its end: a program that calls exit(0) before its tests has not passed.
RUNNER = """
import resource, sys
first = sys.stdin.readline().split()
cpu, memory, size, files, processes = map(int, first[:5])
word, answer = first[5], first[6]
program = sys.stdin.read()
for what, most in (
    (resource.RLIMIT_CORE, 0),
    (resource.RLIMIT_CPU, cpu),
    (resource.RLIMIT_AS, memory),
    (resource.RLIMIT_FSIZE, size),
    (resource.RLIMIT_NOFILE, files),
    (resource.RLIMIT_NPROC, processes),
):
    resource.setrlimit(what, (most, most))
del resource
try:
    exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
except BaseException as error:
    line = getattr(error, "lineno", None)
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "program.py":
            line = trace.tb_lineno
        trace = trace.tb_next
    with open(answer, "w") as file:
        file.write("no\\n" + (f"line {line}: " if line else "") + f"{type(error).__name__}: {error}"[:1500])
else:
    with open(answer, "w") as file:
        file.write(word)
"""


@dataclass(frozen=True)
class Limits:
    """seconds of wall clock; cpu seconds; memory, file in mebibytes; open files; processes, its own included."""

    seconds: float = 10.0
    cpu: int = 10
    memory: int = 1024
    file: int = 8
    files: int = 64
    processes: int = 16

    def __post_init__(self) -> None:
        if self.seconds <= 0 or min(self.cpu, self.memory, self.file, self.files, self.processes) < 1:
            raise ValueError("limits must be positive")


LIMITS = Limits()


@dataclass(frozen=True)
class Protection:
    """What is in force beside the limits. user: whom programs run as; namespaces: no network, nothing stays."""

    namespaces: bool
    user: str

    def line(self) -> str:
        """One line for the reader of a result."""
        shut = "no network, own processes" if self.namespaces else "NETWORK OPEN: unshare does not work here"
        kept = "time, memory, files and processes"
        if self.user == "root":
            kept = "time, memory and files; AS ROOT they could write everywhere (nobody cannot read this Python)"
        return f"programs ran as {self.user}, {shut}, with limits of {kept}"


@dataclass(frozen=True)
class Ran:
    """How a program ended, and what it complained of."""

    outcome: Outcome
    said: str = ""


def run_program(program: str, limits: Limits = LIMITS) -> Ran:
    """Run Python source to its end.

    passed      it ended without an exception
    failed      it raised, called exit, or was stopped by a limit of CPU time or memory
    timeout     the wall clock ran out
    broken      it could not be started at all

    Raises UserError where there is nothing to run it with (no resource limits: not Linux, not macOS).
    """
    if os.name != "posix":
        raise UserError("programs are run under limits that only Linux and macOS have")
    shield, user = _shield()
    folder = Path(tempfile.mkdtemp(prefix="tandem-program-"))
    answer, said = folder / "answer", folder / "said"
    word = secrets.token_hex(16)
    head = f"{limits.cpu} {limits.memory * MEBIBYTE} {limits.file * MEBIBYTE} {limits.files} {limits.processes}"
    try:
        if user is not None:
            os.chown(folder, user, user)
        with (folder / "said").open("wb") as output:
            process = subprocess.Popen(
                [*shield, *_python(), "-c", RUNNER],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8"},
                start_new_session=True,
                user=user,
                group=user,
                extra_groups=None if user is None else [],
            )
            timed_out = _feed(process, f"{head} {word} {answer}\n{program}".encode(), limits.seconds)
        told = _head(answer)
        if told == word:
            return Ran("passed")
        if timed_out:
            return Ran("timeout", f"longer than {limits.seconds:g} s")
        if told:
            return Ran("failed", told.partition("\n")[2][:MOST_SAID])
        reason = f"ended with {_ending(process.returncode)} before it was done"
        return Ran("failed", (f"{reason}: " + _head(said)).rstrip(": ")[:MOST_SAID])
    except OSError as error:
        return Ran("broken", str(error))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _feed(process: subprocess.Popen[bytes], text: bytes, seconds: float) -> bool:
    """Hand over the program and wait; whether the time ran out. Nothing of its process group outlives this."""
    try:
        process.communicate(text, timeout=seconds)
        return False
    except subprocess.TimeoutExpired:
        return True
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()


def _head(path: Path) -> str:
    """The start of a file, which a hostile program may have made anything but text."""
    if path.is_symlink() or not path.is_file():
        return ""
    with path.open("rb") as file:
        return file.read(MOST_SAID).decode("utf-8", errors="replace").strip()


def _ending(code: int | None) -> str:
    number = 0 if code is None else -code if code < 0 else code - 128  # a shell says 128 + the signal
    if number in {known.value for known in signal.Signals}:
        return f"signal {signal.Signals(number).name}"
    return f"exit code {code}"


def _python() -> list[str]:
    """The interpreter itself, not a virtual environment's link to it, without site-packages and user settings."""
    return [os.path.realpath(sys.executable), "-I", "-S", "-B"]


def protection() -> Protection:
    """What programs are protected by here."""
    shield, user = _shield()
    name = pwd.getpwuid(os.getuid() if user is None else user).pw_name
    return Protection(namespaces=bool(shield), user=name)


@functools.cache
def _shield() -> tuple[list[str], int | None]:
    """What to put before the interpreter, and the user to run as (None: oneself). Tried out, once a process."""
    users: list[int | None] = [None]
    if os.geteuid() == 0:
        with contextlib.suppress(KeyError):
            users.insert(0, pwd.getpwnam("nobody").pw_uid)
    # The shell is the namespace's first process, which signals of its own cannot end; the program is its child.
    first = ["/bin/sh", "-c", '"$0" "$@"; exit $?']
    unshare = ["unshare", "--user", "--net", "--ipc", "--pid", "--fork", "--kill-child", "--", *first]
    for shield in (unshare, []):
        for user in users:
            if _starts([*shield, *_python(), "-c", "pass"], user):
                return shield, user
    raise UserError(f"{_python()[0]}: Python cannot be started to run programs with")


def _starts(command: list[str], user: int | None) -> bool:
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=30, user=user, group=user, cwd="/", env={"PATH": "/usr/bin:/bin"}
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0
