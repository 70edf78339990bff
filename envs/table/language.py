"""What the robot can be told: goals, the sentences that name them, and which of both are kept from training.

A goal combines a task with a thing and, by task, a pad or a second thing. A fifth of the combinations of each
task is held out of training, though none of their words is; so success on them measures composition. A
sentence is an optional courtesy, a verb and its nouns, with or without articles; some verbs and nouns occur in
the phrasing "synonyms" only, so success on those measures words never heard. Colours have no synonyms: without
its colour nothing in the scene could be told from the rest.

Sentences are lower case without punctuation and at most `LONGEST` words long.
"""

import hashlib
import itertools
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, get_args

import numpy as np

TASKS = ("reach", "push", "pick", "place", "stack")
COLOURS = ("red", "green", "blue", "yellow", "purple")
SHAPES = ("cube", "bar", "tower")
PAD_COLOURS = ("white", "black", "orange", "cyan")
LONGEST = 16

Phrasing = Literal["train", "synonyms"]
PHRASINGS: tuple[Phrasing, ...] = get_args(Phrasing)

_WITH_PAD = ("push", "place")
_NO_BASE = "tower"  # nothing stays on a tower's top
_SEED = "tandem-table-1"  # chooses the held-out combinations; a change makes older results incomparable
_HELD_OUT_SHARE = 0.2

_COURTESIES = ("", "please", "now", "can you")
_ARTICLES = ("the", "")
_VERBS: dict[Phrasing, dict[str, tuple[str, ...]]] = {
    "train": {
        "reach": ("reach {thing}", "touch {thing}", "go to {thing}", "reach for {thing}"),
        "push": (
            "push {thing} to {pad}",
            "slide {thing} to {pad}",
            "push {thing} onto {pad}",
            "slide {thing} over to {pad}",
        ),
        "pick": ("pick up {thing}", "lift {thing}", "pick {thing} up", "lift {thing} up"),
        "place": (
            "put {thing} on {pad}",
            "place {thing} on {pad}",
            "set {thing} down on {pad}",
            "pick up {thing} and put it on {pad}",
        ),
        "stack": (
            "stack {thing} on {base}",
            "put {thing} on top of {base}",
            "place {thing} on {base}",
            "pick up {thing} and stack it on {base}",
        ),
    },
    "synonyms": {
        "reach": ("approach {thing}", "tap {thing}"),
        "push": ("shove {thing} to {pad}", "nudge {thing} to {pad}"),
        "pick": ("grab {thing}", "hoist {thing}"),
        "place": ("lay {thing} on {pad}", "deposit {thing} on {pad}"),
        "stack": ("pile {thing} on {base}", "balance {thing} on top of {base}"),
    },
}
_NOUNS: dict[Phrasing, dict[str, tuple[str, ...]]] = {
    "train": {"cube": ("cube", "box"), "bar": ("bar", "beam"), "tower": ("tower", "column"), "pad": ("pad", "mat")},
    "synonyms": {"cube": ("block",), "bar": ("brick",), "tower": ("pillar",), "pad": ("square",)},
}


def _one_of(value: str | None, allowed: tuple[str, ...], what: str) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {what} {value!r}; there are {', '.join(allowed)}")


@dataclass(frozen=True, order=True)
class Thing:
    """A movable object. Raises ValueError for a colour or a shape that does not exist."""

    colour: str
    shape: str

    def __post_init__(self) -> None:
        _one_of(self.colour, COLOURS, "colour")
        _one_of(self.shape, SHAPES, "shape")

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True, order=True)
class Goal:
    """What is to be done: reach, pick a thing; push, place it to a pad of colour `pad`; stack it on `base`.

    A task of a user's own has the parts of the task that it is `like`. Raises ValueError for unknown words, parts
    that the task has not or lacks, and a base that cannot carry.
    """

    task: str
    thing: Thing
    pad: str | None = None
    base: Thing | None = None
    like: str | None = None

    def __post_init__(self) -> None:
        parts_of = self.like or self.task
        _one_of(parts_of, TASKS, "task")
        if (self.pad is not None) != (parts_of in _WITH_PAD):
            raise ValueError(f"task {self.task!r} {'needs a' if self.pad is None else 'has no'} pad")
        if (self.base is not None) != (parts_of == "stack"):
            raise ValueError(f"task {self.task!r} {'needs a' if self.base is None else 'has no'} base")
        if self.pad is not None:
            _one_of(self.pad, PAD_COLOURS, "pad colour")
        if self.base is not None and self.base == self.thing:
            raise ValueError(f"the {self.thing} cannot be stacked on itself")
        if self.base is not None and self.base.shape == _NO_BASE:
            raise ValueError(f"nothing can be stacked on a {_NO_BASE}")

    @property
    def key(self) -> str:
        """A stable name of the goal, one to one: "reach red cube", "push red cube to white"."""
        if self.pad is not None:
            return f"{self.task} {self.thing} to {self.pad}"
        if self.base is not None:
            return f"{self.task} {self.thing} on {self.base}"
        return f"{self.task} {self.thing}"


# ---------------------------------------------------------------- combinations


@lru_cache
def combinations(task: str | None = None, like: str | None = None) -> tuple[Goal, ...]:
    """Every goal of `task`, or of all tasks, in a fixed order. Raises ValueError for an unknown task.

    like: for a task of a user's own, the one whose combinations it has.
    """
    if task is None:
        return tuple(goal for name in TASKS for goal in combinations(name))
    if like is not None:
        return tuple(replace(goal, task=task, like=like) for goal in combinations(like))
    _one_of(task, TASKS, "task")
    things = [Thing(colour, shape) for colour in COLOURS for shape in SHAPES]
    if task in _WITH_PAD:
        return tuple(Goal(task, thing, pad=pad) for thing in things for pad in PAD_COLOURS)
    if task == "stack":
        return tuple(
            Goal(task, thing, base=base)
            for thing in things
            for base in things
            if base != thing and base.shape != _NO_BASE
        )
    return tuple(Goal(task, thing) for thing in things)


def held_out(goal: Goal) -> bool:
    """Whether the combination is kept from training: a fifth of each task's, the same in every process."""
    if goal.like is not None:
        goal = replace(goal, task=goal.like, like=None)
    return goal in _held_out_of(goal.task)


@lru_cache
def _held_out_of(task: str) -> frozenset[Goal]:
    """The first fifth of the task's goals by hash; each word keeps at least half of its combinations."""
    goals = combinations(task)
    uses = Counter(word for goal in goals for word in _roles(goal))
    spare = Counter({word: count // 2 for word, count in uses.items()})
    chosen: set[Goal] = set()
    for goal in sorted(goals, key=lambda goal: hashlib.sha256(f"{_SEED}:{goal.key}".encode()).digest()):
        if len(chosen) < round(_HELD_OUT_SHARE * len(goals)) and all(spare[word] for word in _roles(goal)):
            chosen.add(goal)
            spare.subtract(_roles(goal))
    return frozenset(chosen)


def _roles(goal: Goal) -> list[tuple[str, str]]:
    """The words of a goal with the part that each plays in it."""
    roles = [("colour", goal.thing.colour), ("shape", goal.thing.shape)]
    if goal.pad is not None:
        roles.append(("pad", goal.pad))
    if goal.base is not None:
        roles += [("base colour", goal.base.colour), ("base shape", goal.base.shape)]
    return roles


# ---------------------------------------------------------------- sentences


def instruct(goal: Goal, rng: np.random.Generator, *, phrasing: Phrasing) -> str:
    """One of `phrases(goal, phrasing)`, all equally likely."""
    choices = phrases(goal, phrasing)
    return choices[int(rng.integers(len(choices)))]


@lru_cache(maxsize=1024)
def phrases(goal: Goal, phrasing: Phrasing) -> tuple[str, ...]:
    """Every sentence for `goal`, in a fixed order. "synonyms" has those with at least one held-out verb or noun.

    Raises ValueError for an unknown phrasing.
    """
    _one_of(phrasing, PHRASINGS, "phrasing")
    known = _compose(goal, ("train",))
    if phrasing == "train":
        return known
    trained = set(known)
    return tuple(phrase for phrase in _compose(goal, PHRASINGS) if phrase not in trained)


def _compose(goal: Goal, vocabularies: tuple[Phrasing, ...]) -> tuple[str, ...]:
    def words(table: dict[Phrasing, dict[str, tuple[str, ...]]], name: str) -> list[str]:
        return [word for vocabulary in vocabularies for word in table[vocabulary][name]]

    slots = {"thing": [f"{goal.thing.colour} {noun}" for noun in words(_NOUNS, goal.thing.shape)]}
    if goal.pad is not None:
        slots["pad"] = [f"{goal.pad} {noun}" for noun in words(_NOUNS, "pad")]
    if goal.base is not None:
        slots["base"] = [f"{goal.base.colour} {noun}" for noun in words(_NOUNS, goal.base.shape)]
    composed = []
    for courtesy, article, verb in itertools.product(_COURTESIES, _ARTICLES, words(_VERBS, goal.task)):
        for names in itertools.product(*slots.values()):
            filled = {slot: f"{article} {name}".strip() for slot, name in zip(slots, names, strict=True)}
            composed.append(f"{courtesy} {verb.format(**filled)}".strip())
    return tuple(composed)


def _training_words() -> tuple[str, ...]:
    texts = [*_COURTESIES, *_ARTICLES, *COLOURS, *PAD_COLOURS]
    for table in (_VERBS, _NOUNS):
        texts += [text for choices in table["train"].values() for text in choices]
    return tuple(sorted({word for text in texts for word in re.sub(r"{\w+}", "", text).split()}))


TRAINING_WORDS: tuple[str, ...] = _training_words()


# ---------------------------------------------------------------- understanding

_SHAPE_OF = {noun: shape for phrasing in PHRASINGS for shape in SHAPES for noun in _NOUNS[phrasing][shape]}
_PAD_NOUNS = tuple(noun for phrasing in PHRASINGS for noun in _NOUNS[phrasing]["pad"])


@lru_cache
def _patterns() -> tuple[tuple[str, re.Pattern[str]], ...]:
    """(task, pattern) of every verb. Articles are free and may differ within a sentence."""

    def noun(slot: str, colours: tuple[str, ...], nouns: tuple[str, ...]) -> str:
        return rf"(?:(?:the|a|an) )?(?P<{slot}_colour>{'|'.join(colours)}) (?P<{slot}>{'|'.join(nouns)})"

    slots = {
        "thing": noun("thing", COLOURS, tuple(_SHAPE_OF)),
        "pad": noun("pad", PAD_COLOURS, _PAD_NOUNS),
        "base": noun("base", COLOURS, tuple(_SHAPE_OF)),
    }
    return tuple(
        (task, re.compile(verb.format(**slots)))
        for phrasing in PHRASINGS
        for task, verbs in _VERBS[phrasing].items()
        for verb in verbs
    )


_COURTESY = re.compile(rf"^(?:(?:{'|'.join(filter(None, _COURTESIES))}) )+")


def parse(text: str) -> Goal | None:
    """The goal that a sentence names, in either phrasing; None for any other, and for a goal that cannot be.

    Capitals, punctuation and repeated spaces do not matter.
    """
    plain = _COURTESY.sub("", " ".join(re.findall(r"[a-z]+", text.lower())))
    for task, pattern in _patterns():
        found = pattern.fullmatch(plain)
        if found is None:
            continue
        parts = found.groupdict()
        thing = Thing(parts["thing_colour"], _SHAPE_OF[parts["thing"]])
        if "base" not in parts:
            return Goal(task, thing, pad=parts.get("pad_colour"))
        base = Thing(parts["base_colour"], _SHAPE_OF[parts["base"]])
        possible = base != thing and base.shape != _NO_BASE
        return Goal(task, thing, base=base) if possible else None
    return None
