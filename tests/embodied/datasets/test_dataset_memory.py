"""Going through a data set holds one episode at a time: four times the episodes, the same peak of memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from embodied.datasets.formats import open_dataset
from embodied.datasets.writing import write_dataset
from studies import dataset_memory


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_memory, "FRAMES", 20)
    monkeypatch.setattr(dataset_memory, "SIZE", 64)


def peak(act: Callable[[], object]) -> int:
    """Bytes that Python and numpy held at most."""
    act()  # imports and caches
    tracemalloc.start()
    act()
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found


def iterate(path: Path) -> None:
    for episode in open_dataset(path):
        assert episode.images["front"].shape == (20, 64, 64, 3)


@pytest.mark.parametrize("kind", ["robomimic", "lerobot"])
def test_iterating(tmp_path: Path, kind: str) -> None:
    write = dataset_memory.write_robomimic if kind == "robomimic" else dataset_memory.write_lerobot
    write(tmp_path / "small", 3)
    write(tmp_path / "large", 12)
    small, large = (peak(partial(iterate, tmp_path / name)) for name in ("small", "large"))
    assert small > 20 * 64 * 64 * 3
    assert large < 1.1 * small  # the study asks for 1.05 of what is far larger


@pytest.mark.parametrize("to", ["lerobot", "minari"])
def test_converting(tmp_path: Path, to: str) -> None:
    dataset_memory.write_robomimic(tmp_path / "small", 3)
    dataset_memory.write_robomimic(tmp_path / "large", 12)
    done: list[int] = []

    def convert(name: str) -> None:
        done.append(len(done))
        write_dataset(open_dataset(tmp_path / name), tmp_path / f"{name}{len(done)}", to)

    small, large = (peak(partial(convert, name)) for name in ("small", "large"))
    assert large < 1.1 * small
