"""Memory that going through image data sets takes: the same for 0.5, 1 and 2 GB.

    python -m studies.dataset_memory

Episodes of 100 frames of 128 x 128 pixels are written to a temporary folder, as robomimic's uncompressed arrays or
as LeRobot's PNG (without compression, so that the files are as large as the pictures), and read one by one or
converted, in a process of its own each, whose peak of resident memory is kept. The data are deleted.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

from embodied.datasets.formats import open_dataset
from embodied.datasets.lerobot_episode import EpisodeEncoder
from embodied.datasets.lerobot_layout import demonstration_features, outcome
from embodied.datasets.lerobot_writer import LeRobotWriter
from embodied.datasets.writing import write_dataset
from studies.cells import Figures, main

CELLS = ["iterate_robomimic", "iterate_lerobot", "convert_robomimic_to_lerobot"]
GIGABYTES = (0.5, 1.0, 2.0)
FRAMES, SIZE, FPS = 100, 128, 10
EPISODE_BYTES = FRAMES * SIZE * SIZE * 3


def write_robomimic(path: Path, episodes: int) -> None:
    """A file whose pictures are not compressed, as robomimic writes them; a conversion compresses them well."""
    pictures = np.zeros((FRAMES, SIZE, SIZE, 3), np.uint8)
    pictures[:, : SIZE // 8] = np.random.default_rng(0).integers(0, 256, (FRAMES, SIZE // 8, SIZE, 3), np.uint8)
    with h5py.File(path, "w") as file:
        for number in range(episodes):
            demo = file.create_group(f"data/demo_{number}")
            demo["actions"], demo["rewards"] = np.zeros((FRAMES, 4)), np.zeros(FRAMES)
            demo["obs/front"], demo["obs/state"] = pictures, np.zeros((FRAMES, 8))


def write_lerobot(folder: Path, episodes: int) -> None:
    """A folder of PNG pictures; one episode is encoded, and appended again and again."""
    rng = np.random.default_rng(0)
    features = demonstration_features(
        cameras={"front": (SIZE, SIZE)}, fps=FPS, proprio=8, action=4, state=None, expert=False
    )
    encoder = EpisodeEncoder(features, FPS)
    for step in range(FRAMES):
        encoder.add(
            {
                "observation.images.front": np.zeros((SIZE, SIZE, 3), np.uint8),
                "observation.state": np.zeros(8),
                "action": np.zeros(4),
                **outcome(reward=0.0, terminated=step == FRAMES - 1, truncated=False, success=False),
            }
        )
    episode = encoder.finish("wait")
    episode = dataclasses.replace(episode, pictures={name: [stored_png(rng)] * FRAMES for name in episode.pictures})
    with LeRobotWriter(folder, fps=FPS, features=features) as writer:
        for _ in range(episodes):
            writer.append(episode)


def stored_png(rng: np.random.Generator) -> bytes:
    """A PNG file of noise that is as large as its pixels."""
    content = io.BytesIO()
    picture = Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8))
    picture.save(content, format="PNG", compress_level=0)
    return content.getvalue()


def peak_of(what: str, source: str, target: str) -> None:
    """In a process of its own: go through the data, print episodes and the peak of resident memory in bytes."""
    dataset = open_dataset(source)
    if what == "iterate":
        assert sum(len(episode.images["front"]) for episode in dataset) == sum(dataset.lengths)
    else:
        write_dataset(dataset, target, "lerobot")
    # not getrusage: its peak may be that of the process that began this one
    status = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    print(json.dumps({"episodes": len(dataset), "peak": 1024 * kilobytes}))


def measure(cell: str, gigabytes: float) -> Figures:
    """One size: write, go through, delete."""
    what, _, kind = cell.partition("_")
    folder = Path(tempfile.mkdtemp(prefix="dataset_memory_"))
    try:
        source = folder / "source"
        write = write_lerobot if kind == "lerobot" else write_robomimic
        write(source, round(gigabytes * 1e9 / EPISODE_BYTES))
        size = sum(path.stat().st_size for path in [source, *source.rglob("*")] if path.is_file())
        call = f"peak_of({what!r}, {str(source)!r}, {str(folder / 'target')!r})"
        code = f"from studies.dataset_memory import peak_of; {call}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return {"gigabytes": size / 1e9, **json.loads(done.stdout)}
    finally:
        shutil.rmtree(folder)


def run(cell: str, options: argparse.Namespace) -> Figures:
    """All sizes, and by how much the largest takes more memory than the smallest."""
    sizes = [measure(cell, gigabytes) for gigabytes in GIGABYTES]
    peaks = [size["peak"] for size in sizes]
    return {"sizes": sizes, "growth": max(peaks) / min(peaks) - 1}


def table(results: Mapping[str, Figures]) -> str:
    """A row a cell."""
    heads = " | ".join(f"{gigabytes} GB, peak MB" for gigabytes in GIGABYTES)
    lines = [f"| what | {heads} | growth |", "|---|" + "---|" * (len(GIGABYTES) + 1)]
    for cell, figures in results.items():
        peaks = " | ".join(f"{size['peak'] / 1e6:.0f}" for size in figures["sizes"])
        lines.append(f"| {cell.replace('_', ' ')} | {peaks} | {figures['growth']:.1%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main("dataset_memory", cells=CELLS, run=run, table=table)
