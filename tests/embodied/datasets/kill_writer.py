"""Converts a data set in processes that are SIGKILLed inside the writing of a file, until one lives to the end.

    kill_writer.py SOURCE TARGET FORMAT SEED

Every life is a process of its own, dies at a random flush of a file that is not renamed yet, and prints what the
writer had said was finished; prints what `validate` says after each death. One JSON object on stdout.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path

from embodied.datasets import lerobot_state, staging
from embodied.datasets.check import problems
from embodied.datasets.formats import open_dataset
from embodied.datasets.staging import StagedEpisodes, staging_folder
from embodied.datasets.writing import write_dataset


def live(source: Path, target: Path, to: str, flushes: int, log: Path) -> None:
    """Convert, and die at the given flush."""
    done = 0

    def sync(path: Path) -> None:
        nonlocal done
        done += 1
        if done == flushes:
            os.kill(os.getpid(), signal.SIGKILL)

    def claim(finished: int) -> None:
        log.write_text(str(finished))

    lerobot_state.sync = staging.sync = sync
    write_dataset(open_dataset(source), target, to, on_episode=claim)


def finished(target: Path, to: str) -> int:
    """Episodes that a kill has left."""
    folder = staging_folder(target)
    if to != "lerobot":
        return len(StagedEpisodes(folder / "episodes"))
    info = folder / "result" / "meta" / "info.json"
    return int(json.loads(info.read_text())["total_episodes"]) if info.is_file() else 0


def main(source: Path, target: Path, to: str, seed: int) -> None:
    """Lives and deaths until the target is there."""
    rng = random.Random(seed)
    log = target.with_name("log")
    lives: list[dict[str, object]] = []
    while not target.exists() and len(lives) < 100:
        log.write_text("0")
        child = os.fork()
        if child == 0:
            live(source, target, to, rng.randrange(4, 30), log)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            said = list(problems(target))
            lives.append({"claimed": int(log.read_text()), "left": finished(target, to), "validate": said})
        elif status:
            sys.exit(f"a life ended with status {status}")
    print(json.dumps(lives))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
