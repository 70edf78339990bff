"""The complete state of an environment as a tree of numpy arrays and scalars, and back, bit for bit.

Three kinds of state are read from every layer (wrappers and the environment itself):

MuJoCo data   the integration state (time, qpos, qvel, act, controls, warm start, mocap, history, ...) and all
              fixed-size derived arrays. The latter matter because after `mj_step` positions of bodies and
              sites still describe the *start* of the last substep: computing them afresh gives other bits,
              and environments read them (palm and handle of the Adroit door, the torso of the Ant).
              Contact and constraint lists are not kept; the next step computes them before it uses them.
MuJoCo model  the fields, also those of `opt`, that differ from the model as it was made: resets may move
              bodies, randomization may change masses. It may belong to a helper object, but not lie in a list.
attributes    None, numbers, strings, numpy arrays and generators, and lists, tuples, dicts and plain objects
              of these. An array that is a view of another is written in place, as plain objects are; others are
              replaced, and so are frozen dataclasses, which others may hold too: two names for one object
              become two objects.

Spaces, specs, functions, classes, modules and MuJoCo's renderer are taken as constant. Anything else (a Box2D
world, a socket, a queue) cannot be read: `obstacle` names it.
"""

import dataclasses
import enum
import functools
import random
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer
from gymnasium.envs.registration import EnvSpec

_INTEGRATION = mujoco.mjtState.mjSTATE_INTEGRATION
_CONSTANT = (
    gymnasium.Space,
    EnvSpec,
    MujocoRenderer,
    *([mujoco.Renderer] if hasattr(mujoco, "Renderer") else []),  # mujoco lacks it where no graphics library is
    type,
    types.ModuleType,
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    functools.partial,
)
# what a layer holds besides its own state: the next layer, and the arguments that it was made with
_NOT_STATE = {"env", "_saved_kwargs", "_ezpickle_args", "_ezpickle_kwargs"}
_COLLISION_TREE = "bvh_"  # arrays that only speed up collision detection
# how many entries the lists of what is awake have; they change where MuJoCo may put things to sleep
_AWAKE = ("ntree_awake", "nbody_awake", "nparent_awake", "nv_awake")
_DEEPEST = 6
_PYTHON_CLASS = 1 << 9  # CPython's Py_TPFLAGS_HEAPTYPE


class _UnreadableError(Exception):
    """An attribute holds something that has no known state; the message names it."""


def model_fields(model: mujoco.MjModel) -> dict[str, np.ndarray]:
    """Copies of all numeric fields of the model and, as 'opt.NAME', of its options."""
    fields = {name: value.copy() for name, value in _arrays(model)}
    for name in _public_names(type(model.opt)):
        value = getattr(model.opt, name)
        if isinstance(value, (bool, int, float, np.ndarray)):
            fields[f"opt.{name}"] = np.array(value)
    return fields


def nominal_fields(env: gymnasium.Env[Any, Any]) -> dict[str, dict[str, np.ndarray]]:
    """'layer.attribute' -> fields of each MuJoCo model of `env`, to be read before its first reset.

    A model of a helper object is 'layer.attribute.attribute'.
    """
    return {
        key: model_fields(model)
        for depth, layer in enumerate(_layers(env))
        for key, model in _models(layer, f"{depth}.", frozenset())
    }


def _models(owner: object, key: str, above: frozenset[int]) -> Iterator[tuple[str, mujoco.MjModel]]:
    """The models among the attributes of `owner` and of its helper objects."""
    for name, value in vars(owner).items():
        if isinstance(value, mujoco.MjModel):
            yield key + name, value
        elif name in _NOT_STATE or isinstance(value, _CONSTANT) or id(value) in above:
            continue
        elif len(above) < _DEEPEST and _is_plain_object(value):
            yield from _models(value, f"{key}{name}.", above | {id(value)})


def obstacle(env: gymnasium.Env[Any, Any], nominal: Mapping[str, Mapping[str, np.ndarray]]) -> str | None:
    """None if the state of `env` can be captured, else one line that names what cannot be read.

    nominal: `nominal_fields` before the first reset.
    """
    try:
        capture(env, nominal)
    except _UnreadableError as error:
        return str(error)
    return None


def capture(env: gymnasium.Env[Any, Any], nominal: Mapping[str, Mapping[str, np.ndarray]]) -> list[dict[str, Any]]:
    """The state of each layer of `env`, outermost first. Call it only where `obstacle` is None."""
    return [
        _read_attributes(layer, f"{type(layer).__name__}.", f"{depth}.", nominal, frozenset())
        for depth, layer in enumerate(_layers(env))
    ]


def restore(
    env: gymnasium.Env[Any, Any],
    state: list[dict[str, Any]],
    nominal: Mapping[str, Mapping[str, np.ndarray]],
) -> None:
    """Put back what `capture` read. Raises ValueError when the state is of another kind of environment."""
    layers = list(_layers(env))
    if len(layers) != len(state):
        raise ValueError(f"the state has {len(state)} layers, environment {env} has {len(layers)}")
    # a data object is written after the model that its derived quantities depend on
    for depth, (layer, attributes) in enumerate(zip(layers, state, strict=True)):
        _write_models(layer, attributes, f"{depth}.", nominal)
    for layer, attributes in zip(layers, state, strict=True):
        for name, node in attributes.items():
            _write_attribute(layer, name, node)


def _layers(env: gymnasium.Env[Any, Any]) -> Iterator[gymnasium.Env[Any, Any]]:
    while isinstance(env, gymnasium.Wrapper):
        yield env
        env = env.env
    yield env


def _public_names(cls: type) -> Iterator[str]:
    return (name for name in dir(cls) if not name.startswith("_"))


def _arrays(struct: mujoco.MjModel | mujoco.MjData) -> Iterator[tuple[str, np.ndarray]]:
    for name in _public_names(type(struct)):
        if not name.startswith(_COLLISION_TREE):
            value = getattr(struct, name)
            if isinstance(value, np.ndarray) and value.size:
                yield name, value


# --- reading -----------------------------------------------------------------------------------------------
# A node is a plain value (None, bool, int, float, str, array), or {"kind": ..., ...}.


def _read_attributes(
    owner: object,
    path: str,
    key: str,
    nominal: Mapping[str, Mapping[str, np.ndarray]],
    above: frozenset[int],
) -> dict[str, Any]:
    """path names an attribute to the user, key its model in `nominal` ("" where no model can be)."""
    nodes: dict[str, Any] = {}
    for name, value in vars(owner).items():
        if name in _NOT_STATE or isinstance(value, _CONSTANT):
            continue
        if isinstance(value, mujoco.MjModel):
            if key + name not in nominal:
                raise _UnreadableError(f"{path}{name}: a MuJoCo model in a list, or made after the environment")
            fields = model_fields(value)
            if _shapes(fields) != _shapes(nominal[key + name]):
                raise _UnreadableError(f"{path}{name}: a MuJoCo model that is made anew, with other parts")
            nodes[name] = {"kind": "model", "fields": _changed_fields(fields, nominal[key + name])}
        elif _is_frozen(value) or not _is_plain_object(value):
            nodes[name] = _read(value, path + name, above)
        else:
            below = _below(value, path + name, above)
            entries = _read_attributes(value, f"{path}{name}.", f"{key}{name}." if key else "", nominal, below)
            nodes[name] = _object_node(value, entries)
    return nodes


def _shapes(fields: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in fields.items()}


def _changed_fields(fields: Mapping[str, np.ndarray], nominal: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        name: value
        for name, value in fields.items()
        if not np.array_equal(value, nominal[name], equal_nan=value.dtype.kind == "f")
    }


def _read(value: Any, path: str, above: frozenset[int]) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return value.copy()
    if isinstance(value, np.generic) and value.dtype.kind in "biuf":
        return {"kind": "scalar", "value": np.array([value])}
    if isinstance(value, np.random.Generator):
        return {"kind": "generator", "value": value.bit_generator.state}
    if type(value) is random.Random:
        version, words, gauss = value.getstate()
        return {"kind": "random", "version": version, "words": np.array(words, np.uint32), "gauss": gauss}
    if isinstance(value, mujoco.MjData):
        return {"kind": "data", **_read_data(value)}
    above = _below(value, path, above)
    if type(value) in (list, tuple):
        items = [_read(item, f"{path}[{i}]", above) for i, item in enumerate(value)]
        return {"kind": type(value).__name__, "items": items}
    if type(value) is dict:
        if any(type(key) not in (str, int) for key in value):
            raise _UnreadableError(f"{path}: a dict whose keys are neither strings nor integers")
        return {
            "kind": "dict",
            "items": {key: _read(v, f"{path}[{key!r}]", above) for key, v in value.items()},
        }
    if _is_frozen(value):
        entries = {
            field.name: _read(getattr(value, field.name), f"{path}.{field.name}", above)
            for field in dataclasses.fields(value)
        }
        return {"kind": "frozen", "class": _class_name(type(value)), "items": entries}
    if _is_plain_object(value):
        return _object_node(value, _read_attributes(value, f"{path}.", "", {}, above))
    raise _UnreadableError(f"{path}: {_class_name(type(value)).replace(':', '.')} has no readable state")


def _object_node(value: object, entries: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "object", "class": type(value).__qualname__, "items": entries}


def _below(value: object, path: str, above: frozenset[int]) -> frozenset[int]:
    """The ids of all that holds the parts of `value`: `above`, and itself."""
    if len(above) >= _DEEPEST or id(value) in above:
        raise _UnreadableError(f"{path}: nested too deeply, or within itself")
    return above | {id(value)}


def _class_name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _is_frozen(value: object) -> bool:
    """Whether it is a frozen dataclass that can be found again by its name."""
    cls = type(value)
    return _frozen_class(_class_name(cls)) is cls


def _frozen_class(name: str) -> Any:
    """The frozen dataclass of that name in a module that is loaded; None if there is none."""
    module, _, qualified = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in qualified.split("."):
        found = getattr(found, part, None)
    parameters = getattr(found, "__dataclass_params__", None)
    return found if isinstance(found, type) and parameters is not None and parameters.frozen else None


def _is_plain_object(value: Any) -> bool:
    """Whether everything the object knows is in its `__dict__`: no slots, no part written in C, which would have a
    way of its own to be copied."""
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, enum.Enum)
        and "__reduce__" not in {name for cls in type(value).__mro__[:-1] for name in vars(cls)}
        and all(
            cls.__flags__ & _PYTHON_CLASS and not vars(cls).get("__slots__")
            for cls in type(value).__mro__
            if cls is not object
        )
    )


def _read_data(data: mujoco.MjData) -> dict[str, Any]:
    integration = np.empty(mujoco.mj_stateSize(data.model, _INTEGRATION))
    mujoco.mj_getState(data.model, data, integration, _INTEGRATION)
    fixed_size = [name for name, _ in _arrays(mujoco.MjData(data.model))]  # without contacts the others are empty
    return {
        "integration": integration,
        "derived": {name: getattr(data, name).copy() for name in fixed_size},
        "awake": {name: int(getattr(data, name)) for name in _AWAKE if hasattr(data, name)},
    }


# --- writing -----------------------------------------------------------------------------------------------


def _write_models(
    owner: object, nodes: Mapping[str, Any], key: str, nominal: Mapping[str, Mapping[str, np.ndarray]]
) -> None:
    for name, node in nodes.items():
        match node:
            case {"kind": "model"}:
                _write_model(getattr(owner, name), node["fields"], nominal[key + name])
            case {"kind": "object"} if name in vars(owner):
                _write_models(vars(owner)[name], node["items"], f"{key}{name}.", nominal)


def _write_attribute(owner: object, name: str, node: Any) -> None:
    # through __dict__, since some classes refuse setattr
    vars(owner)[name] = _write(vars(owner).get(name), node)


def _write(current: Any, node: Any) -> Any:
    """The value that `node` describes, reusing `current` where others may hold references to it."""
    if isinstance(node, np.ndarray):
        in_place = isinstance(current, np.ndarray) and current.base is not None and current.flags.writeable
        if in_place and current.shape == node.shape and current.dtype == node.dtype:
            current[...] = node
            return current
        return node.copy()
    if not isinstance(node, dict):
        return node
    match node["kind"]:
        case "scalar":
            return node["value"][0]
        case "generator":
            return _write_generator(current, node["value"])
        case "random":
            found = current if type(current) is random.Random else random.Random()
            found.setstate((node["version"], tuple(node["words"].tolist()), node["gauss"]))
            return found
        case "model":  # it was written before
            return current
        case "data":
            return _write_data(current, node)
        case "list" | "tuple" as kind:
            present = current if isinstance(current, (list, tuple)) else ()
            items = [_write(present[i] if i < len(present) else None, item) for i, item in enumerate(node["items"])]
            return items if kind == "list" else tuple(items)
        case "dict":
            named = current if isinstance(current, dict) else {}
            return {key: _write(named.get(key), item) for key, item in node["items"].items()}
        case "frozen":
            return _write_frozen(node)
        case "object":
            if type(current).__qualname__ != node["class"]:
                raise ValueError(f"the state holds a {node['class']} where there is {type(current).__name__}")
            for name, item in node["items"].items():
                _write_attribute(current, name, item)
            return current
        case kind:
            raise ValueError(f"unknown kind of state {kind!r}")


def _write_frozen(node: Mapping[str, Any]) -> Any:
    cls = _frozen_class(node["class"])
    if cls is None:
        raise ValueError(f"the state holds a {node['class']}, which is no frozen dataclass here")
    made = object.__new__(cls)
    for name, item in node["items"].items():
        object.__setattr__(made, name, _write(None, item))
    return made


def _write_generator(current: np.random.Generator | None, state: dict[str, Any]) -> np.random.Generator:
    bit_generator = getattr(np.random, state["bit_generator"])()
    bit_generator.state = state
    if current is None or type(current.bit_generator) is not type(bit_generator):
        return np.random.Generator(bit_generator)
    current.bit_generator.state = state
    return current


def _write_data(data: mujoco.MjData | None, node: Mapping[str, Any]) -> mujoco.MjData | None:
    if data is None:  # not made yet: data that are made only when they are needed are scratch
        return None
    model, integration = data.model, node["integration"]
    if integration.shape != (mujoco.mj_stateSize(model, _INTEGRATION),):
        raise ValueError(f"the MuJoCo state has {integration.size} numbers, which is not this model's size")
    mujoco.mj_resetData(model, data)  # wakes what sleeps: the next lines must not depend on what was there
    mujoco.mj_setState(model, data, integration, _INTEGRATION)
    mujoco.mj_forward(model, data)  # for what is not kept: contacts and constraints
    mujoco.mj_setState(model, data, integration, _INTEGRATION)  # mj_forward moves the warm start
    for name, value in node["derived"].items():
        getattr(data, name)[...] = value
    for name, value in node.get("awake", {}).items():
        setattr(data, name, value)
    return data


def _write_model(
    model: mujoco.MjModel, changed: Mapping[str, np.ndarray], nominal: Mapping[str, np.ndarray]
) -> None:
    for name, present in model_fields(model).items():
        value = changed.get(name, nominal[name])
        if value.shape != present.shape:
            raise ValueError(f"model field {name} has shape {present.shape}, the state's is {value.shape}")
        if np.array_equal(value, present, equal_nan=value.dtype.kind == "f"):
            continue
        owner, field = (model.opt, name.removeprefix("opt.")) if name.startswith("opt.") else (model, name)
        if value.ndim:
            getattr(owner, field)[...] = value
        else:
            setattr(owner, field, value.item())
