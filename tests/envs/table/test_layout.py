"""Drawn scenes: what lies in them, how far apart, and which combinations may be asked for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from envs.table import scene
from envs.table.language import COLOURS, PAD_COLOURS, SHAPES, TASKS, Goal, Thing, combinations, held_out
from envs.table.layout import APART, PADS_APART, SAME_COLOUR, draw_goal, draw_layout, goals, other_goal

KINDS = ("train", "held_out", "all")


def draws(task: str, count: int, seed: int = 0) -> list:
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(count):
        goal = draw_goal(rng, (task,), "all")
        drawn.append((goal, draw_layout(rng, goal)))
    return drawn


def test_training_and_held_out_combinations_share_nothing_and_are_all() -> None:
    for task in TASKS:
        train, kept, everything = (goals(task, kind) for kind in KINDS)
        assert not set(train) & set(kept)
        assert set(train) | set(kept) == set(everything) == set(combinations(task))
        assert not any(map(held_out, train))
        assert all(map(held_out, kept))


@pytest.mark.parametrize("kind", ["train", "held_out"])
def test_only_combinations_of_the_kind_are_drawn(kind: str) -> None:
    """And each of them is: 20 draws for each combination miss none (4e-9 each)."""
    rng = np.random.default_rng(0)
    for task in TASKS:
        among = set(goals(task, kind))
        drawn = {draw_goal(rng, (task,), kind) for _ in range(20 * len(among))}  # type: ignore[arg-type]
        assert drawn == among


def test_tasks_are_drawn_evenly() -> None:
    rng = np.random.default_rng(0)
    names = [draw_goal(rng, TASKS, "train").task for _ in range(2000)]
    for task in TASKS:  # 400 expected, standard deviation 17.9
        assert abs(names.count(task) - 400) < 6 * 17.9


@pytest.mark.parametrize("task", TASKS)
def test_a_scene_has_four_distinct_things_and_those_of_the_goal(task: str) -> None:
    for goal, layout in draws(task, 200):
        assert len(set(layout.things)) == len(layout.things) == 4
        assert len(set(layout.pads)) == len(layout.pads) == 2
        assert goal.thing in layout.things
        assert goal.base is None or goal.base in layout.things
        assert goal.pad is None or goal.pad in layout.pads
        assert set(layout.pads) <= set(PAD_COLOURS)
        assert {thing.colour for thing in layout.things} <= set(COLOURS)
        assert np.abs(layout.yaw).max() <= np.deg2rad(14) + 1e-12


@pytest.mark.parametrize("task", TASKS)
def test_things_lie_in_the_workspace_and_apart(task: str) -> None:
    for _, layout in draws(task, 200, seed=1):
        for a, b in itertools.combinations(layout.xy, 2):
            assert np.linalg.norm(a - b) > APART == 0.10
        for a, b in itertools.product(layout.xy, layout.pads_xy):
            assert np.linalg.norm(a - b) > APART
        assert np.linalg.norm(np.subtract(*layout.pads_xy)) > PADS_APART == 0.14
        assert (np.abs([*layout.xy, *layout.pads_xy]) <= scene.WORKSPACE).all()


def test_things_that_turn_do_not_touch() -> None:
    """The widest object's half diagonal is 39 mm, so two of them at 10 cm leave 2 cm between."""
    widest = max(np.hypot(x, y) for x, y, _ in scene.HALF_EXTENTS.values())
    assert 2 * widest < APART - 0.02


@pytest.mark.parametrize("task", ["reach", "push"])
def test_a_quarter_of_the_scenes_has_another_object_of_the_named_colour(task: str) -> None:
    same = 0
    for goal, layout in draws(task, 1000, seed=2):
        colours = [thing.colour for thing in layout.things]
        same += colours.count(goal.thing.colour) == 2
        assert len(set(colours)) >= 3
    # binomial(1000, 0.25): standard deviation 13.7; six of them on either side
    assert abs(same - 1000 * SAME_COLOUR) < 6 * 13.7


def test_places_in_the_scene_tell_nothing() -> None:
    """The named object and pad are at each index equally often: 250 of 1000, 500 of 1000."""
    things, pads = np.zeros(4), np.zeros(2)
    for goal, layout in draws("push", 1000, seed=3):
        things[layout.things.index(goal.thing)] += 1
        pads[layout.pads.index(goal.pad)] += 1
    assert np.abs(things - 250).max() < 6 * 13.7
    assert np.abs(pads - 500).max() < 6 * 15.8


def test_a_drawn_scene_depends_on_the_seed_only() -> None:
    goal = Goal("push", Thing("red", "cube"), pad="white")
    one, two, three = (draw_layout(np.random.default_rng(seed), goal) for seed in (7, 7, 8))
    assert one.things == two.things
    np.testing.assert_array_equal(one.xy, two.xy)
    np.testing.assert_array_equal(one.yaw, two.yaw)
    assert (one.xy != three.xy).all()


@pytest.mark.parametrize("task", TASKS)
def test_another_goal_in_the_same_scene(task: str) -> None:
    rng = np.random.default_rng(4)
    preferred = 0
    for goal, layout in draws(task, 150, seed=4):
        other = other_goal(rng, goal, layout, "train")
        assert other.task == task
        assert other.thing != goal.thing
        assert other.thing in layout.things
        assert (other.pad, other.base) == (goal.pad, goal.base)
        possible = [Goal(task, t, goal.pad, goal.base) for t in layout.things if t not in (goal.thing, goal.base)]
        if not all(map(held_out, possible)):
            assert not held_out(other)
            preferred += 1
    assert preferred > 100


def test_every_shape_is_among_the_distractors() -> None:
    shapes = {thing.shape for goal, layout in draws("reach", 50) for thing in layout.things if thing != goal.thing}
    assert shapes == set(SHAPES)
