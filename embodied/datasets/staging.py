"""Where a data set is built until it is whole, so that a kill loses the episode in progress at most.

`NAME.unfinished/` lies beside the target: `plan.json` says what is being made of what, `episodes/` or `result/`
hold what is finished. Every file is written under another name, flushed and renamed (`lerobot_state.publish`); the
target appears by one rename at the end. The same command goes on where it was killed; another one is refused.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py

from embodied.datasets.lerobot_state import publish
from embodied.datasets.lerobot_writer import lock_folder
from experiment.checkpoint import sync
from experiment.errors import UserError, storage_errors

PLAN = "plan.json"
_EPISODE = "episode_{:06d}.hdf5"


def staging_folder(target: Path) -> Path:
    """Where `target` is built."""
    named = target if target.name else Path(os.path.abspath(target))  # "." has no name of its own
    return named.with_name(f"{named.name}.unfinished")


def interrupted(target: Path) -> str | None:
    """One line about a writing of `target` that did not finish; None where there is none."""
    folder = staging_folder(target)
    if not (folder / PLAN).is_file():
        return None
    told = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    return (
        f"{target}: was not finished: {folder} holds what is there of its {told['episodes']} episodes; "
        "the same command goes on, or delete it"
    )


class Staging:
    """The folder in which one target is built. Only one process at a time may have it."""

    def __init__(self, target: Path, plan: Mapping[str, Any]) -> None:
        """plan: what is being made; JSON, with `episodes`, how many it will hold.

        Raises UserError when the target exists, another process builds it, or something else was begun there.
        """
        if target.exists() or target.is_symlink():
            raise UserError(f"{target}: exists already; choose another name")
        self.target, self.folder = target, staging_folder(target)
        with storage_errors(target):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(self.folder)
            try:
                self._agree(json.dumps(plan, indent=2))
            except BaseException:
                self.close()
                raise

    def _agree(self, plan: str) -> None:
        path = self.folder / PLAN
        if not path.is_file():
            publish(self.folder, PLAN, lambda temporary: temporary.write_text(plan, encoding="utf-8"))
        elif path.read_text(encoding="utf-8") != plan:
            raise UserError(
                f"{self.folder}: holds what another command began; repeat that one, or delete the folder"
            )

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let another process have the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    @property
    def result(self) -> Path:
        """What becomes the target."""
        return self.folder / "result"

    def deliver(self) -> None:
        """Rename the result to the target and remove the rest. Raises UserError when it cannot be written."""
        with storage_errors(self.target):
            self.result.rename(self.target)
            sync(self.target.parent)
            self.discard()

    def discard(self) -> None:
        """Remove everything that was begun."""
        shutil.rmtree(self.folder)


class StagedEpisodes:
    """Finished episodes, each an HDF5 file with what it adds to the one that they are assembled into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0
        while (folder / _EPISODE.format(self._count)).is_file():
            self._count += 1

    def __len__(self) -> int:
        return self._count

    def append(self, write: Callable[[h5py.File], None]) -> None:
        """Add one, on the disk when this returns. write: fills its file. UserError when the disk is full."""

        def fill(path: Path) -> None:
            with h5py.File(path, "w") as file:
                write(file)

        with storage_errors(self.folder):
            publish(self.folder, _EPISODE.format(self._count), fill)
        self._count += 1

    def assemble(self, path: Path, finish: Callable[[h5py.File], None]) -> None:
        """Copy them into one file, one at a time. finish: writes what else it holds. UserError as `append`."""
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with h5py.File(path, "w", track_order=True) as file:
                for number in range(self._count):
                    with h5py.File(self.folder / _EPISODE.format(number), "r") as one:
                        for name in one:
                            one.copy(name, file)
                finish(file)
            sync(path)
