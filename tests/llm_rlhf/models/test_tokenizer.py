from pathlib import Path

import pytest
from transformers import AutoTokenizer

from experiment.errors import UserError
from llm_rlhf.models.tokenizer import character_tokenizer, decode_completions, load_tokenizer, pad_id


def test_one_token_a_character_and_special_tokens_are_distinct() -> None:
    tokenizer = character_tokenizer("0123456789+-*/= ")
    ids = tokenizer.encode("12+ 3=", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["1", "2", "+", " ", "3", "="]
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert len(set(special)) == 4
    assert len(tokenizer) == 4 + 16
    assert pad_id(tokenizer) == tokenizer.pad_token_id


def test_text_comes_back_character_by_character() -> None:
    tokenizer = character_tokenizer("ab ,.\n")
    for text in ("a b", "  a,,b .", "a\nb\n", "b ."):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
    assert decode_completions(tokenizer, [[4, 4], []])[1] == ""


def test_unknown_characters_become_the_unknown_token() -> None:
    tokenizer = character_tokenizer("ab")
    assert tokenizer.encode("axb", add_special_tokens=False)[1] == tokenizer.unk_token_id


def test_saved_tokenizer_loads_with_plain_transformers(tmp_path: Path) -> None:
    tokenizer = character_tokenizer("0123+= ")
    tokenizer.save_pretrained(str(tmp_path))
    loaded = AutoTokenizer.from_pretrained(str(tmp_path))
    for text in ("12+3=", " 0 =", ""):
        assert loaded.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False)
        assert loaded.decode(loaded.encode(text, add_special_tokens=False)) == text
    assert loaded.eos_token_id == tokenizer.eos_token_id
    assert loaded.pad_token_id == tokenizer.pad_token_id


def test_folder_without_tokenizer_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(tmp_path)


def test_empty_alphabet_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one character"):
        character_tokenizer("")
