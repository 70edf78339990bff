"""A user's own Python objects, named in a configuration as `file.py:name`."""

from __future__ import annotations

import importlib.util
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any


def is_own(name: str) -> bool:
    """Whether a name has the form `file.py:name`."""
    return ".py:" in name


def load_own(name: str) -> Any:
    """`file.py:name` -> what the file calls so. A file is run once a process, unless it was changed since.

    Raises ValueError, in one line, where there is no such file, it cannot be imported, or has no such name.
    """
    path, _, attribute = name.rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{name}: there is no file {path}")
    try:
        module = _module(file.resolve(), file.stat().st_mtime_ns)
    except Exception as error:  # whatever the user's file raises
        reason = " ".join(str(error).split())
        raise ValueError(f"{name}: importing {path} failed: {type(error).__name__}: {reason}") from error
    if not hasattr(module, attribute):
        raise ValueError(f"{name}: {path} has no {attribute}")
    return getattr(module, attribute)


@lru_cache
def _module(file: Path, changed: int) -> ModuleType:
    """changed: when the file was."""
    name = f"tandem_own_{file.stem}_{abs(hash((str(file), changed)))}"
    specification = importlib.util.spec_from_file_location(name, file)
    if specification is None or specification.loader is None:
        raise ImportError("it is not a Python file")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses look themselves up there
    specification.loader.exec_module(module)
    return module
