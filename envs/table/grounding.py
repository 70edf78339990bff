"""Looks at random scenes, with the words for everything in them: what to learn from where words point to.

No demonstration is needed, so there can be as many scenes as a policy needs to learn to find things, instead of
learning the scenes of few demonstrations by heart. A look is a picture of a scene with the arm somewhere, and for
each object a sentence about it with the positions that it asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from envs.table import scene
from envs.table.camera import Image
from envs.table.env import TableEnv
from envs.table.expert import Expert
from envs.table.language import TASKS, Goal, Thing, instruct
from envs.table.layout import goals
from envs.table.observations import state
from envs.table.tasks import locate
from envs.table.world import HIGHEST, LOWEST, STEP_LENGTH, Array, TableWorld

LOCATED = 6
"""Numbers of the state that say where the named object and its destination are; they come first."""
IN_HAND = 0.12
"""Share of the looks with an object in the hand."""
REACHING = 0.25
"""Share of the looks with the hand on its way to an object."""
_SEEDS = 9_999_991
"""Scenes have smaller seeds than those that evaluation plays."""
_LONGEST_GRASP = 30
"""Control steps."""


@dataclass(frozen=True)
class Look:
    """images: entry of an observation ("image", "wrist_image") -> [H, W, 3]; proprio [17]; for each of the four
    objects a sentence, and positions [4, LOCATED], the first numbers of the privileged state for its goal."""

    images: dict[str, Image]
    proprio: NDArray[np.float32]
    sentences: tuple[str, ...]
    positions: NDArray[np.float32]


def look(
    env: TableEnv,
    rng: np.random.Generator,
    *,
    images: Sequence[str] = ("image",),
    combinations: Literal["train", "all"] = "train",
) -> Look:
    """Draw a scene and look at it; all draws come from `rng`. The environment needs a reset before other uses."""
    happening = rng.random()
    while True:
        env.reset(seed=int(rng.integers(_SEEDS)))
        if happening < IN_HAND:
            fine = take(env, rng)
        elif happening < IN_HAND + REACHING:
            fine = reach(env, rng)
        else:
            fine = wander(env, rng)
        if fine and not lost(env.world):
            break
    asked = [draw_goal_of(thing, env.world, rng, combinations) for thing in env.world.things]
    seen = env.observe((*images, "proprio"))
    return Look(
        images={name: seen[name] for name in images},
        proprio=seen["proprio"],
        sentences=tuple(instruct(goal, rng, phrasing="train") for goal in asked),
        positions=np.stack([positions(goal, env.world) for goal in asked]),
    )


def lost(world: TableWorld) -> bool:
    """Whether an object was knocked off the table, where no position is worth knowing."""
    return any(map(world.out_of_reach, range(scene.OBJECTS)))


def wander(env: TableEnv, rng: np.random.Generator) -> bool:
    """Move the tool towards a random place, the gripper open or closed. Always succeeds."""
    steer(env, rng.uniform(LOWEST, HIGHEST), grip=rng.choice((-1.0, 1.0)), steps=int(rng.integers(2, 12)))
    return True


def reach(env: TableEnv, rng: np.random.Generator) -> bool:
    """Be on the way to a random object. Always succeeds."""
    expert, _ = _picking(env, rng)
    for _ in range(int(rng.integers(2, 12))):
        action = expert.act()
        if action[3] > 0:  # there: it would close the gripper
            break
        env.step(action)
    return True


def take(env: TableEnv, rng: np.random.Generator) -> bool:
    """Take a random object towards a random place; whether it is in the hand."""
    expert, thing = _picking(env, rng)
    for _ in range(_LONGEST_GRASP):
        env.step(expert.act())
        if env.world.gripped(thing):
            break
    steer(env, rng.uniform(LOWEST, HIGHEST), grip=1.0, steps=int(rng.integers(0, 9)))
    return env.world.gripped(thing)


def _picking(env: TableEnv, rng: np.random.Generator) -> tuple[Expert, int]:
    """An expert that picks up one of the objects, and which. Nobody hears of it: held-out goals are fine."""
    goal = Goal("pick", env.world.things[int(rng.integers(scene.OBJECTS))])
    env.goal, env.slots = goal, locate(goal, env.world)
    return Expert(env), env.slots.thing


def steer(env: TableEnv, target: Array, *, grip: float, steps: int) -> None:
    """Move the tool straight towards a point."""
    for _ in range(steps):
        way = np.clip((target - env.world.tool) / STEP_LENGTH, -1.0, 1.0)
        env.step(np.array([*way, grip]))


def draw_goal_of(
    thing: Thing, world: TableWorld, rng: np.random.Generator, combinations: Literal["train", "all"]
) -> Goal:
    """What could be asked of a thing in the present scene: a task, then a combination, each uniformly."""
    possible = [among for task in TASKS if (among := goals_of(task, thing, world, combinations))]
    among = possible[int(rng.integers(len(possible)))]
    return among[int(rng.integers(len(among)))]


def goals_of(task: str, thing: Thing, world: TableWorld, combinations: Literal["train", "all"]) -> list[Goal]:
    """The task's goals for a thing that can be met in the present scene."""
    pads, things = (*world.pads, None), (*world.things, None)
    return [
        goal
        for goal in goals(task, combinations)
        if goal.thing == thing and goal.pad in pads and goal.base in things
    ]


def positions(goal: Goal, world: TableWorld) -> NDArray[np.float32]:
    """[LOCATED] of the named object and its destination."""
    return state(world, goal.task, locate(goal, world), 0.0, 0.0)[:LOCATED]
