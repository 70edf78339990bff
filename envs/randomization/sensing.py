"""What lies between the simulation and the policy: delays, noise on vectors, noise on pictures."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

UNTOUCHED: dict[str, float] = {
    "proprio_noise": 0.0,
    "observation_latency": 0.0,
    "action_latency": 0.0,
    "image_brightness": 0.0,
    "image_contrast": 1.0,
    "image_noise": 0.0,
}
"""Field -> the value with which nothing happens."""

_FULL_SCALE = 255.0
_MID_GREY = 127.5


class Delay:
    """A line in which everything waits for `steps` pushes.

    Observations: `reset` with the first one, then push each new one; what comes out is that of `steps` control
    steps ago, and the first one for as long as there is none. Actions: `reset` with the neutral one; until the
    first chosen one comes out, the neutral one does. Values are copied in, so a buffer that is written over
    later stays stale in here. Values may be arrays, numbers, strings, and dicts or lists of these.
    """

    def __init__(self, steps: int = 0) -> None:
        self.steps = steps
        self.waiting: list[Any] | None = None

    def reset(self, first: Any) -> Any:
        """Start an episode; returns `first`."""
        self.waiting = [copy.deepcopy(first) for _ in range(self.steps)]
        return first

    def push(self, value: Any) -> Any:
        """Put a value in, take the one out whose turn it is. Raises ValueError before the first `reset`."""
        if self.waiting is None or len(self.waiting) != self.steps:
            raise ValueError("a delay needs reset(first) at the start of each episode")
        self.waiting.append(copy.deepcopy(value))
        return self.waiting.pop(0)


def noisy_vector(vector: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """The vector plus independent gaussian noise, of the vector's dtype."""
    if deviation == 0:
        return vector
    return (vector + deviation * rng.standard_normal(vector.shape)).astype(vector.dtype)


def changed_picture(picture: np.ndarray, sensing: dict[str, float], rng: np.random.Generator) -> np.ndarray:
    """A picture [H, W, C] uint8 with contrast, then brightness, then noise; rounded and cut off at 0 and 255.

    Raises ValueError for another dtype.
    """
    if picture.dtype != np.uint8:
        raise ValueError(f"a picture is uint8, got {picture.dtype}")
    contrast, noise = sensing["image_contrast"], sensing["image_noise"]
    brightness = _FULL_SCALE * sensing["image_brightness"]
    if contrast == 1 and noise == 0 and brightness == 0:
        return picture
    values = (picture - np.float32(_MID_GREY)) * np.float32(contrast) + np.float32(_MID_GREY + brightness)
    if noise:
        values += np.float32(_FULL_SCALE * noise) * rng.standard_normal(picture.shape, dtype=np.float32)
    return np.clip(np.rint(values), 0, _FULL_SCALE).astype(np.uint8)
