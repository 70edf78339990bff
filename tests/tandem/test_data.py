"""`tandem data`: what is printed, where files go, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embodied.datasets.formats import open_dataset
from embodied.datasets.lerobot_layout import Feature, demonstration_features, outcome
from embodied.datasets.lerobot_writer import LeRobotWriter
from tandem import cli, data


@pytest.fixture
def demonstrations(tmp_path: Path) -> Path:
    """Three episodes of 4 frames; the second one fails."""
    folder = tmp_path / "demos"
    own = demonstration_features(cameras={"front": (8, 8)}, fps=10, proprio=2, action=2, state=None, expert=False)
    with LeRobotWriter(folder, fps=10, features=own, robot_type="arm") as writer:
        for number in range(3):
            with writer.episode(["lift it", "drop it"][number % 2]) as episode:
                for step in range(4):
                    done = step == 3
                    episode.add(
                        {
                            "observation.images.front": np.full((8, 8, 3), 10 * step, np.uint8),
                            "observation.state": [0.0, step],
                            "action": [-0.5, 0.25 * step],
                            **outcome(reward=0.5, terminated=done, truncated=False, success=done and number != 1),
                        }
                    )
                episode.save()
    return folder


def test_inspect(demonstrations: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "inspect", str(demonstrations)]) == 0
    out = capsys.readouterr().out
    assert "episodes   3 (12 frames, 0.0 min at 10 fps; 4 to 4 frames)" in out
    assert "success    2 of 3 (66.7%, 95% interval 20.8% to 93.9%)" in out
    assert "ends       3 terminated, 0 truncated" in out
    assert "returns    2 on average, 2 to 2" in out
    lines = [line.split() for line in out.splitlines()]
    assert ["observation.images.front", "image", "8x8x3", "0", "to", "0.118"] in lines
    assert ["action", "float32", "2", "-0.5", "to", "0.75"] in lines
    assert ["0", "-0.500", "-0.500", "-0.500", "0.000"] in lines
    assert ["lift", "it", "2"] in lines
    assert ["drop", "it", "1"] in lines


def test_inspect_counts_ends_as_they_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LeRobot's own data say `next.done` and `next.success`: what is done without success was cut."""
    features = {name: Feature("float32", (1,)) for name in ("observation.state", "action")}
    features |= {name: Feature("bool", (1,)) for name in ("next.done", "next.success")}
    folder = tmp_path / "plain"
    with LeRobotWriter(folder, fps=10, features=features) as writer:
        for number in range(3):
            with writer.episode("push") as episode:
                for step in range(4):
                    ends = {"next.done": step == 3, "next.success": step == 3 and number == 0}
                    episode.add({"observation.state": [0.0], "action": [0.0], **ends})
                episode.save()
    assert cli.main(["data", "inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "ends       1 terminated, 2 truncated" in out
    assert "0 of these say what was seen after the last action" in out
    read = [(one.terminated, one.truncated) for one in map(open_dataset(folder).read, range(3))]
    assert read == [(True, False), (False, True), (False, True)]


def test_inspect_shows_the_most_frequent_instructions(
    demonstrations: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "_MOST_TASKS", 1)
    cli.main(["data", "inspect", str(demonstrations)])
    out = capsys.readouterr().out
    assert "lift it" in out
    assert "drop it" not in out
    assert "and 1 more instructions" in out


def test_validate(demonstrations: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "validate", str(demonstrations)]) == 0
    assert capsys.readouterr().out == "3 episodes checked: no problems\n"
    info = demonstrations / "meta/info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"total_frames": 9, "total_tasks": 1}))
    assert cli.main(["data", "validate", str(demonstrations)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{info}: total_frames is 9, there are 12",
        f"{info}: total_tasks is 1, there are 2",
        "3 episodes checked: 2 problems",
    ]


def test_validate_stops_listing(
    demonstrations: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "_MOST_PROBLEMS", 1)
    info = demonstrations / "meta/info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"total_frames": 9, "total_tasks": 1}))
    assert cli.main(["data", "validate", str(demonstrations)]) == 1
    assert capsys.readouterr().out.splitlines()[1:] == ["and 1 more", "3 episodes checked: 2 problems"]


def test_view_writes_a_video(
    demonstrations: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import av

    monkeypatch.chdir(demonstrations.parent)
    assert cli.main(["data", "view", "demos", "--episode", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == ["'lift it', 4 frames", "demos_episode_002.mp4"]
    with av.open("demos_episode_002.mp4") as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 4
    assert [round(float(frame[:300].mean()), -1) for frame in frames] == [0, 10, 20, 30]


def test_view_writes_a_sheet(demonstrations: Path, tmp_path: Path) -> None:
    from PIL import Image

    out = tmp_path / "new" / "sheet.png"
    assert cli.main(["data", "view", str(demonstrations), "--sheet", "--out", str(out)]) == 0
    with Image.open(out) as picture:
        assert picture.size[0] == 4 * 160


RECORD = ["data", "record", "--expert", "--image-size", "16", "--workers", "0", "--tasks", "reach"]


def test_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "set"
    assert cli.main([*RECORD, "--episodes", "2", "--out", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "reach   2 of 2 (100.0%, 95% interval 34.2% to 100.0%)" in out
    assert "wrote 2 episodes (" in out
    assert cli.main(["data", "validate", str(folder)]) == 0
    assert cli.main([*RECORD, "--episodes", "2", "--out", str(folder)]) == 0
    assert "holds 2 episodes or more already; --episodes asks for more" in capsys.readouterr().out


def test_half_written_episodes_are_a_warning(demonstrations: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (demonstrations / "data/chunk-000/file-002.parquet").unlink()
    assert cli.main(["data", "inspect", str(demonstrations)]) == 0
    captured = capsys.readouterr()
    assert "episodes   2 (8 frames" in captured.out
    assert captured.err.startswith(f"warning: {demonstrations}: the last episode is left out: ")
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data", "inspct", "x"], "unknown verb 'data inspct'; did you mean data inspect?"),
        (["data", "inspect", "nowhere"], "nowhere: no such file or folder"),
        (["data", "view", "demos", "--episode", "3"], "demos: has no episode 3; there are 0 to 2"),
        (["data", "view", "demos", "--camera", "top"], "demos: episode 0: has no camera 'top'; it has front"),
        (
            ["data", "view", "demos", "--out", "x.gif"],
            "--out x.gif: a video ends in .mp4, a sheet",
        ),
        (["data", "record", "--out", "x"], "tandem data record: say who acts: --expert or --teleop"),
        ([*RECORD, "--out", "demos"], "demos: its robot_type is arm, that of the new episodes tandem-table"),
        ([*RECORD, "--out", "file"], "file: a file is in the way; name a new folder"),
        ([*RECORD, "--out", "file/x"], "file/x: a file is in the way; name a new folder"),
        ([*RECORD, "--out", "x", "--seed", "-1"], "tandem data record: --seed must not be negative, got -1"),
        ([*RECORD, "--out", "x", "--noise", "2"], "noise must be from 0 to 0.5, got 2.0"),
        ([*RECORD, "--out", "x", "--phrasing", "rude"], "there is no phrasing 'rude': choose from train, synonyms"),
    ],
)
def test_mistakes_are_one_line(
    demonstrations: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(demonstrations.parent)
    Path("file").touch()
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("words", [["data"], ["data", "--help"]])
def test_the_family_of_verbs_has_an_overview(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "usage: tandem data VERB ..." in out
    assert "  data validate PATH" in out
    assert "train CONFIG" not in out


def test_help_imports_nothing_heavy() -> None:
    heavy: tuple[Any, ...] = ("torch", "numpy", "pyarrow", "mujoco", "gymnasium", "PIL", "av", "rich")
    code = (
        "import sys\nfrom tandem.cli import main\nmain(['data', 'record', '--help'])\n"
        f"print('loaded', [name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip().splitlines()[-1] == "loaded []", done.stderr
