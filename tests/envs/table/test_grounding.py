"""Looks at the table: sentences and percepts agree with the scene, the hand plays, all follows from a generator."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from envs.table import grounding
from envs.table.env import TableEnv
from envs.table.grounding import LONGEST_PLAY, LOOKS, Hand, Look, goals_of, looks, play
from envs.table.language import COLOURS, PAD_COLOURS, SHAPES, TASKS, Goal, Thing, held_out, parse, phrases
from envs.table.observations import PERCEPT, state
from envs.table.tasks import air, locate
from envs.table.world import TableWorld
from tests.envs.table.scenes import BAR, CUBE, TOWER, by_hand, hand_laid_world, teleport


@pytest.fixture(scope="module")
def env() -> TableEnv:
    return TableEnv(observe=(), image_size=32)


def goals_in(seen: Look) -> list[Goal]:
    understood = [parse(sentence) for sentence in seen.sentences]
    return [goal for goal in understood if goal is not None]


def test_every_object_has_a_sentence_and_the_percept_that_it_asks_for(env: TableEnv) -> None:
    tasks = set()
    for number in range(12):
        *_, seen = looks(env, np.random.default_rng(number), images=())  # the scene is as it was at the last
        goals = goals_in(seen)
        assert [goal.thing for goal in goals] == list(env.world.things)
        for index, goal in enumerate(goals):
            told = state(env.world, goal.task, locate(goal, env.world), 0.5, 0.5)[:PERCEPT]
            np.testing.assert_array_equal(seen.percepts[index], told)
        np.testing.assert_allclose(seen.percepts[:, :3], (env.world.positions - [0, 0, 0.12]) * 10, atol=1e-6)
        tasks |= {goal.task for goal in goals}
    assert tasks == set(TASKS)


def test_percepts_by_hand() -> None:
    world = hand_laid_world()
    on_pad = grounding.percept(Goal("place", CUBE, pad="black"), world)  # the second pad, at (0, 18) cm
    expected = (1.0, 1.0, -0.97, 0.0, 1.8, -0.97, 0.23, 0.23, 0.23, 0, 0, 0, 1, 0, 0, 0, 0)
    np.testing.assert_allclose(on_pad, expected, atol=1e-6)
    on_bar = grounding.percept(Goal("stack", CUBE, base=BAR), world)  # its half height 1.5, the cube's 2.3 cm
    np.testing.assert_allclose(on_bar[3:6], (-1.0, 1.0, -1.2 + 0.3 + 0.23), atol=1e-6)
    assert on_bar[9:].tolist() == [0, 0, 0, 0, 1, 0, 0, 0]
    tower = grounding.percept(Goal("pick", TOWER), world)
    np.testing.assert_allclose(tower[3:6], (-1.0, -1.0, -0.84), atol=1e-6)


def test_a_look_shows_the_scene_as_it_is(env: TableEnv) -> None:
    seen = looks(env, np.random.default_rng(5), images=("image", "wrist_image"))[-1]
    there = env.observe(("image", "wrist_image", "proprio"))
    assert seen.images.keys() == {"image", "wrist_image"}
    for name, picture in seen.images.items():
        assert picture.shape == (32, 32, 3)
        np.testing.assert_array_equal(picture, there[name])
    np.testing.assert_array_equal(seen.proprio, there["proprio"])


def test_the_looks_at_a_scene_are_of_the_same_things_at_other_moments(env: TableEnv) -> None:
    for number in range(6):
        seen = looks(env, np.random.default_rng([6, number]), images=())
        assert len(seen) == LOOKS == 4
        assert {tuple(goal.thing for goal in goals_in(one)) for one in seen} == {env.world.things}
        tools = np.stack([one.proprio[7:10] for one in seen])
        gaps = [np.abs(one - two).max() for one, two in itertools.combinations(tools, 2)]
        assert min(gaps) > 1e-4


def test_the_moments_are_spread_over_the_play(env: TableEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    stepped: list[int] = []
    moments: list[int] = []
    reset, step, look = env.reset, env.step, grounding._look

    def begun(**rest: Any) -> Any:
        stepped.clear()
        return reset(**rest)

    def counted(action: Any) -> Any:
        stepped.append(1)
        return step(action)

    def watched(*rest: Any) -> Look:
        moments.append(len(stepped))
        return look(*rest)

    monkeypatch.setattr(env, "reset", begun)
    monkeypatch.setattr(env, "step", counted)
    monkeypatch.setattr(grounding, "_look", watched)
    for number in range(40):
        looks(env, np.random.default_rng([7, number]), images=())
    assert (min(moments), max(moments)) == (1, LONGEST_PLAY)
    assert np.mean(moments) == pytest.approx((1 + LONGEST_PLAY) / 2, abs=2.3)  # two deviations of 150 draws


def test_held_out_combinations_are_never_named(env: TableEnv) -> None:
    seen = [look for number in range(7) for look in looks(env, np.random.default_rng([1, number]), images=())]
    goals = [goal for look in seen for goal in goals_in(look)]
    assert len(goals) == 7 * 4 * 4
    assert not any(map(held_out, goals))
    for look in seen:
        assert all(text in phrases(goal, "train") for text in look.sentences if (goal := parse(text)))
    every = [
        goal
        for number in range(7)
        for look in looks(env, np.random.default_rng([1, number]), images=(), combinations="all")
        for goal in goals_in(look)
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


def played(env: TableEnv, number: int) -> Iterator[tuple[list[bool], list[bool], list[bool]]]:
    """A play, step by step: which objects are gripped, held in the air, and pushed aside without being lifted."""
    rng = np.random.default_rng([3, number])
    env.reset(seed=number)
    world = env.world
    start = world.positions.copy()
    for _ in itertools.islice(play(env, rng), LONGEST_PLAY):
        if grounding.lost(world):
            return
        gripped = [world.gripped(index) for index in range(4)]
        held = [gripped[index] and air(world, index) > 0.03 for index in range(4)]
        aside = np.linalg.norm((world.positions - start)[:, :2], axis=1) > 0.03
        yield gripped, held, [bool(aside[index]) and world.lifted[index] < 0.01 for index in range(4)]


def test_things_are_gripped_lifted_and_pushed_in_a_sizeable_share_of_the_play(env: TableEnv) -> None:
    plays = [list(played(env, number)) for number in range(60)]
    steps = np.array([[any(which) for which in step] for whole in plays for step in whole])
    assert len(steps) > 0.9 * 60 * LONGEST_PLAY  # few scenes are lost
    gripped, held, pushed = steps.mean(0)
    assert 0.2 < gripped < 0.5
    assert 0.15 < held < gripped
    assert 0.15 < pushed < 0.5
    ever = np.mean([np.any([[any(which) for which in step] for step in whole], axis=0) for whole in plays], axis=0)
    assert (ever > 0.4).all()  # of the scenes, at some time


def test_what_the_hand_takes_is_put_down_too(env: TableEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, on_pad, on_another = 0, 0, 0
    for number in range(40):
        env.reset(seed=number)
        world, hand = env.world, Hand(env, np.random.default_rng([4, number]))
        hand.noise = 0.0
        before = world.positions[0].copy()
        held = [world.gripped(0) for _ in hand.take(0)]
        taken += any(held)
        if not any(held) or world.gripped(0):
            continue
        assert np.abs(world.positions[0] - before).max() > 0.005
        near = np.abs(world.pad_positions[:, :2] - world.positions[0][:2]).max(1) < 0.045
        on_pad += bool(near.any()) and abs(air(world, 0)) < 0.01
        on_another += air(world, 0) > 0.02
    assert taken >= 36
    assert on_pad >= 5
    assert on_another >= 2


def test_without_noise_the_hand_goes_where_it_is_sent_and_over_what_is_there(env: TableEnv) -> None:
    env.reset(seed=1)
    hand = Hand(env, np.random.default_rng(0))
    hand.noise = 0.0
    for target, over in [((0.1, -0.12, 0.06), False), ((-0.1, 0.1, 0.03), True)]:
        path = [env.world.tool.copy() for _ in hand.go(np.array(target), -1.0, steps=30, over=over)]
        assert len(path) < 30  # it stops when it is there
        np.testing.assert_allclose(path[-1], target, atol=0.012)
        if over:
            far = [point for point in path if np.abs(point[:2] - target[:2]).max() > 0.05]
            assert max(point[2] for point in far) > 0.1
    assert len(list(hand.go(np.array([0.1, 0.1, 0.1]), -1.0, steps=2))) == 2


ONCE = [
    {"field": "proprio_noise", "operation": "set", "range": (0.001, 0.1), "when": "start"},
    {"field": "light_diffuse", "operation": "scale", "range": (0.5, 1.0)},
]


@pytest.mark.parametrize("randomization", [None, "full", ONCE])
def test_looks_follow_from_their_generator(env: TableEnv, randomization: Any) -> None:
    fresh, used = (TableEnv(observe=(), image_size=32, randomization=randomization) for _ in range(2))
    for number in range(3):
        looks(used, np.random.default_rng(number))
    for one, two in zip(looks(fresh, np.random.default_rng(9)), looks(used, np.random.default_rng(9)), strict=True):
        assert one.sentences == two.sentences
        for mine, its in ((one.percepts, two.percepts), (one.images["image"], two.images["image"])):
            np.testing.assert_array_equal(mine, its)
        np.testing.assert_array_equal(one.proprio, two.proprio)
    assert looks(used, np.random.default_rng(10))[-1].sentences != one.sentences


def test_looks_speak_the_words_of_their_table() -> None:
    def words(goal: Goal) -> list[str]:
        return [f"{goal.task} that {goal.thing.colour} one"]

    own = TableEnv(observe=(), image_size=32, phrasing=words)
    first, *_ = looks(own, np.random.default_rng(9), images=())
    for thing, sentence in zip(own.world.things, first.sentences, strict=True):
        task, *rest = sentence.split()
        assert task in TASKS
        assert rest == ["that", thing.colour, "one"]


def test_a_scene_with_something_lost_is_drawn_again(env: TableEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    looked, look = [], grounding._look

    def watched(env: TableEnv, *rest: Any) -> Look:
        looked.append(env.world.things)
        return look(env, *rest)

    def lost(world: TableWorld) -> bool:
        return len(looked) == 3 and world.things == looked[0]  # after the third look at the first scene

    monkeypatch.setattr(grounding, "_look", watched)
    monkeypatch.setattr(grounding, "lost", lost)
    seen = looks(env, np.random.default_rng(0), images=())
    assert len(set(looked[:3])) == len(set(looked[3:])) == 1
    assert looked[0] != looked[3]
    assert len(looked) == 3 + LOOKS
    assert {tuple(goal.thing for goal in goals_in(one)) for one in seen} == {looked[3]}


def test_what_fell_is_lost() -> None:
    world = hand_laid_world()
    assert not grounding.lost(world)
    teleport(world, 2, (0.4, 0.0, 0.05))
    assert grounding.lost(world)
