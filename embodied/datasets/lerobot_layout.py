"""The LeRobot data set layout, version 3: where its files lie and what their columns are.

    meta/info.json                                  features, counts, path templates
    meta/stats.json                                 statistics of every feature over the whole set
    meta/tasks.parquet                              task_index -> instruction
    meta/episodes/chunk-CCC/file-FFF.parquet        a row an episode: length, where its rows lie, its statistics
    data/chunk-CCC/file-FFF.parquet                 a row a frame; images as PNG
    videos/KEY/chunk-CCC/file-FFF.mp4               frames of a camera whose feature is a video

As written by `lerobot` 0.4 to 0.6 (https://huggingface.co/docs/lerobot/lerobot-dataset-v3). A file may hold several
episodes. Row t holds what was seen before action t, and what action t earned (`next.*`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from embodied.datasets.recorded import PROPRIO, STATE
from experiment.errors import UserError

VERSION = "v3.0"
INFO, STATS, TASKS, EPISODES = "meta/info.json", "meta/stats.json", "meta/tasks.parquet", "meta/episodes"
CHUNK_FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
EPISODES_PATH = f"{EPISODES}/{CHUNK_FILE}.parquet"
DATA_PATH = f"data/{CHUNK_FILE}.parquet"
VIDEO_PATH = f"videos/{{video_key}}/{CHUNK_FILE}.mp4"
PLACES = ("chunk_index", "file_index", "episode_chunk", "episode_index", "video_key")
"""What the templates of paths ask for, in version 3 and in version 2."""
CHUNK_SIZE = 1000
"""Files in a folder."""
LARGEST_PNG = 128
"""Pixels of the longer side up to which `camera_feature` keeps frames as PNG; beyond, videos are smaller."""
UNFINISHED = ".part"
"""End of the name of a file that is being written."""

ACTION, EXPERT_ACTION = "action", "expert_action"
REWARD, DONE, SUCCESS, TRUNCATED = "next.reward", "next.done", "next.success", "next.truncated"
SUCCESS_IF_KNOWN = "next.success_if_known"
"""Tandem's, in place of `next.success` where not every episode says: 1 or 0 at every frame, -1: nobody knows."""
NEXT, AHEAD, OBSERVED = "next.", "next.observation.", "next.observed"
"""Tandem's: what was seen after each action, and whether it is known."""
CAMERA = "observation.images."
CHOICES, INFERRED = "choices", "choices_inferred"
"""In `Feature.info` of a discrete action: how many there are, and whether nobody said so but the actions."""

_NUMBERS = ("float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "bool")
_PICTURES = ("image", "video")


@dataclass(frozen=True)
class Feature:
    """One feature of `meta/info.json`.

    dtype: a numpy type, "string", "image" (PNG in the data files) or "video" (mp4).
    shape: of one frame's value; (height, width, 3) of a picture.
    names: what the dimensions are called, as LeRobot keeps them.
    info: what LeRobot says of a video's encoding; Tandem's `CHOICES` and `INFERRED` of a discrete action.
    """

    dtype: str
    shape: tuple[int, ...]
    names: Any = None
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def picture(self) -> bool:
        """Whether frames are colour pictures; depth maps are not."""
        return self.dtype in _PICTURES and not (
            self.info.get("is_depth_map") or self.info.get("video.is_depth_map")
        )

    @property
    def number(self) -> bool:
        """Whether frames are numbers."""
        return self.dtype in _NUMBERS

    @property
    def known(self) -> bool:
        """Whether the kind is one that is read: numbers, text or pictures."""
        return self.number or self.dtype == "string" or self.dtype in _PICTURES

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a picture, whichever way round LeRobot was told its shape."""
        rows, columns = self.shape[:2] if self.shape[-1] == 3 else self.shape[1:]
        return rows, columns

    def as_json(self) -> dict[str, Any]:
        """The feature's entry in `meta/info.json`."""
        told: dict[str, Any] = {"dtype": self.dtype, "shape": list(self.shape), "names": self.names}
        return told | ({"info": dict(self.info)} if self.info else {})

    @classmethod
    def from_json(cls, name: str, told: Any, source: object) -> Feature:
        """The feature of an entry of `meta/info.json`. Raises UserError if it is none."""
        try:
            shape = tuple(int(size) for size in told["shape"])
            info = told.get("info") or told.get("video_info") or {}
            return cls(str(told["dtype"]), shape, told.get("names"), info)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise UserError(f"{source}: feature {name} needs dtype and shape, got {told!r}") from error

    def arrow_type(self) -> pa.DataType:
        """The type of its column in the data files."""
        if self.dtype == "image":
            return pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        kind = pa.string() if self.dtype == "string" else pa.from_numpy_dtype(np.dtype(self.dtype))
        return kind if self.shape == (1,) else pa.list_(pa.field("element", kind), self.shape[0])

    def hugging_face_type(self) -> dict[str, Any]:
        """What the `datasets` library says of the column, so that it shows images as images."""
        if self.dtype == "image":
            return {"_type": "Image"}
        value = {"dtype": self.dtype, "_type": "Value"}
        return value if self.shape == (1,) else {"feature": value, "length": self.shape[0], "_type": "List"}


INDEX_FEATURES: dict[str, Feature] = {
    "timestamp": Feature("float32", (1,)),
    "frame_index": Feature("int64", (1,)),
    "episode_index": Feature("int64", (1,)),
    "index": Feature("int64", (1,)),
    "task_index": Feature("int64", (1,)),
}
"""Columns that every data set has; a writer fills them in."""


def camera_feature(height: int, width: int, fps: int) -> Feature:
    """A camera's feature: PNG up to `LARGEST_PNG` pixels (exact, quick to read at random), mp4 beyond (small)."""
    names = ["height", "width", "channels"]
    if max(height, width) <= LARGEST_PNG:
        return Feature("image", (height, width, 3), names)
    info = {
        "video.height": height,
        "video.width": width,
        "video.codec": "h264",
        "video.pix_fmt": "yuv420p",
        "video.fps": fps,
        "video.channels": 3,
        "has_audio": False,
        "is_depth_map": False,
    }
    return Feature("video", (height, width, 3), names, info)


def demonstration_features(
    *, cameras: Mapping[str, tuple[int, int]], fps: int, proprio: int, action: int, state: int | None, expert: bool
) -> dict[str, Feature]:
    """What Tandem records of a robot.

    cameras: name -> (height, width).
    proprio, action, state: sizes of the vectors; state None: nothing privileged is recorded.
    expert: whether a teacher labels every frame, beside the action that was executed.
    """
    features = {CAMERA + name: camera_feature(*size, fps) for name, size in cameras.items()}
    features[PROPRIO] = Feature("float32", (proprio,))
    if state is not None:
        features[STATE] = Feature("float32", (state,))
    features[ACTION] = Feature("float32", (action,))
    if expert:
        features[EXPERT_ACTION] = Feature("float32", (action,))
    features[REWARD] = Feature("float32", (1,))
    return features | {name: Feature("bool", (1,)) for name in (DONE, SUCCESS, TRUNCATED)}


def outcome(*, reward: float, terminated: bool, truncated: bool, success: bool) -> dict[str, Any]:
    """The `next.*` columns of one frame.

    `next.done` is LeRobot's: the episode ended here, either way. `next.truncated` says that it was cut off rather
    than ended; where an environment says both at once, it ended.
    """
    return {
        REWARD: reward,
        DONE: terminated or truncated,
        SUCCESS: success,
        TRUNCATED: truncated and not terminated,
    }


def data_schema(features: Mapping[str, Feature]) -> pa.Schema:
    """The schema of the data files: every feature that is not a video."""
    kept = {name: feature for name, feature in features.items() if feature.dtype != "video"}
    told = {"info": {"features": {name: feature.hugging_face_type() for name, feature in kept.items()}}}
    columns = [pa.field(name, feature.arrow_type()) for name, feature in kept.items()]
    return pa.schema(columns, metadata={"huggingface": json.dumps(told)})


def place(number: int, chunk_size: int = CHUNK_SIZE) -> dict[str, int]:
    """Chunk and file index of the `number`-th file."""
    return {"chunk_index": number // chunk_size, "file_index": number % chunk_size}


def file_number(chunk_index: int, file_index: int, chunk_size: int = CHUNK_SIZE) -> int:
    """The inverse of `place`."""
    return chunk_index * chunk_size + file_index


@dataclass(frozen=True)
class Info:
    """`meta/info.json`. `others` holds the keys that only LeRobot reads, so that writing it keeps them."""

    fps: int
    features: dict[str, Feature]
    episodes: int = 0
    frames: int = 0
    tasks: int = 0
    robot_type: str | None = None
    chunk_size: int = CHUNK_SIZE
    data_path: str = DATA_PATH
    video_path: str | None = None
    others: Mapping[str, Any] = field(default_factory=dict)

    def as_text(self) -> str:
        """The text of the file."""
        told = {
            "codebase_version": VERSION,
            "robot_type": self.robot_type,
            "total_episodes": self.episodes,
            "total_frames": self.frames,
            "total_tasks": self.tasks,
            "chunks_size": self.chunk_size,
            "fps": self.fps,
            "splits": {"train": f"0:{self.episodes}"},
            "data_path": self.data_path,
            "video_path": self.video_path,
            "features": {name: feature.as_json() for name, feature in self.features.items()},
        }
        sizes = {"data_files_size_in_mb": 100, "video_files_size_in_mb": 200}
        return json.dumps({**sizes, **self.others, **told}, indent=4, ensure_ascii=False)


def read_info(folder: Path) -> Info:
    """Read `meta/info.json`.

    Raises:
        UserError: no such folder, not a data set, another version of the layout, or a damaged file.
    """
    version, told = read_told(folder)
    if version.lstrip("v").split(".")[0] != "3":
        old = version.lstrip("v").startswith("2")
        hint = "`tandem data convert OLD NEW --to lerobot` makes one" if old else "it needs another Tandem"
        raise UserError(f"{folder / INFO}: codebase_version is {version}, v3.x is needed here: {hint}")
    return info_of(told, folder / INFO)


def read_told(folder: Path) -> tuple[str, dict[str, Any]]:
    """The version of the layout, such as "v3.0", and all that `meta/info.json` says. Raises as `read_info`."""
    path = folder / INFO
    if not path.is_file():
        if not folder.is_dir():
            raise UserError(f"{folder}: {'is a file, not a folder' if folder.exists() else 'no such folder'}")
        raise UserError(f"{folder}: not a LeRobot data set (it has no {INFO})")
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return str(told["codebase_version"]), told
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a LeRobot {INFO}, or damaged ({error})") from error


def info_of(told: Mapping[str, Any], path: Path) -> Info:
    """What `meta/info.json` (at `path`) says. Raises UserError where it lacks or garbles something."""
    try:
        features = {name: Feature.from_json(name, one, path) for name, one in told["features"].items()}
        if not isinstance(told.get("fps"), int | float):
            raise ValueError(f"'fps', which is {told.get('fps')!r}")
        info = Info(
            fps=told["fps"],
            features=features,
            episodes=int(told["total_episodes"]),
            frames=int(told["total_frames"]),
            tasks=int(told["total_tasks"]),
            robot_type=told.get("robot_type"),
            chunk_size=int(told.get("chunks_size", CHUNK_SIZE)),
            data_path=str(told.get("data_path") or DATA_PATH),
            video_path=told.get("video_path"),
            others=told,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: lacks or garbles {error}; fetch the data set again") from error
    if not info.fps > 0:
        raise UserError(f"{path}: fps is {info.fps}, it must be positive")
    for name, template in (("data_path", info.data_path), ("video_path", info.video_path or "")):
        try:
            str(template).format(**dict.fromkeys(PLACES, 0))
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            known = ", ".join(f"{{{place}}}" for place in PLACES)
            raise UserError(f"{path}: {name} is {template!r}; only {known} can be filled in") from error
    return info
