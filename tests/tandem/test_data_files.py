"""`tandem data` on formats without LeRobot's `meta/`: inspect, validate, view, convert, split, merge."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from tandem import cli


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A D4RL file of four episodes of 5 steps, the last one stopped; the working folder is its own."""
    monkeypatch.chdir(tmp_path)
    steps = np.arange(20)
    with h5py.File(tmp_path / "flat.hdf5", "w") as file:
        file["observations"] = np.stack([steps, steps % 5], axis=1).astype(np.float32)
        file["actions"] = np.sin(steps)[:, None].astype(np.float32)
        file["rewards"] = np.ones(20, np.float32)
        file["terminals"] = (steps % 5 == 4) & (steps != 19)
        file["timeouts"] = steps == 19
    return Path("flat.hdf5")


def tandem(*words: str) -> int:
    return cli.main(["data", *words])


def test_inspect(flat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tandem("inspect", "flat.hdf5") == 0
    out = capsys.readouterr().out
    assert "data set   flat.hdf5 (d4rl)" in out
    assert "episodes   4 (20 steps; 5 to 5 steps)" in out
    assert "ends       3 terminated, 1 truncated" in out
    assert "0 of these say what was seen after the last action" in out
    assert "returns    5 on average, 5 to 5" in out
    assert "success    not recorded" in out
    lines = [line.split() for line in out.splitlines()]
    assert ["observation.state", "float32", "2", "0", "to", "19"] in lines
    assert "instruction" not in out


def test_convert_says_what_is_lost(flat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tandem("convert", "flat.hdf5", "there", "--to", "lerobot") == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "there: 4 episodes (20 steps) as lerobot",
        "1 truncated episodes do not say what was seen after their last action: that step cannot be bootstrapped",
    ]
    assert captured.err == "flat.hdf5: does not say its steps a second; 20 are assumed (--fps)\n"
    assert tandem("validate", "there") == 0
    assert tandem("inspect", "there") == 0
    assert "episodes   4 (20 frames, 0.0 min at 20 fps" in capsys.readouterr().out


def test_split_and_merge(flat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from embodied.datasets.formats import detect, read_dataset

    words = ("split", "flat.hdf5", "--out", "a", "b", "--fractions", "0.75", "0.25", "--to", "d3rlpy")
    assert tandem(*words) == 0
    assert tandem("merge", "a", "b", "--out", "all") == 0
    assert capsys.readouterr().out.splitlines()[-2] == "all: 4 episodes (20 steps) as d3rlpy"
    assert [detect(name) for name in ("a", "b", "all")] == ["d3rlpy"] * 3
    assert [len(read_dataset(name)) for name in ("a", "b")] == [3, 1]
    began = sorted(episode.observations[0, 0] for episode in read_dataset("all"))
    assert began == [0.0, 5.0, 10.0, 15.0]
    assert tandem(*words) == 2
    assert "a: exists already" in capsys.readouterr().err


def test_an_interrupted_split_goes_on(
    flat: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from embodied.datasets.formats import read_dataset
    from embodied.datasets.staging import StagedEpisodes, staging_folder

    words = ("split", "flat.hdf5", "--out", "a", "b", "--fractions", "0.5", "0.5", "--to", "d3rlpy")
    append, begun = StagedEpisodes.append, [0]

    def interrupted(self: StagedEpisodes, write: Callable[[h5py.File], None]) -> None:
        begun[0] += 1
        if begun[0] == 4:
            raise KeyboardInterrupt
        append(self, write)

    with monkeypatch.context() as patched:
        patched.setattr(StagedEpisodes, "append", interrupted)
        assert tandem(*words) == 130
    assert Path("a").exists()
    assert staging_folder(Path("b")).is_dir()
    capsys.readouterr()
    assert tandem(*words) == 0
    assert capsys.readouterr().out.splitlines() == [
        "a: is there already, with these 2 episodes",
        "b: 2 episodes (10 steps) as d3rlpy",
        "1 truncated episodes do not say what was seen after their last action: that step cannot be bootstrapped",
    ]
    began = {float(one.observations[0, 0]) for name in ("a", "b") for one in read_dataset(name)}
    assert began == {0.0, 5.0, 10.0, 15.0}


def test_a_split_takes_no_other_data_set_for_its_own(flat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tandem("convert", "flat.hdf5", "a", "--to", "d3rlpy") == 0
    words = ("split", "flat.hdf5", "--out", "a", "b", "--fractions", "0.5", "0.5", "--to", "d3rlpy")
    assert tandem(*words) == 2
    assert "a: exists already" in capsys.readouterr().err
    assert not Path("b").exists()


def test_view_draws_curves(flat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    assert tandem("view", "flat.hdf5", "--episode", "3") == 0
    assert capsys.readouterr().out.splitlines() == ["5 steps", "flat_episode_003.png"]
    with Image.open("flat_episode_003.png") as shown:
        colours = {colour for _, colour in shown.convert("RGB").getcolors(1 << 20) or []}
    assert (31, 119, 180) in colours  # matplotlib's first colour: a curve was drawn


def test_validate_tells_of_an_interrupted_conversion(flat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from embodied.datasets.formats import open_dataset
    from embodied.datasets.writing import write_dataset

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(open_dataset("flat.hdf5"), "there", "minari", on_episode=stop)
    assert tandem("validate", "there") == 1
    out = capsys.readouterr().out
    assert out.startswith("there: was not finished: there.unfinished holds what is there of its 4 episodes")
    assert tandem("convert", "flat.hdf5", "there", "--to", "minari") == 0
    assert tandem("validate", "there") == 0


def test_the_folder_one_is_in_is_a_data_set(
    flat: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ "." has no name beside which a writing could lie unfinished."""
    assert tandem("convert", "flat.hdf5", "there", "--to", "minari") == 0
    monkeypatch.chdir("there")
    capsys.readouterr()
    assert tandem("validate", ".") == 0
    assert "no problems" in capsys.readouterr().out


def test_validate_says_what_is_wrong(flat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with h5py.File(flat, "a") as file:
        file["rewards"][7] = np.nan
    assert tandem("validate", "flat.hdf5") == 1
    assert capsys.readouterr().out.splitlines() == [
        "flat.hdf5: episode 1: rewards row 2 is not finite: nan",
        "4 episodes checked: 1 problem",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["convert", "flat.hdf5", "x"], "tandem data convert: say --to which format: lerobot, minari, d3rlpy"),
        (["convert", "flat.hdf5", "x", "--to", "zarr"], "argument --to: invalid choice: 'zarr'"),
        (["convert", "flat.hdf5", "x", "--ot", "minari"], "tandem data convert: unknown argument '--ot'; did you"),
        (["convert", "nowhere", "x", "--to", "minari"], "nowhere: no such file or folder, and no local Minari"),
        (["convert", "flat.hdf5", "x", "--to", "lerobot", "--fps", "0"], "--fps 0: must be at least 1"),
        (["convert", "flat.hdf5", "x", "--to", "minari", "--subset", "a"], "flat.hdf5: has no subsets"),
        (
            ["split", "flat.hdf5", "--out", "a", "--fractions", "0.5", "0.5"],
            "tandem data split: 1 names after --out",
        ),
        (["split", "flat.hdf5", "--out", "a", "a", "--fractions", ".5", ".5"], "tandem data split: the parts need"),
        (["split", "flat.hdf5", "--out", "a", "b", "--fractions", "0.9", "0.1"], "4 episodes cannot be split"),
        (["merge", "flat.hdf5", "--out", "a.h5"], "a.h5: lerobot is a folder; say --to d3rlpy for such a file, or"),
        (
            ["split", "flat.hdf5", "--out", "a", "b.hdf5", "--fractions", "0.75", "0.25", "--to", "minari"],
            "b.hdf5: minari is a folder; say --to d3rlpy",
        ),
        (["view", "flat.hdf5", "--episode", "4"], "flat.hdf5: has no episode 4; there are 0 to 3"),
        (["view", "flat.hdf5", "--out", "x.mp4"], "--out x.mp4: flat.hdf5: episode 0 has no pictures; its curves"),
        (["view", "flat.hdf5", "--camera", "top"], "flat.hdf5: episode 0: has no pictures to show"),
        (["inspect", "."], ".: this folder is no data set that Tandem reads (LeRobot v2.1 and v3, Minari"),
    ],
)
def test_mistakes_are_one_line(
    flat: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(Path().iterdir())
    assert tandem(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert len(error.splitlines()) == 1
    assert sorted(Path().iterdir()) == before
