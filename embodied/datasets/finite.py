"""Which row of numbers is not finite, in few words."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SHOWN = 8
"""A row of more numbers is not shown whole."""


def first_not_finite(values: NDArray) -> int | None:
    """The first of [T, ...] rows that holds NaN or an infinity."""
    if values.dtype.kind != "f":
        return None
    bad = np.flatnonzero(~np.isfinite(values).all(axis=tuple(range(1, values.ndim))))
    return int(bad[0]) if len(bad) else None


def shown(row: NDArray) -> str:
    """The numbers of a row; of a long one, the first that is not finite and where it stands."""
    if row.size <= SHOWN:
        return str(row.tolist())
    bad = np.flatnonzero(~np.isfinite(row.ravel()))
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    return f"{row.ravel()[bad[0]]} at {bad[0]}{more}, of {row.size} numbers"
