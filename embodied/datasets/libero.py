"""Reader of LIBERO's demonstrations: robomimic's layout with pictures, one task a file.

    data.attrs["problem_info"]       JSON; `language_instruction` is what the robot is told
    data/demo_I/obs/                 agentview_rgb, eye_in_hand_rgb [T, 128, 128, 3]; ee_states, gripper_states,
                                     joint_states, ... [T, d]
    data/demo_I/                     actions [T, 7]; rewards, dones [T]; robot_states [T, 9]; states [T, S]

https://libero-project.github.io/main.html. Demonstrations end with success: reward and `dones` are 1 at the last
step, after which LIBERO's environment has ended. Where `dones` ends with 0 the episode was cut off. What was seen
after the last action is not recorded. `states` is the simulator's state, `observation.environment_state` here. The
pictures are as they were recorded: upside down, as OpenGL draws them.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import h5py

from embodied.datasets.hdf5 import array, opened
from embodied.datasets.recorded import RecordedEpisode
from embodied.datasets.robomimic import RobomimicSource
from experiment.errors import UserError


class LiberoSource(RobomimicSource):
    """A file. UserError when it is missing, damaged, or lacks what makes it LIBERO's."""

    kind = "libero"

    def __init__(self, path: str | Path, subset: str | None = None) -> None:
        super().__init__(path, subset)
        with opened(self.path) as file:
            told = file["data"].attrs.get("problem_info", "{}")
        try:
            words = json.loads(told).get("language_instruction", "")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{self.path}: problem_info of data is damaged ({error})") from error
        # some files spell it as a list of its pieces, and some put quotation marks around it
        self.instruction = "".join(words).strip().strip('"')

    def _recorded(self, demo: h5py.Group, where: str, images: bool) -> RecordedEpisode:
        episode = super()._recorded(demo, where, images)
        dones = array(demo, "dones", where, columns=False)
        if episode.rewards is None:
            raise UserError(f"{where}: has no rewards")
        others = dict(episode.others)
        rows = {name: array(demo, name, where, columns=True) for name in ("states", "robot_states") if name in demo}
        for name, values in {"dones": dones, **rows}.items():
            if len(values) != len(episode):
                raise UserError(f"{where}: {len(episode)} actions but {len(values)} rows of {name}")
        if "robot_states" in rows:
            others["observation.robot_states"] = rows["robot_states"]
        return dataclasses.replace(
            episode,
            others=others,
            state=rows.get("states"),
            terminated=bool(dones[-1]),
            truncated=not dones[-1],
            success=bool((episode.rewards > 0).any()),
            instruction=self.instruction,
        )
