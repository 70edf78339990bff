"""Win rates: both orders, ties half, judges that lean to one side, files of answers."""

from pathlib import Path

import pytest
import torch

from experiment.errors import UserError
from llm_rlhf.evaluation.win_rate import (
    Pair,
    by_reward,
    load_judge,
    one_by_one,
    paired,
    read_answers,
    verdict_of,
    win_rate,
)
from llm_rlhf.models.loading import ModelConfig
from llm_rlhf.rewards.reward_model import build_reward_model, reward_function, reward_writer

PAIRS = [Pair("p", "long answer", "short"), Pair("q", "x", "yy"), Pair("r", "same", "same"), Pair("s", "aaa", "b")]


def longer(prompt: str, a: str, b: str) -> str | None:
    return "tie" if len(a) == len(b) else "a" if len(a) > len(b) else "b"


def test_a_fair_judge_by_hand() -> None:
    result = win_rate(PAIRS, one_by_one(longer, "longer"))
    figures = result.figures()
    assert figures["win_rate"] == (1 + 0 + 0.5 + 1) / 4
    assert (figures["won"], figures["lost"]) == (0.5, 0.25)
    assert (figures["position_bias"], figures["consistent"], figures["longer_won"]) == (0.0, 1.0, 1.0)
    assert (figures["pairs"], figures["groups"], figures["unjudged"]) == (4, 4, 0)
    low, high = figures["win_rate_interval"]
    assert 0 <= low < 0.625 < high <= 1
    assert figures["position_bias_interval"] == [0.0, 0.0]  # 0 of each pair: no trial that might have succeeded
    swapped = win_rate([Pair(pair.prompt, pair.b, pair.a) for pair in PAIRS], one_by_one(longer, "longer"))
    assert swapped.figures()["win_rate"] == 1 - figures["win_rate"]


def test_a_judge_that_takes_the_first_decides_nothing() -> None:
    figures = win_rate(PAIRS, one_by_one(lambda prompt, a, b: "a", "first")).figures()
    assert (figures["win_rate"], figures["won"], figures["lost"]) == (0.5, 0.0, 0.0)
    assert (figures["position_bias"], figures["consistent"]) == (1.0, 0.0)
    assert win_rate(PAIRS, one_by_one(lambda prompt, a, b: "b", "last")).figures()["position_bias"] == -1.0


@pytest.mark.parametrize(
    ("shown", "swapped", "expected"),
    [
        ("a", "b", "a"),
        ("b", "a", "b"),
        ("a", "a", "tie"),
        ("a", "tie", "tie"),
        ("tie", "tie", "tie"),
        (None, "a", None),
        ("b", None, None),
    ],
)
def test_two_verdicts_make_one(shown: str | None, swapped: str | None, expected: str | None) -> None:
    assert verdict_of(shown, swapped) == expected


def test_what_cannot_be_judged_is_left_out() -> None:
    def shy(prompt: str, a: str, b: str) -> str | None:
        return None if prompt == "p" else longer(prompt, a, b)

    figures = win_rate(PAIRS, one_by_one(shy, "shy")).figures()
    assert figures["unjudged"] == 1
    assert figures["win_rate"] == 1.5 / 3
    with pytest.raises(UserError, match="could say nothing of any of the 4 pairs"):
        win_rate(PAIRS, one_by_one(lambda prompt, a, b: None, "mute"))


def test_prompts_weigh_alike_however_many_pairs_they_have() -> None:
    pairs = [Pair("p", "long", "s")] * 3 + [Pair("q", "s", "long")]
    assert win_rate(pairs, one_by_one(longer, "longer")).figures()["win_rate"] == 0.5
    turns = [Pair("p", "long", "s", "1"), Pair("p, then", "s", "long", "1"), Pair("q", "long", "s", "2")]
    found = win_rate(turns, one_by_one(longer, "longer")).figures()
    assert (found["win_rate"], found["pairs"], found["groups"]) == (0.75, 3, 2)


def test_rewards_judge_once_a_text() -> None:
    asked: list[str] = []

    def reward(prompts: list[str], completions: list[str]) -> list[float | None]:
        asked.extend(completions)
        return [None if text == "same" else float(len(text)) for text in completions]

    figures = win_rate(PAIRS, by_reward(reward, margin=1.0)).figures()
    assert (figures["win_rate"], figures["unjudged"]) == ((1 + 0.5 + 1) / 3, 1)
    assert sorted(asked) == sorted({text for pair in PAIRS for text in (pair.a, pair.b)})
    with pytest.raises(ValueError, match="margin"):
        by_reward(reward, margin=-1.0)


def test_a_reward_model_judges(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ModelConfig(layers=1, width=16, heads=2, context=24)
    model, tokenizer = build_reward_model(config, alphabet="abcdefgh ", objectives=("reward",), heads=1)
    for parameter in model.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    reward_writer(model, tokenizer)["reward_model"](tmp_path)
    scores = reward_function(tmp_path)(["a", "a"], ["bcd", "hh"])
    assert scores[0] is not None
    assert scores[1] is not None
    gap = abs(scores[0] - scores[1])
    assert gap > 0.01
    first = "a" if scores[0] > scores[1] else "b"
    assert load_judge(str(tmp_path), margin=gap / 2)(["a"], ["bcd"], ["hh"]) == [first]
    assert load_judge(str(tmp_path), margin=gap * 2)(["a"], ["bcd"], ["hh"]) == ["tie"]


def test_judges_by_name(tmp_path: Path) -> None:
    file = tmp_path / "judge.py"
    file.write_text(
        "def good(prompt, a, b):\n    return 'a'\n\n\ndef odd(prompt, a, b):\n    return 'A'\n\n\n"
        "def broken(prompt, a, b):\n    raise KeyError('x')\n\n\nnumber = 3\n"
    )
    assert load_judge(f"{file}:good")(["p"], ["x"], ["y"]) == ["a"]
    for name, message in (
        (f"{file}:odd", "returned 'A'; return 'a', 'b', 'tie' or None"),
        (f"{file}:broken", "it raised KeyError"),
    ):
        with pytest.raises(UserError, match=message):
            load_judge(name)(["p"], ["x"], ["y"])
    for name, message in (
        (f"{file}:number", "a function is needed, got int"),
        (f"{file}:none", "has no none"),
        (str(tmp_path), "neither path/to/file.py:function nor the folder of a reward model"),
    ):
        with pytest.raises(UserError, match=message):
            load_judge(name)


def test_files_of_answers(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    rows = [("p", "1"), ("p", "2"), ("q", "3")]
    file.write_text("".join(f'{{"prompt": "{prompt}", "completion": "{text}"}}\n' for prompt, text in rows))
    answers = read_answers(file)
    assert answers == {"p": ["1", "2"], "q": ["3"]}
    assert paired({"p": ["a", "b"], "q": ["c"]}, answers, source="f") == [
        Pair("p", "a", "1"),
        Pair("p", "b", "2"),
        Pair("q", "c", "3"),
    ]
    with pytest.raises(UserError, match="f: 2 answers to the prompt 'p', the other side has 1"):
        paired({"p": ["a"]}, answers, source="f")
    with pytest.raises(UserError, match="f: 1 prompts that the other side did not answer, as 'q'"):
        paired({"p": ["a", "b"]}, answers, source="f")
    file.write_text('{"prompt": "p", "completion": 1}\n')
    with pytest.raises(UserError, match=r"answers\.jsonl:1: column 'completion' is int, not text"):
        read_answers(file)
    with pytest.raises(UserError, match="no pairs"):
        win_rate([], one_by_one(longer, "longer"))
