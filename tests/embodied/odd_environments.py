"""Environments that misbehave, or whose every number is known; by id as `tests.embodied.odd_environments:NAME`."""

from __future__ import annotations

import os
import threading
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Odd(gymnasium.Env[np.ndarray, np.ndarray]):
    """Observes [t, the reset's seed modulo 1000], rewards t; from its `at`-th step on, `fault` happens."""

    def __init__(
        self,
        fault: str = "none",
        at: int = 10**9,
        terminate_at: int = 10**9,
        render_mode: str | None = None,
    ) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.render_mode = render_mode
        self.fault, self.at, self.terminate_at = fault, at, terminate_at
        self.port = threading.Lock() if fault == "unreadable" else None  # no state that could be read
        self.steps_ever, self.time, self.tag = 0, 0, 0.0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.time, self.tag = 0, float((seed or 0) % 1000)
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.time += 1
        self.steps_ever += 1
        reward, observation = float(self.time), self._observation()
        if self.steps_ever >= self.at:
            if self.fault == "raise":
                raise OSError("the gripper's cable came off")
            if self.fault == "die":
                os._exit(7)
            if self.fault == "nan reward":
                reward = float("nan")
            if self.fault == "nan observation":
                observation[0] = np.nan
        return observation, reward, self.time >= self.terminate_at, False, {}

    def _observation(self) -> np.ndarray:
        return np.array([self.time, self.tag], np.float32)


class Broken(Odd):
    """Cannot be made in a worker process, only where it was asked for."""

    def __init__(self, pid: int) -> None:
        if os.getpid() != pid:
            raise OSError("no such serial port")
        super().__init__()


class Target(gymnasium.Env[np.ndarray, np.ndarray]):
    """One decision an episode, which earns 1 - (action - 0.5)^2; the observation says nothing."""

    observation_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return self.np_random.uniform(-1.0, 1.0, 1).astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return np.zeros(1, np.float32), 1.0 - float(action[0] - 0.5) ** 2, True, False, {}


gymnasium.register("Target-v0", entry_point=f"{__name__}:Target")
gymnasium.register("Odd-v0", entry_point=f"{__name__}:Odd", max_episode_steps=5)
gymnasium.register("Broken-v0", entry_point=f"{__name__}:Broken", max_episode_steps=5)
