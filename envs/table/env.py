"""One table, many words: the Gymnasium environments `tandem/Table-v0` and `tandem/TableState-v0`.

The scene is the same whatever is asked; only the instruction tells what to do. Nothing is drawn unless a picture is
among the observations that were asked for.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import gymnasium
import mujoco
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from envs.own import call_own, is_own, load_own
from envs.randomization import Randomization, Randomizer
from envs.table import scene
from envs.table.camera import Image
from envs.table.language import LONGEST, PHRASINGS, TASKS, Goal, instruct, parse
from envs.table.layout import Combinations, draw_goal, draw_layout, goals, other_goal
from envs.table.observations import PROPRIO, STATE, state
from envs.table.randomization import specs_of
from envs.table.senses import Senses
from envs.table.tasks import TASK, OwnTask, Slots, Task, destination, locate
from envs.table.world import Layout, TableWorld

SUCCESS_REWARD = 1.0
ENTRIES = ("image", "wrist_image", "proprio", "instruction", "state")
CAMERA_OF = {"image": "front", "wrist_image": "wrist"}
TIME_LIMIT = 64
"""Control steps of an episode."""


class TableEnv(gymnasium.Env[dict[str, Any], NDArray[np.floating]]):
    """An episode: a drawn scene, an instruction, control steps of 0.1 s.

    tasks             the tasks to draw from; one that is named twice is drawn twice as often; your own is an
                      `OwnTask`, or `file.py:name` of one
    combinations      of task, thing and target: "train", "held_out" or "all"
    phrasing          "train"; "synonyms": words that training never uses; or a function of your own, or its
                      `file.py:name`: from a Goal to every way to ask for it
    observe           the entries of an observation: image, wrist_image, proprio, instruction, state (privileged)
    image_size        pixels, square
    reward            "dense": the change of the task's progress, and 1 at every step of success; "sparse": 1 at
                      every step of success; always 0 where the instruction is not understood
    end_on_success    terminate there, so that 1 is paid once; else go on to the time limit, and pay 1 at every step
                      at which success holds: success_at_end may differ from success_once
    randomization     a preset of `envs.table.randomization`, or randomizations of your own, or their file.yaml

    Actions [4] in [-1, 1]: the tool's way (times 3 cm) in x, y and z, and the gripper (> 0 closes). `info` holds
    success (now), and at reset the instruction, and its task and goal (None where it is not understood). A named
    object beyond reach terminates without success. The environment alone never truncates: the limit of 64 steps is
    that of `gymnasium.make("envs.make:tandem/Table-v0")`. Raises ValueError for unknown tasks, entries or goals,
    for actions that are not finite, and where a user's own sentences fail.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 (Gymnasium declares it so)

    def __init__(
        self,
        *,
        tasks: str | OwnTask | Sequence[str | OwnTask] = TASKS,
        combinations: Combinations = "train",
        phrasing: str | Callable[[Goal], Sequence[str]] = "train",
        observe: Sequence[str] = ("image", "proprio", "instruction", "state"),
        image_size: int = 64,
        reward: Literal["dense", "sparse"] = "dense",
        end_on_success: bool = True,
        randomization: str | Sequence[Randomization | Mapping[str, Any]] | None = None,
        render_mode: str | None = None,
    ) -> None:
        named = [(task, _task(task)) for task in ([tasks] if isinstance(tasks, (str, OwnTask)) else tasks)]
        own: dict[str, OwnTask] = {}
        for _, task in named:
            if isinstance(task, OwnTask) and own.setdefault(task.name, task) is not task:
                raise ValueError(f"tasks: two are named {task.name!r}: give one of them another `name`")
        places = [task.place for task in own.values()]
        if len(set(places)) < len(places):
            raise ValueError(f"tasks {', '.join(own)} share a place in the state: give each another `place`")
        self._own_task = own.get  # a function, which a capture of the environment takes as constant
        self._like = {name: task.like for name, task in own.items()}
        self._names = {
            asked: task.name for asked, task in named if isinstance(asked, str) and not isinstance(task, str)
        }
        self._tasks = tuple(task if isinstance(task, str) else task.name for _, task in named)
        self._observe = tuple(_known("observation", name, ENTRIES) for name in observe)
        _known("combinations", combinations, ("train", "held_out", "all"))
        self._sentences, self._phrasing = sentences_of(phrasing)
        _known("reward", reward, ("dense", "sparse"))
        if not self._tasks:
            raise ValueError("tasks must name one at least")
        if not 16 <= image_size <= scene.LARGEST_PICTURE:
            raise ValueError(f"image_size must be from 16 to {scene.LARGEST_PICTURE} pixels, got {image_size}")
        self._combinations: Combinations = combinations
        self.image_size, self._reward, self._end_on_success = image_size, reward, end_on_success
        self.render_mode = render_mode
        self.world = TableWorld()
        specs = specs_of(randomization)
        self.randomizer = Randomizer(self.world.model, specs, np.random.default_rng(0)) if specs else None
        self.senses = Senses(self.world, self.randomizer)
        self.goal = Goal("reach", _ANY_THING)
        self.slots = Slots(0)
        self.other: Goal | None = None
        self._other_slots: Slots | None = None
        self.instruction, self.judged = "", True
        self.elapsed, self._streak, self._other_streak = 0, 0, 0
        self._progress = 0.0
        every = self._spaces()
        self.observation_space = spaces.Dict({name: every[name] for name in self._observe})
        self.action_space = spaces.Box(-1.0, 1.0, (4,), np.float32)

    def _spaces(self) -> dict[str, gymnasium.Space[Any]]:
        picture = spaces.Box(0, 255, (self.image_size, self.image_size, 3), np.uint8)
        letters = frozenset("abcdefghijklmnopqrstuvwxyz ")
        return {
            "image": picture,
            "wrist_image": picture,
            "proprio": spaces.Box(-np.inf, np.inf, (PROPRIO,), np.float32),
            "instruction": spaces.Text(max_length=12 * LONGEST, min_length=1, charset=letters),
            "state": spaces.Box(-np.inf, np.inf, (STATE,), np.float32),
        }

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draw a scene and an instruction.

        options: "task": a task's name instead of a drawn one; "goal": a Goal; "instruction": a sentence, whose goal
        is understood where it can be (else the scene is any, and neither success nor loss is ever reported); with
        both, the sentence is told and the goal is what counts, whatever the sentence says; "swap": True to name
        another object of the same scene instead, and report `success_of_original` beside. Raises ValueError for
        other options, for a task beside a goal or an instruction, which have their own, and for an instruction to
        swap: it would go on naming the first object.
        """
        super().reset(seed=seed)
        asked = dict(options or {})
        for name in asked:
            _known("reset option", name, ("task", "goal", "instruction", "swap"))
        rng = self.np_random
        goal, sentence = asked.get("goal"), asked.get("instruction")
        if goal is not None and not isinstance(goal, Goal):
            raise ValueError(f"the reset option 'goal' must be a Goal, got {goal!r}")
        if asked.get("task") is not None and (goal is not None or sentence is not None):
            other = "instruction" if goal is None else "goal"
            raise ValueError(f"the reset option 'task' draws a goal, so it cannot be given beside {other!r}")
        if sentence is not None and asked.get("swap"):
            raise ValueError("the reset option 'swap' draws its own instruction, so none can be given")
        self.judged = True
        if sentence is not None and goal is None:
            goal = self.understand(sentence)
            self.judged = goal is not None
        if goal is None:
            names = self._tasks if asked.get("task") is None else (self._asked(asked["task"]),)
            goal = draw_goal(rng, names, self._combinations, self._like)
        layout = draw_layout(rng, goal)
        swapped = other_goal(rng, goal, layout, self._combinations)  # drawn always: the scene stays the same
        self.other = goal if asked.get("swap") else None
        self.goal = swapped if asked.get("swap") else goal
        self._begin(layout)
        self.slots = locate(self.goal, self.world)
        self._other_slots = None if self.other is None else locate(self.other, self.world)
        self.instruction = self.say(self.goal, rng) if sentence is None else sentence
        self.elapsed, self._streak, self._other_streak = 0, 0, 0
        self._progress = self._rule.progress(self.world, self.slots)
        self.senses.begin()
        task, key = (self.goal.task, self.goal.key) if self.judged else (None, None)
        return self.observe(self._observe), {"instruction": self.instruction, "task": task, "goal": key}

    @property
    def own_tasks(self) -> tuple[OwnTask, ...]:
        """Those of the tasks to draw from that are a user's own."""
        return tuple(task for task in map(self._own_task, dict.fromkeys(self._tasks)) if task is not None)

    @property
    def own_task(self) -> OwnTask | None:
        """The present task where it is a user's own."""
        return self._own_task(self.goal.task)

    @property
    def _rule(self) -> Task:
        return self.own_task or TASK[self.goal.task]

    def _asked(self, task: str) -> str:
        """The name in goals of a task that a reset asks for."""
        return self._names.get(task) or _known("task", task, tuple(dict.fromkeys((*TASKS, *self._tasks))))

    def say(self, goal: Goal, rng: np.random.Generator) -> str:
        """A sentence for a goal, drawn with one number of `rng`, in this table's phrasing."""
        own = self._own_task(goal.task)
        sentences = self._sentences if own is None else own.sentences
        if sentences is None:
            return instruct(goal, rng, phrasing="synonyms" if self._phrasing == "synonyms" else "train")
        ways = own_ways(sentences, goal)
        chosen = ways[int(rng.integers(len(ways)))]
        if chosen != _plain(chosen) or not 1 <= len(chosen.split()) <= LONGEST:
            raise ValueError(f"a sentence is 1 to {LONGEST} words of lower-case letters, got {chosen!r}")
        return chosen

    def understand(self, sentence: str) -> Goal | None:
        """The goal that a sentence names, in words of the package's or of the user's own; None for any other.

        Capitals, punctuation and repeated spaces do not matter.
        """
        plain = _plain(sentence)
        for task in self._tasks:
            own = self._own_task(task)
            sentences = self._sentences if own is None else own.sentences
            if sentences is not None:
                for goal in goals(task, "all", self._like.get(task)):
                    if plain in call_own(_saying(goal), sentences, goal):
                        return goal
        return parse(sentence)

    def _begin(self, layout: Layout) -> None:
        """Place the scene, under new random circumstances."""
        randomizer, rng = self.randomizer, self.np_random
        if randomizer is None:
            self.world.place(layout, rng)
            return
        randomizer.restore()
        self.world.place(layout, rng)
        randomizer.rebase()  # the shapes and colours of this scene are what is varied
        randomizer.seed(rng)
        randomizer.reset(self.world.data)
        randomizer.actions.reset(np.array([0.0, 0.0, 0.0, -1.0]))
        mujoco.mj_forward(self.world.model, self.world.data)

    def step(self, action: NDArray[np.floating]) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """One control step of 0.1 s."""
        chosen = np.asarray(action, np.float64)
        if chosen.shape != (4,):
            raise ValueError(f"the action must be [4], got {list(chosen.shape)}")
        if not np.isfinite(chosen).all():
            raise ValueError(f"the action is not finite: {chosen.tolist()}")
        world = self.world
        chosen = np.minimum(np.maximum(chosen, -1.0), 1.0)
        if self.randomizer is not None:
            chosen = self.randomizer.actions.push(chosen)
        world.step(chosen)
        self.elapsed += 1
        if self.randomizer is not None:
            self.randomizer.interval(world.data, self.elapsed * scene.CONTROL_STEP)
            self.senses.tick()
        task = self._rule
        self._streak = self._streak + 1 if task.done(world, self.slots) else 0
        success = self.judged and self._streak >= task.hold
        reward = SUCCESS_REWARD * success
        if self._reward == "dense" and self.judged:
            progress = task.progress(world, self.slots)
            reward += progress - self._progress
            self._progress = progress
        info: dict[str, Any] = {"success": success, "is_success": success}
        if self._other_slots is not None:
            self._other_streak = self._other_streak + 1 if task.done(world, self._other_slots) else 0
            info["success_of_original"] = self._other_streak >= task.hold
        terminated = bool(success and self._end_on_success) or (self.judged and self._lost())
        return self.observe(self._observe), float(reward), terminated, False, info

    def _lost(self) -> bool:
        named = (self.slots.thing,) if self.slots.base is None else (self.slots.thing, self.slots.base)
        return any(map(self.world.out_of_reach, named))

    def observe(self, names: Sequence[str]) -> dict[str, Any]:
        """The named entries of the present observation; draws only what is named."""
        entries: dict[str, Any] = {}
        for name in names:
            match name:
                case "instruction":
                    entries[name] = self.instruction
                case "proprio":
                    entries[name] = self.senses.proprio()
                case "state":
                    own = self.own_task
                    entries[name] = state(
                        self.world,
                        self.goal.task,
                        self.slots,
                        self._streak / self._rule.hold,
                        min(1.0, self.elapsed / TIME_LIMIT),
                        destination=self.destination,
                        own_place=0 if own is None else own.place,
                    )
                case _:
                    entries[name] = self.senses.picture(CAMERA_OF[name], self.image_size)
        return entries

    def picture(self, name: str = "front", size: int = 256) -> Image:
        """[size, size, 3] uint8 of the scene as it is, for people."""
        return self.senses.clear_picture(name, size)

    def render(self) -> Any:
        """The front camera, 256 pixels."""
        return self.picture() if self.render_mode == "rgb_array" else None

    @property
    def destination(self) -> NDArray[np.float64]:
        """[3] where the named object's centre is to be."""
        if self.own_task is not None and self.own_task.destination is not None:
            return self.own_task.destination(self.world, self.slots)
        return destination(self.world, self.slots)


class TableStateEnv(gymnasium.Env[NDArray[np.float32], NDArray[np.floating]]):
    """The same table for learners from a flat state: the observation is the privileged state [S]."""

    metadata = TableEnv.metadata

    def __init__(
        self,
        *,
        tasks: Sequence[str] | str = TASKS,
        reward: Literal["dense", "sparse"] = "dense",
        end_on_success: bool = True,
        render_mode: str | None = None,
    ) -> None:
        names = tasks.split("+") if isinstance(tasks, str) else tasks
        self.table = TableEnv(
            tasks=names, observe=("state",), reward=reward, end_on_success=end_on_success, render_mode=render_mode
        )
        self.render_mode = render_mode
        self.observation_space = spaces.Box(-np.inf, np.inf, (STATE,), np.float32)
        self.action_space = self.table.action_space

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """As TableEnv."""
        super().reset(seed=seed)
        observation, info = self.table.reset(seed=seed, options=options)
        return observation["state"], info

    def step(self, action: NDArray[np.floating]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """As TableEnv."""
        observation, reward, terminated, truncated, info = self.table.step(action)
        return observation["state"], reward, terminated, truncated, info

    def render(self) -> Any:
        """As TableEnv."""
        return self.table.render()


def _task(named: str | OwnTask) -> str | OwnTask:
    """A task of the package's by its name, or a user's own."""
    if isinstance(named, OwnTask):
        return named
    if not is_own(named):
        return _known("task", named, TASKS)
    found = load_own(named)
    if not isinstance(found, OwnTask):
        raise ValueError(f"task {named}: an OwnTask is needed, got {type(found).__name__}")
    return found


def sentences_of(
    phrasing: str | Callable[[Goal], Sequence[str]],
) -> tuple[Callable[[Goal], Sequence[str]] | None, str]:
    """A user's own sentences, if it is them that the phrasing means, and its name.

    Raises ValueError where there is no such phrasing, file or function.
    """
    if isinstance(phrasing, str) and not is_own(phrasing):
        return None, _known("phrasing", phrasing, PHRASINGS)
    found = load_own(phrasing) if isinstance(phrasing, str) else phrasing
    if not callable(found):
        raise ValueError(f"phrasing {phrasing}: a function is needed, got {type(found).__name__}")
    return found, "own"


def own_ways(sentences: Callable[[Goal], Sequence[str]], goal: Goal) -> Sequence[str]:
    """A user's own ways to ask for a goal. Raises ValueError where the function fails or there is none."""
    ways: Sequence[str] = call_own(_saying(goal), sentences, goal)
    if isinstance(ways, str) or not ways:
        raise ValueError(f"the sentences for {goal.key!r} must be a list of one at least, got {ways!r}")
    return ways


def _saying(goal: Goal) -> str:
    return f"the function of the sentences for {goal.key!r}"


def _plain(text: str) -> str:
    """The words of a sentence."""
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def _known(what: str, name: str, among: Sequence[str]) -> str:
    """The name, if it is one of them; ValueError that names the nearest otherwise."""
    if name in among:
        return name
    nearest = difflib.get_close_matches(str(name), among, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"there is no {what} {name!r}: choose from {', '.join(among)}{hint}")


_ANY_THING = parse("reach the red cube").thing  # type: ignore[union-attr]
