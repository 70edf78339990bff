"""Hard rules: no weighted sum buys a broken rule back, and a rule that cannot judge says so."""

from pathlib import Path

import pytest
import torch

from experiment.errors import UserError
from llm_rlhf.rewards.functions import RewardSet
from llm_rlhf.rewards.safety import SafetyConfig, constrained

COLUMNS = {"sample_index": [0, 1, 2]}


def length(prompts: list[str], completions: list[str]) -> list[float | None]:
    """100 a character, None for an empty completion."""
    return [100.0 * len(text) if text else None for text in completions]


def rules(folder: Path) -> str:
    file = folder / "rules.py"
    file.write_text(
        "def no_at(prompt, completion):\n    return '@' in completion\n\n"
        "def short(prompt, completion):\n    return len(completion) >= 4\n\n"
        "def echo(prompt, completion):\n    return None if not prompt else prompt in completion\n\n"
        "def broken(prompt, completion):\n    raise KeyError('x y')\n\n"
        "def number(prompt, completion):\n    return 1\n\n"
        "limit = 3\n"
    )
    return str(file)


def test_a_broken_rule_costs_whatever_the_rest_says(tmp_path: Path) -> None:
    path = rules(tmp_path)
    config = SafetyConfig(rules=(f"{path}:no_at", f"{path}:short"), floor=-5.0)
    rewards = constrained(RewardSet({"length": length}, {"length": 1.0}), config)
    scores = rewards(["p"] * 3, ["ok", "a@b", "toolong"], COLUMNS)
    assert scores.total.tolist() == [200.0, -5.0, -5.0]
    assert scores.metrics()["rewards/rules/no_at/mean"] == pytest.approx(2 / 3)
    assert scores.metrics()["rewards/rules/short/mean"] == pytest.approx(2 / 3)
    assert scores.by_name["length"].tolist() == [200.0, 300.0, 700.0]
    assert scores.broken is not None
    assert scores.broken.tolist() == [False, True, True]


def test_a_rule_knows_the_prompt_and_need_not_say(tmp_path: Path) -> None:
    config = SafetyConfig(rules=(f"{rules(tmp_path)}:echo",), floor=-5.0)
    scores = constrained(RewardSet({"length": length}, {"length": 1.0}), config)(
        ["a", "b", ""], ["xax", "xax", "xax"], COLUMNS
    )
    assert scores.total.tolist() == [-5.0, 300.0, 300.0]


def test_breaking_a_rule_never_pays(tmp_path: Path) -> None:
    """A weighted sum below the floor stays; what nothing could score is scored by the rule, or stays unscored."""
    config = SafetyConfig(rules=(f"{rules(tmp_path)}:no_at",), floor=-5.0)
    low = constrained(RewardSet({"length": length}, {"length": -1.0}), config)
    assert low(["p"] * 2, ["@@@", "ok"], {}).total.tolist() == [-300.0, -200.0]

    def silent(prompts: list[str], completions: list[str]) -> list[float | None]:
        return [None for _ in completions]

    scores = constrained(RewardSet({"silent": silent}, {"silent": 1.0}), config)(["p"] * 2, ["@", "ok"], {})
    assert scores.total.tolist() == [-5.0, 0.0]
    assert scores.scored.tolist() == [True, False]


def test_without_rules_nothing_changes() -> None:
    rewards = RewardSet({"length": length}, {"length": 1.0})
    assert constrained(rewards, SafetyConfig()) is rewards
    assert rewards(["p"], ["ok"], {}).broken is None


def test_the_time_limit_of_the_rewards_stays(tmp_path: Path) -> None:
    rewards = RewardSet({"length": length}, {"length": 1.0}, timeout=3.0)
    assert constrained(rewards, SafetyConfig(rules=(f"{rules(tmp_path)}:no_at",))).timeout == 3.0


def test_two_rules_of_one_name_are_both_there(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    names = (f"{rules(tmp_path / 'a')}:no_at", f"{rules(tmp_path / 'b')}:no_at")
    scores = constrained(RewardSet({"length": length}, {"length": 1.0}), SafetyConfig(rules=names))(
        ["p"], ["@"], {}
    )
    assert [name for name in scores.by_name if "no_at" in name] == ["rules/no_at", f"rules/{names[1]}"]
    assert torch.equal(scores.by_name["rules/no_at"], torch.zeros(1))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("broken", r"safety\.rules: broken: it raised KeyError: 'x y'"),
        ("number", r"safety\.rules: number: it returned 1 for 'ok'; return True, False or None"),
        ("limit", "a function is needed, got int"),
        ("nothing", "has no nothing"),
    ],
)
def test_rules_that_cannot_be_used(tmp_path: Path, rule: str, message: str) -> None:
    config = SafetyConfig(rules=(f"{rules(tmp_path)}:{rule}",))
    with pytest.raises(UserError, match=message):
        constrained(RewardSet({"length": length}, {"length": 1.0}), config)(["p"], ["ok"], {})


def test_settings_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"safety\.floor must be a finite number"):
        SafetyConfig(floor=float("-inf"))
    with pytest.raises(ValueError, match="named twice"):
        SafetyConfig(rules=("a.py:b", "a.py:b"))
    with pytest.raises(UserError, match=r"safety\.rules: 'no_at' is no rule; give it as path/to/file\.py:function"):
        constrained(RewardSet({}, {}), SafetyConfig(rules=("no_at",)))
