import re

import numpy as np
import pytest
import yaml

from envs.randomization import KINDS, Randomization, parse_specs
from envs.randomization.randomizer import WRITERS
from envs.randomization.sensing import UNTOUCHED
from envs.randomization.spec import Distribution, combine, sample, select


def test_every_field_acts_somewhere() -> None:
    assert set(KINDS) == {*WRITERS, *UNTOUCHED}


def test_yaml_gives_specs() -> None:
    text = """
    - {field: mass, operation: scale, range: [0.8, 1.2], names: "object*"}
    - {field: friction, operation: set, range: [1e-4, 2], distribution: log_uniform, when: start, names: [a, b]}
    - {field: kp, operation: scale, range: [1, 1], when: interval, period: 2, together: true}
    """
    assert parse_specs(yaml.safe_load(text)) == (
        Randomization("mass", "scale", (0.8, 1.2), names=("object*",)),
        # YAML reads 1e-4 as a string
        Randomization("friction", "set", (1e-4, 2.0), "log_uniform", "start", ("a", "b")),
        Randomization("kp", "scale", (1.0, 1.0), when="interval", period=2.0, together=True),
    )


def test_specs_pass_through() -> None:
    spec = Randomization("mass", "scale", (0.8, 1.2))
    assert parse_specs([spec, {"field": "mass", "operation": "scale", "range": (0.8, 1.2)}]) == (spec, spec)


def test_one_name_may_stand_alone() -> None:
    spec = Randomization("mass", "scale", (0.8, 1.2), names="object*")
    assert spec == Randomization("mass", "scale", (0.8, 1.2), names=("object*",))
    assert select(spec, {"object0": 0, "object1": 1, "link": 2}).tolist() == [0, 1]
    assert str(spec) == "mass scale (0.8, 1.2) of object*"


GOOD = {"field": "mass", "operation": "scale", "range": [0.5, 2]}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"field": "frction"}, "there is no randomization of 'frction'; did you mean friction?"),
        ({"opration": "set"}, "unknown key 'opration'; did you mean operation?"),
        ({"operation": "multiply"}, "mass: operation 'multiply' is not one of set, add, scale"),
        ({"distribution": "loguniform"}, "did you mean log_uniform?"),
        ({"when": "restart"}, "mass: when 'restart' is not one of start, reset, interval"),
        ({"range": [2, 0.5]}, "mass: a range is two finite numbers, low before high; got (2.0, 0.5)"),
        ({"range": [0.5, float("nan")]}, "two finite numbers"),
        ({"range": [1]}, "mass: a range is [low, high], got [1]"),
        ({"range": ["low", 2]}, "range: 'low' is not a number"),
        ({"range": [True, 2]}, "range: True is not a number"),
        ({"range": [-1, 2]}, "mass: a factor cannot be negative"),
        ({"range": [0, 2], "distribution": "log_uniform"}, "log_uniform needs a range above 0"),
        ({"operation": "set", "range": [0, 1]}, "mass: values lie between 1e-06 and inf"),
        ({"when": "interval"}, "`period` belongs to `when: interval`, and is needed there"),
        ({"period": 1}, "`period` belongs to `when: interval`"),
        ({"when": "interval", "period": 0}, "the period must be above 0 seconds"),
        ({"names": []}, "mass: `names` is empty"),
        ({"names": [1]}, "mass: names are words"),
        ({"together": "yes"}, "mass: together is true or false"),
        ({"field": "gravity", "names": "sun"}, "gravity has no names to choose from"),
        ({"field": "camera_position"}, "camera_position: operation 'scale' is not one of add"),
        ({"field": "proprio_noise"}, "proprio_noise: operation 'scale' is not one of set"),
        ({"field": "saturation", "operation": "set"}, "saturation: values lie between 0 and 1"),
        (
            {"field": "action_latency", "operation": "set", "range": [0, 1.5]},
            "a uniform range of whole numbers is needed",
        ),
        (
            {"field": "action_latency", "operation": "set", "range": [0, 1], "distribution": "normal"},
            "a uniform range of whole numbers",
        ),
        (
            {"field": "action_latency", "operation": "set", "range": [0, 1], "when": "interval", "period": 1},
            "action_latency: when 'interval' is not one of start, reset",
        ),
    ],
)
def test_mistakes_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        parse_specs([GOOD, {**GOOD, **change}])
    assert str(caught.value).startswith("randomization 2: ")


def test_malformed_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="randomizations are a list, got dict"):
        parse_specs(GOOD)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="randomization 1: keys and values are needed, got 'mass'"):
        parse_specs(["mass"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="randomization 1: operation, range missing"):
        parse_specs([{"field": "mass"}])


@pytest.mark.parametrize(
    "distribution, mean",
    # log-uniform over (1, 4): (4 - 1) / ln 4 = 2.164
    [("uniform", 2.5), ("normal", 2.5), ("log_uniform", 2.164)],
)
def test_draws_follow_the_distribution(distribution: Distribution, mean: float) -> None:
    spec = Randomization("friction", "set", (1.0, 4.0), distribution)
    drawn = sample(spec, (20_000,), np.random.default_rng(0))
    assert drawn.min() >= 1
    assert drawn.max() <= 4
    assert drawn.mean() == pytest.approx(mean, abs=0.02)
    # uniform: 3 / sqrt(12) = 0.866; normal of 0.75, cut at two deviations: * 0.8796 = 0.660;
    # log-uniform: sqrt(15 / (2 ln 4) - 2.164^2) = 0.853
    deviation = {"uniform": 0.866, "normal": 0.660, "log_uniform": 0.853}[distribution]
    assert drawn.std() == pytest.approx(deviation, abs=0.015)


@pytest.mark.parametrize("distribution", ["uniform", "normal", "log_uniform"])
def test_a_range_of_one_value_gives_it(distribution: Distribution) -> None:
    spec = Randomization("friction", "set", (0.3, 0.3), distribution)
    assert (sample(spec, (50,), np.random.default_rng(0)) == 0.3).all()


def test_latencies_are_whole_and_reach_both_ends() -> None:
    spec = Randomization("action_latency", "set", (1, 3))
    assert set(sample(spec, (100,), np.random.default_rng(0))) == {1.0, 2.0, 3.0}


def test_operations() -> None:
    present, drawn = np.array([2.0, 3.0]), np.array([0.5, 10.0])
    assert combine(present, "set", drawn).tolist() == [0.5, 10.0]
    assert combine(present, "add", drawn).tolist() == [2.5, 13.0]
    assert combine(present, "scale", drawn).tolist() == [1.0, 30.0]


def test_names_are_globs_in_the_models_order() -> None:
    there = {"object10": 4, "object2": 3, "table": 1}
    spec = Randomization("friction", "set", (0, 1), names=("table", "object*", "object2"))
    assert select(spec, there).tolist() == [1, 3, 4]


def test_a_glob_without_a_match_lists_the_names() -> None:
    spec = Randomization("friction", "set", (0, 1), names=("table", "cube*"))
    expected = "randomization of friction: no geom is named 'cube*'; there are: box, table"
    with pytest.raises(ValueError, match=re.escape(expected)):
        select(spec, {"box": 0, "table": 1})
