"""Make any Gymnasium environment by its id, or say in one line why that cannot be done.

Importing this module makes Tandem's own ids known, so `gymnasium.make("envs.make:tandem/Table-v0")` works as well.
"""

import contextlib
import difflib
import importlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium import spaces

from envs.packages import package_of

# id -> (entry point, stock time limit)
OUR_ENVIRONMENTS: Mapping[str, tuple[str, int]] = {
    "tandem/AdroitDoor-v0": ("envs.adroit_door:AdroitDoor", 200),
    "tandem/Table-v0": ("envs.table.env:TableEnv", 64),
    "tandem/TableState-v0": ("envs.table.env:TableStateEnv", 64),
}
for _id, (_entry_point, _limit) in OUR_ENVIRONMENTS.items():
    if _id not in gymnasium.registry:
        gymnasium.register(_id, entry_point=_entry_point, max_episode_steps=_limit)


@dataclass(frozen=True)
class EnvironmentSpec:
    """What a policy must know of an environment.

    observation_dim: D of the flat observation [D].
    action_dim: A of a continuous action [A]; the number of choices of a discrete one.
    discrete: actions are the integers 0 .. action_dim - 1.
    action_low, action_high: [A] float32 bounds (possibly infinite); None when discrete.
    max_episode_steps: the time limit, None when the environment has none that Gymnasium knows of.
    """

    env_id: str
    observation_dim: int
    action_dim: int
    discrete: bool
    action_low: np.ndarray | None
    action_high: np.ndarray | None
    max_episode_steps: int | None


def make_environment(
    env_id: str,
    *,
    max_episode_steps: int | None = None,
    render: bool = False,
    options: Mapping[str, Any] | None = None,
) -> gymnasium.Env[Any, Any]:
    """Make the environment `env_id`; 'package:Env-v0' imports `package` first.

    max_episode_steps replaces the environment's own time limit; options are keyword arguments of its
    constructor. With render=True, `env.render()` gives [H, W, 3] uint8 frames; otherwise it cannot render.

    Raises ValueError, with a one-line message, when the id is unknown (naming the nearest one), when a
    package is missing (naming it), when the options do not fit or the constructor fails, when the action
    space is neither a one-dimensional Box nor Discrete, or the observation space not a one-dimensional Box.
    """
    if max_episode_steps is not None and max_episode_steps < 1:
        raise ValueError(f"max_episode_steps must be at least 1, got {max_episode_steps}")
    _register(env_id)
    arguments = dict(options or {})
    if render:
        arguments["render_mode"] = "rgb_array"
    try:
        with _quiet():
            env = gymnasium.make(env_id, max_episode_steps=max_episode_steps, disable_env_checker=True, **arguments)
    except gymnasium.error.UnregisteredEnv:
        raise ValueError(_unknown_id_message(env_id)) from None
    except TypeError as error:
        raise ValueError(f"environment {env_id!r} does not accept its options: {_one_line(error)}") from error
    except Exception as error:  # whatever a package's own constructor raises
        raise ValueError(f"environment {env_id!r} cannot be made: {_one_line(error)}") from error
    try:
        describe(env)
        if render and "rgb_array" not in env.metadata.get("render_modes", ()):
            raise ValueError(f"environment {env_id!r} cannot render images (no 'rgb_array' mode)")
    except ValueError:
        env.close()
        raise
    return env


def describe(env: gymnasium.Env[Any, Any]) -> EnvironmentSpec:
    """The EnvironmentSpec of a made environment. Raises ValueError for spaces that are not supported."""
    env_id = env.spec.id if env.spec is not None else type(env.unwrapped).__name__
    observation_space, action_space = env.observation_space, env.action_space
    if not isinstance(observation_space, spaces.Box) or len(observation_space.shape) != 1:
        raise ValueError(
            f"environment {env_id!r} has observations {observation_space}: only a flat Box [D] is supported; "
            "wrap it with gymnasium.wrappers.FlattenObservation where you register it"
        )
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    if isinstance(action_space, spaces.Discrete):
        action_dim = int(action_space.n)
    elif isinstance(action_space, spaces.Box) and len(action_space.shape) == 1:
        action_dim = action_space.shape[0]
        low, high = action_space.low.astype(np.float32), action_space.high.astype(np.float32)
    else:
        raise ValueError(
            f"environment {env_id!r} has actions {action_space}: only a flat Box [A] or Discrete is supported"
        )
    return EnvironmentSpec(
        env_id=env_id,
        observation_dim=observation_space.shape[0],
        action_dim=action_dim,
        discrete=isinstance(action_space, spaces.Discrete),
        action_low=low,
        action_high=high,
        max_episode_steps=env.spec.max_episode_steps if env.spec is not None else None,
    )


def _register(env_id: str) -> None:
    """Make the id known to Gymnasium: import its package, or gymnasium-robotics where it is not known yet."""
    package, colon, name = env_id.rpartition(":")
    if not name or package.count(":"):
        raise ValueError(f"environment id {env_id!r} is malformed; expected 'Name-v0' or 'package:Name-v0'")
    if colon:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ValueError(_unimportable(env_id, package, error)) from error
    elif name not in gymnasium.registry and importlib.util.find_spec("gymnasium_robotics") is not None:
        with _quiet():
            importlib.import_module("gymnasium_robotics")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep away advice that concerns the authors of a package, a model or an environment, not its user.

    Gymnasium warns of newer versions, gymnasium-robotics prints on import, and MuJoCo's compiler writes
    deprecations to the terminal and to a file in the working directory; those go to the log instead.
    """
    previous = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(logging.getLogger(__name__).info)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        mujoco.set_mju_user_warning(previous)


def _unknown_id_message(env_id: str) -> str:
    name = env_id.rpartition(":")[2]
    message = f"there is no environment {env_id!r}"
    nearest = difflib.get_close_matches(name, sorted(gymnasium.registry), n=1, cutoff=0.7)
    if nearest:
        return f"{message}; did you mean {nearest[0]!r}?"
    package = package_of(name)
    if package is not None:
        return f"{message}; install it with `pip install '{package}'`"
    return (
        f"{message}; if a package brings it, install that package and write 'package:{name}', so that it is "
        "imported first"
    )


def _unimportable(env_id: str, package: str, error: ImportError) -> str:
    """What is missing: the package itself, or something that it imports."""
    message = f"environment {env_id!r} needs the package {package!r}, which cannot be imported ({_one_line(error)})"
    if not isinstance(error, ModuleNotFoundError):  # it is there, and lacks a name
        return message
    missing = (error.name or package).partition(".")[0]
    needed = "it" if missing == package.partition(".")[0] else f"{missing!r}, which it imports,"
    return f"{message}; install {needed} with `pip install {missing}`"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
