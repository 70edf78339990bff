"""`tandem doctor`: one line for each check of this machine, one remedy for each problem."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

Level = Literal["ok", "warn", "fail"]

DISTRIBUTION = "tandem"
GL_LIBRARIES = {"egl": "libegl1 libgl1-mesa-dri", "osmesa": "libosmesa6", "glfw": "libgl1 libglfw3"}
GL_SECONDS = 60.0
LEAST_DISK, GOOD_DISK = 1.0, 10.0  # GB


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        level: "fail" needs mending, "warn" may need it.
        name: what was looked at.
        text: what was found.
        fix: what to type or set; empty where all is well.
    """

    level: Level
    name: str
    text: str
    fix: str = ""


def examine() -> int:
    """Print every check as it is made; returns 1 if any of them failed."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True)
    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    counts = {"ok": 0, "warn": 0, "fail": 0}
    for check in all_checks():
        counts[check.level] += 1
        line = Text.assemble((f"{check.level:<5}", styles[check.level]), (f"{check.name:<20}", "bold"), check.text)
        if check.fix:
            line.append(f"  fix: {check.fix}", style=styles[check.level])
        console.print(line)
    console.print(f"{counts['ok']} ok, {counts['warn']} to look at, {counts['fail']} to mend")
    return 1 if counts["fail"] else 0


def all_checks() -> Iterator[Check]:
    """Every check, quick ones first."""
    yield check_python(sys.version_info[:3])
    yield from check_packages()
    yield check_torch()
    yield check_threads(os.environ, os.cpu_count() or 1)
    yield from check_graphics()
    yield check_wandb()
    yield check_disk(shutil.disk_usage(Path.cwd()).free / 1e9, Path.cwd())


# ---------------------------------------------------------------- versions


def check_python(version: tuple[int, ...]) -> Check:
    """Python 3.11 or newer."""
    text = ".".join(str(part) for part in version)
    if version < (3, 11):
        return Check("fail", "python", text, "make setup PYTHON=python3.11")
    return Check("ok", "python", f"{text} ({sys.executable})")


def check_packages() -> Iterator[Check]:
    """Every declared dependency against its declared range."""
    try:
        declared = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        yield Check("fail", DISTRIBUTION, "not installed", "pip install -e .")
        return
    yield Check("ok", DISTRIBUTION, metadata.version(DISTRIBUTION))
    for line in declared:
        if "extra ==" in line:
            continue
        name = re.split(r"[^\w.-]", line, maxsplit=1)[0]
        try:
            installed: str | None = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed = None
        yield check_requirement(line, installed)


def check_requirement(requirement: str, installed: str | None) -> Check:
    """One dependency.

    Args:
        requirement: as declared, such as "mujoco!=4.0.0,>=3.3".
        installed: its version, or None.
    """
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    fix = f"pip install '{wanted.name}{wanted.specifier}'"
    if installed is None:
        return Check("fail", wanted.name, "not installed", fix)
    if not wanted.specifier.contains(installed, prereleases=True):
        return Check("fail", wanted.name, f"{installed} does not fit {wanted.specifier}", fix)
    return Check("ok", wanted.name, f"{installed}" + (f" (wants {wanted.specifier})" if wanted.specifier else ""))


def check_torch() -> Check:
    """Which PyTorch build this is, and what it can run on."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check("fail", "accelerator", f"torch cannot be loaded: {error}", "make setup")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    if torch.cuda.is_available():
        devices = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return Check("ok", "accelerator", f"{devices} ({build} build)")
    if torch.version.cuda and shutil.which("nvidia-smi"):
        text = f"{build} build, but the GPU cannot be used"
        return Check(
            "warn", "accelerator", text, "update the driver, or choose a build for it: make setup TORCH='...'"
        )
    if shutil.which("nvidia-smi"):
        text = "there is a GPU, but this is PyTorch's CPU build"
        return Check(
            "warn", "accelerator", text, "make setup TORCH='...' (the selector on PyTorch's site gives it)"
        )
    return Check("ok", "accelerator", f"none; everything runs on the CPU ({build} build)")


def check_threads(environment: Mapping[str, str], cores: int) -> Check:
    """Cores against the threads that numerical libraries will start in every process."""
    asked = environment.get("OMP_NUM_THREADS", "")
    text = f"{cores} cores, OMP_NUM_THREADS={asked or 'unset'}, torch uses {_torch_threads()} here"
    if asked.isdigit() and int(asked) > cores:
        return Check("warn", "cores", text, f"export OMP_NUM_THREADS={cores}")
    return Check("ok", "cores", f"{text}; a run sets its own number (run.threads)")


def _torch_threads() -> str:
    try:
        import torch
    except (ImportError, OSError):
        return "no threads"
    return str(torch.get_num_threads())


# ---------------------------------------------------------------- rendering


def check_graphics() -> Iterator[Check]:
    """One MuJoCo frame with each back end."""
    results = {backend: probe(backend) for backend in ("egl", "osmesa")}
    screen = bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    if screen:
        results["glfw"] = probe("glfw")
    yield from judge_graphics(results, chosen=os.environ.get("MUJOCO_GL", ""))
    if not screen:
        yield Check("ok", "MUJOCO_GL=glfw", "not tried: it needs a screen, and there is none")


def probe(backend: str) -> tuple[bool, str]:
    """Draw one frame in a process of its own; returns (it worked, who drew it or why not)."""
    environment = {**os.environ, "MUJOCO_GL": backend}
    environment.pop("PYOPENGL_PLATFORM", None)  # mujoco sets it from MUJOCO_GL
    command = [sys.executable, "-m", "tandem.gl_probe"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=GL_SECONDS)
    except subprocess.TimeoutExpired:
        return False, f"no frame within {GL_SECONDS:.0f} seconds"
    lines = done.stdout.strip().splitlines() or [f"it crashed (exit code {done.returncode})"]
    return done.returncode == 0, lines[-1]


def judge_graphics(results: Mapping[str, tuple[bool, str]], *, chosen: str) -> Iterator[Check]:
    """What the frames mean: one back end is enough, unless it is not the one that is chosen.

    Args:
        results: back end -> (it worked, who drew or why not).
        chosen: MUJOCO_GL, or "".
    """
    working = [backend for backend, (works, _) in results.items() if works]
    for backend, (works, text) in results.items():
        name = f"MUJOCO_GL={backend}"
        install = f"sudo apt-get install {GL_LIBRARIES[backend]}"
        if works:
            yield Check("ok", name, text)
        elif not working:
            yield Check("fail", name, text, install)
        elif backend == chosen:
            yield Check("fail", name, text, f"export MUJOCO_GL={working[0]}")
        else:
            yield Check("warn", name, text, f"{install} (or leave it: {working[0]} works)")


# ---------------------------------------------------------------- the rest


def check_wandb() -> Check:
    """What `run.wandb: auto` will do here."""
    from experiment.metrics import resolve_mode

    mode = resolve_mode("auto")
    reason = "WANDB_MODE says so" if os.environ.get("WANDB_MODE") == mode else "there is no key"
    texts = {
        "online": "online: runs are sent to the server",
        "offline": f"offline ({reason}): `wandb login` to go online, `wandb sync` to send runs later",
        "disabled": "disabled by WANDB_MODE",
    }
    return Check("ok", "wandb", texts[mode])


def check_disk(free: float, folder: Path) -> Check:
    """Free gigabytes where runs will be written."""
    text = f"{free:.1f} GB free under {folder}"
    if free < LEAST_DISK:
        return Check("fail", "disk", text, "free some space, or set run.folder to another disk")
    if free < GOOD_DISK:
        return Check("warn", "disk", text, "checkpoints and videos may fill it: free some space")
    return Check("ok", "disk", text)
