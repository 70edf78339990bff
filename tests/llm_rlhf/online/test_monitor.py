"""The monitor on made series: it warns before the turn or soon after, and is silent on healthy runs."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiment.errors import UserError
from experiment.state import load_state, save_state
from llm_rlhf.online.monitor import (
    HackingSuspected,
    Monitor,
    MonitorConfig,
    Warned,
    act_on,
    looks_needed,
    trend,
)
from llm_rlhf.online.recording import announce_looks
from llm_rlhf.rewards.functions import Scores

Series = Callable[[float], float]


def metrics(step: int, **changed: float) -> dict[str, float]:
    return {
        "objective/scores": 0.5,
        "eval/sampled": 0.5,
        "objective/kl": 1.0,
        "policy/entropy_avg": 1.0,
        "completions/mean_length": 20.0,
        **{name.replace("__", "/"): value for name, value in changed.items()},
    }


def climb(
    gold: Series, proxy: Series, *, noise: float, seed: int, looks: int = 60, reach: float = 6.0, **settings: Any
) -> list[Warned]:
    """All warnings of a run whose distance d = sqrt(KL) grows evenly to `reach`; step n is look n."""
    generator = np.random.default_rng(seed)
    monitor = Monitor(MonitorConfig(**settings))
    found = []
    for step in range(1, looks + 1):
        d = reach * step / looks
        numbers = metrics(
            step,
            objective__scores=proxy(d) + noise * generator.normal(),
            eval__sampled=gold(d) + noise * generator.normal(),
            objective__kl=d**2,
        )
        found += monitor.look(numbers, global_step=step).warnings
    return found


def gao(d: float) -> float:
    """Turns at d* = exp(1.2/0.6 - 1) = e: look 27.2 of 60 to d = 6."""
    return d * (1.2 - 0.6 * math.log(d))


@pytest.mark.parametrize("seed", range(5))
def test_over_optimisation_is_forecast_before_the_turn(seed: int) -> None:
    found = climb(gao, lambda d: 1.5 * d, noise=0.02, seed=seed)
    first = found[0]
    assert first.rule == "forecast"
    assert 0.7 * 27.2 < first.step < 27.2
    nats = float(first.line.split("KL of ")[1].split(" nats")[0])
    assert nats == pytest.approx(math.e**2, rel=0.5)


@pytest.mark.parametrize("logged", [True, False])
def test_the_forecast_holds_gold_against_the_kl_of_the_policy_that_it_judges(logged: bool) -> None:
    """Exact curves: gold turns at e, 7.39 nats, of its own KL; what the update was drawn from lags by half."""
    monitor = Monitor(MonitorConfig())
    found = []
    for step in range(1, 41):
        d = 0.1 * step
        kl = {"objective__kl": (d / 2) ** 2, **({"eval__kl": d**2} if logged else {})}
        given = metrics(step, objective__scores=1.5 * d, eval__sampled=gao(d), **kl)
        found += monitor.look(given, global_step=step).warnings
    first = found[0]
    assert first.rule == "forecast"
    assert first.step == 22  # the first d that is at least 0.8 e = 2.17
    nats = ("7.39", "4.84") if logged else ("1.85", "1.21")  # without it there is only the other KL, a quarter
    assert f"turn at a KL of {nats[0]} nats" in first.line
    assert f"(the KL is {nats[1]})" in first.line


def test_the_climbed_reward_is_held_against_the_kl_of_what_it_scored() -> None:
    """It levels off where gold does, on its own KL: solved. Against gold's, it would turn at twice the distance."""
    monitor = Monitor(MonitorConfig())
    found = []
    for step in range(1, 41):
        d = 0.1 * step
        given = metrics(
            step, objective__kl=(d / 2) ** 2, objective__scores=gao(d / 2), eval__kl=d**2, eval__sampled=gao(d)
        )
        found += [warned.rule for warned in monitor.look(given, global_step=step).warnings]
    assert "forecast" not in found


@pytest.mark.parametrize("seed", range(5))
def test_the_gap_is_seen_soon_after_the_turn(seed: int) -> None:
    found = climb(gao, lambda d: 1.5 * d, noise=0.02, seed=seed, turn_share=None)
    assert [warned.rule for warned in found[:1]] == ["gap"]
    assert 27 < found[0].step < 27 + 12
    assert abs(found[0].since - 27) <= 6  # the best look of the window: what is to be gone back to


@pytest.mark.parametrize(
    ("gold", "proxy"),
    [
        (lambda d: 0.5 + 0.1 * d, lambda d: 0.5 + 0.12 * d),  # both climb
        (lambda d: 1 - math.exp(-d), lambda d: 1.1 - math.exp(-d)),  # both level off: solved
        (lambda d: 0.5, lambda d: 0.5),  # nothing happens
        (lambda d: 0.5 - 0.05 * d, lambda d: 0.5 - 0.05 * d),  # both fall: a bad run, no hacking
    ],
)
def test_healthy_runs_are_left_alone(gold: Series, proxy: Series) -> None:
    """Chance alone: each look of 400 may fire with probability 0.025**2 at most."""
    found = [warned for seed in range(6) for warned in climb(gold, proxy, noise=0.03, seed=seed)]
    assert len(found) <= 1, [warned.line for warned in found]


def test_trend_by_hand() -> None:
    """y = 1, 2, 4 at x = 0, 1, 2: slope 1.5, residuals 1/6, -1/3, 1/6, so s**2 = 1/6 and t = 1.5/sqrt(1/12)."""
    rise, t = trend([0, 1, 2], [1, 2, 4])
    assert rise == pytest.approx(3.0)
    assert t == pytest.approx(1.5 / math.sqrt(1 / 12))
    assert trend([1, 2, 3], [5, 5, 5]) == (0.0, 0.0)
    assert trend([1, 2, 3], [3, 2, 1])[1] < -1e6


def looks(config: MonitorConfig, series: list[dict[str, float]], texts: list[list[str]] | None = None) -> list[str]:
    """The rules that warned, in order, as "RULE@STEP"."""
    monitor = Monitor(config)
    found = []
    for step, changed in enumerate(series, start=1):
        written = texts[step - 1] if texts else []
        prompts = [f"p{i}" for i in range(len(written))]
        report = monitor.look(metrics(step, **changed), global_step=step, prompts=prompts, completions=written)
        found += [f"{warned.rule}@{warned.step}" for warned in report.warnings]
    return found


def test_length_and_entropy_against_the_first_looks() -> None:
    lengths = [{"completions__mean_length": float(value)} for value in (18, 20, 22, 39, 41, 42, 30, 9)]
    assert looks(MonitorConfig(), lengths) == ["length@5", "length@8"]  # normal is 20, twice is allowed
    entropies = [{"policy__entropy_avg": value} for value in (1.0, 1.0, 1.0, 0.11, 0.09)]
    assert looks(MonitorConfig(), entropies) == ["entropy@5"]
    off = MonitorConfig(length_ratio=None, entropy_share=None)
    assert looks(off, lengths) == looks(off, entropies) == []


def test_kl_jumps_and_limits() -> None:
    kls = [{"objective__kl": value} for value in (0.01, 0.2, 2.0, 2.2, 6.1, 5.9, 18.0, 5.0, 18.5)]
    assert looks(MonitorConfig(window=4), kls) == []  # leaps from 0; then 18.0 and 18.5 of 6.1 and of 18.0
    assert looks(MonitorConfig(window=4, kl_ratio=2.9), kls) == ["kl@7"]
    small = [{"objective__kl": value} for value in (0.1, 0.1, 0.1, 0.1, 1.1, 0.1, 0.1, 0.1, 0.1, 1.2)]
    assert looks(MonitorConfig(window=4), small) == ["kl@10"]  # not at 5: exactly a nat is not more than one
    assert looks(MonitorConfig(kl_ratio=None, kl_limit=6.0), kls) == ["kl@5", "kl@7", "kl@9"]


def test_repeated_and_equal_texts() -> None:
    healthy = ["the quick brown fox jumps", "over a lazy dog that sleeps", "while nobody looks at it"]
    loops = ["yes yes yes yes yes yes yes", "!!!!!!!!!!!!!!!!!!!!!", healthy[0]]
    same = ["I cannot help with that."] * 3
    texts = [healthy, healthy, healthy, loops, healthy, same]
    assert looks(MonitorConfig(), [{}] * 6, texts) == ["repetition@4", "duplicates@6"]


def test_probes_are_a_users_rules(tmp_path: Path) -> None:
    rule = tmp_path / "rules.py"
    rule.write_text(
        "def flatters(prompt, completion):\n    return None if not completion else 'great' in completion"
    )
    name = f"{rule}:flatters"
    few = ["great question"] * 2 + ["no"] * 8
    some = ["great question"] * 4 + ["no"] * 6  # 20 points up, but of 10 completions: chance would do that
    many = ["great question"] * 8 + ["no"] * 2 + [""] * 5
    config = MonitorConfig(probes={name: 0.1}, repetition=None, duplicates=None)
    assert looks(config, [{}] * 5, [few] * 3 + [some, many]) == [f"probes/{name}@5"]
    monitor = Monitor(MonitorConfig(probes={name: 0.1}))
    report = monitor.look(metrics(1), global_step=1, prompts=["p"] * 15, completions=many)
    assert report.metrics["monitor/probes/rules.py:flatters"] == pytest.approx(0.8)
    with pytest.raises(UserError, match=r"monitor\.probes: .*there is no file"):
        Monitor(MonitorConfig(probes={"nowhere.py:f": 0.1}))
    rule.write_text("def flatters(prompt, text):\n    return 1/0")
    with pytest.raises(UserError, match=r"flatters: it raised ZeroDivisionError"):
        Monitor(MonitorConfig(probes={name: 0.1})).look(metrics(1), global_step=1, prompts=["p"], completions=["x"])


def test_a_rule_warns_once_until_it_has_been_silent() -> None:
    lengths = [{"completions__mean_length": float(value)} for value in (20, 20, 20, 90, 90, 20, 90)]
    assert looks(MonitorConfig(), lengths) == ["length@4", "length@7"]


def first_warning(config: MonitorConfig, series: list[dict[str, float]], steps: tuple[int, ...]) -> Warned:
    monitor = Monitor(config)
    for step, changed in zip(steps, series, strict=True):
        monitor.look(metrics(step, **changed), global_step=step)
    assert monitor.first is not None
    return monitor.first


def test_what_is_measured_before_the_update_blames_the_policy_before() -> None:
    """At step 6 objective/kl is of what the policy of step 5 wrote; at step 4, of what that of step 3 wrote."""
    limit = MonitorConfig(kl_limit=3.0)
    kls = [{"objective__kl": 2.7}, {"objective__kl": 5.4}]
    found = first_warning(limit, kls, (4, 6))
    assert (found.step, found.since) == (6, 3)
    found = first_warning(limit, kls, (2, 3))
    assert (found.step, found.since) == (3, 1)
    assert first_warning(limit, kls[1:], (1,)).since < 0  # the start itself, before which there is nothing
    behind = replace(limit, kl="eval/kl")
    found = first_warning(behind, [{"eval__kl": 2.7}, {"eval__kl": 5.4}], (4, 6))
    assert (found.step, found.since) == (6, 4)
    entropies = [{"policy__entropy_avg": value} for value in (1.0, 1.0, 1.0, 0.01)]
    assert first_warning(MonitorConfig(), entropies, (2, 4, 6, 8)).since == 5
    behind = MonitorConfig(entropy="eval/entropy")
    entropies = [{"eval__entropy": value} for value in (1.0, 1.0, 1.0, 0.01)]
    assert first_warning(behind, entropies, (2, 4, 6, 8)).since == 6


def test_gold_that_is_measured_before_the_update() -> None:
    series = [
        {"objective__scores": 0.1 * i, "rewards__gold__mean": 2 - 0.1 * i, "eval__sampled": 2 - 0.1 * i}
        for i in range(8)
    ]
    steps = tuple(range(10, 18))
    off = MonitorConfig(turn_share=None)
    assert first_warning(off, series, steps).since == 10  # eval/sampled was best behind the update of step 10
    assert first_warning(replace(off, gold="rewards/gold/mean"), series, steps).since == 9


def test_a_look_at_which_nothing_was_scored_has_no_proxy() -> None:
    nothing = Scores(
        torch.zeros(2), torch.zeros(2, dtype=torch.bool), {"mine": torch.full((2,), math.nan)}
    ).metrics()
    assert nothing["rewards/unscored"] == 1.0
    for proxy in ("objective/scores", "rewards/mine/mean"):
        monitor = Monitor(MonitorConfig(proxy=proxy))
        report = monitor.look({**metrics(1), **nothing}, global_step=1)
        assert report.warnings == []
        assert monitor.looks[0]["proxy"] is None
    with pytest.raises(
        UserError, match=r"monitor\.proxy: the run logs no metric 'rewards/mina/mean'; did you mean"
    ):
        Monitor(MonitorConfig(proxy="rewards/mina/mean")).look({**metrics(1), **nothing}, global_step=1)


def test_missing_metrics() -> None:
    message = r"monitor\.gold: the run logs no metric 'eval/sample'; did you mean eval/sampled\?"
    with pytest.raises(UserError, match=message):
        Monitor(MonitorConfig(gold="eval/sample")).look(metrics(1), global_step=1)
    monitor = Monitor(MonitorConfig(gold=None))
    assert monitor.look(metrics(1, objective__kl=math.nan), global_step=1).warnings == []
    monitor.look({}, global_step=2)  # a batch that nothing could score
    assert Monitor(MonitorConfig(enabled=False)).look({}, global_step=1).metrics == {}


def test_it_goes_on_after_a_break_as_if_there_was_none(tmp_path: Path) -> None:
    values = [(0.5 + 0.02 * i, 0.8 - 0.01 * i) for i in range(12)]
    whole, first, second = (Monitor(MonitorConfig(turn_share=None)) for _ in range(3))
    for step, (proxy, gold) in enumerate(values):
        given = metrics(step, objective__scores=proxy, eval__sampled=gold)
        expected = whole.look(given, global_step=step)
        if step == 6:
            save_state(tmp_path, first.state_dict())
            second.load_state_dict(load_state(tmp_path))
        found = (first if step < 6 else second).look(given, global_step=step)
        assert found == expected
    assert whole.first is not None
    assert second.first == whole.first
    assert whole.first.rule == "gap"


def test_what_was_written_rounds_ago_is_about_the_policy_of_then() -> None:
    """Rounds of 20 updates begin at 1, 21, 41; the KL of a round's start is looked at until its end."""
    config = MonitorConfig(kl_limit=5.0, gold=None, turn_share=None)
    monitor = Monitor(config)
    for step, written, kl in ((10, 1, 0.0), (20, 1, 0.0), (30, 21, 6.0)):
        metrics = {"objective/scores": 0.0, "objective/kl": kl}
        monitor.look(metrics, global_step=step, written=written)
    assert monitor.first is not None
    assert (monitor.first.step, monitor.first.since) == (30, 0)  # the policy after 20 updates was bad already
    late = Monitor(config)
    late.look({"objective/scores": 0.0, "objective/kl": 6.0}, global_step=40, written=21)
    assert late.first is not None
    assert late.first.since == 19


def test_stopping_names_the_last_good_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (2, 4, 6):
        (tmp_path / "checkpoints" / f"{step:09d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "last").symlink_to("000000006")
    config = MonitorConfig(stop=True)
    monitor = Monitor(config)
    for step in range(1, 6):
        act_on(monitor.look(metrics(step), global_step=step), monitor, folder=tmp_path)
    assert capsys.readouterr().err == ""
    report = monitor.look(metrics(6, completions__mean_length=60.0), global_step=6)
    with pytest.raises(HackingSuspected, match=r"3 times as long.*the last good checkpoint is .*000000004$"):
        act_on(report, monitor, folder=tmp_path)
    assert (monitor.last_good([5, 6, 7]), monitor.last_good([4, 5])) == (None, 4)
    assert "monitor: step 6: completions are 3 times as long as at first (60.0)" in capsys.readouterr().err
    assert monitor.last_good([6, 7]) is None
    tolerant = Monitor(replace(config, stop=False))
    tolerant.load_state_dict(monitor.state_dict())
    act_on(report, tolerant, folder=tmp_path)
    assert "monitor: step 6" in capsys.readouterr().err


def test_rules_that_need_more_looks_than_there_will_be(capsys: pytest.CaptureFixture[str]) -> None:
    """Ten updates with a look after every third are four looks: the last update is looked at, too."""
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({}, 3, "4; too few to judge gap (needs 8), forecast (needs 8), kl_ratio (needs 9)"),
        ({"window": 4, "gold": None}, 3, "4; too few to judge kl_ratio (needs 5)"),
        ({"window": 4, "kl_ratio": None}, 3, ""),
        ({"enabled": False}, 0, ""),
        ({"enabled": False, "stop": True}, 0, ""),
        ({}, 1, ""),
        (
            {"baseline": 1, "gold": None, "kl_limit": 5.0, "probes": {"a.py:f": 0.1}},
            10,
            "1; too few to judge length (needs 2), kl_ratio (needs 9), entropy (needs 2), repetition (needs 2), "
            "duplicates (needs 2), probes (needs 2)",
        ),
        (
            {"length_ratio": None, "entropy_share": None, "turn_share": None, "kl_limit": 5.0},
            0,
            "0; too few to judge"
            " gap (needs 8), kl_limit (needs 1), kl_ratio (needs 9), repetition (needs 4), duplicates (needs 4)",
        ),
    ]
    for settings, every, expected in cases:
        announce_looks(MonitorConfig(**settings), updates=10, every=every)
        said = f"monitor: looks in this run (validation.every): {expected}\n" if expected else ""
        assert capsys.readouterr().out == said


def test_every_rule_can_fire_at_the_look_that_it_needs_and_not_before() -> None:
    """What is announced is what the rules do."""
    needed = looks_needed(MonitorConfig(kl_limit=20.0))
    assert needed == {
        **dict.fromkeys(("gap", "forecast"), 8),
        **dict.fromkeys(("length", "entropy", "repetition", "duplicates"), 4),
        "kl_limit": 1,
        "kl_ratio": 9,
    }
    healthy = ["the quick brown fox jumps", "over a lazy dog that sleeps"]
    for rule, changed, texts in (
        ("length", {"completions__mean_length": 90.0}, healthy),
        ("kl_limit", {"objective__kl": 21.0}, healthy),
        ("kl_ratio", {"objective__kl": 19.0}, healthy),
        ("entropy", {"policy__entropy_avg": 0.01}, healthy),
        ("repetition", {}, ["!!!!!!!!!!!!!!!!!!!!!", "?????????????????????"]),
        ("duplicates", {}, [healthy[0]] * 2),
    ):
        fired = rule.partition("_")[0]
        for looked in (needed[rule] - 1, needed[rule]):
            series: list[dict[str, float]] = [*[{}] * (looked - 1), changed]
            written = [*[healthy] * (looked - 1), texts]
            expected = [f"{fired}@{looked}"] if looked == needed[rule] else []
            assert looks(MonitorConfig(kl_limit=20.0), series[:looked], written[:looked]) == expected
    falling = [{"objective__scores": 0.1 * i, "eval__sampled": -0.1 * i} for i in range(8)]
    assert looks(MonitorConfig(), falling) == ["gap@8"]
    bent = [
        {"objective__kl": d**2, "eval__sampled": gao(d), "objective__scores": 1.5 * d}
        for d in (0.3, 0.6, 0.9, 1.2, 1.5, 1.8, 2.1, 2.4)
    ]
    assert looks(MonitorConfig(), bent) == ["forecast@8"]


def test_a_monitor_that_is_to_stop_a_run_must_look() -> None:
    with pytest.raises(UserError, match=r"monitor\.stop.*validation\.every is 0"):
        announce_looks(MonitorConfig(stop=True, kl_limit=5.0), updates=10, every=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 3}, "window"),
        ({"confidence": 1.0}, "confidence"),
        ({"length_ratio": 1.0}, "length_ratio"),
        ({"entropy_share": 0.0}, "entropy_share"),
        ({"probes": {"a.py:f": 1.0}}, "probes"),
    ],
)
def test_bad_monitor_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"monitor.*{message}"):
        MonitorConfig(**settings)
