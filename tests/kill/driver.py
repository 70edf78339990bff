"""`tandem VERB ...` that dies inside its N-th checkpoint: driver.py N VERB ... (N = 0: it lives)."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

from experiment import checkpoint
from tandem.cli import main

real_sync, checkpoints_begun = checkpoint.sync, set[str]()


def sync(path: Path) -> None:
    """Die when the first file of a checkpoint has been flushed and the others have not: nothing is renamed yet."""
    begun = next((part for part in path.parts if re.fullmatch(r"\.tmp-\d{9}-\d+", part)), None)
    if begun is not None:
        checkpoints_begun.add(begun)
        if len(checkpoints_begun) == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
    real_sync(path)


if __name__ == "__main__":
    checkpoint.sync = sync
    sys.exit(main(sys.argv[2:]))
