"""`tandem chat`: turns from piped input, streamed answers, a context that fills up, commands."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import pytest
import torch

from experiment.errors import UserError
from llm_rlhf.data.chat import render
from llm_rlhf.evaluation.subject import Decoding, Subject
from llm_rlhf.models.causal import build_policy
from llm_rlhf.models.loading import ModelConfig
from tandem.chat import ChatConfig, Conversation, add_arguments, chat, stream, talk

ALPHABET = "".join(map(chr, range(32, 127))) + "\n"


def make_subject(*, context: int = 128) -> Subject:
    torch.manual_seed(3)
    policy, tokenizer = build_policy(ModelConfig(layers=1, width=16, heads=2, context=context), alphabet=ALPHABET)
    for parameter in policy.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return Subject(policy.eval(), tokenizer, chat=True)


def said(lines: str, config: ChatConfig, *, context: int = 128) -> list[str]:
    """What is printed to piped input."""
    out = io.StringIO()
    talk(Conversation(make_subject(context=context), config), source=io.StringIO(lines), out=out)
    return out.getvalue().splitlines()


GREEDY = ChatConfig(temperature=0.0, max_new_tokens=6)


def test_what_is_streamed_is_what_generation_draws() -> None:
    subject = make_subject()
    for temperature, seed in ((0.0, 0), (1.3, 5)):
        config = ChatConfig(temperature=temperature, max_new_tokens=12, seed=seed)
        text = render(subject.tokenizer, [{"role": "user", "content": "hello"}], answer=True)
        ids = list(subject.tokenizer.encode(text, add_special_tokens=False))
        pieces = list(stream(subject, ids, config, torch.Generator().manual_seed(seed)))
        expected = subject.complete(["hello"], Decoding(max_new_tokens=12, temperature=temperature, seed=seed))
        assert "".join(pieces) == expected[0][0]
        assert len(pieces) > 3  # character by character


def test_a_conversation_remembers() -> None:
    """The second answer is the model's to the whole conversation, rendered by the template."""
    talking = Conversation(make_subject(), GREEDY)
    first = "".join(talking.say("hi"))
    second = "".join(talking.say("and?"))
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": first.strip()},
        {"role": "user", "content": "and?"},
    ]
    assert [message["role"] for message in talking.messages] == ["user", "assistant", "user", "assistant"]
    subject = make_subject()
    assert second == subject.complete([messages], Decoding(max_new_tokens=6))[0][0]
    assert talking.news() == []


def test_reset_and_quit() -> None:
    once = said("hi\n", GREEDY)
    assert len(once) >= 1
    twice = said("hi\n/reset\n\nhi\n/quit\nnever said\n", GREEDY)
    assert twice == [*once, "(forgotten)", *once]
    assert "(unknown command /resett;" in said("/resett\n", GREEDY)[0]


def test_a_system_message_stays() -> None:
    talking = Conversation(make_subject(), ChatConfig(temperature=0.0, max_new_tokens=6, system="be kind"))
    list(talking.say("hi"))
    talking.reset()
    assert talking.messages == [{"role": "system", "content": "be kind"}]


def test_plain_lines_are_prompts_of_their_own() -> None:
    config = ChatConfig(temperature=0.0, max_new_tokens=6, plain=True)
    talking, subject = Conversation(make_subject(), config), make_subject()
    subject.chat = False
    expected = subject.complete(["12+3=", "and?"], Decoding(max_new_tokens=6))
    assert ["".join(talking.say("12+3=")), "".join(talking.say("and?"))] == [texts[0] for texts in expected]
    with pytest.raises(ValueError, match="--system"):
        ChatConfig(system="s", plain=True)
    for temperature in (float("nan"), 1e-40, float("inf")):
        with pytest.raises(ValueError, match=r"--temperature must be 0, or a number from 0\.0001 on"):
            ChatConfig(temperature=temperature)
    with pytest.raises(ValueError, match="--seed must be between 0 and"):
        ChatConfig(seed=2**64)


def test_a_full_context_forgets_the_oldest_turns_and_says_so_once() -> None:
    subject = make_subject(context=64)
    talking = Conversation(subject, ChatConfig(temperature=0.0, max_new_tokens=4, system="s"))
    told = []
    for number in range(8):
        list(talking.say(f"turn {number}"))
        told += talking.news()
    assert len(told) == 1
    assert "context of 64 tokens is full: the oldest turns are forgotten" in told[0]
    assert talking.dropped > 2
    assert talking.messages[0]["role"] == "system"
    assert talking.messages[1]["role"] == "user"
    assert talking.messages[-2]["content"] == "turn 7"
    asked = render(subject.tokenizer, talking.messages[:-1], answer=True)
    assert len(subject.tokenizer.encode(asked, add_special_tokens=False)) <= 60
    list(talking.say("x" * 100))
    assert "longer than the 60 tokens there are; its end was used" in talking.news()[-1]


@pytest.mark.parametrize("context", [2, 24])
def test_without_a_limit_an_answer_takes_what_fits(context: int) -> None:
    """Up to 256 tokens; the conversation may have the rest, and at least half of a small context."""
    subject = make_subject(context=context)
    config = ChatConfig(temperature=0.0, plain=True)
    assert [config.longest_answer(10, size) for size in (200, 266, 4096)] == [190, 256, 256]
    assert [config.kept_free(size) for size in (200, 512, 4096)] == [100, 256, 256]
    room = context - context // 2
    for prompt in (1, room):
        subject.policy.steering = lambda logits, hidden: torch.nn.functional.pad(
            torch.zeros_like(logits[..., 5:]), (5, 0), value=-9.0
        )  # never EOS
        drawn = "".join(stream(subject, [7] * prompt, config, torch.Generator()))
        assert len(drawn) == context - prompt
    talking = Conversation(subject, config)
    list(talking.say("x" * room))
    assert talking.news() == []
    list(talking.say("x" * (room + 1)))
    assert f"longer than the {room} tokens there are" in talking.news()[0]


def test_piped_input_through_the_verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    subject = make_subject()
    folder = tmp_path / "run" / "checkpoints" / "last" / "policy"
    subject.policy.save_pretrained(folder)
    subject.tokenizer.save_pretrained(str(folder))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = [str(tmp_path / "run"), "--temperature", "0", "--max-new-tokens", "6"]
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    assert chat(parser.parse_args(words)) == 0
    assert capsys.readouterr().out.splitlines() == said("hi\n", GREEDY)
    for option, message in (
        (["--temperature", "-1"], "must not be negative"),
        (["--max-new-tokens", "128"], "leave no room"),
    ):
        with pytest.raises(UserError, match=message):
            chat(parser.parse_args([*words, *option]))


def test_a_terminal_is_prompted() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = io.StringIO()
    talk(Conversation(make_subject(), GREEDY), source=Terminal("/quit\n"), out=out)
    assert out.getvalue().endswith("> ")
    assert "/reset forgets" in out.getvalue()
