"""Do the tests of the core notice when the core is wrong? `make mutants`, or `python -m tests.mutants [WORD ...]`.

Each of `planted_faults.FAULTS` is planted alone in a copy of the tree under a temporary folder; the checkout is
never touched. The tests of the faulty file run first, then all of tests/policy_core and tests/contracts, until one
fails. Words choose the faults whose file or effect contains one of them. Exit code 1 if a fault survives, if its
line is not found exactly once, or if it breaks the import instead of a number.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from tests.fault import Fault
from tests.planted_faults import FAULTS

ROOT = Path(__file__).resolve().parent.parent
COPIED = (
    *("policy_core", "experiment", "envs", "llm_rlhf", "embodied"),
    *("tests/policy_core", "tests/golden", "tests/contracts"),
)
COPIED_FILES = ("pyproject.toml", "tests/conftest.py")
WORKERS = 2


@dataclass(frozen=True)
class Outcome:
    """What became of a fault; `caught_by` is None where no test failed."""

    fault: Fault
    caught_by: str | None
    seconds: float
    problem: str | None = None


def copy_tree(folder: Path) -> Path:
    """What the tests need, without caches."""
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in COPIED_FILES:
        shutil.copy(ROOT / name, folder / name)
    return folder


def environment(tree: Path) -> dict[str, str]:
    """One thread, no plugin that is not named, and the copy before whatever is installed."""
    changes = {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return {**os.environ, **changes}


def run_tests(tree: Path, paths: Sequence[str]) -> tuple[int, str]:
    """pytest's exit code and output; it stops at the first failure, and its own time limit holds for each test."""
    options = ["-x", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider", "-p", "pytest_timeout"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *paths],
        cwd=tree,
        env=environment(tree),
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def stages(tree: Path, file: str) -> Iterator[list[str]]:
    """Which tests to run: those of the file, then all."""
    own = sorted(tree.glob(f"tests/policy_core/test_{file}*.py"))
    yield [str(path.relative_to(tree)) for path in own]
    yield ["tests/policy_core", "tests/contracts"]


def plant(tree: Path, fault: Fault, number: int) -> str:
    """Write the fault into the tree and return the sound text."""
    path = tree / "policy_core" / f"{fault.file}.py"
    sound = path.read_text()
    write(path, sound.replace(fault.original, fault.mutated), stamp=number)
    return sound


def write(path: Path, text: str, *, stamp: int) -> None:
    """With a time of its own, so that no cached bytecode of another version is taken for it."""
    path.write_text(text)
    os.utime(path, (1_000_000_000 + stamp, 1_000_000_000 + stamp))


def examine(tree: Path, fault: Fault, number: int) -> Outcome:
    """Plant one fault, run tests until one notices, and take the fault out again."""
    started = time.perf_counter()
    count = (tree / "policy_core" / f"{fault.file}.py").read_text().count(fault.original)
    if count != 1:
        return Outcome(fault, None, 0.0, f"its line is found {count} times in policy_core/{fault.file}.py")
    sound = plant(tree, fault, 2 * number)
    caught_by, problem = None, None
    try:
        for paths in stages(tree, fault.file):
            code, output = run_tests(tree, paths)
            failed = re.search(r"^FAILED (?:tests/)?(.+?)(?: - .*)?$", output, flags=re.MULTILINE)
            if code == 1 and failed:
                caught_by = failed[1]
                break
            if code != 0:
                problem = f"the tests could not run (exit code {code}): {output.strip().splitlines()[-1]}"
                break
    finally:
        write(tree / "policy_core" / f"{fault.file}.py", sound, stamp=2 * number + 1)
    return Outcome(fault, caught_by, time.perf_counter() - started, problem)


def baseline(tree: Path) -> None:
    """Exit unless the sound copy passes and is what the tests import."""
    where = subprocess.run(
        [sys.executable, "-c", "import policy_core; print(policy_core.__file__)"],
        cwd=tree,
        env=environment(tree),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    if not Path(where.strip()).is_relative_to(tree):
        sys.exit(f"error: the tests would import {where.strip()} instead of the copy in {tree}")
    code, output = run_tests(tree, ["tests/policy_core", "tests/contracts"])
    if code != 0:
        sys.exit(f"error: the tests fail without any fault:\n{output}")


def row(number: int, outcome: Outcome) -> str:
    verdict = outcome.caught_by or outcome.problem or "SURVIVED"
    return f"{number:3}  {outcome.fault.file:13} {outcome.fault.breaks:60} {outcome.seconds:5.1f}  {verdict}"


def main(words: Sequence[str]) -> int:
    chosen = [
        fault for fault in FAULTS if not words or any(word in f"{fault.file} {fault.breaks}" for word in words)
    ]
    if not chosen:
        sys.exit(f"error: no planted fault contains any of {', '.join(words)}")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees: SimpleQueue[Path] = SimpleQueue()
        for worker in range(WORKERS):
            trees.put(copy_tree(Path(folder).resolve() / str(worker)))
        first = trees.get()
        baseline(first)
        trees.put(first)
        print(f"  #  {'file':13} {'fault':60} {'s':>5}  caught by", flush=True)

        def examine_in_a_free_tree(numbered: tuple[int, Fault]) -> Outcome:
            tree = trees.get()
            try:
                return examine(tree, numbered[1], numbered[0])
            finally:
                trees.put(tree)

        outcomes = []
        with ThreadPoolExecutor(WORKERS) as pool:
            for outcome in pool.map(examine_in_a_free_tree, enumerate(chosen, start=1)):
                outcomes.append(outcome)
                print(row(len(outcomes), outcome), flush=True)
    caught = sum(outcome.caught_by is not None for outcome in outcomes)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{caught} of {len(chosen)} faults caught in {time.perf_counter() - started:.0f} s, "
        f"{children.ru_utime + children.ru_stime:.0f} s of processor time"
    )
    return 0 if caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
