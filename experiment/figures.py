"""Where a figure goes: a .png, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from experiment.checkpoint import sync
from experiment.errors import UserError, storage_errors

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def require_png(path: str | Path, *, option: str) -> Path:
    """The path. Raises UserError, naming the `option` that gave it, where it is no name of a .png."""
    found = Path(path)
    if found.suffix.lower() != ".png":
        raise UserError(f"{option}: {str(path)!r} is no name of a picture; give one that ends in .png")
    return found


def save_figure(figure: Figure, path: Path, *, dpi: int) -> None:
    """Write the figure, and the folders on the way to it. Raises StorageError if it cannot be written."""
    temporary = path.with_name(f".tmp-{path.name}")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, format="png", dpi=dpi)
        sync(temporary)
        temporary.replace(path)
