"""Looks at scenes in which the hand plays, with the words for everything in them: to learn where words point to.

No demonstration is needed, so there can be as many scenes as a policy needs to learn to find things, instead of
learning the scenes of few demonstrations by heart. The hand wanders, goes to things, pushes them, takes them
somewhere and lets go, as it happens and with no goal. A look is a picture of that, and for each object a sentence
about it with the positions that it asks for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from envs.table import scene, tasks
from envs.table.camera import Image
from envs.table.env import TableEnv
from envs.table.expert import Expert
from envs.table.language import TASKS, Goal, Thing
from envs.table.layout import TRAINING_SEEDS, goals
from envs.table.observations import PERCEPT, state
from envs.table.world import HIGHEST, LOWEST, STEP_LENGTH, Array, TableWorld

LOOKS = 4
"""Looks at each scene, at random times."""
LONGEST_PLAY = 48
"""Control steps of play in a scene, at the most."""
WANDER, VISIT, PUSH = 0.15, 0.2, 0.25
"""Shares of what the hand does; else it takes something."""
NOISE = 0.5
"""The most noise of the hand's motions (standard deviation, in largest steps)."""
_OPEN, _CLOSE = -1.0, 1.0
_SAFE = 0.115
"""Metres above the table at which the tool passes over everything."""
_UP = np.array([0.0, 0.0, 0.1])
_LONGEST_GRASP = 22
"""Control steps that the hand spends on a grasp, at the most."""

Motion = Iterator[None]
"""Control steps of the hand, one at every `next`."""


@dataclass(frozen=True)
class Look:
    """images: entry of an observation ("image", "wrist_image") -> [H, W, 3]; proprio [17]; for each of the four
    objects a sentence, and percepts [4, PERCEPT], the first numbers of the privileged state for its goal."""

    images: dict[str, Image]
    proprio: NDArray[np.float32]
    sentences: tuple[str, ...]
    percepts: NDArray[np.float32]


def looks(
    env: TableEnv,
    rng: np.random.Generator,
    *,
    images: Sequence[str] = ("image",),
    combinations: Literal["train", "all"] = "train",
) -> list[Look]:
    """Draw a scene, play in it and look LOOKS times; all draws come from `rng`. Sentences are of the five tasks, in
    the environment's phrasing. The environment needs a reset before other uses."""
    while True:
        if env.randomizer is not None:
            env.randomizer.forget_start()  # a scene must not depend on those before it
        env.reset(seed=int(rng.integers(TRAINING_SEEDS)))
        due = set(rng.permutation(LONGEST_PLAY)[:LOOKS].tolist())
        seen: list[Look] = []
        for step, _ in enumerate(play(env, rng)):
            if lost(env.world):  # knocked off the table, where no position is worth knowing: another scene
                break
            if step in due:
                seen.append(_look(env, rng, images, combinations))
            if len(seen) == LOOKS:
                return seen


def _look(
    env: TableEnv, rng: np.random.Generator, images: Sequence[str], combinations: Literal["train", "all"]
) -> Look:
    asked = [draw_goal_of(thing, env.world, rng, combinations) for thing in env.world.things]
    seen = env.observe((*images, "proprio"))
    return Look(
        images={name: seen[name] for name in images},
        proprio=seen["proprio"],
        sentences=tuple(env.say(goal, rng) for goal in asked),
        percepts=np.stack([percept(goal, env.world) for goal in asked]),
    )


def lost(world: TableWorld) -> bool:
    """Whether an object is where the hand cannot go."""
    return any(map(world.out_of_reach, range(scene.OBJECTS)))


def play(env: TableEnv, rng: np.random.Generator) -> Motion:
    """Do one thing after another, for ever."""
    hand = Hand(env, rng)
    while True:
        what = rng.random()
        if what < WANDER:
            yield from hand.go(rng.uniform(LOWEST, HIGHEST), hand.any_grip(), steps=int(rng.integers(2, 12)))
        elif what < WANDER + VISIT:
            yield from hand.visit(hand.any_thing())
        elif what < WANDER + VISIT + PUSH:
            yield from hand.push(hand.any_thing())
        else:
            yield from hand.take(hand.any_thing())


class Hand:
    """What the hand can do with the things of a scene, with noise of a size that is its own."""

    def __init__(self, env: TableEnv, rng: np.random.Generator) -> None:
        self.env, self.world, self.rng = env, env.world, rng
        self.noise = rng.uniform(0, NOISE)

    def any_thing(self) -> int:
        """One of the objects."""
        return int(self.rng.integers(scene.OBJECTS))

    def any_grip(self) -> float:
        """Open or closed."""
        return float(self.rng.choice((_OPEN, _CLOSE)))

    def move(self, motion: NDArray[np.floating], grip: float) -> None:
        """One control step: motion [3] in largest steps, and the hand's noise."""
        noisy = motion + self.rng.normal(0.0, self.noise, 3)
        self.env.step(np.clip(np.array([*noisy, grip]), -1.0, 1.0))

    def go(self, target: Array, grip: float, *, steps: int, over: bool = False) -> Motion:
        """Towards a point, for so many steps at most; `over` the things until it is above the point."""
        target = np.clip(target, LOWEST, HIGHEST)
        for _ in range(steps):
            way = target - self.world.tool
            if np.abs(way).max() < 0.008:
                return
            if over and np.abs(way[:2]).max() > 0.03:
                height = max(_SAFE, target[2]) - self.world.tool[2]
                way = np.array([0.0, 0.0, height]) if height > 0.025 else np.array([*way[:2], height])
            way = way / STEP_LENGTH
            self.move(way / max(1.0, np.abs(way).max()), grip)
            yield

    def visit(self, thing: int) -> Motion:
        """Go over a thing, or to it."""
        near = np.array([*self.rng.normal(0.0, 0.02, 2), self.rng.uniform(0.0, 0.1)])
        yield from self.go(tasks.top(self.world, thing) + near, self.any_grip(), steps=16, over=True)

    def push(self, thing: int) -> Motion:
        """Go beside a thing and on from there, then up."""
        way, axis = self.rng.uniform(-0.5, 0.5, 2), int(self.rng.integers(2))
        way[axis] = self.rng.choice((-1.0, 1.0))
        start = tasks.push_start(self.world, tasks.Slots(thing), way, axis)
        yield from self.go(start, _CLOSE, steps=16, over=True)
        beyond = self.world.tool + np.array([*(0.2 * way), 0.0])
        yield from self.go(beyond, _CLOSE, steps=int(self.rng.integers(3, 12)))
        yield from self.go(self.world.tool + _UP, _CLOSE, steps=4)

    def take(self, thing: int) -> Motion:
        """Take a thing somewhere, and let go of it more often than not."""
        env, world, rng = self.env, self.world, self.rng
        goal = Goal("pick", world.things[thing])  # nobody hears of it: held-out goals are fine
        env.goal, env.slots = goal, tasks.locate(goal, world)
        expert = Expert(env)
        for _ in range(_LONGEST_GRASP):
            wanted = expert.act()
            self.move(wanted[:3], float(wanted[3]))
            yield
            if world.gripped(thing):
                break
        else:
            return
        yield from self.go(world.tool + rng.uniform(0.5, 1.2) * _UP, _CLOSE, steps=5)
        place = self.somewhere(thing)
        yield from self.go(np.array([*place[:2], max(place[2], _SAFE)]), _CLOSE, steps=12)
        yield from self.go(place, _CLOSE, steps=6)
        if rng.random() < 0.7:
            for _ in range(3):
                self.move(np.zeros(3), _OPEN)
                yield
            yield from self.go(world.tool + _UP, _OPEN, steps=4)

    def somewhere(self, thing: int) -> Array:
        """[3] a place for what is held: on another object, on a pad, or anywhere."""
        where, world, height = self.rng.random(), self.world, self.world.half_heights[thing]
        base = self.any_thing()
        if where < 0.3 and base != thing:
            place = tasks.top(world, base) + np.array([0.0, 0.0, height + 0.025])
        elif where < 0.6:
            x, y, _ = world.pad_positions[int(self.rng.integers(len(world.pads)))]
            place = np.array([x, y, height + 0.02])
        else:
            place = self.rng.uniform(LOWEST, HIGHEST)
        return place + np.array([*self.rng.normal(0.0, 0.012, 2), 0.0])


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


def percept(goal: Goal, world: TableWorld) -> NDArray[np.float32]:
    """[PERCEPT] what the words and a look tell of a goal."""
    return state(world, goal.task, tasks.locate(goal, world), 0.0, 0.0)[:PERCEPT]
