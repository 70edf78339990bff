"""Checkpoints are whole or absent; links and retention."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from experiment import checkpoint as checkpoint_module
from experiment.checkpoint import Checkpoints, find_checkpoint, load_checkpoint, write_atomically
from experiment.errors import UserError
from experiment.seeding import rng_state


def save(store: Checkpoints, step: int, *, best: int | None = None, value: float = 0.0, **writers: Any) -> Path:
    meta = {"metrics_offset": 0, "best": None if best is None else {"step": best, "metric": 1.0}}
    return store.save(step, {"value": value}, rng_state(), meta, writers)


def names(store: Checkpoints) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def test_layout(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert store.newest() is None
    folder = save(store, 10, best=10, value=2.5, policy=lambda f: (f / "w.txt").write_text("w"))
    assert folder == tmp_path / "checkpoints" / "000000010"
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoint.json", "policy", "rng", "state.json", "state.safetensors",
    ]  # fmt: skip
    assert (folder / "policy" / "w.txt").read_text() == "w"
    assert os.readlink(store.folder / "last") == "000000010"
    assert os.readlink(store.folder / "best") == "000000010"
    loaded = load_checkpoint(store.folder / "last")
    assert (loaded.step, loaded.state, loaded.folder) == (10, {"value": 2.5}, folder)
    assert loaded.rng["torch"].equal(torch.get_rng_state())


def test_retention_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=2)
    for step in range(1, 7):
        save(store, step, best=min(step, 2))
    assert names(store) == ["000000002", "000000005", "000000006", "best", "last"]
    assert os.readlink(tmp_path / "best") == "000000002"
    assert store.newest() == tmp_path / "000000006"
    save(store, 7, best=7)
    assert names(store) == ["000000006", "000000007", "best", "last"]
    assert os.readlink(tmp_path / "best") == "000000007"


def test_nothing_is_deleted_under_the_name_of_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deleted: list[str] = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: deleted.append(path.name) if path.exists() else None)
    store = Checkpoints(tmp_path, keep=1)
    for step in (1, 2, 2):
        save(store, step)
    assert len(deleted) == 2
    assert all(name.startswith((".tmp-", ".old-")) for name in deleted)


def test_links_survive_moving_the_run(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path / "a" / "checkpoints", keep=1)
    save(store, 3, best=3, value=1.5)
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert load_checkpoint(tmp_path / "b" / "checkpoints" / "best").state == {"value": 1.5}


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=1)
    save(store, 3, value=1.0)
    save(store, 3, value=2.0)
    assert load_checkpoint(tmp_path / "last").state == {"value": 2.0}
    assert names(store) == ["000000003", "last"]


def test_recover_after_a_kill_while_replacing(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=1)
    save(store, 3, value=1.0)
    (tmp_path / "000000003").rename(tmp_path / ".old-000000003")
    (tmp_path / ".tmp-000000003-17").mkdir()
    (tmp_path / ".tmp-000000003-17" / "state.json").write_text("half")
    (tmp_path / ".tmp-last-17").symlink_to("000000003")
    store.recover()
    assert names(store) == ["000000003", "last"]
    assert load_checkpoint(tmp_path / "last").state == {"value": 1.0}

    shutil.copytree(tmp_path / "000000003", tmp_path / ".old-000000003")
    store.recover()
    assert names(store) == ["000000003", "last"]


def test_a_failing_writer_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "part").write_text("x")
        raise RuntimeError("boom")

    store = Checkpoints(tmp_path, keep=1)
    save(store, 1)
    with pytest.raises(RuntimeError, match="boom"):
        save(store, 2, policy=fail)
    assert names(store) == ["000000001", "last"]
    with pytest.raises(ValueError, match="may not be called rng"):
        save(store, 2, rng=fail)


@pytest.mark.parametrize("where", ["save_state", "_flush", "sync", "writer"])
def test_disk_full_anywhere_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = Checkpoints(tmp_path, keep=1)
    save(store, 1, value=1.0)
    writers: dict[str, Any] = {"policy": full} if where == "writer" else {}
    with monkeypatch.context() as patch:
        if where != "writer":
            patch.setattr(checkpoint_module, where, full)
        with pytest.raises(UserError) as caught:
            save(store, 2, **writers)
    assert str(caught.value) == (
        f"{tmp_path}/000000002: cannot write (no space left on device); make room or fix the permissions"
    )
    assert not list(tmp_path.glob(".tmp*"))
    assert store.newest() is not None
    save(store, 3, value=3.0)
    assert load_checkpoint(tmp_path / "last").state == {"value": 3.0}
    assert names(store) == ["000000003", "last"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one mebibyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_really_full_disk(small_disk: Path, same: Callable[..., None]) -> None:
    store = Checkpoints(small_disk / "checkpoints", keep=5)
    state = {"weights": torch.arange(100_000, dtype=torch.float32)}  # 400 kB: the third does not fit
    for step in (1, 2):
        store.save(step, state, rng_state(), {}, {})
    with pytest.raises(UserError, match="000000003: cannot write \\(no space left on device\\)"):
        store.save(3, state, rng_state(), {}, {})
    assert names(store) == ["000000001", "000000002", "last"]
    same(load_checkpoint(small_disk / "checkpoints" / "last").state, state)

    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    with pytest.raises(UserError, match=r"notes\.txt: cannot write"):
        write_atomically(small_disk / "notes.txt", "x" * 5000)
    assert sorted(p.name for p in small_disk.iterdir()) == ["checkpoints", "filler"]


def test_write_atomically_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomically(path, "one")
    write_atomically(path, "two ü")
    assert path.read_text(encoding="utf-8") == "two ü"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_auto_is_the_best_checkpoint_or_else_the_last(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no checkpoint to evaluate$"):
        find_checkpoint(tmp_path, "auto")
    (tmp_path / "checkpoints" / "last").mkdir(parents=True)
    assert find_checkpoint(tmp_path, "auto").name == "last"
    with pytest.raises(UserError, match=r"there is no checkpoint 'best' to evaluate; .*checkpoint=last"):
        find_checkpoint(tmp_path, "best")
    (tmp_path / "checkpoints" / "best").mkdir()
    assert [find_checkpoint(tmp_path, which).name for which in ("auto", "best", "last")] == ["best", "best", "last"]


def test_damage_and_absence_are_user_errors(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=1)
    folder = save(store, 1)
    with pytest.raises(UserError, match="not a complete checkpoint"):
        load_checkpoint(tmp_path / "000000002")
    (folder / "state.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"damaged checkpoint.*delete it to use an earlier one"):
        load_checkpoint(folder)
    (folder / "checkpoint.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(UserError, match="damaged checkpoint"):
        load_checkpoint(folder)
