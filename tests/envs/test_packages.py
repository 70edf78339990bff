"""Which package brings an environment."""

from __future__ import annotations

import pytest

from envs.packages import package_of


@pytest.mark.parametrize(
    "name, package",
    [
        ("ALE", "ale-py"),
        ("ALE/Pong-v5", "ale-py"),
        ("FrankaKitchen-v1", "gymnasium-robotics"),
        ("HandManipulateBlock-v1", "gymnasium-robotics"),
        ("AntMaze_UMaze-v5", "gymnasium-robotics"),
        ("BabyAI-GoToObj-v0", "minigrid"),
        ("MiniWorld-Hallway-v0", "miniworld"),
        ("Meta-World/MT1", "metaworld"),
        ("PandaReach-v3", "panda-gym"),
        ("dm_control/cartpole-balance-v0", "shimmy[dm-control]"),
        ("highway-fast-v0", "highway-env"),
        ("Ant-v5", None),
        ("Zzzz-v0", None),
    ],
)
def test_packages(name: str, package: str | None) -> None:
    assert package_of(name) == package
