"""Strict configuration: YAML plus `a.b=c` overrides into nested frozen dataclasses, and back.

Everything the user may have mistyped becomes a `UserError` that names the file and line (or the command
line), the dotted key and the nearest valid name. Values are validated by pydantic in strict mode, with two
courtesies: an integer is a valid float, and so is text such as "1e-4". A bool is never a number; a float is
never an integer.

A key that is left out takes its value from the enclosing dataclass's own default *instance*: a recipe that
declares `algo: PPOConfig = PPOConfig(lr=1e-5)` keeps that rate when the file only sets `algo.clip_range`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import BeforeValidator, Strict, TypeAdapter, ValidationError

from experiment.errors import UserError
from experiment.yaml_tree import COMMAND_LINE, REQUIRED, ConfigTree, Where, YamlDumper, read_tree, show

__all__ = ["ConfigTree", "build", "build_from_dict", "read_tree", "to_dict", "to_yaml"]

T = TypeVar("T")
_NUMBER = re.compile(r"[-+]?((\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|inf)|nan", re.IGNORECASE)

# ---------------------------------------------------------------- building dataclasses


def build(tree: ConfigTree, schema: type[T]) -> T:
    """Make the dataclass `schema` out of a tree.

    Fields may be bool, int, float, str, Path, Literal, `X | None`, unions, tuples, lists, dicts, other
    dataclasses, and tuples, lists, dicts or optionals of dataclasses.

    Raises:
        UserError: an unknown or missing key, a value of the wrong type, or a ValueError from a
        `__post_init__`.
    """
    result: T = _Builder(tree, schema).section(tree.values, schema, (), None)
    return result


def build_from_dict(data: Mapping[str, Any], schema: type[T], source: str = "config") -> T:
    """Make the dataclass `schema` out of plain nested dicts; errors name `source` and the dotted key."""
    return build(ConfigTree(dict(data), {}, source), schema)


class _Builder:
    """One walk over values and types together; holds what every error message needs."""

    def __init__(self, tree: ConfigTree, root: type) -> None:
        self.tree = tree
        self.root = root

    def fail(self, path: Where, problem: str, at: Where | None = None) -> UserError:
        dotted = ".".join(path)
        return UserError(
            f"{self.tree.where(path if at is None else at)}: {dotted + ': ' if dotted else ''}{problem}"
        )

    def section(self, values: Any, schema: type, path: Where, base: Any) -> Any:
        """A dataclass from a mapping; keys left out come from `base`, the enclosing default instance."""
        values = {} if values is None else values
        if not isinstance(values, Mapping):
            raise self.fail(path, f"expected a section with keys, got {show(values)}")
        fields = {field.name: field for field in dataclasses.fields(schema) if field.init}
        for key in values:
            if key not in fields:
                raise self.fail((*path, str(key)), self.unknown(str(key), path, list(fields)))
        hints = _hints(schema)
        arguments: dict[str, Any] = {}
        for name, field in fields.items():
            default = getattr(base, name) if type(base) is schema else _default(field)
            if name in values:
                arguments[name] = self.value(values[name], hints[name], (*path, name), default)
            elif default is not REQUIRED:
                arguments[name] = default
            elif dataclasses.is_dataclass(hints[name]):
                arguments[name] = self.section({}, hints[name], (*path, name), None)
            else:
                raise self.fail(path, f"missing key {'.'.join((*path, name))} ({_describe(hints[name])})")
        try:
            return schema(**arguments)
        except (ValueError, FileNotFoundError, UserError) as error:
            problem = " ".join(str(error).split())
            raise self.fail(path, problem, at=self.blamed(problem, path)) from error

    def blamed(self, problem: str, path: Where) -> Where:
        """The key that a section's complaint is about: of those that it names one from the command line, else the
        first, as in "clip_range must be positive"; the section where it names none that was set."""
        named = [(*path, word.rpartition(".")[2]) for word in re.findall(r"\w[\w.]*", problem)]
        marks = self.tree.marks
        typed = [key for key in named if marks.get(key) == COMMAND_LINE]
        return (typed or [key for key in named[:1] if key in marks] or [path])[0]

    def value(self, value: Any, annotation: Any, path: Where, default: Any) -> Any:
        """One field's value: a nested section, a container of sections, or a leaf for pydantic."""
        if dataclasses.is_dataclass(annotation):
            return self.section(value, annotation, path, default)  # type: ignore[arg-type]
        sections = _sections(annotation)
        if not sections:
            return self.leaf(value, annotation, path)
        origin, arguments = get_origin(annotation), get_args(annotation)
        if origin in (Union, types.UnionType):
            if isinstance(value, Mapping) and len(sections) == 1:
                return self.value(value, sections[0], path, default)
            if value is None and types.NoneType in arguments:
                return None
            raise self.fail(path, f"expected {_describe(annotation)}, got {show(value)}")
        if origin is dict and isinstance(value, Mapping):
            return {k: self.value(v, arguments[1], (*path, str(k)), REQUIRED) for k, v in value.items()}
        if origin in (tuple, list) and isinstance(value, list | tuple):
            fixed = origin is tuple and arguments[-1] is not Ellipsis
            if not fixed or len(arguments) == len(value):
                kinds = arguments if fixed else (arguments[0],) * len(value)
                pairs = enumerate(zip(value, kinds, strict=True))
                return origin(self.value(v, kind, (*path, str(i)), REQUIRED) for i, (v, kind) in pairs)
        raise self.fail(path, f"expected {_describe(annotation)}, got {show(value)}")

    def leaf(self, value: Any, annotation: Any, path: Where) -> Any:
        try:
            return _adapter(annotation).validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            inner = (*path, *(str(part) for part in first["loc"]))
            place = inner if inner in self.tree.marks else path
            expected = f"expected {_describe(annotation)}, got {show(value)}"
            choices = [str(choice) for choice in _choices(annotation)]
            near = difflib.get_close_matches(str(value), choices, n=1)
            if near:
                hint = f"; did you mean {near[0]}?"
            elif first["type"] == "int_type" and isinstance(value, float) and value.is_integer():
                hint = f"; write {int(value)}"
            elif first["type"] == "string_type" and isinstance(value, bool | int | float):
                hint = "; put it in quotes"
            elif first["type"].endswith(("_type", "_error")) or first["type"] == "missing":
                hint = ""
            else:
                hint = f" ({first['msg']})"
            raise UserError(f"{self.tree.where(place)}: {'.'.join(path)}: {expected}{hint}") from error

    def unknown(self, key: str, path: Where, here: list[str]) -> str:
        """Text for an unknown key: the nearest name in this section, or the same name in another one."""
        near = difflib.get_close_matches(key, here, n=1)
        candidates = [".".join((*path, near[0]))] if near else []
        everywhere = _dotted(self.root)
        candidates += [dotted for dotted in everywhere if dotted.rpartition(".")[2] == key]
        if not candidates:
            leaves = {dotted.rpartition(".")[2]: dotted for dotted in reversed(everywhere)}
            candidates = [leaves[name] for name in difflib.get_close_matches(key, leaves, n=1, cutoff=0.75)]
        if candidates:
            return f"unknown key; did you mean {candidates[0]}?"
        return (
            f"unknown key; the keys here are {', '.join(here)}" if here else "unknown key; there are no keys here"
        )


@cache
def _hints(schema: type) -> dict[str, Any]:
    return get_type_hints(schema, include_extras=True)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return REQUIRED if field.default is dataclasses.MISSING else field.default


def _sections(annotation: Any) -> list[type]:
    """The dataclasses that occur inside a type."""
    if dataclasses.is_dataclass(annotation):
        return [annotation]  # type: ignore[list-item]
    return [found for part in get_args(annotation) for found in _sections(part)]


def _dotted(schema: type, prefix: str = "", above: tuple[type, ...] = ()) -> list[str]:
    """Every dotted key of a schema, in order of declaration."""
    names: list[str] = []
    for field in dataclasses.fields(schema):
        names.append(prefix + field.name)
        for inner in _sections(_hints(schema)[field.name]):
            if inner not in above:
                names += _dotted(inner, f"{prefix}{field.name}.", (*above, schema))
    return names


# ---------------------------------------------------------------- leaves: strictness and description


def _to_float(value: Any) -> Any:
    """Text that is plainly a number becomes one; anything else is left for pydantic to judge. NaN sets nothing."""
    number = float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value
    if isinstance(number, float) and math.isnan(number):
        raise ValueError("must be a number, got nan")
    return number


def _strict_choice(annotation: Any) -> BeforeValidator:
    """Literal[1] must refuse True, which equals 1."""

    def check(value: Any) -> Any:
        if not any(type(value) is type(choice) and value == choice for choice in get_args(annotation)):
            raise ValueError("not one of the choices")
        return value

    return BeforeValidator(check)


def _harden(annotation: Any) -> Any:
    """The same type with strict leaves, so that nothing is converted behind the user's back."""
    if annotation is float:
        return Annotated[float, Strict(), BeforeValidator(_to_float)]
    if annotation in (bool, int, str):
        return Annotated[annotation, Strict()]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return Annotated[annotation, _strict_choice(annotation)]
    if origin is Annotated:
        return Annotated[(_harden(arguments[0]), *arguments[1:])]
    if origin in (Union, types.UnionType):
        return Union[tuple(_harden(part) for part in arguments)]  # noqa: UP007 (made at run time)
    if origin is not None and arguments:
        return origin[tuple(part if part is Ellipsis else _harden(part) for part in arguments)]
    return annotation


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(_harden(annotation))


def _choices(annotation: Any) -> list[Any]:
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return list(arguments)
    return [choice for part in arguments for choice in _choices(part)]


def _describe(annotation: Any) -> str:
    """A type in words a user understands."""
    simple = {bool: "true or false", int: "an integer", float: "a number", str: "text", Path: "a path"}
    if annotation in simple:
        return simple[annotation]
    if annotation is types.NoneType:
        return "null"
    if dataclasses.is_dataclass(annotation):
        return "a section with keys"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin is Annotated:
        return _describe(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(part) for part in arguments)
    if origin is dict:
        return f"names with values, each {_describe(arguments[1])}"
    if origin is tuple and arguments[-1] is not Ellipsis:
        return "a list of " + ", ".join(_describe(part) for part in arguments)
    if origin in (tuple, list):
        return f"a list, each item {_describe(arguments[0])}"
    return getattr(annotation, "__name__", str(annotation))


# ---------------------------------------------------------------- writing


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested dicts, lists and scalars: tuples become lists, paths become text."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"expected a dataclass instance, got {type(config).__name__}")
    return {
        field.name: _to_plain(getattr(config, field.name)) for field in dataclasses.fields(config) if field.init
    }


def _to_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {str(key): _to_plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def to_yaml(config: Any, recipe: str | None = None) -> str:
    """A configuration as YAML that `read_tree` and `build` turn into an equal one; `recipe:` comes first."""
    values = to_dict(config) if recipe is None else {"recipe": recipe, **to_dict(config)}
    return yaml.dump(values, Dumper=YamlDumper, sort_keys=False, allow_unicode=True, width=110)
