"""HDF5 files read with one-line errors: what every HDF5 layout shares."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from embodied.datasets.finite import first_not_finite, shown
from experiment.errors import UserError


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """The file, for reading. Raises UserError when it is missing, not HDF5 or cut off, here or while reading it."""
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError) as error:  # h5py raises either, also while reading
        reason = " ".join(str(error).split())
        if "signature" in reason:
            raise UserError(f"{path}: not an HDF5 file") from error
        raise UserError(f"{path}: damaged or cut off, fetch it again ({reason})") from error


def array(group: h5py.Group, key: str, where: str, *, columns: bool, rows: slice = slice(None)) -> np.ndarray:
    """A data set as finite float32, [T, d] or, without columns, [T] (also where it was written as [T, 1]).

    key: of the data set, "a/b" within sub-groups. where: what messages call the group. rows: only these.
    Raises UserError when it is missing, no such array, or holds NaN or infinity.
    """
    dataset = group.get(key)
    if not isinstance(dataset, h5py.Dataset):
        parent = key.rpartition("/")[0]
        inside = group.get(parent) if parent else group
        present = sorted(inside) if isinstance(inside, h5py.Group) else "nothing"
        called = "the demonstration" if re.search(r"/demo_\d+$", group.name) else "the file"
        raise UserError(f"{where}: has no {key}; {parent or called} has {present}")
    shape = dataset.shape
    if not columns and len(shape) == 2 and shape[1] == 1:
        shape = shape[:1]
    if len(shape) != (2 if columns else 1) or dataset.dtype.kind not in "fiub":
        expected = "[T, d] numbers" if columns else "[T] numbers"
        raise UserError(f"{where}: {key} is {dataset.dtype} {list(dataset.shape)}, expected {expected}")
    values = dataset[rows].astype(np.float32)
    return finite(values.reshape(len(values), *shape[1:]), f"{where}: {key}")


def finite(values: np.ndarray, where: str) -> np.ndarray:
    """The same [T, ...] values. Raises UserError naming the first row that is NaN or infinite."""
    bad = first_not_finite(values)
    if bad is not None:
        raise UserError(f"{where} row {bad} is not finite: {shown(values[bad])}")
    return values


def is_hdf5(path: Path) -> bool:
    """Whether the file begins as HDF5 files do, or is called like one and is empty or cut before that."""
    if path.suffix in (".hdf5", ".h5") or not path.is_file():
        return path.is_file()
    with path.open("rb") as file:
        return os.path.getsize(path) >= 8 and file.read(8) == b"\x89HDF\r\n\x1a\n"
