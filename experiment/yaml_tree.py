"""Reading YAML into plain values that remember where they came from.

YAML is read by the rules of version 1.2 where those of 1.1 surprise: `off`, `yes` and `on` are text, `1e-4`
is a number, `010`, `1:30` and dates are text. Duplicate keys are errors.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from experiment.errors import UserError

Where = tuple[str, ...]
REQUIRED: Any = object()
COMMAND_LINE = "command line"


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalar rules of YAML 1.2 (plus `1_000`), which refuses duplicate keys."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML copies the rules of the base class unless told not to)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(None, None, "a key must be a plain name", key.start_mark)
            if key.value in seen:
                problem = f"duplicate key {key.value} (first on line {seen[key.value]})"
                raise yaml.MarkedYAMLError(None, None, problem, key.start_mark)
            seen[key.value] = key.start_mark.line + 1
        return node

    def construct_number(self, node: yaml.ScalarNode) -> float:
        """`.inf` and `.nan` lose their dot; everything else is as Python reads it."""
        return float(re.sub(r"\.(?=inf|nan)", "", node.value.lower()))


class YamlDumper(yaml.SafeDumper):
    """SafeDumper that also quotes the text that `read_tree` would take for a number."""


def _add_rules() -> None:
    rules = {
        "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
        "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        "int": (r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
        "float": (
            r"[-+]?([0-9][0-9_]*)?\.[0-9][0-9_]*([eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*\.?([eE][-+]?[0-9]+)"
            r"|[-+]?[0-9][0-9_]*\.|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
            "-+.0123456789",
        ),
        "merge": (r"<<", "<"),
    }
    for tag, (pattern, first) in rules.items():
        for cls in (_Loader, YamlDumper):
            cls.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), list(first))
    _Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)


_add_rules()


@dataclasses.dataclass
class ConfigTree:
    """Plain values read from a file, with the place each of them came from.

    Attributes:
        values: nested dicts, lists and scalars.
        marks: path of a value -> "FILE:LINE" or "command line".
        source: what to name when a path has no mark of its own.
    """

    values: dict[str, Any]
    marks: dict[Where, str]
    source: str

    def where(self, path: Where = ()) -> str:
        """The place of `path`, or of the nearest enclosing section that has one."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.marks:
                return self.marks[path[:length]]
        return self.source

    def pop(self, key: str, default: Any = REQUIRED) -> Any:
        """Remove and return a top-level value (a recipe's name, say) before `build`.

        Raises:
            UserError: the key is absent and no default was given.
        """
        if key not in self.values and default is REQUIRED:
            raise UserError(f"{self.source}: missing key {key}")
        return self.values.pop(key, default)


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> ConfigTree:
    """Read a YAML file and apply `a.b=c` overrides, whose values are parsed as YAML too.

    Raises:
        UserError: the file is missing, unreadable, not a mapping, malformed or has a duplicate key, or an
            override is not of the form `a.b=c`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file{_neighbours(Path(path))}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the configuration file: {error}") from error
    tree = ConfigTree({}, {}, str(path))
    values = _parse(text, str(path), tree.marks, ())
    if not isinstance(values, dict) and values is not None:
        raise UserError(f"{path}: expected keys and values, such as `seed: 1`, got {show(values)}")
    tree.values = values or {}
    for override in overrides:
        _override(tree, override)
    return tree


def _neighbours(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" (there is no folder {folder})"
    near = difflib.get_close_matches(path.name, [p.name for p in folder.iterdir()], n=1)
    return f"; did you mean {folder / near[0]}?" if near else ""


def _parse(text: str, source: str, marks: dict[Where, str], path: Where) -> Any:
    """Parse YAML into plain values and fill `marks`; the line is left out for the command line."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _plain(loader, node, source, marks, path, ())
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f":{error.problem_mark.line + 1}"
        place = source if source == COMMAND_LINE else source + line
        raise UserError(f"{place}: malformed YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{source}: malformed YAML: {' '.join(str(error).split())}") from error
    finally:
        loader.dispose()


def _plain(
    loader: Any, node: yaml.Node, source: str, marks: dict[Where, str], path: Where, above: tuple[int, ...]
) -> Any:
    if id(node) in above:
        raise UserError(f"{_mark(source, node)}: a YAML alias contains itself")
    above = (*above, id(node))
    if isinstance(node, yaml.ScalarNode):
        return loader.construct_object(node)
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            marks[(*path, str(index))] = _mark(source, child)
        return [_plain(loader, c, source, marks, (*path, str(i)), above) for i, c in enumerate(node.value)]
    loader.flatten_mapping(node)
    values: dict[str, Any] = {}
    for key, child in node.value:
        inner = (*path, key.value)
        marks[inner] = _mark(source, key)
        values[key.value] = _plain(loader, child, source, marks, inner, above)
    return values


def _mark(source: str, node: yaml.Node) -> str:
    return source if source == COMMAND_LINE else f"{source}:{node.start_mark.line + 1}"


def _override(tree: ConfigTree, override: str) -> None:
    """Apply one `a.b=c` to the tree."""
    key, equals, text = override.partition("=")
    path = tuple(key.strip().lstrip("-").split("."))
    if not equals or not all(path):
        raise UserError(f"{COMMAND_LINE}: {override!r}: expected an override of the form section.key=value")
    section: Any = tree.values
    for depth, name in enumerate(path[:-1], start=1):
        if isinstance(section, dict):
            if section.get(name) is None:
                section[name] = {}
                tree.marks[path[:depth]] = COMMAND_LINE
            section = section[name]
        else:
            section = section[_index(section, name, override)]
        if not isinstance(section, dict | list):
            raise UserError(f"{COMMAND_LINE}: {override!r}: {'.'.join(path[:depth])} is a value, not a section")
    for old in [mark for mark in tree.marks if mark[: len(path)] == path]:
        del tree.marks[old]
    tree.marks[path] = COMMAND_LINE
    value = _parse(text, COMMAND_LINE, tree.marks, path)
    section[path[-1] if isinstance(section, dict) else _index(section, path[-1], override)] = value


def _index(section: list[Any], name: str, override: str) -> int:
    if not name.isdigit() or int(name) >= len(section):
        raise UserError(f"{COMMAND_LINE}: {override!r}: {name} is not an index of a list of {len(section)}")
    return int(name)


def show(value: Any) -> str:
    """A value as an error message quotes it."""
    if value is None:
        return "nothing (null)"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
