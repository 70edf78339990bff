"""A user's own Python objects, named in a configuration as `file.py:name`, and calls of the user's functions."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any


def is_own(name: str) -> bool:
    """Whether a name has the form `file.py:name`."""
    return ".py:" in name


def load_own(name: str) -> Any:
    """`file.py:name` -> what the file calls so. A file is run once a process, unless it was changed since.

    As in a script, `import neighbour` finds the files of its folder, while it is run. Python keeps such a module by
    that name: of two folders that both have one, the first to be asked wins.

    Raises ValueError, in one line, where there is no such file, it cannot be imported, or has no such name.
    """
    path, _, attribute = name.rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{name}: there is no file {path}")
    try:
        module = _module(file.resolve(), file.stat().st_mtime_ns)
    except (Exception, SystemExit) as error:  # whatever the user's file raises; nobody would hear of an exit
        reason = " ".join(str(error).split())
        raise ValueError(f"{name}: importing {path} failed: {type(error).__name__}: {reason}") from error
    if not hasattr(module, attribute):
        raise ValueError(f"{name}: {path} has no {attribute}")
    return getattr(module, attribute)


def call_own(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), which a user wrote. Raises ValueError, in one line with the place, where it fails.

    what: what the message calls it.
    """
    try:
        return function(*arguments)
    except Exception as error:  # whatever the user's function raises
        frames = traceback.extract_tb(error.__traceback__)[1:]
        file = getattr(getattr(function, "__code__", None), "co_filename", None)
        inside = [frame for frame in frames if frame.filename == file] or frames
        place = f" ({inside[-1].filename}, line {inside[-1].lineno})" if inside else ""
        reason = " ".join(str(error).split())
        raise ValueError(f"{what} failed: {type(error).__name__}: {reason}{place}") from error


@lru_cache
def _module(file: Path, changed: int) -> ModuleType:
    """The file as a module. changed: when the file was changed, so that a new version is run."""
    name = f"tandem_own_{file.stem}_{abs(hash((str(file), changed)))}"
    specification = importlib.util.spec_from_file_location(name, file)
    if specification is None or specification.loader is None:
        raise ImportError("it is not a Python file")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses look themselves up there
    folder = str(file.parent)
    sys.path.insert(0, folder)
    try:
        specification.loader.exec_module(module)
    finally:
        if folder in sys.path:  # the file may have changed the path itself
            sys.path.remove(folder)
    return module
