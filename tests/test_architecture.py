"""The arrows between rooms, the size of files and functions, what may lie where: docs/ARCHITECTURE.md, enforced.

The checks read the source (lazy imports included) and import nothing but the recipes that configs/ names.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent

# Room -> rooms it may import, besides itself.
ARROWS: dict[str, set[str]] = {
    "policy_core": set(),
    "experiment": set(),
    "envs": set(),
    "llm_rlhf": {"policy_core", "experiment", "envs"},
    "embodied": {"policy_core", "experiment", "envs", "llm_rlhf"},
    "tandem": {"policy_core", "experiment", "envs", "llm_rlhf", "embodied"},
    "studies": {"policy_core", "experiment", "envs", "llm_rlhf", "embodied", "tandem"},
}
CORE_LIBRARIES = {"torch"}
NOT_IN_ENVS = {"torch", "transformers", "stable_baselines3", "d3rlpy", "peft", "accelerate"}
UNPICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "shelve"}
MOST_LINES_OF_FILE, MOST_LINES_OF_FUNCTION = 500, 80
LEFT_FOR_LATER = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def product_files() -> list[Path]:
    return [path for room in ARROWS for path in python_files(room)]


def all_files() -> list[Path]:
    return [*product_files(), *python_files("tests")]


def imported(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every absolute import, at any depth, `import_module("literal")` included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, first.value


def roots(source: str) -> Iterator[tuple[int, str]]:
    """(line, first part of the name) of every import."""
    for line, name in imported(source):
        yield line, name.partition(".")[0]


def forbidden_imports(room: str, source: str) -> list[str]:
    """What a file of `room` imports although it may not, as "LINE: NAME"."""
    found = []
    for line, name in roots(source):
        other_room = name in ARROWS and name != room and name not in ARROWS[room]
        core = room == "policy_core" and name not in CORE_LIBRARIES | {room} | sys.stdlib_module_names
        body = room == "envs" and name in NOT_IN_ENVS
        if other_room or core or body or name == "tests" or name in UNPICKLERS:
            found.append(f"{line}: {name}")
    return found


def swallowed(source: str) -> list[int]:
    """Lines of `except ...: pass` and of a bare `except:`."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or all(isinstance(inner, ast.Pass) for inner in node.body))
    ]


def long_functions(source: str) -> list[str]:
    return [
        f"{node.lineno}: {node.name}, {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MOST_LINES_OF_FUNCTION
    ]


def unsafe_loading(source: str) -> list[int]:
    """Lines of calls that would unpickle a file: `weights_only=False`, `allow_pickle=True`."""
    unsafe = {("weights_only", False), ("allow_pickle", True)}
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.keyword)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, bool)
        and (node.arg, node.value.value) in unsafe
    ]


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Rooms that import each other in a circle; empty where there is none."""
    left = {room: set(targets) - {room} for room, targets in graph.items()}
    while True:
        free = [room for room, targets in left.items() if not targets & left.keys()]
        if not free:
            return sorted(left)
        for room in free:
            del left[room]


def at(path: Path, found: list[str] | list[int]) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{item}" for item in found]


# ---------------------------------------------------------------- the tree as it is


def test_rooms_import_only_what_the_arrows_allow() -> None:
    files = [(room, path) for room in ARROWS for path in python_files(room)]
    assert files
    assert [hit for room, path in files for hit in at(path, forbidden_imports(room, path.read_text()))] == []


def test_rooms_do_not_import_each_other_in_a_circle() -> None:
    graph = {
        room: {name for path in python_files(room) for _, name in roots(path.read_text()) if name in ARROWS}
        for room in ARROWS
    }
    assert cycle(graph) == []


def test_every_package_is_a_known_room() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages <= ARROWS.keys(), "a new room needs its arrows, here and in docs/ARCHITECTURE.md"


def test_files_are_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in all_files()}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES_OF_FILE} == {}


def test_functions_are_short() -> None:
    assert [hit for path in all_files() for hit in at(path, long_functions(path.read_text()))] == []


def test_nothing_is_left_for_later() -> None:
    hits = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in all_files()
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if LEFT_FOR_LATER.search(line)
    ]
    assert hits == []


def test_no_exception_is_swallowed() -> None:
    assert [hit for path in all_files() for hit in at(path, swallowed(path.read_text()))] == []


def test_nothing_is_unpickled_from_files() -> None:
    assert [hit for path in product_files() for hit in at(path, unsafe_loading(path.read_text()))] == []


def test_test_folders_are_not_packages() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


# ---------------------------------------------------------------- configs/

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def test_configs_holds_only_yaml() -> None:
    assert [p for p in (ROOT / "configs").rglob("*") if p.is_file() and p.suffix != ".yaml"] == []


@pytest.mark.parametrize("path", CONFIGS, ids=[str(p.relative_to(ROOT)) for p in CONFIGS])
def test_config_builds(path: Path) -> None:
    """Every shipped file names its recipe first and fits the recipe's configuration."""
    from tandem.recipes import RECIPES, read_plan

    recipe = next(iter(yaml.safe_load(path.read_text()).items()))
    assert recipe[0] == "recipe"
    module = RECIPES[recipe[1]][0]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not written yet")
    plan = read_plan(path)
    assert plan.recipe == recipe[1]
    assert plan.config.run.dry_run is False


# ---------------------------------------------------------------- the checks themselves can fail


def test_forbidden_imports_are_seen_wherever_they_hide() -> None:
    assert forbidden_imports("policy_core", "import numpy\nimport math, torch.nn") == ["1: numpy"]
    assert forbidden_imports("llm_rlhf", "def f():\n    from embodied.policies import x") == ["2: embodied"]
    assert forbidden_imports("embodied", "from llm_rlhf import models\nimport tandem.cli") == ["2: tandem"]
    assert forbidden_imports("envs", "import torch") == ["1: torch"]
    assert forbidden_imports("experiment", "importlib.import_module('envs.make')") == ["1: envs"]
    assert forbidden_imports("tandem", "import studies\nimport pickle") == ["1: studies", "2: pickle"]
    assert forbidden_imports("policy_core", "from . import gae\nfrom policy_core.kl import k1") == []


def test_swallowed_exceptions_are_seen() -> None:
    assert swallowed("try:\n    f()\nexcept ValueError:\n    pass") == [3]
    assert swallowed("try:\n    f()\nexcept:\n    g()") == [3]
    assert swallowed("try:\n    f()\nexcept ValueError:\n    g()") == []


def test_long_functions_are_seen() -> None:
    body = "\n".join("    pass" for _ in range(80))
    assert long_functions(f"def f():\n{body}") == ["1: f, 81 lines"]
    assert long_functions(f"def f():\n{body[9:]}") == []


def test_unsafe_loading_is_seen() -> None:
    assert unsafe_loading("torch.load(p, weights_only=False)\nnp.load(p, allow_pickle=False)") == [1]


def test_cycles_are_seen() -> None:
    assert cycle({"a": {"b"}, "b": {"a"}, "c": {"a"}}) == ["a", "b", "c"]
    assert cycle({"a": {"b"}, "b": set(), "c": {"a", "b"}}) == []
