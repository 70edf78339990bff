"""Opening a door with the 24-joint Adroit hand, with the reward that was published with its demonstrations.

Rajeswaran et al. 2018, "Learning complex dexterous manipulation with deep reinforcement learning and
demonstrations" (arXiv 1709.10087); reward: `door_v0.py` of the authors' mj_envs. The scene, the actions and
the observations are those of gymnasium-robotics. Its AdroitHandDoor-v1 (up to 1.4.2) gives
+0.1 * ||palm - handle||, which pays the hand for staying *away* from the handle; the published term is
negative, and so are the rewards recorded with the demonstrations.
"""

import contextlib
import io
from typing import Any, Literal

import numpy as np

with contextlib.redirect_stderr(io.StringIO()):  # its import prints advice about its own versions
    from gymnasium_robotics.envs.adroit_hand.adroit_door import AdroitHandDoorEnv

# where the observation [39] holds what the reward reads
_DOOR_ANGLE = 28
_PALM_TO_HANDLE = slice(35, 38)


def dapg_reward(palm_to_handle: np.ndarray, door_angle: float, velocities: np.ndarray) -> float:
    """The published dense reward of one step.

    palm_to_handle: [3] metres; door_angle: radians, 0 is closed; velocities: [30] joint velocities.
    """
    reward = -0.1 * np.sqrt(palm_to_handle @ palm_to_handle)
    reward -= 0.1 * (door_angle - 1.57) ** 2
    reward -= 1e-5 * (velocities @ velocities)
    if door_angle > 0.2:
        reward += 2.0
    if door_angle > 1.0:
        reward += 8.0
    if door_angle > 1.35:
        reward += 10.0
    return float(reward)


class AdroitDoor(AdroitHandDoorEnv):
    """`tandem/AdroitDoor-v0`: observations [39], actions [28] in [-1, 1], info["success"]: angle >= 1.35 rad.

    An episode never terminates; the time limit is 200 steps unless `max_episode_steps` says otherwise.
    reward: 'dapg' is the published one; 'stock' is whatever the installed gymnasium-robotics computes.
    """

    def __init__(self, reward: Literal["dapg", "stock"] = "dapg", **arguments: Any) -> None:
        if reward not in ("dapg", "stock"):
            raise ValueError(f"reward must be 'dapg' or 'stock', got {reward!r}")
        super().__init__(**arguments)
        self.reward = reward

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One control step of 10 ms."""
        observation, reward, terminated, truncated, info = super().step(action)
        if self.reward == "dapg":
            reward = dapg_reward(observation[_PALM_TO_HANDLE], observation[_DOOR_ANGLE], self.data.qvel)
        return observation, float(reward), terminated, truncated, {"success": bool(info["success"])}
