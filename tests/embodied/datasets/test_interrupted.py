"""An interrupted writing goes on with the same data only: not where they were changed or are played otherwise."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from embodied.datasets.episode import Episode
from embodied.datasets.formats import open_dataset, read_dataset
from embodied.datasets.robomimic import DoneMeaning
from embodied.datasets.selecting import Joined, Selection
from embodied.datasets.source import Source
from embodied.datasets.staging import staging_folder
from embodied.datasets.writing import WRITTEN, write_dataset
from embodied.logged.played import PlayedSource
from experiment.errors import UserError

Make = Callable[..., Path]
OTHER = "holds what another command began; repeat that one, or delete the folder"


def begin(source: Source, target: Path, to: str) -> None:
    """Write one episode and stop."""

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(source, target, to, on_episode=stop)
    assert staging_folder(target).is_dir()


def played(value: float, success: bool | None = None) -> list[Episode]:
    """Three episodes of as many steps, whatever the value."""
    rows = np.full((4, 2), value, np.float32)
    return [Episode(rows, rows, rows[:, 0], terminated=False, truncated=True, success=success)] * 3


@pytest.mark.parametrize("to", WRITTEN)
def test_what_plays_otherwise_does_not_go_on(tmp_path: Path, to: str) -> None:
    begin(PlayedSource(played(1.0), tmp_path / "run", {}), tmp_path / "there", to)
    for other in (played(2.0), played(1.0, success=True)):
        with pytest.raises(UserError, match=OTHER):
            write_dataset(PlayedSource(other, tmp_path / "run", {}), tmp_path / "there", to)
    write_dataset(PlayedSource(played(1.0), tmp_path / "run", {}), tmp_path / "there", to)
    assert [one.rewards[0] for one in read_dataset(tmp_path / "there")] == [1.0] * 3


@pytest.mark.parametrize("kind", ["robomimic", "libero", "d4rl", "d3rlpy", "minari", "lerobot"])
@pytest.mark.parametrize("how", ["alone", "selected", "joined"])
def test_what_was_changed_meanwhile_does_not_go_on(make: Make, tmp_path: Path, kind: str, how: str) -> None:
    path = make(kind)

    def source() -> Source:
        opened = open_dataset(path)
        return opened if how == "alone" else Selection(opened, [0, 1]) if how == "selected" else Joined([opened])

    begin(source(), tmp_path / "there", "lerobot")
    data = path if path.is_file() else next(path.glob("data/**/*.*5" if kind == "minari" else "data/**/*.parquet"))
    before = data.stat()
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000_000))
    with pytest.raises(UserError, match=OTHER):
        write_dataset(source(), tmp_path / "there", "lerobot")
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert write_dataset(source(), tmp_path / "there", "lerobot").episodes == (2 if how == "selected" else 3)


def test_another_subset_or_reading_of_the_ends_does_not_go_on(make: Make, tmp_path: Path) -> None:
    path = make("robomimic")
    with h5py.File(path, "a") as file:
        file["mask/same"] = file["mask/train"][()]
    begin(open_dataset(path, subset="train"), tmp_path / "there", "minari")
    readings: list[tuple[str, DoneMeaning]] = [("same", "truncated"), ("train", "terminated")]
    for subset, done_means in readings:
        with pytest.raises(UserError, match=OTHER):
            write_dataset(open_dataset(path, subset=subset, done_means=done_means), tmp_path / "there", "minari")
    write_dataset(open_dataset(path, subset="train"), tmp_path / "there", "minari")


def test_a_target_inside_the_source_goes_on(make: Make) -> None:
    for kind in ("minari", "lerobot"):
        path = make(kind)
        begin(open_dataset(path), path / "copy", "minari")
        assert write_dataset(open_dataset(path), path / "copy", "minari").episodes == 3


def test_minari_named_by_its_id_goes_on_from_another_folder(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("minari")
    begin(open_dataset("minari-v0"), tmp_path / "there", "d3rlpy")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert write_dataset(open_dataset("minari-v0"), tmp_path / "there", "d3rlpy").episodes == 3
