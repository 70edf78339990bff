"""Strict configuration: what is accepted, what is refused, and what the refusal says."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from experiment.config import ConfigTree, build, build_from_dict, read_tree, to_dict, to_yaml
from experiment.errors import UserError
from experiment.run import RunConfig


@dataclass(frozen=True)
class Algo:
    clip_range: float = 0.2
    lr: float | None = None
    kind: Literal["k1", "k2", "off"] = "k1"
    epochs: int = 3
    hidden: tuple[int, ...] = (64, 64)
    span: tuple[float, float] = (0.0, 1.0)
    weights: dict[str, float] = field(default_factory=dict)
    verbose: bool = False
    data: Path | None = None

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")
        if self.clip_range > 1 and self.verbose:
            raise ValueError("a clip range above 1 clips nothing")
        if self.span[0] > self.span[1]:
            raise ValueError(f"epochs {self.epochs} have no span: it runs backwards")


@dataclass(frozen=True)
class Task:
    name: str
    level: Literal[1, 2] = 1


@dataclass(frozen=True)
class Recipe:
    algo: Algo = field(default_factory=lambda: Algo(lr=1e-5))
    tasks: tuple[Task, ...] = ()
    spare: Task | None = None
    by_name: dict[str, Task] = field(default_factory=dict)
    run: RunConfig = field(default_factory=RunConfig)


def make(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    return build(read_tree(path, overrides), Recipe)


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        make(tmp_path, text, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"{tmp_path}/", "")


def test_values_of_every_type(tmp_path: Path) -> None:
    config = make(
        tmp_path,
        """
algo:
  clip_range: 1
  lr: "1e-4"
  kind: off
  hidden: [8, 1_000]
  span: [-1, 2.5e1]
  weights: {near: 1, far: .inf, on: 2}
  verbose: true
  data: some/where
tasks:
  - name: push
  - {name: "3", level: 2}
spare: {name: lift}
by_name:
  a: {name: x}
""",
    )
    assert config.algo.clip_range == 1.0
    assert type(config.algo.clip_range) is float
    assert config.algo.lr == 1e-4
    assert config.algo.kind == "off"
    assert config.algo.hidden == (8, 1000)
    assert config.algo.span == (-1.0, 25.0)
    assert config.algo.weights == {"near": 1.0, "far": math.inf, "on": 2.0}
    assert config.algo.verbose is True
    assert config.algo.data == Path("some/where")
    assert config.tasks == (Task("push"), Task("3", 2))
    assert config.spare == Task("lift")
    assert config.by_name == {"a": Task("x")}


def test_a_partial_section_keeps_the_recipes_own_defaults(tmp_path: Path) -> None:
    assert make(tmp_path, "algo: {epochs: 5}").algo == Algo(lr=1e-5, epochs=5)
    assert make(tmp_path, "algo:").algo == Algo(lr=1e-5)
    assert make(tmp_path, "") == Recipe()


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "'1e-4'", ".0001", "+1e-4", "1.e-4"])
def test_floats_as_people_write_them(tmp_path: Path, text: str) -> None:
    assert make(tmp_path, f"algo: {{lr: {text}}}").algo.lr == 1e-4
    assert make(tmp_path, "", f"algo.lr={text}").algo.lr == 1e-4


@pytest.mark.parametrize(
    "text, message",
    [
        ("algo:\n  clip_rnage: 0.1", "x.yaml:2: algo.clip_rnage: unknown key; did you mean algo.clip_range?"),
        ("seed: 1\n", "x.yaml:1: seed: unknown key; did you mean run.seed?"),
        ("zzz: 1\n", "x.yaml:1: zzz: unknown key; the keys here are algo, tasks, spare, by_name, run"),
        ("\n\nalgo:\n  epochs: true", "x.yaml:4: algo.epochs: expected an integer, got true"),
        ("algo: {epochs: 2.5}", "x.yaml:1: algo.epochs: expected an integer, got 2.5"),
        ("algo: {epochs: 1e3}", "x.yaml:1: algo.epochs: expected an integer, got 1000.0; write 1000"),
        ("algo: {epochs: '3'}", "x.yaml:1: algo.epochs: expected an integer, got '3'"),
        ("algo: {epochs:}", "x.yaml:1: algo.epochs: expected an integer, got nothing (null)"),
        ("algo: {clip_range: true}", "x.yaml:1: algo.clip_range: expected a number, got true"),
        ("algo: {clip_range: .nan}", "x.yaml:1: algo.clip_range: expected a number, got nan"),
        ("algo: {clip_range: high}", "x.yaml:1: algo.clip_range: expected a number, got 'high'"),
        ("algo: {lr: high}", "x.yaml:1: algo.lr: expected a number or null, got 'high'"),
        ("algo: {verbose: 1}", "x.yaml:1: algo.verbose: expected true or false, got 1"),
        ("algo: {verbose: yes}", "x.yaml:1: algo.verbose: expected true or false, got 'yes'"),
        ("algo: {kind: of}", "x.yaml:1: algo.kind: expected one of k1, k2, off, got 'of'; did you mean off?"),
        ("algo: {kind: 7}", "x.yaml:1: algo.kind: expected one of k1, k2, off, got 7"),
        ("tasks: [{name: a, level: true}]", "x.yaml:1: tasks.0.level: expected one of 1, 2, got true"),
        (
            "algo:\n  hidden:\n    - 8\n    - x",
            "x.yaml:4: algo.hidden: expected a list, each item an integer, got [8, 'x']",
        ),
        ("algo: {hidden: 8}", "x.yaml:1: algo.hidden: expected a list, each item an integer, got 8"),
        ("tasks: [{name: 3}]", "x.yaml:1: tasks.0.name: expected text, got 3; put it in quotes"),
        ("algo: {span: [1]}", "x.yaml:1: algo.span: expected a list of a number, a number, got [1]"),
        (
            "algo:\n weights:\n  a: 1\n  b: x",
            "x.yaml:4: algo.weights: expected names with values, each a number, got {'a': 1, 'b': 'x'}",
        ),
        ("algo: 3", "x.yaml:1: algo: expected a section with keys, got 3"),
        ("tasks:\n  - name: a\n  - nmae: b", "x.yaml:3: tasks.1.nmae: unknown key; did you mean tasks.1.name?"),
        ("tasks:\n  - level: 1", "x.yaml:2: tasks.0: missing key tasks.0.name (text)"),
        ("tasks: push", "x.yaml:1: tasks: expected a list, each item a section with keys, got 'push'"),
        ("spare: push", "x.yaml:1: spare: expected a section with keys or null, got 'push'"),
        ("by_name: {a: {nam: x}}", "x.yaml:1: by_name.a.nam: unknown key; did you mean by_name.a.name?"),
        ("algo:\n  verbose: true\n  epochs: 0", "x.yaml:3: algo: epochs must be at least 1, got 0"),
        ("algo:\n  verbose: true\n  clip_range: 2", "x.yaml:1: algo: a clip range above 1 clips nothing"),
        ("run: {threads: 0}", "x.yaml:1: run: threads must be at least 1, got 0"),
        ("run: {name: a/b}", "x.yaml:1: run: name must be letters, digits, '.', '-' and '_' only, got 'a/b'"),
        ("algo: {epochs: 1}\nalgo: {epochs: 2}", "x.yaml:2: malformed YAML: duplicate key algo (first on line 1)"),
        ("algo:\n  lr: 1\n  epochs: 2\n  lr: 3", "x.yaml:4: malformed YAML: duplicate key lr (first on line 2)"),
        ("algo: [1", "x.yaml:1: malformed YAML: expected ',' or ']', but got '<stream end>'"),
        ("algo:\n\tlr: 1", "x.yaml:2: malformed YAML: found character '\\t' that cannot start any token"),
        ("- 1", "x.yaml: expected keys and values, such as `seed: 1`, got [1]"),
        ("? [a]\n: 1", "x.yaml:1: malformed YAML: a key must be a plain name"),
        ("algo: &a\n  weights: *a", "x.yaml:1: a YAML alias contains itself"),
    ],
)  # fmt: skip
def test_what_a_mistake_says(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path, text) == message


@pytest.mark.parametrize(
    "override, message",
    [
        ("algo.clip_rnage=1", "command line: algo.clip_rnage: unknown key; did you mean algo.clip_range?"),
        ("algo.epochs=ten", "command line: algo.epochs: expected an integer, got 'ten'"),
        ("algo.epochs=0", "command line: algo: epochs must be at least 1, got 0"),
        ("algo.epochs.x=1", "command line: 'algo.epochs.x=1': algo.epochs is a value, not a section"),
        ("algo.epochs", "command line: 'algo.epochs': expected an override of the form section.key=value"),
        ("=1", "command line: '=1': expected an override of the form section.key=value"),
        ("algo.weights={a: 1, a: 2}", "command line: malformed YAML: duplicate key a (first on line 1)"),
        ("tasks.3.name=x", "command line: 'tasks.3.name=x': 3 is not an index of a list of 1"),
    ],
)
def test_what_a_mistaken_override_says(tmp_path: Path, override: str, message: str) -> None:
    assert refusal(tmp_path, "algo: {epochs: 2}\ntasks: [{name: a}]", override) == message


def test_overrides(tmp_path: Path) -> None:
    text = "algo: {epochs: 2, lr: 0.1}\ntasks: [{name: a}, {name: b}]"
    config = make(
        tmp_path, text, "algo.epochs=4", "algo.lr=null", "tasks.1.name=c", "--run.seed=3", "algo.weights={x: 1}",
        "spare.name=a=b",
    )  # fmt: skip
    assert config.algo == Algo(epochs=4, lr=None, weights={"x": 1.0})
    assert config.tasks == (Task("a"), Task("c"))
    assert config.run.seed == 3
    assert config.spare == Task("a=b")
    assert make(tmp_path, text, "algo={clip_range: 0.5}").algo == Algo(lr=1e-5, clip_range=0.5)


def test_an_error_below_an_overridden_section_blames_the_command_line(tmp_path: Path) -> None:
    message = refusal(tmp_path, "algo:\n  epochs: 2\n", "algo={epochs: x}")
    assert message == "command line: algo.epochs: expected an integer, got 'x'"


def test_of_several_keys_that_a_mistake_names_the_one_that_was_typed_is_blamed(tmp_path: Path) -> None:
    text = "algo:\n  lr: 1\n  epochs: 2\n  span: [0, 1]\n"
    said = "algo: epochs 2 have no span: it runs backwards"
    assert refusal(tmp_path, text, "algo.span=[2, 1]") == f"command line: {said}"
    assert refusal(tmp_path, text.replace("[0, 1]", "[2, 1]")) == f"x.yaml:3: {said}"


def test_merge_keys_and_aliases(tmp_path: Path) -> None:
    config = make(tmp_path, "spare: &t {name: a, level: 2}\ntasks:\n  - *t\n  - {<<: *t, name: b}\n  - *t")
    assert config.tasks == (Task("a", 2), Task("b", 2), Task("a", 2))


def test_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "robot.yaml").write_text("")
    with pytest.raises(UserError, match=r"rbot.yaml: no such configuration file; did you mean .*robot.yaml\?"):
        read_tree(tmp_path / "rbot.yaml")
    with pytest.raises(UserError, match="there is no folder"):
        read_tree(tmp_path / "nowhere" / "x.yaml")
    with pytest.raises(UserError, match="cannot read the configuration file"):
        read_tree(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot read the configuration file"):
        read_tree(tmp_path / "binary.yaml")


def test_pop(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("recipe: robot/ppo\nalgo: {epochs: 2}")
    tree = read_tree(tmp_path / "x.yaml")
    assert tree.pop("recipe") == "robot/ppo"
    assert tree.pop("other", None) is None
    with pytest.raises(UserError, match=r"x\.yaml: missing key recipe"):
        tree.pop("recipe")
    assert build(tree, Recipe).algo.epochs == 2


def test_build_from_dict_names_its_source() -> None:
    assert build_from_dict({"name": "a", "level": 2}, Task) == Task("a", 2)
    with pytest.raises(UserError, match=r"^model.json: level: expected one of 1, 2, got 3$"):
        build_from_dict({"name": "a", "level": 3}, Task, source="model.json")
    with pytest.raises(UserError, match=r"^config: missing key name \(text\)$"):
        build_from_dict({}, Task)


def test_build_leaves_the_tree_as_it_was() -> None:
    tree = ConfigTree({"algo": {"hidden": [1]}}, {}, "x")
    build(tree, Recipe)
    assert tree.values == {"algo": {"hidden": [1]}}


def test_yaml_round_trip(tmp_path: Path) -> None:
    names = ("1e-4", "off", "010", "2024-01-01", "~", "", "1_0", "x: y", "1:30", "ü")
    config = Recipe(
        algo=Algo(lr=1e-7, span=(-math.inf, 3.0), weights={"on": 1.0, "a b": 2.0}, data=Path("d")),
        tasks=tuple(Task(name) for name in names),
        run=RunConfig(folder="runs/a", wandb="offline"),
    )
    text = to_yaml(config, "toy")
    assert text.startswith("recipe: toy\nalgo:\n")
    (tmp_path / "x.yaml").write_text(text)
    tree = read_tree(tmp_path / "x.yaml")
    assert tree.pop("recipe") == "toy"
    assert build(tree, Recipe) == config
    assert build_from_dict(to_dict(config), Recipe) == config
    assert to_dict(config)["algo"]["hidden"] == [64, 64]
    with pytest.raises(TypeError):
        to_dict(Recipe)


def test_imports_stay_light() -> None:
    code = (
        "import sys, experiment.run, experiment.compare, experiment.video, experiment.statistics\n"
        "print([name for name in ('torch', 'wandb', 'matplotlib', 'av') if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
