import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from experiment.errors import UserError
from llm_rlhf.models.causal import build_policy
from llm_rlhf.models.loading import ModelConfig, new_language_model
from llm_rlhf.models.tokenizer import character_tokenizer, decode_completions, end_ids, load_tokenizer, pad_id
from llm_rlhf.rewards.reward_model import build_reward_model


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


def test_a_models_own_ends_count_where_they_are_special_tokens() -> None:
    """As Gemma's: eos ends a text, and <end_of_turn>, which the generation settings name, a turn."""
    torch.manual_seed(0)
    tokenizer = character_tokenizer("ab")
    model = new_language_model(ModelConfig(layers=1, width=8, heads=1, context=8), tokenizer)
    eos = tokenizer.eos_token_id
    assert model.generation_config is not None
    assert end_ids(tokenizer, model) == {eos}
    model.generation_config.eos_token_id = [tokenizer.bos_token_id, tokenizer.encode("a")[0]]
    assert end_ids(tokenizer, model) == {eos, tokenizer.bos_token_id}
    model.generation_config.eos_token_id = tokenizer.unk_token_id
    assert end_ids(tokenizer, model) == {eos, tokenizer.unk_token_id}
    model.generation_config.eos_token_id = None
    assert end_ids(tokenizer, model) == {eos}


def test_empty_alphabet_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one character"):
        character_tokenizer("")


def small_model(folder: Path, alphabet: str, tokenizer_alphabet: str | None = None) -> Path:
    torch.manual_seed(0)
    config = ModelConfig(layers=1, width=16, heads=2, context=16)
    new_language_model(config, character_tokenizer(alphabet)).save_pretrained(folder)
    character_tokenizer(tokenizer_alphabet or alphabet).save_pretrained(str(folder))
    return folder


def test_a_token_that_the_model_does_not_know_is_told_before_it_is_met(tmp_path: Path) -> None:
    folder = small_model(tmp_path / "model", "ab", "abcd")
    wanted = (
        r"model: the tokenizer goes up to id 7 \('d'\), the model has embeddings of 6 tokens; "
        r"call model\.resize_token_embeddings\(8\)"
    )
    with pytest.raises(UserError, match=wanted):
        build_policy(ModelConfig(path=str(folder)), alphabet="")
    with pytest.raises(UserError, match=wanted):
        build_reward_model(ModelConfig(path=str(folder)), alphabet="", objectives=("preference",), heads=1)
    build_policy(ModelConfig(path=str(small_model(tmp_path / "wide", "abcd", "ab"))), alphabet="")  # rows to spare


@pytest.mark.parametrize(
    "change",
    [
        {"n_embd": 6},
        {"n_embd": "8"},
        {"n_layer": 3},
        {"n_head": 3},
        {"activation_function": "none"},
        {"model_type": 3},
    ],
)
def test_settings_that_contradict_the_weights_are_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = small_model(tmp_path / "model", "ab")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **change}))
    for build in (
        lambda: build_policy(ModelConfig(path=str(folder)), alphabet=""),
        lambda: build_reward_model(ModelConfig(path=str(folder)), alphabet="", objectives=("preference",), heads=1),
    ):
        with pytest.raises(UserError, match=r"could (not )?be loaded|would be random") as error:
            build()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_files_that_hold_something_else_are_one_line(tmp_path: Path, name: str) -> None:
    folder = small_model(tmp_path / "model", "ab")
    for text in ("[]", "3", "{", '{"version": 7}' if name == "tokenizer.json" else "null"):
        (folder / name).write_text(text)
        with pytest.raises(UserError, match=r"could be loaded|could not be loaded|no transformers model") as error:
            build_policy(ModelConfig(path=str(folder)), alphabet="")
        assert "\n" not in str(error.value)


def test_weights_that_were_cut_short_are_one_line(tmp_path: Path) -> None:
    folder = small_model(tmp_path / "model", "ab")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for length in (0, 40, len(whole) // 2):
        weights.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"model\.path: .*model could not be loaded as a causal"):
            build_policy(ModelConfig(path=str(folder)), alphabet="")
