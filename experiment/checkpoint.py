"""Checkpoints that are either whole or absent.

    checkpoints/
        000000010/              state.safetensors, state.json, rng/, checkpoint.json, one folder per writer
        000000020/
        last -> 000000020       relative links, replaced atomically
        best -> 000000010

A checkpoint is written as `.tmp-STEP-PID`, flushed to the disk and renamed. Deleting renames first, too, so a
folder whose name is a number is always complete, whenever the process was killed. What a killed process left
behind is removed by `Checkpoints.recover`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiment.errors import UserError, storage_errors
from experiment.state import load_state, save_state

__all__ = ["Checkpoint", "Checkpoints", "Which", "find_checkpoint", "load_checkpoint", "load_state", "save_state"]

Which = Literal["auto", "best", "last"]
"""A checkpoint of a run: auto is the best one, or the last where the run judged none of its own."""

_META, _RNG = "checkpoint.json", "rng"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back.

    Attributes:
        step: the global_step it was saved at.
        state: the recipe's own tree.
        folder: where it lies, with one sub-folder per writer.
        rng: state of the global random generators.
        meta: metrics_offset (bytes), elapsed (seconds), metric, best {step, metric} or None.
    """

    step: int
    state: Any
    folder: Path
    rng: dict[str, Any]
    meta: dict[str, Any]


def find_checkpoint(run_folder: str | Path, which: Which) -> Path:
    """RUN/checkpoints/best or last. UserError, in one line, if it is not there."""
    folder = Path(run_folder) / "checkpoints"
    if which != "auto" and (folder / which).exists():
        return folder / which
    found = [folder / name for name in ("best", "last") if (folder / name).exists()]
    if which == "auto" and found:
        return found[0]
    wanted = "checkpoint" if which == "auto" else f"checkpoint {which!r}"
    hint = "; the run judged none of its own: say checkpoint=last" if which == "best" and found else ""
    raise UserError(f"{run_folder}: there is no {wanted} to evaluate{hint}")


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read one checkpoint folder, or a `last` or `best` link to one.

    Raises:
        UserError: the folder is not a checkpoint, or is damaged.
    """
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        return Checkpoint(meta["step"], load_state(folder), folder.resolve(), load_state(folder / _RNG), meta)
    except FileNotFoundError as error:
        raise UserError(f"{folder}: not a complete checkpoint: {error.filename} is missing") from error
    except (ValueError, KeyError) as error:
        raise UserError(f"{folder}: damaged checkpoint ({error}); delete it to use an earlier one") from error


class Checkpoints:
    """The checkpoints of one run: writes them, keeps the newest few and the best, and the two links."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdigit() and not p.is_symlink())

    def path(self, step: int) -> Path:
        return self.folder / f"{step:09d}"

    def newest(self) -> Path | None:
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def recover(self) -> None:
        """Remove what a killed process left, and put back a checkpoint that was about to be replaced."""
        if not self.folder.is_dir():
            return
        for stray in self.folder.glob(".old-*"):
            final = self.path(int(stray.name.split("-")[1]))
            if not final.exists():
                stray.rename(final)
        for pattern in (".old-*", ".tmp-*"):
            for stray in self.folder.glob(pattern):
                _remove(stray)

    def save(
        self,
        step: int,
        state: Any,
        rng: Mapping[str, Any],
        meta: Mapping[str, Any],
        writers: Mapping[str, Callable[[Path], None]],
    ) -> Path:
        """Write a checkpoint, move `last` (and `best`, when `meta["best"]` names this step), drop old ones.

        Raises:
            UserError: the disk is full or read-only; nothing half-written is left.
        """
        reserved = {_META, _RNG, "state.json", "state.safetensors"} & set(writers)
        if reserved:
            raise ValueError(f"a writer may not be called {', '.join(sorted(reserved))}")
        final, temporary = self.path(step), self.folder / f".tmp-{step:09d}-{os.getpid()}"
        with storage_errors(final):
            try:
                (temporary / _RNG).mkdir(parents=True)
                save_state(temporary, state)
                save_state(temporary / _RNG, rng)
                for name, write in writers.items():
                    (temporary / name).mkdir()
                    write(temporary / name)
                text = json.dumps({"step": step, **meta}, indent=1)
                (temporary / _META).write_text(text, encoding="utf-8")
                _flush(temporary)
                self._publish(temporary, final)
            except BaseException:
                _remove(temporary)
                raise
            best = meta["best"]["step"] if meta.get("best") else None
            self.relink(step, best)
            self._prune(best)
        return final

    def _publish(self, temporary: Path, final: Path) -> None:
        """Rename into place; a checkpoint of the same step is kept aside until the new one is there."""
        aside = self.folder / f".old-{final.name}"
        if final.exists():
            final.rename(aside)
        temporary.rename(final)
        sync(self.folder)
        _remove(aside)

    def relink(self, last: int, best: int | None) -> None:
        """Point `last`, and `best` if that checkpoint is still there, at their steps."""
        for name, step in (("last", last), ("best", best)):
            if step is None or not self.path(step).is_dir():
                continue
            link = self.folder / f".tmp-{name}-{os.getpid()}"
            link.unlink(missing_ok=True)
            link.symlink_to(self.path(step).name)
            link.replace(self.folder / name)
        sync(self.folder)

    def _prune(self, best: int | None) -> None:
        steps = self.steps()
        for step in steps[: -self.keep]:
            if step != best:
                doomed = self.folder / f".tmp-{step:09d}-old-{os.getpid()}"
                self.path(step).rename(doomed)
                _remove(doomed)


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Force every file and folder below onto the disk, so that the rename cannot overtake the contents."""
    for root, _, files in os.walk(folder):
        for name in files:
            sync(Path(root) / name)
        sync(Path(root))


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file; a reader sees the old or the new text, never a part.

    Raises:
        UserError: the disk is full or read-only.
    """
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    with storage_errors(path):
        try:
            temporary.write_text(text, encoding="utf-8")
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
