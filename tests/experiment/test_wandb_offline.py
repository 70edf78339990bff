"""A real offline wandb run, read back from its transaction log."""

from __future__ import annotations

import json
import random
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from experiment.run import Run
from experiment.video import write_mp4

BLOCK, HEADER = 32768, 7


def read_records(path: Path) -> Iterator[Any]:
    """The protobuf records of a .wandb file: LevelDB's log format after seven bytes of file header.

    A block of 32 KiB holds chunks of (crc32, length, kind) + payload; kind 1 is a whole record, 2, 3 and 4 are its
    first, middle and last part. Fewer than seven bytes at the end of a block are padding.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, record = HEADER, b""
    while position + HEADER <= len(data):
        rest = BLOCK - position % BLOCK
        if rest < HEADER:
            position += rest
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        if position + HEADER + length > len(data):
            return  # still being written
        record += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (1, 4):
            message = Record()
            message.ParseFromString(record)
            record = b""
            yield message


def nested(items: Any) -> dict[str, Any]:
    """A history row as wandb.log was given it."""
    row: dict[str, Any] = {}
    for item in items:
        *sections, last = item.nested_key or [item.key]
        inner = row
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = json.loads(item.value_json)
    return row


def read_log(run_folder: Path) -> SimpleNamespace:
    """What one wandb run recorded; its service process may still be writing when `finish` has returned."""
    (path,) = run_folder.glob("*.wandb")
    kinds: list[str] = []
    deadline = time.monotonic() + 30
    while "exit" not in kinds and time.monotonic() < deadline:
        records = list(read_records(path))
        kinds = [record.WhichOneof("record_type") for record in records]
        time.sleep(0.02)
    rows = [nested(record.history.item) for record, kind in zip(records, kinds, strict=True) if kind == "history"]
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    metrics = [record.metric for record in records if record.WhichOneof("record_type") == "metric"]
    return SimpleNamespace(kinds=kinds, rows=rows, run=run, metrics=metrics, files=run_folder / "files")


def generators() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tobytes()  # type: ignore[index]


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[Path, Path]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1, 1))
    figure.add_subplot().plot([1, 2, 3])
    figure.savefig(tmp_path / "plot.png")
    frames = (np.full((32, 32, 3), 20 * i, np.uint8) for i in range(5))
    return tmp_path / "plot.png", write_mp4(frames, tmp_path / "episode.mp4", fps=5)


def test_scalars_table_image_and_video_then_a_resume(
    toy: SimpleNamespace, tmp_path: Path, pictures: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    plot, video = pictures
    config = toy.config(tmp_path / "r", wandb="auto", wandb_group="a group", wandb_project="a project")
    with Run.start(config, recipe="toy") as run:
        before = generators()
        run.log({"train/loss": 0.5, "env_steps": 80}, global_step=1)
        run.log_table("eval/samples", ["prompt", "reward"], [["hello", 1.5], ["ü", -2.0]], global_step=1)
        run.log_image("eval/plot", plot, global_step=1)
        run.log_video("eval/video", video, global_step=1)
        run.log({"eval/success": 0.75}, global_step=2)
        assert generators() == before, "wandb must not draw from the global generators"
        run.save({}, global_step=2)
    with Run.start(config, recipe="toy", resume=tmp_path / "r") as run:
        run.log({"train/loss": 0.25}, global_step=3)
    assert "warning" not in capsys.readouterr().err

    first, second = [read_log(path) for path in sorted((tmp_path / "r" / "wandb").glob("offline-run-*"))]
    assert (first.run.project, first.run.run_group, first.run.display_name) == ("a project", "a group", "r")
    stored = {update.key: json.loads(update.value_json) for update in first.run.config.update}
    assert stored["recipe"] == "toy"
    assert stored["run"]["wandb_group"] == "a group"

    by_name = {metric.name or metric.glob_name: metric for metric in first.metrics}
    assert set(by_name) == {"global_step", "env_steps", "episodes", "tokens", "samples", "*"}
    assert by_name["*"].step_metric == "global_step"

    scalars, table, image, movie, evaluation = first.rows
    assert (scalars["train/loss"], scalars["global_step"], scalars["env_steps"]) == (0.5, 1, 80)
    assert (evaluation["eval/success"], evaluation["global_step"], evaluation["env_steps"]) == (0.75, 2, 80)
    for row, name, kind, original in (
        (image, "eval/plot", "image-file", plot),
        (movie, "eval/video", "video-file", video),
    ):
        assert row[name]["_type"] == kind
        assert (first.files / row[name]["path"]).read_bytes() == original.read_bytes()
        assert (row["global_step"], row["env_steps"]) == (1, 80)
    assert table["eval/samples"]["_type"] == "table-file"
    content = json.loads((first.files / table["eval/samples"]["path"]).read_text())
    assert content["columns"] == ["prompt", "reward"]
    assert content["data"] == [["hello", 1.5], ["ü", -2.0]]
    assert first.kinds[-1] == "exit"

    assert second.run.run_id == first.run.run_id
    assert second.run.resume
    assert not first.run.resume
    assert [row["train/loss"] for row in second.rows] == [0.25]
