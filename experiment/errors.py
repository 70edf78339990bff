"""Mistakes the user can mend, and the conversion of a full or read-only disk into one of them."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ENOTDIR}
_STORAGE |= {errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}


class UserError(Exception):
    """A mistake in a configuration, a path or the surroundings of a run.

    The message is one line: what is wrong, and how to mend it. The command line prints `error: MESSAGE` and
    exits with code 2, without a traceback.
    """


class StorageError(UserError):
    """Something cannot be written: no space, read-only, no permission. What was written before is untouched."""


class NonFiniteMetric(UserError):
    """A loss became NaN or infinite; the message names run, metric, step and the last kept checkpoint."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing: a part of a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def user_errors(what: str = "") -> Iterator[None]:
    """Turn a ValueError below this line into a `UserError`, with what was asked for before its text.

    For calls whose ValueErrors say what their caller did wrong, where the caller is the user.
    """
    try:
        yield
    except ValueError as error:
        raise UserError(f"{what}: {error}" if what else str(error)) from error


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn "no space left", "read-only" and "permission denied" below this line into a `StorageError`.

    Libraries written in Rust or C++ report a full disk with exceptions of their own, so the text is looked at
    too.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = _storage_problem(error)
        if reason is None:
            raise
        raise StorageError(f"{path}: cannot write ({reason}); make room or fix the permissions") from error


def _storage_problem(error: Exception) -> str | None:
    if isinstance(error, OSError) and error.errno in _STORAGE:
        return (error.strerror or str(error)).lower()
    foreign = re.search(r"os error (\d+)", str(error))
    if (foreign and int(foreign[1]) == errno.ENOSPC) or "No space left on device" in str(error):
        return "no space left on device"
    return None
