"""Failures of the surroundings, told in one line with a remedy.

A full disk, a missing graphics library or an environment that is not installed are nobody's bug: the user needs
the remedy, not a traceback. Everything that is not recognized here is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
import sys
import traceback
from collections.abc import Callable

from envs.packages import package_of
from experiment.errors import UserError

_ROOMS = ("policy_core", "experiment", "envs", "llm_rlhf", "embodied", "tandem")
_GL_MODULES = ("OpenGL", "mujoco.egl", "mujoco.osmesa", "mujoco.glfw", "mujoco.rendering.classic.gl_context")
_GL_REMEDY = (
    "install the libraries with `sudo apt-get install libegl1 libgl1-mesa-dri libosmesa6`, or choose another"
    " back end (MUJOCO_GL=osmesa or MUJOCO_GL=egl); `tandem doctor` shows which of them work"
)


def explain(error: BaseException) -> str | None:
    """One line that says what is wrong and how to mend it, or None where the error is a bug."""
    if isinstance(error, UserError):
        return one_line(error)
    for judge in _JUDGES:
        text = judge(error)
        if text is not None:
            return text
    return None


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def _storage(error: BaseException) -> str | None:
    if not isinstance(error, OSError):
        return None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = f" under {error.filename}" if error.filename else ""
        return f"the disk{place} is full: free some space, or set run.folder to a folder on another disk"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
        reason = (error.strerror or "no access").lower()
        return f"{error.filename}: {reason}; mend its permissions or choose another place"
    return None


def _graphics(error: BaseException) -> str | None:
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    in_library = any(m == gl or m.startswith(gl + ".") for m in modules for gl in _GL_MODULES)
    fatal = type(error).__name__ == "FatalError" and type(error).__module__.startswith("mujoco")
    no_context = fatal and any(word in str(error) for word in ("OpenGL", "glad", "context"))
    # mujoco hides a failed import of its renderer; what shows is the missing name.
    hidden = (
        isinstance(error, AttributeError) and "'mujoco'" in str(error) and error.name in ("Renderer", "GLContext")
    )
    if in_library or no_context or hidden:
        return f"MuJoCo cannot draw on this machine ({one_line(error)}): {_GL_REMEDY}"
    return None


def _environment_name(error: BaseException) -> str | None:
    # gymnasium is loaded already if one of its errors is in flight: the start of the program stays quick.
    gymnasium = sys.modules.get("gymnasium")
    if gymnasium is None:
        return None
    known = gymnasium.error
    if isinstance(error, known.NameNotFound | known.NamespaceNotFound | known.VersionNotFound):
        message = one_line(error).split(". ")[0].rstrip(".").replace("`", "")
        wanted = _wanted(message)
        near = _nearest(wanted, list(gymnasium.registry))
        package = package_of(wanted)
        install = f"install its package (pip install {package})" if package else "install its package"
        # A package that is known to hold it is a better guess than a name that looks alike.
        guess = f"did you mean {near}? If not, {install}" if near and not package else install
        return f"{message}; {guess}, and check the spelling with gymnasium.pprint_registry()"
    if isinstance(error, known.DependencyNotInstalled | known.DeprecatedEnv):
        return one_line(error)
    return None


def _wanted(message: str) -> str:
    """The environment's name in gymnasium's messages: `Environment X ...`, `... for environment X ...`."""
    words = message.split()
    for marker in ("environment", "Environment", "Namespace"):
        if marker in words[:-1] and not (marker == "Environment" and "environment" in words):
            return words[words.index(marker) + 1]
    return message


def _nearest(wanted: str, registered: list[str]) -> str | None:
    """The newest version of the registered environment whose name is most like `wanted`."""
    names: dict[str, str] = {}
    for name in registered:
        base, _, version = name.rpartition("-v")
        newest = names.get(base, "")
        if version.isdigit() and int(version) >= int(newest.rpartition("-v")[2] or -1):
            names[base] = name
    near = difflib.get_close_matches(wanted.rpartition("-v")[0] or wanted, names, n=1)
    return names[near[0]] if near else None


def _missing_package(error: BaseException) -> str | None:
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    package = error.name.partition(".")[0]
    if package in _ROOMS:
        return None
    return f"the package {package} is not installed: type `pip install -e .`, or `make setup` in a checkout"


def _accelerator_memory(error: BaseException) -> str | None:
    if type(error).__name__ != "OutOfMemoryError" or not type(error).__module__.startswith("torch"):
        return None
    return "the accelerator is out of memory: lower the batch or micro-batch size, or use a smaller model"


_JUDGES: tuple[Callable[[BaseException], str | None], ...] = (
    _storage,
    _graphics,
    _environment_name,
    _missing_package,
    _accelerator_memory,
)
