import json
from pathlib import Path

import pytest
import torch

from experiment.errors import UserError
from llm_rlhf.data.texts import (
    Batches,
    TokenizedTexts,
    columns_of,
    concatenate,
    encode_prompts,
    tokenize,
)
from llm_rlhf.models.tokenizer import character_tokenizer
from llm_rlhf.tasks.examples import Example
from llm_rlhf.tasks.rows import RowsConfig
from llm_rlhf.tasks.task import TaskConfig, build_task


def test_completions_start_at_one_column_and_only_they_count() -> None:
    tokenizer = character_tokenizer("abc")
    a, b, c = (tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "abc")
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    texts = tokenize([Example("ab", "c"), Example("a", "bcc")], tokenizer, context=10, pad=pad)
    assert texts.input_ids.tolist() == [[a, b, c, eos, pad, pad], [pad, a, b, c, c, eos]]
    assert texts.attention_mask.tolist() == [[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]
    assert texts.mask.int().tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]]
    picked = texts.observations(torch.tensor([1]))
    assert picked["input_ids"].tolist() == [[pad, a, b, c, c, eos]]


def test_masks_are_carried_even_where_padding_is_the_ending_token() -> None:
    tokenizer = character_tokenizer("abc")
    eos = tokenizer.eos_token_id
    texts = tokenize([Example("a", "b"), Example("a", "bc")], tokenizer, context=10, pad=eos)
    assert texts.input_ids[0].tolist()[-2:] == [eos, eos]
    assert texts.mask[0].tolist() == [False, True, True, False]


def test_texts_that_do_not_fit_are_refused() -> None:
    tokenizer = character_tokenizer("abc")
    with pytest.raises(UserError, match="context of 4"):
        tokenize([Example("ab", "ab")], tokenizer, context=4, pad=0)
    with pytest.raises(UserError, match="no texts"):
        tokenize([], tokenizer, context=4, pad=0)
    assert encode_prompts(tokenizer, ["", "a"])[0] == [tokenizer.bos_token_id]


def test_concatenate_aligns_completions() -> None:
    first = TokenizedTexts(
        torch.tensor([[5, 6, 7]]), torch.tensor([[1, 1, 1]]), torch.tensor([[False, True, True]])
    )
    second = TokenizedTexts(
        torch.tensor([[8, 9, 10]]), torch.tensor([[1, 1, 1]]), torch.tensor([[False, False, True]])
    )
    both = concatenate([first, second])
    assert both.input_ids.tolist() == [[0, 5, 6, 7], [8, 9, 10, 0]]
    assert both.attention_mask.tolist() == [[0, 1, 1, 1], [1, 1, 1, 0]]
    assert both.mask.tolist() == [[False, False, True, True], [False, False, True, False]]
    again = TokenizedTexts.from_state(both.state_dict())
    assert torch.equal(again.input_ids, both.input_ids)


def test_batches_cover_every_row_once_an_epoch_and_resume() -> None:
    batches = Batches(10, 4, seed=0)
    seen = torch.cat([batches.next() for _ in range(5)])
    assert sorted(seen[:10].tolist()) == list(range(10))
    assert sorted(seen[10:].tolist()) == list(range(10))
    assert batches.epoch == 2
    batches.next()
    state = batches.state_dict()
    expected = [batches.next().tolist() for _ in range(6)]
    again = Batches(10, 4, seed=99)
    again.load_state_dict(state)
    assert [again.next().tolist() for _ in range(6)] == expected
    with pytest.raises(UserError, match="has 11 rows now"):
        Batches(11, 4, seed=0).load_state_dict(state)
    assert len(Batches(3, 8, seed=0).next()) == 8


def test_columns_that_all_rows_share() -> None:
    rows = [Example("a", "b", {"answer": "b", "level": 1}), Example("c", "d", {"answer": "d"})]
    assert columns_of(rows) == {"answer": ["b", "d"]}
    assert columns_of([]) == {}


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_own_rows_are_split_by_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "completion": f"r{i}{j}", "level": "x"} for i in range(40) for j in range(2)]
    task = build_task(TaskConfig(name="rows", data=write(tmp_path / "rows.jsonl", rows)))
    train = {example.prompt for example in task.train}
    demonstrated = {example.prompt for example in task.demonstrations}
    held_out = {example.prompt for split in task.splits.values() for example in split}
    assert train == demonstrated
    assert not train & held_out
    assert len(train | held_out) == 40
    assert len(task.demonstrations) == 2 * len(train)
    assert task.train[0].columns["answer"] == task.train[0].completion
    assert set(columns_of(task.train)) == {"answer", "prompt", "completion", "level"}
    assert set("qr0123456789") <= set(task.alphabet)


def test_bad_rows_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task\.data"):
        build_task(TaskConfig(name="rows"))
    missing = write(tmp_path / "rows.jsonl", [{"prompt": "a", "reply": "b"}])
    with pytest.raises(
        UserError, match=r"rows\.jsonl:1: column 'completion' is missing \(there is prompt, reply\)"
    ):
        build_task(TaskConfig(name="rows", data=missing))
    few = write(tmp_path / "few.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(UserError, match="too few"):
        build_task(TaskConfig(name="rows", data=few))
    with pytest.raises(ValueError, match="shares"):
        RowsConfig(test=1.0)
