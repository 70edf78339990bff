"""Sets of randomizations for the table: for training, and one that stands for a robot's reality.

The camera and the light of "reality", its friction, gains, delays and colours lie outside the ranges of "full" or
where "full" ends; it is for evaluation only. Colours change so little that each keeps its name.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from envs.randomization import Randomization, parse_specs

_OBJECTS = ("object*",)
_PADS = ("pad*",)
_FINGERS = ("left_finger*", "right_finger*")
_JOINTS = ("joint*",)
_SURFACES = ("table", "object*")  # of two geoms that touch the greater friction counts, so they change together

MILD: tuple[Randomization, ...] = (
    Randomization("mass", "scale", (0.8, 1.25), "log_uniform", names=_OBJECTS),
    Randomization("friction", "scale", (0.85, 1.15), names=_SURFACES, together=True),
    Randomization("kp", "scale", (0.95, 1.05), names=_JOINTS),
    Randomization("proprio_noise", "set", (0.0, 0.002)),
    Randomization("camera_position", "add", (-0.01, 0.01), names=("front",)),
    Randomization("camera_rotation", "add", (-1, 1), names=("front",)),
    Randomization("light_diffuse", "scale", (0.8, 1.2)),
    Randomization("brightness", "scale", (0.92, 1.05), names=(*_OBJECTS, *_PADS)),
    Randomization("texture", "add", (-0.06, 0.06), names=("table",)),
    Randomization("image_brightness", "add", (-0.03, 0.03)),
    Randomization("image_noise", "set", (0.0, 0.01)),
)

FULL: tuple[Randomization, ...] = (
    Randomization("mass", "scale", (0.5, 2.0), "log_uniform", names=_OBJECTS),
    Randomization("mass", "scale", (0.9, 1.1), names=("link*", "hand")),
    Randomization("friction", "scale", (0.6, 1.5), "log_uniform", names=_SURFACES, together=True),
    Randomization("friction", "scale", (0.7, 1.2), names=_FINGERS, together=True),
    Randomization("damping", "scale", (0.5, 2.0), "log_uniform", names=_JOINTS),
    Randomization("armature", "scale", (0.8, 1.2), names=_JOINTS),
    Randomization("kp", "scale", (0.85, 1.15), names=_JOINTS),
    Randomization("kv", "scale", (0.85, 1.15), names=_JOINTS),
    Randomization("kp", "scale", (0.8, 1.2), names=("left_finger", "right_finger"), together=True),
    Randomization("proprio_noise", "set", (0.0, 0.005)),
    Randomization("observation_latency", "set", (0, 1)),
    Randomization("action_latency", "set", (0, 1)),
    Randomization("camera_position", "add", (-0.025, 0.025), names=("front",)),
    Randomization("camera_rotation", "add", (-2.5, 2.5), names=("front",)),
    Randomization("camera_position", "add", (-0.005, 0.005), names=("wrist",)),
    Randomization("camera_rotation", "add", (-2, 2), names=("wrist",)),
    Randomization("camera_fov", "scale", (0.96, 1.04)),
    Randomization("light_direction", "add", (0, 20)),
    Randomization("light_diffuse", "scale", (0.6, 1.3)),
    Randomization("hue", "add", (-6, 6), names=(*_OBJECTS, *_PADS)),
    Randomization("saturation", "scale", (0.85, 1.0), names=(*_OBJECTS, *_PADS)),
    Randomization("brightness", "scale", (0.85, 1.1), names=(*_OBJECTS, *_PADS)),
    Randomization("texture", "add", (-0.2, 0.2), names=("table",)),
    Randomization("image_brightness", "add", (-0.06, 0.06)),
    Randomization("image_contrast", "scale", (0.85, 1.15)),
    Randomization("image_noise", "set", (0.0, 0.02)),
)

REALITY: tuple[Randomization, ...] = (
    Randomization("mass", "scale", (2.0, 2.3), names=_OBJECTS),
    Randomization("mass", "scale", (1.1, 1.15), names=("link*", "hand"), together=True),
    Randomization("friction", "scale", (1.5, 1.8), names=_SURFACES, together=True),
    Randomization("friction", "scale", (0.62, 0.7), names=_FINGERS, together=True),
    Randomization("damping", "scale", (2.0, 2.5), names=_JOINTS, together=True),
    Randomization("kp", "scale", (0.78, 0.85), names=_JOINTS, together=True),
    Randomization("kv", "scale", (1.15, 1.25), names=_JOINTS, together=True),
    Randomization("proprio_noise", "set", (0.005, 0.008)),
    Randomization("action_latency", "set", (1, 2)),
    Randomization("camera_position", "add", (0.025, 0.035), names=("front",)),
    Randomization("camera_rotation", "add", (2.5, 3.5), names=("front",)),
    Randomization("camera_position", "add", (0.005, 0.008), names=("wrist",)),
    Randomization("camera_fov", "scale", (1.04, 1.06), names=("front",)),
    Randomization("light_direction", "add", (20, 30)),
    Randomization("light_diffuse", "scale", (0.45, 0.6)),
    Randomization("hue", "add", (6, 8), names=(*_OBJECTS, *_PADS)),
    Randomization("saturation", "scale", (0.8, 0.85), names=(*_OBJECTS, *_PADS)),
    Randomization("brightness", "scale", (0.8, 0.85), names=(*_OBJECTS, *_PADS)),
    Randomization("texture", "add", (0.2, 0.28), names=("table",)),
    Randomization("image_brightness", "add", (-0.09, -0.06)),
    Randomization("image_contrast", "scale", (1.15, 1.2)),
    Randomization("image_noise", "set", (0.02, 0.03)),
)

PRESETS: dict[str, tuple[Randomization, ...]] = {"none": (), "mild": MILD, "full": FULL, "reality": REALITY}


def specs_of(
    randomization: str | Sequence[Mapping[str, Any] | Randomization] | None,
) -> tuple[Randomization, ...]:
    """A preset's name, a file.yaml that lists them, specs or their mappings, or None, as specs.

    Raises ValueError where there is no such preset (naming the nearest) or file, and for a file that lists none.
    """
    if randomization is None:
        return ()
    if not isinstance(randomization, str):
        return parse_specs(randomization)
    if is_file(randomization):
        return _read(Path(randomization))
    if randomization not in PRESETS:
        nearest = difflib.get_close_matches(randomization, PRESETS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"there is no randomization {randomization!r}: choose from {', '.join(PRESETS)}; "
            f"did you mean {nearest!r}?"
        )
    return PRESETS[randomization]


def is_file(randomization: str) -> bool:
    """Whether it names a file and no preset."""
    return randomization.endswith((".yaml", ".yml"))


def _read(path: Path) -> tuple[Randomization, ...]:
    """The randomizations that a YAML file lists."""
    try:
        return parse_specs(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        raise ValueError(f"randomization {path}: {' '.join(str(error).split())}") from error
