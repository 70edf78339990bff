"""The declaration of a randomization: which fields there are, what may be asked of them, how values are drawn."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np

Operation = Literal["set", "add", "scale"]
Distribution = Literal["uniform", "log_uniform", "normal"]
When = Literal["start", "reset", "interval"]

_ANY: tuple[Operation, ...] = ("set", "add", "scale")
_ADD: tuple[Operation, ...] = ("add",)
_SET: tuple[Operation, ...] = ("set",)
_EVERY_TIME: tuple[When, ...] = ("start", "reset", "interval")
_NOT_DURING: tuple[When, ...] = ("start", "reset")


@dataclass(frozen=True)
class Kind:
    """What a field is: its unit, whose names select it ("" = there is one only), what is allowed, its bounds."""

    unit: str
    names_of: str = ""
    operations: tuple[Operation, ...] = _ANY
    times: tuple[When, ...] = _EVERY_TIME
    lowest: float = -math.inf
    highest: float = math.inf
    whole: bool = False


KINDS: dict[str, Kind] = {
    # physics
    "mass": Kind("kg; the inertia is scaled along", "body", lowest=1e-6),
    "friction": Kind("sliding friction", "geom", lowest=0),
    "damping": Kind("N m s/rad or N s/m, all degrees of freedom of the joint", "joint", lowest=0),
    "armature": Kind("kg m^2 or kg", "joint", lowest=0),
    "kp": Kind("stiffness of a position servo, in gain and bias alike", "actuator", lowest=1e-6),
    "kv": Kind("damping of a position or velocity servo", "actuator", lowest=0),
    "gain": Kind("gain of a motor (an actuator without bias)", "actuator", lowest=0),
    "gravity": Kind("m/s^2 along the nominal direction", lowest=0),
    # vision: the scene
    "camera_position": Kind("metres along each axis of the camera's body", "camera", _ADD),
    "camera_rotation": Kind("degrees about a random axis", "camera", _ADD),
    "camera_fov": Kind("degrees, vertical", "camera", lowest=1, highest=179),
    "light_position": Kind("metres along each axis; a directional light has none", "light", _ADD),
    "light_direction": Kind("degrees about a random axis", "light", _ADD),
    "light_diffuse": Kind("intensity, one number for the three channels", "light", lowest=0),
    "rgb": Kind("each channel in 0..1, cut off there", "geom", lowest=0, highest=1),
    "hue": Kind("degrees", "geom", ("add", "set")),
    "saturation": Kind("0..1, cut off there; `scale` keeps greys grey", "geom", lowest=0, highest=1),
    "brightness": Kind("0..1, the V of HSV, cut off there", "geom", lowest=0, highest=1),
    "texture": Kind("a random pattern of two colours, each channel in 0..1", "material", lowest=0, highest=1),
    # vision: the picture
    "image_brightness": Kind("share of full scale", operations=_ADD, lowest=-1, highest=1),
    "image_contrast": Kind("factor about mid-grey", operations=("scale",), lowest=0),
    "image_noise": Kind(
        "standard deviation of each channel of each pixel, share of full scale", "", _SET, lowest=0
    ),
    # the other senses
    "proprio_noise": Kind("standard deviation, in the vector's unit", "", _SET, lowest=0),
    "observation_latency": Kind("control steps", "", _SET, _NOT_DURING, lowest=0, whole=True),
    "action_latency": Kind("control steps", "", _SET, _NOT_DURING, lowest=0, whole=True),
}


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean X?' with the known word that is most alike."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.0)
    return f"; did you mean {match[0]}?" if match else ""


def _one_of(value: object, known: Sequence[str], what: str) -> None:
    if value not in known:
        raise ValueError(f"{what} {value!r} is not one of {', '.join(known)}{nearest(str(value), known)}")


@dataclass(frozen=True)
class Randomization:
    """One field of the things named by `names` (globs), drawn anew `when`.

    range: both ends included. `set` puts the drawn number in place of the nominal one, `add` adds it, `scale`
        multiplies by it.
    distribution: "normal" has its mean in the middle of the range and a standard deviation of a quarter of its
        width, and is drawn again while outside. Latencies are uniform over the integers of the range.
    when: "start" once per environment, "reset" once per episode, "interval" at the episode's start and after
        every `period` seconds of it.
    names: globs over the model's names; one may stand alone.
    together: one draw for all names instead of one for each.

    Several specs of one field apply one after the other. Raises ValueError for anything that is not possible.
    """

    field: str
    operation: Operation
    range: tuple[float, float]
    distribution: Distribution = "uniform"
    when: When = "reset"
    names: tuple[str, ...] | str = ("*",)
    period: float | None = None
    together: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", (self.names,) if isinstance(self.names, str) else tuple(self.names))
        if self.field not in KINDS:
            raise ValueError(f"there is no randomization of {self.field!r}{nearest(str(self.field), KINDS)}")
        kind = KINDS[self.field]
        _one_of(self.operation, kind.operations, f"{self.field}: operation")
        _one_of(self.distribution, get_args(Distribution), f"{self.field}: distribution")
        _one_of(self.when, kind.times, f"{self.field}: when")
        self._check_range(kind)
        if (self.period is not None) != (self.when == "interval"):
            raise ValueError(f"{self.field}: `period` belongs to `when: interval`, and is needed there")
        if self.period is not None and not 0 < self.period < math.inf:
            raise ValueError(f"{self.field}: the period must be above 0 seconds, got {self.period}")
        if not self.names:
            raise ValueError(f"{self.field}: `names` is empty")
        if not kind.names_of and self.names != ("*",):
            raise ValueError(f"{self.field} has no names to choose from, got {', '.join(self.names)}")

    def _check_range(self, kind: Kind) -> None:
        low, high = self.range
        if not (math.isfinite(low) and math.isfinite(high)) or low > high:
            raise ValueError(f"{self.field}: a range is two finite numbers, low before high; got ({low}, {high})")
        if self.distribution == "log_uniform" and low <= 0:
            raise ValueError(f"{self.field}: log_uniform needs a range above 0, got ({low}, {high})")
        if self.operation == "scale" and low < 0:
            raise ValueError(f"{self.field}: a factor cannot be negative, got ({low}, {high})")
        if self.operation == "set" and (low < kind.lowest or high > kind.highest):
            raise ValueError(
                f"{self.field}: values lie between {kind.lowest:g} and {kind.highest:g}, got ({low}, {high})"
            )
        if kind.whole and (self.distribution != "uniform" or low != int(low) or high != int(high)):
            raise ValueError(f"{self.field}: a uniform range of whole numbers is needed, got ({low}, {high})")

    def __str__(self) -> str:
        return f"{self.field} {self.operation} ({self.range[0]:g}, {self.range[1]:g}) of {', '.join(self.names)}"


# ---------------------------------------------------------------- from plain data


def parse_specs(items: Sequence[Mapping[str, Any] | Randomization]) -> tuple[Randomization, ...]:
    """Randomizations from mappings, as YAML gives them. `names` may be one string, numbers may be written 1e-4.

    Raises ValueError that names the entry, counted from 1, and the nearest key where one is unknown.
    """
    if isinstance(items, (str, Mapping)) or not isinstance(items, Sequence):
        raise ValueError(f"randomizations are a list, got {type(items).__name__}")
    parsed = []
    for number, item in enumerate(items, start=1):
        try:
            parsed.append(item if isinstance(item, Randomization) else _parse(item))
        except ValueError as error:
            raise ValueError(f"randomization {number}: {error}") from error
    return tuple(parsed)


def _parse(item: Mapping[str, Any]) -> Randomization:
    if not isinstance(item, Mapping):
        raise ValueError(f"keys and values are needed, got {item!r}")
    known = [each.name for each in fields(Randomization)]
    for key in item:
        if key not in known:
            raise ValueError(f"unknown key {key!r}{nearest(str(key), known)}")
    missing = [key for key in ("field", "operation", "range") if key not in item]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing")
    values = dict(item)
    ends = values["range"]
    if not isinstance(ends, (list, tuple)) or len(ends) != 2:
        raise ValueError(f"{item['field']}: a range is [low, high], got {ends!r}")
    values["range"] = (_number(ends[0], "range"), _number(ends[1], "range"))
    if values.get("period") is not None:
        values["period"] = _number(values["period"], "period")
    if "names" in values:
        names = values["names"]
        names = (names,) if isinstance(names, str) else names
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{item['field']}: names are words, got {values['names']!r}")
        values["names"] = tuple(names)
    if not isinstance(values.get("together", False), bool):
        raise ValueError(f"{item['field']}: together is true or false, got {values['together']!r}")
    return Randomization(**values)


def _number(value: Any, what: str) -> float:
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError as error:
            raise ValueError(f"{what}: {value!r} is not a number") from error
    raise ValueError(f"{what}: {value!r} is not a number")


# ---------------------------------------------------------------- names and numbers


def select(spec: Randomization, candidates: Mapping[str, int]) -> np.ndarray:
    """Indices of the candidates that the spec's globs name, each once, in the model's order.

    Raises ValueError where a glob names none, listing what there is.
    """
    for glob in spec.names:
        if not fnmatch.filter(candidates, glob):
            there = ", ".join(candidates) or "none"
            kind = KINDS[spec.field].names_of
            raise ValueError(f"randomization of {spec.field}: no {kind} is named {glob!r}; there are: {there}")
    chosen = {name for glob in spec.names for name in candidates if fnmatch.fnmatchcase(name, glob)}
    return np.array(sorted(candidates[name] for name in chosen), dtype=np.int64)


def sample(spec: Randomization, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Numbers of the spec's distribution, float64 of `shape`, all within the range."""
    low, high = spec.range
    if KINDS[spec.field].whole:
        return rng.integers(int(low), int(high), size=shape, endpoint=True).astype(np.float64)
    if spec.distribution == "log_uniform":
        drawn = np.exp(rng.uniform(math.log(low), math.log(high), size=shape))
    elif spec.distribution == "normal":
        middle, spread = (low + high) / 2, (high - low) / 4
        drawn = rng.normal(middle, spread, size=shape)
        while (outside := (drawn < low) | (drawn > high)).any() and spread > 0:
            drawn[outside] = rng.normal(middle, spread, size=int(outside.sum()))
    else:
        drawn = rng.uniform(low, high, size=shape)
    return np.clip(drawn, low, high)  # exp(log(x)) may miss x by a rounding


def combine(present: np.ndarray, operation: Operation, drawn: np.ndarray) -> np.ndarray:
    """The operation on the present values; `drawn` broadcasts to their shape."""
    if operation == "set":
        return np.broadcast_to(drawn, present.shape)
    return present + drawn if operation == "add" else present * drawn


def within_bounds(field: str, values: np.ndarray) -> np.ndarray:
    """The values themselves. Raises ValueError if one lies outside what the field can be."""
    kind = KINDS[field]
    if values.min() < kind.lowest or values.max() > kind.highest:
        worst = values.min() if values.min() < kind.lowest else values.max()
        raise ValueError(f"{field} would become {worst:g}; it lies between {kind.lowest:g} and {kind.highest:g}")
    return values
