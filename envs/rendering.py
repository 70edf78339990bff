"""Pictures of an episode, for videos, on machines with and without a screen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np

from envs.graphics import cannot_draw, choose_backend
from envs.make import describe, make_environment
from envs.stepper import episode_seed


@dataclass(frozen=True)
class RenderedEpisode:
    """frames: [H, W, 3] uint8 each, the first before the first action; fps: frames per second of simulated time.

    success_once: None where the environment reports no success.
    """

    frames: list[np.ndarray]
    fps: float
    episode_return: float
    length: int
    success_once: bool | None


def render_episode_frames(
    env_id: str,
    act: Callable[[np.ndarray], np.ndarray],
    *,
    seed: int,
    max_episode_steps: int | None = None,
    options: Mapping[str, Any] | None = None,
    every: int = 1,
) -> RenderedEpisode:
    """Play one episode and draw every `every`-th step, and the last one.

    act: observation [D] float32 -> action [A] (clipped to the bounds), or an integer counted from 0.
    seed: the episode is number 0 of a `Stepper` with this seed.
    Raises ValueError as `make_environment` does, for `every` below 1, and when nothing can be drawn here, saying
    what to install. Renderer and environment are closed in any case.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    choose_backend()
    env = make_environment(env_id, max_episode_steps=max_episode_steps, render=True, options=options)
    try:
        return _play(env, act, seed, every)
    finally:
        env.close()


def draw(env: gymnasium.Env[Any, Any]) -> np.ndarray:
    """One frame [H, W, 3] uint8. Raises ValueError when the machine cannot draw, saying what to install."""
    try:
        frame: Any = env.render()
    except gymnasium.error.DependencyNotInstalled as error:
        raise ValueError(f"cannot draw {_name(env)}: {' '.join(str(error).split())}") from error
    except Exception as error:  # each graphics library fails in its own way, often with AttributeError
        raise ValueError(cannot_draw(error, _name(env))) from error
    if not isinstance(frame, np.ndarray) or frame.ndim != 3 or frame.shape[2] != 3:
        raise ValueError(f"{_name(env)} draws {type(frame).__name__} {np.shape(frame)}, not [H, W, 3]")
    return frame


def _play(
    env: gymnasium.Env[Any, Any], act: Callable[[np.ndarray], np.ndarray], seed: int, every: int
) -> RenderedEpisode:
    spec = describe(env)
    observation, _ = env.reset(seed=episode_seed(seed, 0))
    frames, total, length = [draw(env)], 0.0, 0
    success_once: bool | None = None
    ended = False
    while not ended:
        action: Any = act(np.asarray(observation, np.float32))
        if isinstance(env.action_space, gymnasium.spaces.Discrete):
            action = int(env.action_space.start) + int(action)
        else:
            action = np.clip(np.asarray(action, np.float32), spec.action_low, spec.action_high)
        observation, reward, terminated, truncated, info = env.step(action)
        total += float(reward)
        length += 1
        ended = bool(terminated or truncated)
        success = info.get("success", info.get("is_success"))
        if success is not None:
            success_once = bool(success) or bool(success_once)
        if ended or length % every == 0:
            frames.append(draw(env))
    fps = float(env.metadata.get("render_fps") or 30) / every
    return RenderedEpisode(frames, fps, total, length, success_once)


def _name(env: gymnasium.Env[Any, Any]) -> str:
    return env.spec.id if env.spec is not None else type(env.unwrapped).__name__
