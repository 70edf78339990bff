"""What reaches the robot of the table: pictures and proprioception, late and noisy where randomization says so."""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from envs.randomization import Randomizer
from envs.table import camera
from envs.table.observations import proprio
from envs.table.world import TableWorld


class Senses:
    """Looks at a world. Late pictures are drawn only when they are asked for, from the poses of back then.

    Poses alone are late: colours, textures, the strength of the light and the field of view are those of now. They
    differ from those of back then only where a randomization draws them anew within an episode (`when: interval`).
    """

    def __init__(self, world: TableWorld, randomizer: Randomizer | None) -> None:
        self.world, self.randomizer = world, randomizer
        self._late: dict[str, Any] | None = None

    def begin(self) -> None:
        """At the start of an episode, after the randomizer's draws."""
        self._late = None
        if self.randomizer is not None and self.randomizer.observation_latency:
            self._late = self.randomizer.observations.reset(self._snapshot())

    def tick(self) -> None:
        """After each control step."""
        if self.randomizer is not None and self.randomizer.observation_latency:
            self._late = self.randomizer.observations.push(self._snapshot())

    def _snapshot(self) -> dict[str, Any]:
        seen = {name: getattr(self.world.data, name).copy() for name in _DRAWN}
        return {"proprio": proprio(self.world), **seen}

    def proprio(self) -> NDArray[np.float32]:
        """[17], see `observations.proprio`."""
        felt: NDArray[np.float32] = proprio(self.world) if self._late is None else self._late["proprio"]
        return felt if self.randomizer is None else self.randomizer.noisy(felt)

    def picture(self, name: str, size: int) -> camera.Image:
        """[size, size, 3] uint8 as the robot's camera `name` gives it."""
        seen = self.clear_picture(name, size, self._late)
        return seen if self.randomizer is None else self.randomizer.image(seen)

    def clear_picture(self, name: str, size: int, late: dict[str, Any] | None = None) -> camera.Image:
        """The scene as it is now, or with the poses of back then in `late`; nothing is done to the picture's
        contrast, brightness and noise."""
        model, data = self.world.model, self.world.data
        if late is None:
            return camera.picture(model, data, name, size, size)
        present = {entry: getattr(data, entry).copy() for entry in _DRAWN}
        try:
            _write(data, late)
            return camera.picture(model, data, name, size, size)
        finally:
            _write(data, present)


_DRAWN = ("geom_xpos", "geom_xmat", "cam_xpos", "cam_xmat", "light_xpos", "light_xdir")
"""All of the data that a picture depends on. Not qpos: after a step, these are still those of its last substep."""


def _write(data: mujoco.MjData, poses: dict[str, Any]) -> None:
    for name in _DRAWN:
        getattr(data, name)[:] = poses[name]
