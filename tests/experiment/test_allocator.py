"""Page faults of a process that allocates and frees the same blocks again and again."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from experiment.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        blocks = [np.ones(2**17) for _ in range(32)]  # 1 MiB each
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

agreed = keep_freed_memory()
faults()
print(agreed, faults())
"""
PAGES = 10 * 32 * 2**20 // 4096

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc")


def outcome(**environment: str) -> tuple[str, int]:
    """What `keep_freed_memory` returned in a process with these variables, and the page faults after it."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", PROGRAM]
    run = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=True)
    agreed, faults = run.stdout.split()
    return agreed, int(faults)


def test_freed_blocks_are_not_faulted_in_again() -> None:
    agreed, faults = outcome()
    assert agreed == "True"
    assert faults < PAGES / 100


def test_the_users_own_settings_rule() -> None:
    agreed, faults = outcome(MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072")
    assert agreed == "False"
    assert faults > PAGES / 2
