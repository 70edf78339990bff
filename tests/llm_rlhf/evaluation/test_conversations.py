"""Prompts that are conversations: read as training reads them, asked and judged through chat templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiment.errors import UserError
from llm_rlhf.data.chat import Chat
from llm_rlhf.evaluation import red_team, win_rate
from llm_rlhf.evaluation.benchmarks.pairwise import Question, compare
from llm_rlhf.evaluation.red_team import attacker_reward, read_prompts
from llm_rlhf.evaluation.subject import Decoding, Subject
from llm_rlhf.evaluation.suites import SuiteConfig, prepare
from llm_rlhf.evaluation.win_rate import one_by_one, read_answers

MARKS = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SHORT = Decoding(max_new_tokens=4)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


HELLO = [user("hi"), assistant("ho"), user("hey")]
ROWS: dict[str, list[dict[str, Any]]] = {
    "prompts": [{"prompt": HELLO}, {"prompt": [user("yo")]}],
    "messages": [{"messages": [*HELLO, assistant("x")]}, {"messages": [user("yo"), assistant("y"), user("z")]}],
    "pairs": [
        {"prompt": HELLO, "chosen": [assistant("a")], "rejected": [assistant("b")]},
        {"chosen": [user("yo"), assistant("c")], "rejected": [user("yo"), assistant("d")]},
        {"prompt": [user("left out")], "chosen": [assistant("a")], "rejected": [assistant("a")]},
    ],
    "thumbs": [
        {"prompt": HELLO, "completion": [assistant("a")], "label": False},
        {"prompt": [user("yo")], "completion": "b", "label": True},
    ],
    "texts": [{"prompt": "hi", "completion": "a"}, {"prompt": "yo", "completion": "b"}],
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ROWS)
def test_prompts_are_read_as_training_reads_them(kind: str, tmp_path: Path) -> None:
    found = read_prompts(write(tmp_path / "rows.jsonl", ROWS[kind]))
    if kind == "texts":
        assert found == ["hi", "yo"]
        return
    first = [user("hi")] if kind == "messages" else HELLO
    assert [list(prompt.messages) for prompt in found if isinstance(prompt, Chat)] == [first, [user("yo")]]
    assert len(found) == 2


def test_files_without_prompts(tmp_path: Path) -> None:
    for row, message in (
        ({"text": "a"}, r"rows\.jsonl:1: column 'prompt' is missing \(there is text\)"),
        ({"prompt": 3}, r"rows\.jsonl:1: column 'prompt' is int, not text"),
        ({"prompt": [assistant("a")]}, "there is nothing to answer"),
    ):
        with pytest.raises(UserError, match=message):
            read_prompts(write(tmp_path / "rows.jsonl", [row]))
    with pytest.raises(UserError, match=r"column 'completion' is missing \(there is text\)"):
        read_answers(write(tmp_path / "rows.jsonl", [{"text": "a"}]))


def test_answers_of_conversations(tmp_path: Path) -> None:
    def answers(kind: str) -> list[tuple[Any, list[str]]]:
        found = read_answers(write(tmp_path / "rows.jsonl", ROWS[kind]))
        return [(getattr(prompt, "messages", prompt), texts) for prompt, texts in found.items()]

    assert answers("messages") == [((user("hi"),), ["ho"]), ((user("yo"),), ["y"])]
    assert answers("pairs") == [(tuple(HELLO), ["a"]), ((user("yo"),), ["c"])]
    assert answers("thumbs") == [((user("yo"),), ["b"])]
    assert answers("texts") == [("hi", ["a"]), ("yo", ["b"])]


@pytest.mark.parametrize("chat", [True, False])
def test_a_conversation_is_asked_through_the_template(make_subject: Callable[..., Subject], chat: bool) -> None:
    subject, plain = make_subject(context=128, chat=chat), make_subject(context=128)
    subject.tokenizer.chat_template = MARKS
    expected = plain.complete(["<user>hi<assistant>ho<user>hey<assistant>"], SHORT)
    assert subject.complete([Chat.prompt(HELLO)], SHORT) == expected
    assert subject.complete(["hi"], SHORT) == plain.complete(["<user>hi<assistant>" if chat else "hi"], SHORT)


Judged = list[tuple[str, str]]


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Judged:
    """What a reward model's folder, TMP_PATH/judge, is asked to score."""
    seen: Judged = []

    def score(prompts: list[str], completions: list[str]) -> list[float | None]:
        seen.extend(zip(prompts, completions, strict=True))
        return [float(len(text)) for text in completions]

    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "reward.json").write_text("{}")
    monkeypatch.setattr(win_rate, "reward_function", lambda name: score)
    return seen


@pytest.mark.parametrize("against", ["file", "model"])
@pytest.mark.parametrize(("kind", "chat"), [("texts", True), ("texts", False), ("pairs", True), ("pairs", False)])
def test_a_reward_model_judges_the_prompt_that_was_asked(
    kind: str, chat: bool, against: str, make_subject: Callable[..., Subject], tmp_path: Path, judged: Judged
) -> None:
    data = write(tmp_path / "rows.jsonl", ROWS[kind])
    subject, reference = make_subject(chat=chat), None
    if against == "model":
        subject.policy.save_pretrained(tmp_path / "other")
        subject.tokenizer.save_pretrained(str(tmp_path / "other"))
        reference = str(tmp_path / "other")
    config = SuiteConfig(str(data), judge=str(tmp_path / "judge"), reference=reference, max_new_tokens=4)
    result = prepare("win_rate", config)(subject)
    assert len(result.rows) == 2
    expected = {"texts": [[user("hi")], [user("yo")]], "pairs": [HELLO, [user("yo")]]}[kind]
    prompts = {prompt: prompt for prompt, _ in judged}.values()
    if kind == "pairs" or chat:
        assert [list(prompt.messages) for prompt in prompts if isinstance(prompt, Chat)] == expected
    assert len(prompts) == 2
    assert all(isinstance(prompt, Chat) for prompt in prompts) == (kind == "pairs" or chat)
    if kind == "texts":
        assert [row["prompt"] for row in result.rows] == ["hi", "yo"]


def test_a_function_is_given_the_question(make_subject: Callable[..., Subject], tmp_path: Path) -> None:
    """Of one question its text, as it stands in the file; of a longer conversation its lines."""
    (tmp_path / "own.py").write_text(
        "shown = ('yo', 'user: hi\\nassistant: ho\\nuser: hey\\nassistant: ')\n\n\n"
        "def judge(prompt, a, b):\n    assert prompt in shown, prompt\n    return 'a'\n\n\n"
        "def rule(prompt, text):\n    return judge(prompt, '', '') == 'a'\n"
    )
    data = str(write(tmp_path / "rows.jsonl", ROWS["pairs"]))
    own, subject = str(tmp_path / "own.py"), make_subject(chat=True)
    config = SuiteConfig(data, judge=f"{own}:judge", rules=(f"{own}:rule",), max_new_tokens=4)
    assert prepare("win_rate", config)(subject).figures()["win_rate"] == 0.5
    assert prepare("red_team", config)(subject).figures()["attack_success"] == 1.0
    rows = prepare("diversity", config)(subject).rows
    assert [row["prompt"] for row in rows] == ["user: hi\nassistant: ho\nuser: hey\nassistant: ", "yo"]


def test_alpaca_eval_gives_the_judge_the_conversation(
    make_subject: Callable[..., Subject], tmp_path: Path, judged: Judged
) -> None:
    (tmp_path / "alpaca.json").write_text(json.dumps([{"instruction": "hi", "output": "ho"}]))
    config = SuiteConfig(str(tmp_path / "alpaca.json"), judge=str(tmp_path / "judge"), max_new_tokens=4)
    prepare("alpaca_eval", config)(make_subject(chat=True))
    assert [getattr(prompt, "messages", None) for prompt, _ in judged] == [(user("hi"),)] * len(judged)


def test_later_turns_are_judged_as_conversations() -> None:
    shown: list[tuple[str, str, str]] = []

    def judge(prompt: str, a: str, b: str) -> str:
        shown.append((prompt, a, b))
        return "a"

    questions = [Question("1", ("x", "y"))]
    compare(questions, {"1": ("p", "q")}, {"1": ("r", "s")}, one_by_one(judge, "j"), source="f", chat=True)
    (_, a, b) = shown[1]
    assert shown[0] == ("x", "p", "r")
    assert isinstance(a, Chat)
    assert isinstance(b, Chat)
    assert a.messages == (assistant("p"), user("y"), assistant("q"))
    assert b.messages == (assistant("r"), user("y"), assistant("s"))


def test_an_attackers_target_is_asked_through_its_template(
    make_subject: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects: list[Subject] = []

    def load(path: str, *, chat: bool) -> Subject:
        subjects.append(make_subject(context=128, chat=chat))
        return subjects[-1]

    def rule(prompt: str, text: str) -> bool:
        return text == asked

    monkeypatch.setattr(red_team, "load_subject", load)
    for chat in (True, False):
        asked = make_subject(context=128, chat=chat).complete(["be rude"], red_team.SHORT)[0][0]
        reward = attacker_reward("model", rule, chat=chat)
        assert subjects[-1].chat == chat
        assert reward([""], ["be rude"]) == [1.0]
