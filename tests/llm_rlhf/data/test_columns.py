"""TRL's column types, standard and conversational, become the same records; what cannot be used is named."""

from typing import Any

import pytest

from experiment.errors import UserError
from llm_rlhf.data.chat import Chat
from llm_rlhf.data.columns import (
    EMPTY,
    EQUAL,
    UNRELATED,
    ColumnNames,
    common_start,
    kind_of,
    read_comparison,
    read_demonstration,
    read_feedback_row,
    read_prompt,
)
from llm_rlhf.data.files import Row
from llm_rlhf.data.records import Comparison, Feedback
from llm_rlhf.tasks.examples import Example

NAMES = ColumnNames()


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def comparison(columns: dict[str, Any], **options: Any) -> Comparison:
    found = read_comparison(Row("f:7", columns), NAMES, **options)
    assert isinstance(found, Comparison), found
    return found


def test_the_types_of_trl() -> None:
    """Every example of the section "Dataset types" of TRL's dataset_formats page."""
    chat = [user("What color is the sky?")]
    blue, green = [assistant("It is blue.")], [assistant("It is green.")]
    cases: list[tuple[str, dict[str, Any]]] = [
        ("language modeling", {"text": "The sky is blue."}),
        ("language modeling", {"messages": chat + blue}),
        ("prompt-only", {"prompt": "The sky is"}),
        ("prompt-only", {"prompt": chat}),
        ("prompt-completion", {"prompt": "The sky is", "completion": " blue."}),
        ("prompt-completion", {"prompt": chat, "completion": blue}),
        ("preference", {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}),
        ("preference", {"chosen": "The sky is blue.", "rejected": "The sky is green."}),
        ("preference", {"prompt": chat, "chosen": blue, "rejected": green}),
        ("preference", {"chosen": chat + blue, "rejected": chat + green}),
        ("unpaired preference", {"prompt": "The sky is", "completion": " blue.", "label": True}),
        ("unpaired preference", {"prompt": chat, "completion": blue, "label": False}),
    ]
    for kind, columns in cases:
        assert kind_of(columns, NAMES) == kind
    assert kind_of({"question": "x", "prompt": None}, NAMES) is None


def test_explicit_and_implicit_prompts_are_the_same_comparison() -> None:
    expected = ("The sky is", " blue.", " green.")
    for columns in (
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green.", "source": "x"},
        {"chosen": "The sky is blue.", "rejected": "The sky is green.", "source": "x"},
    ):
        found = comparison(columns)
        assert (found.prompt, found.chosen, found.rejected) == expected
        assert found.columns == {"source": "x"}
        assert (found.margin, found.tied) == (None, False)


def test_conversations_explicit_implicit_and_beside_a_text() -> None:
    chat, blue, green = [user("Sky?")], [assistant("Blue.")], [assistant("Green.")]
    for columns in (
        {"prompt": chat, "chosen": blue, "rejected": green},
        {"chosen": chat + blue, "rejected": chat + green},
        {"prompt": chat, "chosen": chat + blue, "rejected": chat + green},
        {"prompt": "Sky?", "chosen": chat + blue, "rejected": chat + green},  # UltraFeedback, binarized
        {"prompt": chat, "chosen": "Blue.", "rejected": "Green."},
        {"prompt": "Sky?", "chosen": blue, "rejected": green},
    ):
        found = comparison(columns)
        assert (found.prompt, found.chosen, found.rejected) == ("user: Sky?\nassistant: ", "Blue.", "Green.")
        assert isinstance(found.prompt, Chat)
        assert found.prompt.messages == tuple(chat)
    longer = comparison({"chosen": [*chat, *blue, user("Sure?"), assistant("Yes.")], "rejected": chat + green})
    assert longer.prompt == found.prompt
    assert longer.chosen == "Blue.\nuser: Sure?\nassistant: Yes."


def test_common_start_is_trls() -> None:
    def extract_prompt(chosen: Any, rejected: Any) -> int:
        """The rule, a step at a time: up to the first difference, and a space before it is not the prompt's."""
        for index in range(min(len(chosen), len(rejected))):
            if chosen[index] != rejected[index]:
                return index - 1 if index > 0 and chosen[index - 1] == " " else index
        return min(len(chosen), len(rejected)) - 1

    for chosen, rejected in (
        ("The sky is blue.", "The sky is green."),
        ("ab", "abc"),
        ("abc", "xbc"),
        ("a b", "a c"),
        (" b", " c"),
        ([1, 2, 3], [1, 2, 4, 5]),
        ([1, 2], [1, 2, 3]),
    ):
        assert common_start(chosen, rejected) == extract_prompt(chosen, rejected)
    assert common_start("", "abc") == 0


def test_anthropics_transcripts() -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: What?"
    row = {"chosen": start + "\n\nAssistant: I mean hello.", "rejected": start + "\n\nAssistant: I do not know."}
    found = comparison(row)
    assert found.prompt == start + "\n\nAssistant:"
    assert (found.chosen, found.rejected) == (" I mean hello.", " I do not know.")  # not cut after "I "
    chat = comparison(row, transcripts="chat")
    assert isinstance(chat.prompt, Chat)
    assert chat.prompt.messages == (user("Hi"), assistant("Hello"), user("What?"))
    assert (chat.chosen, chat.rejected) == ("I mean hello.", "I do not know.")
    other = {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: x"}
    forms: list[dict[str, Any]] = [{}, {"transcripts": "chat"}]
    for options in forms:
        assert read_comparison(Row("f:1", other), NAMES, **options) == UNRELATED
        empty = {"chosen": start + "\n\nAssistant:", "rejected": start + "\n\nAssistant: x"}
        assert read_comparison(Row("f:1", empty), NAMES, **options) == EMPTY


def test_margins_scores_and_ties() -> None:
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert comparison({**pair, "margin": 2}).margin == 2.0
    assert comparison({**pair, "score_chosen": 4.5, "score_rejected": 3}).margin == 1.5
    assert comparison({**pair, "margin": 1.0, "score_chosen": 4.5, "score_rejected": 3}).margin == 1.0
    assert comparison({**pair, "margin": None, "tie": None}).margin is None
    assert comparison({**pair, "tie": 1}).tied
    same = {**pair, "rejected": "a"}
    assert read_comparison(Row("f:1", same), NAMES) == EQUAL
    assert comparison({**same, "tie": True}).tied
    assert read_comparison(Row("f:1", {"chosen": "abc", "rejected": "abc"}), NAMES) == EQUAL
    assert read_comparison(Row("f:1", {**pair, "chosen": "  "}), NAMES) == EMPTY
    chats = {"prompt": [user("x")], "chosen": [assistant("y")], "rejected": [assistant("y")]}
    assert read_comparison(Row("f:1", chats), NAMES) == EQUAL


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "p", "chosen": "a"}, r"f:7: column 'rejected' is missing \(there is prompt, chosen\)"),
        ({"prompt": "p", "chosen": "a", "rejected": 3}, r"f:7: column 'rejected' is int, not text"),
        ({"chosen": "a", "rejected": [user("x")]}, r"f:7: one of 'chosen' and 'rejected' is text"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": "x"}, r"'margin' is str, not a number"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "tie": "no"}, r"'tie' is 'no'; it must be true or false"),
        (
            {"prompt": [user("x")], "chosen": [{"role": "assistant"}], "rejected": [assistant("b")]},
            r"f:7: column 'chosen': message 1: 'content' is missing",
        ),
        (
            {"prompt": [user("x")], "chosen": [user("a")], "rejected": [assistant("b")]},
            r"f:7: column 'chosen': the first message must be the assistant's",
        ),
        (
            {"prompt": [assistant("x")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
            r"f:7: column 'prompt': the last message is the assistant's",
        ),
        ({"prompt": "\ud800", "chosen": "a", "rejected": "b"}, r"'prompt' holds half of a character"),
        (
            {"prompt": [user("\ud800")], "chosen": "a", "rejected": "b"},
            r"'prompt': message 1: 'content' holds half of a character",
        ),
        (
            {
                "prompt": [user("x"), {"role": "user", "content": [{"type": "image"}]}],
                "chosen": "a",
                "rejected": "b",
            },
            r"message 2: 'content' is list, not text",
        ),
    ],
)
def test_wrong_columns_are_named(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_comparison(Row("f:7", columns), NAMES)


def test_thumbs() -> None:
    def feedback(columns: dict[str, Any]) -> Feedback | str:
        return read_feedback_row(Row("f:3", columns), NAMES)

    assert feedback({"prompt": "p", "completion": "c", "label": True, "x": 1}) == Feedback("p", "c", True, {"x": 1})
    alone = feedback({"completion": [user("a"), assistant("b"), user("c"), assistant("d")], "label": 0})
    assert alone == Feedback("user: a\nassistant: b\nuser: c\nassistant: ", "d", False)
    transcript = feedback({"completion": "\n\nHuman: a\n\nAssistant: b", "label": True})
    assert transcript == Feedback("\n\nHuman: a\n\nAssistant:", " b", True)
    assert feedback({"prompt": "p", "completion": "", "label": True}) == EMPTY
    with pytest.raises(UserError, match=r"f:3: column 'label' is 'good'; it must be true or false"):
        feedback({"prompt": "p", "completion": "c", "label": "good"})
    with pytest.raises(UserError, match=r"f:3: column 'label' is missing \(there is prompt, completion\)"):
        feedback({"prompt": "p", "completion": "c"})


def test_what_a_row_demonstrates() -> None:
    def shown(columns: dict[str, Any]) -> tuple[str, str, str]:
        found = read_demonstration(Row("f:2", columns), NAMES)
        assert isinstance(found, Example)
        return found.prompt, found.completion, found.columns["answer"]

    chat = [{"role": "system", "content": "Be short."}, user("a"), assistant("b"), user("c"), assistant("d")]
    prompt = "system: Be short.\nuser: a\nassistant: "
    assert shown({"messages": chat}) == (prompt, "b\nuser: c\nassistant: d", "b")
    assert shown({"messages": [assistant("hi"), *chat[1:3]]})[0] == "assistant: hi\nuser: a\nassistant: "
    assert shown({"text": "t"}) == ("", "t", "t")
    assert shown({"prompt": "p", "completion": "c", "answer": "other"}) == ("p", "c", "other")
    assert shown({"prompt": "p", "chosen": "c", "rejected": "r"}) == ("p", "c", "c")
    assert shown({"prompt": "p", "completion": "c", "label": True}) == ("p", "c", "c")
    assert (
        read_demonstration(Row("f:2", {"prompt": "p", "completion": "c", "label": False}), NAMES) == "thumbs down"
    )
    parts = [
        user("a"),
        {"role": "assistant", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]},
    ]
    assert shown({"messages": parts})[1] == "bc"
    assert read_prompt(Row("f:2", {"prompt": [user("a")]}), NAMES).prompt == "user: a\nassistant: "
    with pytest.raises(UserError, match=r"f:2: no message of the 'assistant' answers another"):
        shown({"messages": [user("a")]})
    with pytest.raises(UserError, match=r"f:2: column 'messages' is an empty list"):
        shown({"messages": []})


def test_other_names() -> None:
    names = ColumnNames(prompt="question", chosen="winner", rejected="loser")
    found = read_comparison(Row("f:1", {"question": "q", "winner": "w", "loser": "l", "prompt": "x"}), names)
    assert found == Comparison("q", "w", "l", columns={"prompt": "x"})
