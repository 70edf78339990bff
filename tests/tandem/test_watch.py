"""`tandem watch`: one's own words, a scene that fits them, a video."""

from __future__ import annotations

from pathlib import Path

import av
import pytest
import torch

from embodied.policies.vla import VLAConfig, VLAPolicy, VLASpaces
from embodied.policies.words import Words
from envs.table.language import TRAINING_WORDS
from envs.table.observations import PROPRIO, STATE
from tandem import cli
from tandem.watch import slug


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose only checkpoint is the last one."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    torch.manual_seed(0)
    sizes = VLAConfig(chunk=16, channels=(4, 8), blocks=1, queries=2, words=8, hidden=(8,), critic_hidden=(8,))
    spaces = VLASpaces(image_size=16, cameras=("front",), proprio_size=PROPRIO, state_size=STATE, action_size=4)
    VLAPolicy(spaces, sizes, Words(TRAINING_WORDS)).save_pretrained(folder / "checkpoints" / "000000001" / "policy")
    (folder / "checkpoints" / "last").symlink_to("000000001")
    (folder / "config.yaml").write_text("recipe: embodied/vla_bc\n")
    return folder


def test_a_sentence_that_is_understood(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["watch", str(run), "--say", "Push the red cube to the white pad!", "--seed", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    video = run / "videos" / "watch-push-the-red-cube-to-the-white-pad-3.mp4"
    assert lines == [
        "told      Push the red cube to the white pad!",
        "meant     push red cube to white",
        "success   no, 64 control steps",
        f"video     {video}",
    ]
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, float(stream.average_rate or 0)) == (256, 256, 10.0)
        assert sum(1 for _ in container.decode(stream)) == 65 + 10  # and the last one held for a second


def test_any_other_sentence_gets_an_answer_too(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.mp4"
    policy = run / "checkpoints" / "last" / "policy"
    assert cli.main(["watch", str(policy), "--say", "dance with the red cube", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "note: the table does not understand the sentence: the scene is random and success is not judged",
        "note: the policy never met 'dance', 'with'",
        "told      dance with the red cube",
        "success   not judged",
        f"video     {out}",
    ]
    assert captured.err == ""
    assert out.stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--say", " ?! "], "--say: there is no word in it"),
        (["--seed", "-1"], "--seed must be within"),
        (["--sya", "x"], "did you mean --say?"),
    ],
)
def test_mistakes(run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["watch", str(run), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_run_without_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("recipe: embodied/vla_bc\n")
    assert cli.main(["watch", str(tmp_path)]) == 2
    assert "there is no checkpoint with a policy to watch" in capsys.readouterr().err


def test_names_of_videos() -> None:
    assert slug("Pick up the RED cube!") == "pick-up-the-red-cube"
    assert slug("拿起") == "said"
    assert len(slug("very " * 40)) <= 60
