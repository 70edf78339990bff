"""Drawing scenes: which things lie where, and what is asked of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from types import MappingProxyType
from typing import Literal

import numpy as np

from envs.table import scene
from envs.table.language import COLOURS, PAD_COLOURS, SHAPES, Goal, Thing, combinations, held_out
from envs.table.world import Array, Layout

Combinations = Literal["train", "held_out", "all"]

TRAINING_SEEDS = 9_999_991
"""Demonstrations and grounding are reset with smaller seeds; play and evaluation with hashes of theirs, which meet
these or each other about once in a thousand million pairs."""
APART = 0.10
"""Metres between two objects, and between an object and a pad."""
PADS_APART = 0.14
SAME_COLOUR = 0.25
"""Share of the scenes in which another object has the named one's colour, so that only the shape tells which."""
YAW = np.deg2rad(14.0)
"""Largest turn of an object at the start: the gripper keeps its own."""


@cache
def goals(task: str, kind: Combinations, like: str | None = None) -> tuple[Goal, ...]:
    """A task's combinations that are trained on, held out, or all. like: as `combinations`."""
    everything = combinations(task, like)
    if kind == "all":
        return everything
    return tuple(goal for goal in everything if held_out(goal) == (kind == "held_out"))


def draw_goal(
    rng: np.random.Generator,
    tasks: Sequence[str],
    kind: Combinations,
    like: Mapping[str, str] = MappingProxyType({}),
) -> Goal:
    """A task, then one of its combinations, each uniformly. like: a user's own task -> what it is like."""
    task = tasks[int(rng.integers(len(tasks)))]
    among = goals(task, kind, like.get(task))
    return among[int(rng.integers(len(among)))]


def draw_layout(rng: np.random.Generator, goal: Goal) -> Layout:
    """A scene in which the goal can be met, its things among distractors in random places."""
    things = _draw_things(rng, goal)
    pads = [goal.pad] if goal.pad is not None else []
    others = [colour for colour in PAD_COLOURS if colour not in pads]
    pads += rng.choice(others, scene.PADS - len(pads), replace=False).tolist()
    things = [things[i] for i in rng.permutation(scene.OBJECTS)]
    pads = [pads[i] for i in rng.permutation(scene.PADS)]
    places = _draw_places(rng)
    return Layout(
        things=tuple(things),
        xy=places[scene.PADS :],
        yaw=rng.uniform(-YAW, YAW, scene.OBJECTS),
        pads=tuple(pads),
        pads_xy=places[: scene.PADS],
    )


def other_goal(rng: np.random.Generator, goal: Goal, layout: Layout, kind: Combinations) -> Goal:
    """The same task asked of another object of the same scene, in words of the same kind where there are any."""
    candidates = []
    for thing in layout.things:
        if thing in (goal.thing, goal.base):
            continue
        candidates.append(replace(goal, thing=thing))
    allowed = [candidate for candidate in candidates if candidate in goals(goal.task, kind, goal.like)]
    among = allowed or candidates
    return among[int(rng.integers(len(among)))]


def _draw_things(rng: np.random.Generator, goal: Goal) -> list[Thing]:
    """The goal's things, and others that differ from each other and from them in colour, but sometimes one."""
    things = [goal.thing] if goal.base is None else [goal.thing, goal.base]
    free = [colour for colour in COLOURS if colour not in {thing.colour for thing in things}]
    colours = rng.permutation(free)[: scene.OBJECTS - len(things)].tolist()
    shapes = rng.choice(SHAPES, len(colours))
    distractors = [Thing(colour, str(shape)) for colour, shape in zip(colours, shapes, strict=True)]
    if rng.random() < SAME_COLOUR:
        taken = {thing.shape for thing in things if thing.colour == goal.thing.colour}
        left = [shape for shape in SHAPES if shape not in taken]
        distractors[0] = Thing(goal.thing.colour, left[int(rng.integers(len(left)))])
    return things + distractors


def _draw_places(rng: np.random.Generator) -> Array:
    """[2 + 4, 2]: pads, then objects, none too near another; drawn again where the last do not fit."""
    half = np.array(scene.WORKSPACE)
    while True:
        places: list[Array] = []
        for index in range(scene.PADS + scene.OBJECTS):
            tries = rng.uniform(-half, half, (24, 2))
            for other in range(index):
                apart = PADS_APART if index < scene.PADS else APART
                tries = tries[np.square(tries - places[other]).sum(axis=1) > apart**2]
            if not len(tries):
                break
            places.append(tries[0])
        if len(places) == scene.PADS + scene.OBJECTS:
            return np.array(places)
