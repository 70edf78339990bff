"""The table's edges: what is drawn once and in between, words that are not understood, options that disagree."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envs.randomization import Randomizer
from envs.table.env import TIME_LIMIT, TableEnv
from tests.envs.table.scenes import BAR, REST, asked, teleport

ELAPSED = 38  # of the privileged state: share of the time limit
ONCE = [
    {"field": "mass", "operation": "scale", "range": (0.5, 2.0), "names": "object*", "when": "start"},
    {"field": "light_diffuse", "operation": "scale", "range": (0.5, 1.0)},
    {"field": "proprio_noise", "operation": "set", "range": (0.001, 0.01)},
]


def randomizer_of(env: TableEnv) -> Randomizer:
    assert env.randomizer is not None
    return env.randomizer


# ---------------------------------------------------------------- what is drawn when


def test_an_episode_is_that_of_its_seed_whether_or_not_what_is_drawn_once_was() -> None:
    fresh, used = (TableEnv(observe=("proprio", "state"), randomization=ONCE) for _ in range(2))
    used.reset(seed=99)
    seen, _ = fresh.reset(seed=5)
    used.reset(seed=5)
    mine, its = randomizer_of(fresh).draws, randomizer_of(used).draws
    assert not np.array_equal(mine[0], its[0])  # of the first episode that each played
    for drawn_each_episode in (1, 2):
        np.testing.assert_array_equal(mine[drawn_each_episode], its[drawn_each_episode])
    randomizer_of(used).forget_start()
    again, _ = used.reset(seed=5)
    for index, drawn in mine.items():
        np.testing.assert_array_equal(drawn, randomizer_of(used).draws[index])
    for name, value in seen.items():
        np.testing.assert_array_equal(value, again[name])


def test_light_and_masses_change_every_fifth_of_a_second() -> None:
    specs = [
        {"field": "light_diffuse", "operation": "scale", "range": (0.5, 0.9), "when": "interval", "period": 0.2},
        {
            "field": "mass",
            "operation": "scale",
            "range": (0.5, 2.0),
            "names": "object*",
            "when": "interval",
            "period": 0.2,
        },
    ]
    env, plain = TableEnv(observe=(), randomization=specs), TableEnv(observe=())
    bodies = [env.world.model.body(f"object{index}").id for index in range(4)]

    def shares() -> np.ndarray:
        """[5] of the nominal values: the light, the masses."""
        light = env.world.model.light_diffuse[0, 0] / plain.world.model.light_diffuse[0, 0]
        return np.array([light, *(env.world.model.body_mass[bodies] / plain.world.model.body_mass[bodies])])

    for seed in range(3):
        env.reset(seed=seed)
        plain.reset(seed=seed)  # the same scene, so the same nominal masses
        found = [shares()]
        for _ in range(5):
            env.step(REST)
            found.append(shares())
            drawn = np.concatenate([randomizer_of(env).draws[index].ravel() for index in (0, 1)])
            np.testing.assert_allclose(found[-1], drawn, rtol=1e-6)  # of the nominal values: draws never pile up
        assert [(after != before).all() for before, after in pairwise(found)] == [False, True, False, True, False]
        assert [(after == before).all() for before, after in pairwise(found)] == [True, False, True, False, True]
        low, high = np.array([0.5] * 5), np.array([0.9, 2.0, 2.0, 2.0, 2.0])
        assert all(((low <= share) & (share <= high)).all() for share in found)
    randomizer_of(env).restore()
    np.testing.assert_array_equal(shares(), np.ones(5))


# ---------------------------------------------------------------- words that are not understood


def test_what_is_not_understood_has_no_goal_and_cannot_be_lost() -> None:
    env = TableEnv(observe=())
    for options, judged in (({"instruction": "sing a song"}, False), ({"instruction": "reach the red cube"}, True)):
        _, info = env.reset(seed=0, options=options)
        named = ("reach", "reach red cube") if judged else (None, None)
        assert (info["task"], info["goal"]) == named
        assert info["instruction"] == options["instruction"]
        teleport(env.world, env.slots.thing, (0.30, 0.0, 0.03))  # out of reach
        assert env.step(REST)[2] is judged


def test_a_goal_beside_a_sentence_is_what_counts() -> None:
    env, goal = TableEnv(observe=()), asked("pick", thing=BAR)
    _, info = env.reset(seed=0, options={"goal": goal, "instruction": "sing a song"})
    assert (info["instruction"], info["goal"], env.judged) == ("sing a song", goal.key, True)


@pytest.mark.parametrize(
    "others, named",
    [
        ({"instruction": "reach the red cube"}, "instruction"),
        ({"goal": asked("pick", thing=BAR)}, "goal"),
        ({"goal": asked("pick", thing=BAR), "instruction": "sing a song"}, "goal"),
    ],
)
def test_a_task_beside_what_has_its_own_is_refused(others: dict[str, Any], named: str) -> None:
    env = TableEnv(observe=())
    with pytest.raises(ValueError, match=f"'task' draws a goal, so it cannot be given beside '{named}'"):
        env.reset(seed=0, options={"task": "reach", **others})
    env.reset(seed=0, options={"task": None, **others})  # none was given


def test_the_share_of_the_time_ends_at_one() -> None:
    env = TableEnv(observe=())
    env.reset(seed=0)
    shares = []
    for elapsed in (TIME_LIMIT // 2, TIME_LIMIT, TIME_LIMIT + 1, 300):  # by hand an episode may last longer
        env.elapsed = elapsed
        shares.append(float(env.observe(("state",))["state"][ELAPSED]))
    assert shares == [0.5, 1.0, 1.0, 1.0]


# ---------------------------------------------------------------- in a process of its own

_ALONE = """
import importlib
import gymnasium
import mujoco
assert not hasattr(mujoco, "Renderer"), "there is a graphics library after all"
env = gymnasium.make("envs.make:tandem/TableState-v0")
env.reset(seed=0)
env.step(env.action_space.sample())
from envs import capture, make
importlib.reload(make)
nominal = capture.nominal_fields(env)
print(capture.obstacle(env, nominal), env.spec.max_episode_steps, gymnasium.spec("tandem/Table-v0").entry_point)
"""


def test_a_table_that_draws_nothing_needs_no_graphics_library_and_gymnasium_finds_it() -> None:
    """As an installed package is used: nothing of Tandem is imported before; PyOpenGL finds no library."""
    from tests.tandem.test_failures import WITHOUT_LIBRARY

    kept = {name: value for name, value in os.environ.items() if name != "PYOPENGL_PLATFORM"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_LIBRARY + _ALONE],
        env={**kept, "MUJOCO_GL": "egl", "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["None", "64", "envs.table.env:TableEnv"], done.stderr
