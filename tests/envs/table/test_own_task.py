"""Tasks, sentences and randomizations of a user's own at the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envs import capture
from envs.table.env import TableEnv
from envs.table.expert import Expert, require_experts
from envs.table.language import TASKS, Goal, Thing, held_out
from envs.table.layout import goals
from envs.table.tasks import OwnTask, Slots
from envs.table.world import Array, TableWorld


def far_done(world: TableWorld, slots: Slots) -> bool:
    return bool(world.positions[slots.thing][0] < -0.15)


def far_progress(world: TableWorld, slots: Slots) -> float:
    return float(np.clip(0.5 - world.positions[slots.thing][0], 0.0, 1.0))


def far_place(world: TableWorld, slots: Slots) -> Array:
    _, y, z = world.positions[slots.thing]
    return np.array([-0.16, y, z])


def far_words(goal: Goal) -> list[str]:
    return [f"send the {goal.thing} home", f"bring home the {goal.thing}"]


HOME = OwnTask(
    far_done, far_progress, hold=2, name="home", sentences=far_words, destination=far_place, act=Expert.push
)


def test_two_tasks_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two are named 'home'"):
        TableEnv(tasks=(HOME, replace(HOME, hold=3, place=1)), observe=("state",))
    assert len(TableEnv(tasks=(HOME, HOME, "reach"), observe=("state",))._tasks) == 3


def test_a_task_of_ones_own_is_drawn_asked_for_and_judged() -> None:
    env = TableEnv(tasks=(HOME, "reach"), observe=("state",))
    seen = set()
    for seed in range(20):
        observation, info = env.reset(seed=seed)
        seen.add(info["task"])
        if info["task"] == "home":
            assert info["instruction"] in far_words(env.goal)
            assert info["goal"] == f"home {env.goal.thing}"
            assert not held_out(env.goal)
            np.testing.assert_allclose(observation["state"][3], -1.6, atol=1e-6)  # its own destination, 10 cm
            np.testing.assert_array_equal(observation["state"][9:17], [0, 0, 0, 0, 0, 1, 0, 0])
    assert seen == {"home", "reach"}
    env.reset(seed=0, options={"task": "home"})
    env.world.data.qpos[env.world._object_qpos[env.slots.thing]] = -0.2
    before = far_progress(env.world, env.slots)
    results = [env.step(np.array([0.0, 0.0, 0.0, -1.0])) for _ in range(2)]
    assert [result[4]["success"] for result in results] == [False, True]  # held for two control steps
    assert results[1][2]
    gained = far_progress(env.world, env.slots) - before
    assert sum(result[1] for result in results) == pytest.approx(gained + 1.0)


def test_each_task_of_ones_own_has_its_place_in_the_state() -> None:
    others = [replace(HOME, name=f"home{place}", place=place) for place in (1, 2)]
    env = TableEnv(tasks=(HOME, *others, "stack"), observe=("state",))
    told = {}
    for seed in range(24):
        observation, info = env.reset(seed=seed)
        told[info["task"]] = observation["state"][9:17].nonzero()[0].tolist()
    assert told == {"home": [5], "home1": [6], "home2": [7], "stack": [4]}


def test_two_tasks_of_ones_own_cannot_share_a_place() -> None:
    with pytest.raises(ValueError, match="tasks home, away share a place"):
        TableEnv(tasks=(HOME, replace(HOME, name="away"), "reach"), observe=())
    TableEnv(tasks=(HOME, HOME), observe=())  # the same one, played more often


@pytest.mark.parametrize("place", [-1, 3, 0.5])
def test_other_places_are_refused(place: Any) -> None:
    with pytest.raises(ValueError, match=f"task 'home': its place is 0, 1 or 2, got {place}"):
        replace(HOME, place=place)


def test_the_experts_motions_serve_a_task_of_ones_own() -> None:
    env = TableEnv(tasks=HOME, observe=())
    expert, won = Expert(env), 0
    for seed in range(6):
        env.reset(seed=seed)
        for _ in range(64):
            *_, terminated, _, info = env.step(expert.act())
            if terminated:
                break
        won += info["success"]
    assert won >= 5
    silent = TableEnv(tasks=replace(HOME, act=None), observe=())
    silent.reset(seed=0)
    with pytest.raises(ValueError, match="'home' has no scripted expert"):
        Expert(silent).act()


def test_an_expert_of_ones_own_is_held_to_four_finite_numbers() -> None:
    def acting(answer: Any) -> Expert:
        env = TableEnv(tasks=replace(HOME, act=lambda expert: answer), observe=())
        env.reset(seed=0)
        return Expert(env)

    action = acting([2.0, 0.5, 0, -3]).act()
    assert action.tolist() == [1.0, 0.5, 0.0, -1.0]
    assert action.dtype == np.float32
    for wrong in (None, [0.0, 0.0, 0.0], [0.0, np.nan, 0.0, 1.0], "left", [[1.0], 2.0]):
        with pytest.raises(
            ValueError, match="task 'home': its `act` must return an action of 4 finite numbers, got"
        ):
            acting(wrong).act()
    failing = TableEnv(tasks=replace(HOME, act=lambda expert: expert.fly()), observe=())  # type: ignore[attr-defined]
    failing.reset(seed=0)
    with pytest.raises(ValueError, match=r"task 'home': its `act` failed: AttributeError: .*fly.*line \d+\)$"):
        Expert(failing).act()


def test_every_task_needs_an_expert_where_one_is_asked_for() -> None:
    require_experts(TableEnv(tasks=(HOME, "reach"), observe=()))
    with pytest.raises(
        ValueError, match="task 'still' has no scripted expert: give its OwnTask an `act`, or record"
    ):
        require_experts(TableEnv(tasks=("reach", HOME, replace(HOME, act=None, name="still", place=1)), observe=()))


def test_its_sentences_are_understood_and_its_combinations_divided() -> None:
    env = TableEnv(tasks=HOME, observe=())
    goal = env.understand("Bring home the red cube!")
    assert goal == Goal("home", Thing("red", "cube"), like="reach")
    assert env.understand("reach the red cube") == Goal("reach", Thing("red", "cube"))
    assert env.understand("bring it home") is None
    env.reset(seed=0, options={"instruction": "bring home the red cube"})
    assert env.judged
    assert env.goal == goal
    for kind in ("train", "held_out"):
        own = goals("home", kind, "reach")
        assert [goal.thing for goal in own] == [goal.thing for goal in goals("reach", kind)]
    env.reset(seed=0, options={"task": "home", "swap": True})
    assert env.goal.task == "home"
    assert env.other is not None
    assert env.other.thing != env.goal.thing


def test_an_environment_with_own_parts_can_be_captured() -> None:
    env = TableEnv(tasks=(HOME,), phrasing=lambda goal: [f"do {goal.task}"], observe=())
    nominal = capture.nominal_fields(env)
    env.reset(seed=3)
    held = capture.capture(env, nominal)
    key, instruction = env.goal.key, env.instruction
    env.reset(seed=4)
    capture.restore(env, held, nominal)
    assert (env.goal.key, env.instruction) == (key, instruction)
    assert env.own_task is HOME


def my_words(goal: Goal) -> Sequence[str]:
    return [f"fetch the {goal.thing}"]


def test_sentences_of_ones_own() -> None:
    env = TableEnv(tasks="pick", phrasing=my_words, observe=())
    env.reset(seed=1)
    assert env.instruction == f"fetch the {env.goal.thing}"
    assert env.understand("fetch the blue bar") == Goal("pick", Thing("blue", "bar"))
    assert env.understand("pick up the blue bar") == Goal("pick", Thing("blue", "bar"))


def test_everything_by_file_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "from dataclasses import replace\nfrom envs.table.tasks import TASK, OwnTask\nREACH = TASK['reach']\n"
        "def words(goal):\n    return [f'go near the {goal.thing}']\n"
        "NEAR = OwnTask(REACH.done, REACH.progress, hold=5, name='near', sentences=words)\n"
    )
    Path("dim.yaml").write_text("- {field: light_diffuse, operation: scale, range: [0.5, 0.6]}\n")
    env = TableEnv(tasks=("mine.py:NEAR",), phrasing="mine.py:words", randomization="dim.yaml", observe=())
    _, info = env.reset(seed=0, options={"task": "mine.py:NEAR"})
    assert (info["task"], info["instruction"]) == ("near", f"go near the {env.goal.thing}")
    assert env.randomizer is not None
    assert 0.5 <= env.randomizer.draws[0].item() <= 0.6
    env.reset(seed=0, options={"task": "pick"})
    assert env.instruction == f"go near the {env.goal.thing}"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"tasks": "nowhere.py:TASK"}, "there is no file nowhere.py"),
        ({"tasks": f"{__file__}:far_done"}, "an OwnTask is needed, got function"),
        ({"phrasing": "trian"}, "no phrasing 'trian'.* did you mean 'train'"),
        ({"phrasing": f"{__file__}:HOME"}, "a function is needed, got OwnTask"),
        ({"randomization": "nowhere.yaml"}, "nowhere.yaml"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TableEnv(**arguments, observe=())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "sentences, message",
    [([], "one at least"), (["Fetch it!"], "lower-case"), (["a " * 17], "lower-case"), ("fetch", "a list")],
)
def test_sentences_that_cannot_be_said(sentences: list[str], message: str) -> None:
    env = TableEnv(phrasing=lambda goal: sentences, observe=())
    with pytest.raises(ValueError, match=message):
        env.reset(seed=0)


@pytest.mark.parametrize("change", [{"name": "push"}, {"name": "two words"}, {"like": "fetch"}])
def test_own_tasks_that_cannot_be(change: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"task of your own|is like one of"):
        replace(HOME, **change)  # type: ignore[arg-type]


def test_goals_like_no_task_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown task 'home'"):
        Goal("home", Thing("red", "cube"))
    with pytest.raises(ValueError, match="needs a pad"):
        Goal("home", Thing("red", "cube"), like="push")
    assert "home" not in TASKS
