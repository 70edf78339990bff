"""Perplexity: every token once, after as much as the context allows; exact where the model is uniform."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experiment.errors import UserError
from llm_rlhf.evaluation.perplexity import perplexity, read_documents, windows
from llm_rlhf.evaluation.subject import Subject

Make = Callable[..., Subject]


@pytest.mark.parametrize(("tokens", "context", "stride"), [(3, 8, 4), (7, 8, 4), (8, 8, 4), (30, 8, 3), (30, 8, 7)])
def test_windows_judge_every_token_once(tokens: int, context: int, stride: int) -> None:
    ids = list(range(100, 100 + tokens))
    found = windows(ids, start=1, context=context, stride=stride)
    assert [token for window in found for token in window.tokens[window.known :]] == ids
    assert all(len(window.tokens) <= context for window in found)
    assert found[0].tokens[0] == 1
    assert all(window.known >= context - stride for window in found[1:])
    with pytest.raises(ValueError, match="stride"):
        windows(ids, start=1, context=8, stride=8)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(make_subject: Make) -> None:
    subject = make_subject(uniform=True, context=16)
    figures = perplexity(subject, ["some text that is longer than the context", "and another"]).figures()
    size = len(subject.tokenizer)
    for name in ("perplexity", "byte_perplexity", "character_perplexity"):
        assert figures[name] == pytest.approx(size, rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(math.log2(size), rel=1e-5)
    assert figures["tokens"] == figures["bytes"] == 41 + 11


def test_it_is_the_models_own(make_subject: Make) -> None:
    """Against one forward pass a token, over exactly the window that the token is judged in."""
    subject = make_subject(context=16, batch_size=2)
    subject.policy.temperature = 0.7
    text = "the quick brown fox jumps over it"
    ids = [subject.tokenizer.bos_token_id, *subject.tokenizer.encode(text, add_special_tokens=False)]
    total, judged = 0.0, 1
    subject.policy.requires_grad_(False)
    while judged < len(ids):
        end = min(len(ids), 16 if judged == 1 else judged + 5)
        for at in range(judged, end):
            seen = torch.tensor([ids[max(0, end - 16) : at]])
            total -= float(
                torch.log_softmax(subject.policy.model(input_ids=seen).logits[0, -1].double(), -1)[ids[at]]
            )
        judged = end
    result = perplexity(subject, [text], stride=5)
    assert result.measures["perplexity"].value == pytest.approx(math.exp(total / len(text)), rel=1e-4)
    assert subject.policy.temperature == 0.7
    again = perplexity(make_subject(context=16, batch_size=16), [text], stride=5)
    assert again.measures["perplexity"].value == pytest.approx(result.measures["perplexity"].value, rel=1e-5)


def test_bytes_are_not_characters_and_unknown_tokens_are_told(make_subject: Make) -> None:
    result = perplexity(make_subject(uniform=True), ["a naïve test"])
    figures, size = result.figures(), 99 + 1
    assert (figures["bytes"], figures["tokens"], figures["unknown_tokens"]) == (13, 12, 1)
    assert figures["byte_perplexity"] == pytest.approx(size ** (12 / 13), rel=1e-4)
    assert any("1 tokens are unknown" in note for note in result.notes)
    assert any("fewer than 20 documents" in note for note in result.notes)


def test_many_documents_are_the_units_of_the_interval(make_subject: Make) -> None:
    subject = make_subject(context=16)
    documents = [f"document number {number}" for number in range(25)]
    result = perplexity(subject, documents)
    assert len(result.measures["perplexity"].top) == 25
    assert result.notes == []
    low, high = result.measures["perplexity"].interval()
    assert low < result.measures["perplexity"].value < high


def test_reading(tmp_path: Path, make_subject: Make) -> None:
    plain, rows = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text("one\n\ntwo", encoding="utf-8")
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one", "", "two")))
    assert read_documents(plain) == ["one\n\ntwo"]
    assert read_documents(rows) == ["one", "two"]
    (tmp_path / "b.txt").write_bytes(b"abc\xff")
    for name, message in (("b.txt", r"not UTF-8 text \(byte 3\)"), ("c.txt", "cannot be read: No such file")):
        with pytest.raises(UserError, match=message):
            read_documents(tmp_path / name)
    (tmp_path / "d.txt").write_text("")
    with pytest.raises(UserError, match="there is no text in it"):
        read_documents(tmp_path / "d.txt")
    with pytest.raises(UserError, match="--stride must be between 1 and 63"):
        perplexity(make_subject(), ["abc"], stride=64)
