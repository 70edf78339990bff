"""Comparisons and thumbs: read, divided by prompt, and as tokens."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from experiment.errors import UserError
from llm_rlhf.data.chat import Chat
from llm_rlhf.data.pairs import (
    IN_PART,
    PairData,
    PairsConfig,
    concatenated,
    read_feedback,
    read_pairs,
    tokenize_feedback,
    tokenize_pairs,
)
from llm_rlhf.data.records import Comparison, Feedback
from llm_rlhf.data.texts import Encoded, fit
from llm_rlhf.models.tokenizer import character_tokenizer
from llm_rlhf.preferences.learning import tokenized_sets

DATA = Path(os.environ.get("TANDEM_DATA", Path(__file__).parents[4] / "shared" / "data"))
HH = DATA / "hh_harmless_pairs.jsonl.gz"


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def many(count: int = 40) -> list[dict[str, Any]]:
    """Two comparisons of every prompt."""
    return [{"prompt": f"q{i}", "chosen": f"a{j}", "rejected": f"b{i}"} for i in range(count) for j in range(2)]


def test_comparisons_are_divided_by_prompt(tmp_path: Path) -> None:
    config = PairsConfig(path=write(tmp_path / "pairs.jsonl", many()), validation=0.1, test=0.2, seed=3)
    data = read_pairs(config)
    sides = [{one.prompt for one in part} for part in (data.train, data.validation, data.test)]
    assert [len(side) for side in sides] == [28, 4, 8]
    assert len(set.union(*sides)) == 40
    assert [len(part) for part in (data.train, data.validation, data.test)] == [56, 8, 16]
    assert set(data.alphabet) == set("qab0123456789")
    assert data == read_pairs(config)
    assert data.notes == [
        f"{config.path}: 56 comparisons (28 prompts) to train on, 8 comparisons (4 prompts) to validate, "
        "16 comparisons (8 prompts) to test"
    ]


def test_shares_may_be_zero_and_files_may_be_given(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", many(5))
    everything = read_pairs(PairsConfig(path=path, validation=0.0, test=0.0))
    assert [len(everything.train), everything.validation, everything.test] == [10, [], []]
    own = write(tmp_path / "test.jsonl", [*many(2), {"prompt": "z", "chosen": "x", "rejected": "y"}])
    data = read_pairs(PairsConfig(path=path, validation=0.0, test_path=own))
    assert [len(data.train), len(data.test)] == [6, 5]
    assert not {one.prompt for one in data.train} & {one.prompt for one in data.test}
    assert f"{path}: 2 prompts are held out elsewhere too, and not trained on" in data.notes
    few = PairsConfig(path=path, validation=0.0, test=0.0, limit=3)
    assert [one.chosen for one in read_pairs(few).train].count("a0") == 2


def test_rows_that_say_nothing_are_counted(tmp_path: Path) -> None:
    bad = [
        {"prompt": "same", "chosen": "x", "rejected": "x"},
        {"prompt": "empty", "chosen": "x", "rejected": " "},
        {"prompt": "empty", "chosen": "", "rejected": "y"},
    ]
    odd = [
        {"prompt": "tie", "chosen": "x", "rejected": "x", "tie": True},
        {"prompt": "against", "chosen": "x", "rejected": "y", "score_chosen": 1, "score_rejected": 2},
    ]
    path = write(tmp_path / "pairs.jsonl", [*bad, *odd])
    data = read_pairs(PairsConfig(path=path, validation=0.0, test=0.0))
    assert {one.prompt: one.margin for one in data.train} == {"tie": None, "against": -1.0}
    assert data.notes[1:] == [
        f"{path}: 3 of 5 rows are left out: 2 with empty answers, 1 with equal answers",
        "1 of 2 comparisons are ties",
        "1 of 2 comparisons have a negative margin: their scores prefer rejected",
    ]
    nothing = write(tmp_path / "nothing.jsonl", bad)
    with pytest.raises(UserError, match=r"no comparisons to learn from in 3 rows \(2 with empty answers, 1 with"):
        read_pairs(PairsConfig(path=nothing))


def test_bad_settings_and_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pairs\.path: give the file"):
        read_pairs(PairsConfig())
    with pytest.raises(UserError, match="1 different prompts are too few"):
        read_pairs(PairsConfig(path=write(tmp_path / "a.jsonl", many(1))))
    with pytest.raises(
        UserError, match=r"a\.jsonl:1: column 'winner' is missing \(there is prompt, chosen, rejected\)"
    ):
        read_pairs(PairsConfig(path=str(tmp_path / "a.jsonl"), chosen="winner"))
    for bad, message in (
        ({"test": 1.0}, "shares that leave"),
        ({"max_prompt": 0}, r"pairs\.max_prompt must be at least 1"),
        ({"chosen": "rejected"}, "both called 'rejected'"),
    ):
        with pytest.raises(ValueError, match=message):
            PairsConfig(**bad)


def test_pairs_as_tokens() -> None:
    tokenizer = character_tokenizer("abc")
    a, b, c = (tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "abc")
    eos, pad = int(tokenizer.eos_token_id), int(tokenizer.pad_token_id)
    comparisons = [
        Comparison("ab", "c", "bb", margin=0.5),
        Comparison("c", "a", "a", tied=True),
        Comparison("ab", "a", "b"),
    ]
    pairs, counts = tokenize_pairs(comparisons, tokenizer, context=10, pad=pad)
    assert not any(counts.values())
    assert pairs.chosen.input_ids.tolist() == [[a, b, c, eos, pad], [pad, c, a, eos, pad], [a, b, a, eos, pad]]
    assert pairs.rejected.input_ids.tolist() == [[a, b, b, b, eos], [pad, c, a, eos, pad], [a, b, b, eos, pad]]
    assert pairs.rejected.mask.int().tolist() == [[0, 0, 1, 1, 1], [0, 0, 1, 1, 0], [0, 0, 1, 1, 0]]
    assert pairs.chosen.attention_mask.tolist() == [[1, 1, 1, 1, 0], [0, 1, 1, 1, 0], [1, 1, 1, 1, 0]]
    assert pairs.tied.tolist() == [False, True, False]
    assert pairs.margin[0] == 0.5
    assert math.isnan(float(pairs.margin[1]))
    assert pairs.prompt.tolist() == [0, 1, 0]
    both = concatenated(pairs)
    assert torch.equal(both.input_ids, torch.cat([pairs.chosen.input_ids, pairs.rejected.input_ids]))
    some = pairs.select(torch.tensor([2, 0]))
    assert len(some) == 2
    assert some.prompt.tolist() == [0, 0]
    assert torch.equal(concatenated(some).mask, both.mask[torch.tensor([2, 0, 5, 3])])
    with pytest.raises(UserError, match="no comparisons"):
        tokenize_pairs([], tokenizer, context=10, pad=pad)


def test_long_prompts_keep_their_end_and_long_answers_lose_theirs() -> None:
    tokenizer = character_tokenizer("abcdefgh")
    eos = int(tokenizer.eos_token_id)
    comparisons = [
        Comparison("abcdefgh", "a", "b"),  # 8 + 2 > 8: the prompt gives way
        Comparison("abcdefgh", "aaaaaaaa", "aaaaaaab"),  # ... to half of the context, then the answers
        Comparison("a", "b", "c"),
    ]
    pairs, counts = tokenize_pairs(comparisons, tokenizer, context=8, pad=0)
    assert counts == {"prompts_cut": 2, "chosen_cut": 1, "rejected_cut": 1, "answers_made_equal": 1, IN_PART: 0}
    assert tokenizer.decode(pairs.chosen.input_ids[0][pairs.chosen.attention_mask[0].bool()]) == "cdefgha<eos>"
    assert tokenizer.decode(pairs.chosen.input_ids[1][pairs.chosen.attention_mask[1].bool()]) == "efghaaaa"
    assert eos not in pairs.chosen.input_ids[1].tolist()
    assert int(pairs.chosen.attention_mask.sum(1).max()) <= 8
    short, counts = tokenize_pairs(comparisons, tokenizer, context=8, pad=0, max_prompt=3)
    assert counts["prompts_cut"] == 2
    assert short.chosen.input_ids.shape[1] == 3 + 5
    with pytest.raises(UserError, match="all 1 comparisons are equal within the context of 8 tokens"):
        tokenize_pairs(comparisons[1:2], tokenizer, context=8, pad=0)


def test_fit_by_hand() -> None:
    text = Encoded([1, 2, 3, 4], [5, 6], [True, True])
    assert fit([text], context=6) == ([text], False, [False])
    assert fit([text], context=5)[0] == [Encoded([2, 3, 4], [5, 6], [True, True])]
    assert fit([text], context=2) == ([Encoded([4], [5], [True])], True, [True])


def test_thumbs_as_tokens(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "completion": "ab", "label": i % 2 == 0} for i in range(4)]
    data = read_feedback(PairsConfig(path=write(tmp_path / "a.jsonl", rows), validation=0.0, test=0.25))
    assert [len(data.train), len(data.test)] == [3, 1]
    tokenizer = character_tokenizer("abq0123")
    feedback = [Feedback("q0", "a", True), Feedback("q", "abab", False), Feedback("q0", "b", False)]
    texts, counts = tokenize_feedback(feedback, tokenizer, context=4, pad=0)
    assert counts == {"prompts_cut": 0, "completions_cut": 1, IN_PART: 0}
    assert texts.desirable.tolist() == [True, False, False]
    assert texts.prompt.tolist() == [0, 1, 0]
    assert texts.texts.mask.sum(1).tolist() == [2, 3, 2]
    assert len(texts.select(torch.tensor([1]))) == 1


def test_conversations_share_their_prompts_tokens() -> None:
    tokenizer = character_tokenizer("user: assistant\nabc")
    prompt = Chat.prompt([{"role": "user", "content": "a"}])
    chosen, rejected = (Chat.completion([{"role": "assistant", "content": text}]) for text in ("b", "c"))
    pairs, _ = tokenize_pairs([Comparison(prompt, chosen, rejected)], tokenizer, context=64, pad=0)
    left = len(prompt)
    assert torch.equal(pairs.chosen.input_ids[:, :left], pairs.rejected.input_ids[:, :left])
    assert tokenizer.decode(pairs.rejected.input_ids[0]) == "user: a\nassistant: c<eos>"
    assert pairs.rejected.mask[0].nonzero().squeeze(1).tolist() == [left, left + 1]


@pytest.mark.needs_data
@pytest.mark.skipif(not HH.exists(), reason="the HH comparisons are not here")
def test_real_transcripts() -> None:
    data = read_pairs(PairsConfig(path=str(HH), limit=300, validation=0.0, test=0.0))
    assert len(data.train) > 290
    for one in data.train:
        assert one.prompt.startswith("\n\nHuman:")
        assert one.prompt.endswith("\n\nAssistant:")
        assert one.chosen != one.rejected
    chats = read_pairs(PairsConfig(path=str(HH), limit=300, validation=0.0, test=0.0, transcripts="chat"))
    assert len(chats.train) == len(data.train)
    assert all(isinstance(one.prompt, Chat) and one.prompt.messages[-1]["role"] == "user" for one in chats.train)


def test_thoughts_that_the_template_leaves_out_are_said() -> None:
    tokenizer = character_tokenizer("abthink</>user: ")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    asked = Chat.prompt([{"role": "user", "content": "a"}])
    pairs = [Comparison(asked, "think</think>a", "think</think>b"), Comparison(asked, "a", "think</think>b")]
    data = PairData(pairs, [], [], ["note"], "")
    sets, notes = tokenized_sets(data, tokenizer, context=32, max_prompt=None)
    assert notes == ["note", "train: 3 answers shown in part by the chat template"]
    assert len(sets["train"]) == 2
    _, counts = tokenize_feedback([Feedback(asked, "think</think>a", True)], tokenizer, context=32, pad=0)
    assert counts[IN_PART] == 1
