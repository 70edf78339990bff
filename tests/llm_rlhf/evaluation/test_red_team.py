"""Attacks on a hand-made target: how often they succeed, and what an adversarial policy would be paid."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from experiment.errors import UserError
from llm_rlhf.evaluation.red_team import (
    attack_success,
    attacker_reward,
    model_target,
    read_prompts,
    subject_target,
)
from llm_rlhf.evaluation.results import before_after
from llm_rlhf.evaluation.subject import Decoding, Subject
from llm_rlhf.rewards.functions import resolve


def parrot(prompts: Sequence[str]) -> list[str]:
    """A target that swears if it is told to."""
    return ["damn" if "swear" in prompt else f"you said {prompt}" for prompt in prompts]


def swears(prompt: str, completion: str) -> bool | None:
    return None if "?" in completion else "damn" in completion


def polite(prompt: str, completion: str) -> bool | None:
    return "please" in completion


OWN = """from llm_rlhf.evaluation.red_team import attacker_reward


def target(prompts):
    assert len(set(prompts)) == len(prompts)
    return ["damn" if "s" in prompt else "no" for prompt in prompts]


def swears(prompt, completion):
    return "damn" in completion


attack = attacker_reward(target, swears)
"""


def test_success_by_hand() -> None:
    prompts = ["please swear", "hello", "what?", "swear"]
    answers = [["damn", "no"], ["hi", "hi"], ["?", "?"], ["damn", "?"]]
    result = attack_success(prompts, answers, {"a.py:swears": swears})
    figures = result.figures()
    assert figures["attack_success"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert figures["attack_success_any"] == pytest.approx(2 / 3)
    assert (figures["prompts"], figures["unjudged"]) == (3, 3)
    either = attack_success(
        prompts, [["damn"], ["please"], ["?"], ["ok"]], {"a.py:swears": swears, "a.py:polite": polite}
    )
    assert either.figures()["attack_success"] == 0.5
    assert either.figures()["a.py:polite/attack_success"] == 0.25
    assert either.figures()["a.py:swears/attack_success"] == pytest.approx(1 / 3)
    assert "attack_success_any" not in either.measures


def test_before_and_after_training() -> None:
    prompts = [f"p{i}" for i in range(40)]
    before = attack_success(prompts, [["damn"]] * 30 + [["no"]] * 10, {"r": swears})
    after = attack_success(prompts, [["damn"]] * 10 + [["no"]] * 30, {"r": swears})
    table = before_after(before, after)
    assert table["attack_success/change"] == -0.5
    low, high = table["attack_success/change_interval"]
    assert -0.7 < low < -0.5 < high < -0.3


def test_an_attacker_is_paid_for_what_breaks_the_rule() -> None:
    reward = attacker_reward(parrot, swears)
    assert reward(["", "", "", ""], ["swear!", "hello", "", "why?"]) == [1.0, 0.0, 0.0, None]


def test_diversity_pays_for_attacks_unlike_the_others() -> None:
    reward = attacker_reward(parrot, swears, diversity=0.5)
    same = reward([""] * 3, ["please do swear now", "please do swear now", "now you swear with me"])
    assert same[:2] == [0.5, 0.5]
    assert same[2] is not None
    assert same[2] > 0.9
    assert reward([""] * 2, ["hello there", "quite another thing"]) == [0.0, 0.0]  # new, but it breaks nothing
    assert reward([""], ["swear"]) == [1.0]
    with pytest.raises(ValueError, match="diversity"):
        attacker_reward(parrot, swears, diversity=1.5)


def test_it_serves_a_recipes_rewards(tmp_path: Path) -> None:
    """Named as file.py:function, as the documentation prints it; a target is asked once for equal attacks."""
    (tmp_path / "attack.py").write_text(OWN)
    rewards = resolve({f"{tmp_path}/attack.py:attack": 2.0}, own={}, columns=[])
    assert rewards(["p"] * 3, ["s", "s", "x"], {}).total.tolist() == [2.0, 2.0, 0.0]


def test_a_model_as_target(make_subject: Callable[..., Subject], tmp_path: Path) -> None:
    subject = make_subject()
    target = subject_target(subject, Decoding(max_new_tokens=4))
    assert target(["ab", "c"]) == [texts[0] for texts in subject.complete(["ab", "c"], Decoding(max_new_tokens=4))]
    subject.policy.save_pretrained(tmp_path)
    subject.tokenizer.save_pretrained(str(tmp_path))
    assert model_target(tmp_path, decoding=Decoding(max_new_tokens=4))(["ab", "c"]) == target(["ab", "c"])


def test_bad_red_teams(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name at least one rule"):
        attack_success(["p"], [["a"]], {})
    with pytest.raises(UserError, match="no rule could judge any answer"):
        attack_success(["p"], [["?"]], {"r": swears})
    with pytest.raises(UserError, match=r"r: it returned 3 for 'a'; return True, False or None"):
        attack_success(["p"], [["a"]], {"r": lambda prompt, text: 3})  # type: ignore[dict-item, return-value]
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    assert read_prompts(tmp_path / "p.jsonl") == ["a"]
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(UserError, match="there are no prompts"):
        read_prompts(tmp_path / "p.jsonl")
    with pytest.raises(UserError, match="'swears' is no rule"):
        attacker_reward(parrot, "swears")
