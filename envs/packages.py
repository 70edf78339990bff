"""Which package brings an environment that is not installed. Nothing is imported."""

from __future__ import annotations

from collections.abc import Mapping

# first letters of an environment's name or namespace -> what to install for it
_PACKAGES: Mapping[str, str] = {
    "Adroit": "gymnasium-robotics",
    "AntMaze": "gymnasium-robotics",
    "Fetch": "gymnasium-robotics",
    "Franka": "gymnasium-robotics",
    "Hand": "gymnasium-robotics",
    "PointMaze": "gymnasium-robotics",
    "ALE": "ale-py",
    "BabyAI": "minigrid",
    "MiniGrid": "minigrid",
    "MiniWorld": "miniworld",
    "Meta-World": "metaworld",
    "Panda": "panda-gym",
    "dm_control": "shimmy[dm-control]",
    "highway": "highway-env",
    "panda-gym": "panda-gym",
}


def package_of(name: str) -> str | None:
    """What to install for an environment or a namespace of that name; None where it is not known."""
    return next((package for start, package in _PACKAGES.items() if name.startswith(start)), None)
