"""Looks at the table: sentences and positions agree with the scene, and each look follows from its generator."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from envs.table import grounding
from envs.table.env import TableEnv
from envs.table.grounding import IN_HAND, Look, goals_of, look
from envs.table.language import COLOURS, PAD_COLOURS, SHAPES, TASKS, Goal, Thing, held_out, parse, phrases
from envs.table.observations import state
from envs.table.tasks import locate
from envs.table.world import TableWorld
from tests.envs.table.scenes import BAR, CUBE, TOWER, by_hand, hand_laid_world, teleport


@pytest.fixture(scope="module")
def env() -> TableEnv:
    return TableEnv(observe=(), image_size=32)


def goals_in(seen: Look) -> list[Goal]:
    understood = [parse(sentence) for sentence in seen.sentences]
    return [goal for goal in understood if goal is not None]


def test_every_object_has_a_sentence_and_the_positions_that_it_asks_for(env: TableEnv) -> None:
    tasks = set()
    for number in range(12):
        seen = look(env, np.random.default_rng(number), images=())
        goals = goals_in(seen)
        assert [goal.thing for goal in goals] == list(env.world.things)
        for index, goal in enumerate(goals):
            told = state(env.world, goal.task, locate(goal, env.world), 0.5, 0.5)[:6]
            np.testing.assert_array_equal(seen.positions[index], told)
        np.testing.assert_allclose(seen.positions[:, :3], (env.world.positions - [0, 0, 0.12]) * 10, atol=1e-6)
        tasks |= {goal.task for goal in goals}
    assert tasks == set(TASKS)


def test_positions_by_hand() -> None:
    world = hand_laid_world()
    on_pad = grounding.positions(Goal("place", CUBE, pad="black"), world)  # the second pad, at (0, 18) cm
    np.testing.assert_allclose(on_pad, (1.0, 1.0, -0.97, 0.0, 1.8, -0.97), atol=1e-6)
    on_bar = grounding.positions(Goal("stack", CUBE, base=BAR), world)  # its half height 1.5, the cube's 2.3 cm
    np.testing.assert_allclose(on_bar[3:], (-1.0, 1.0, -1.2 + 0.3 + 0.23), atol=1e-6)
    np.testing.assert_allclose(grounding.positions(Goal("pick", TOWER), world)[3:], (-1.0, -1.0, -0.84), atol=1e-6)


def test_a_look_shows_the_scene_as_it_is(env: TableEnv) -> None:
    seen = look(env, np.random.default_rng(5), images=("image", "wrist_image"))
    there = env.observe(("image", "wrist_image", "proprio"))
    assert seen.images.keys() == {"image", "wrist_image"}
    for name, picture in seen.images.items():
        assert picture.shape == (32, 32, 3)
        np.testing.assert_array_equal(picture, there[name])
    np.testing.assert_array_equal(seen.proprio, there["proprio"])


def test_held_out_combinations_are_never_named(env: TableEnv) -> None:
    goals = [g for n in range(25) for g in goals_in(look(env, np.random.default_rng([1, n]), images=()))]
    assert len(goals) == 100
    assert not any(map(held_out, goals))
    sentences = look(env, np.random.default_rng(2), images=()).sentences
    assert all(text in phrases(goal, "train") for text in sentences if (goal := parse(text)))
    every = [
        goal
        for number in range(20)
        for goal in goals_in(look(env, np.random.default_rng([1, number]), images=(), combinations="all"))
    ]
    assert any(map(held_out, every))


def test_something_can_be_asked_of_every_thing_with_any_pads() -> None:
    world = hand_laid_world()
    for colour, shape in itertools.product(COLOURS, SHAPES):
        world.things = (Thing(colour, shape),)  # at worst there is nothing to stack it on
        for pads in itertools.combinations(PAD_COLOURS, 2):
            world.pads = pads
            assert any(goals_of(task, world.things[0], world, "train") for task in TASKS)


def test_the_goals_of_a_thing_are_those_of_the_scene() -> None:
    world = hand_laid_world()
    things, pads = by_hand().things, by_hand().pads
    assert goals_of("place", CUBE, world, "all") == [Goal("place", CUBE, pad=pad) for pad in pads]
    stacked = {goal.base for goal in goals_of("stack", CUBE, world, "all")}
    assert stacked == {things[1], things[3]}  # neither itself nor the tower
    assert goals_of("reach", TOWER, world, "all") == [Goal("reach", TOWER)]


def test_an_object_is_in_the_hand_in_the_stated_share(env: TableEnv) -> None:
    held, lifted = [], []
    for number in range(100):
        look(env, np.random.default_rng([3, number]), images=())
        world = env.world
        gripped = [world.gripped(index) for index in range(4)]
        held.append(any(gripped))
        lifted.append(any(gripped) and (world.positions[:, 2] - world.half_heights).max() > 0.02)
    assert np.mean(held) == pytest.approx(IN_HAND, abs=0.065)  # two deviations of 100 draws
    assert np.mean(lifted) > IN_HAND / 2


@pytest.mark.parametrize("randomization", [None, "full"])
def test_a_look_follows_from_its_generator(env: TableEnv, randomization: str | None) -> None:
    fresh, used = (TableEnv(observe=(), image_size=32, randomization=randomization) for _ in range(2))
    for number in range(3):
        look(used, np.random.default_rng(number))
    one, two = look(fresh, np.random.default_rng(9)), look(used, np.random.default_rng(9))
    assert one.sentences == two.sentences
    for mine, its in ((one.positions, two.positions), (one.images["image"], two.images["image"])):
        np.testing.assert_array_equal(mine, its)
    np.testing.assert_array_equal(one.proprio, two.proprio)
    assert look(used, np.random.default_rng(10)).sentences != one.sentences


def test_a_scene_with_something_lost_is_drawn_again(env: TableEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, scenes = iter([True, False]), []

    def lost(world: TableWorld) -> bool:
        scenes.append(world.positions.copy())
        return next(answers)

    monkeypatch.setattr(grounding, "lost", lost)
    seen = look(env, np.random.default_rng(0), images=())
    assert len(scenes) == 2
    np.testing.assert_allclose(seen.positions[:, :2], 10 * scenes[1][:, :2], atol=1e-6)
    assert np.abs(scenes[0] - scenes[1]).max() > 0.01


def test_what_fell_is_lost() -> None:
    world = hand_laid_world()
    assert not grounding.lost(world)
    teleport(world, 2, (0.4, 0.0, 0.05))
    assert grounding.lost(world)
