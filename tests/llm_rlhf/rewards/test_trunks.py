"""Which of a trunk's layers a reward model keeps, and which it learns."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    PreTrainedModel,
    Qwen2Config,
    Qwen2Model,
)

from experiment.errors import UserError
from llm_rlhf.rewards.reward_model import load_trunk
from llm_rlhf.rewards.trunks import lowest, shorten

SIZES: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def decoder() -> GPT2Model:
    torch.manual_seed(0)
    return GPT2Model(GPT2Config(vocab_size=16, n_positions=24, n_embd=8, n_layer=2, n_head=2)).eval()


def encoder() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=16, max_position_embeddings=24, **SIZES)).eval()


def test_the_lowest_layers_of_a_trunk() -> None:
    """Embeddings come with them; what stands behind the layers stays out, even where all of those are asked for."""

    def found(trunk: PreTrainedModel, count: int) -> set[str]:
        numbers = {id(parameter) for parameter in lowest(trunk, count)}
        return {name for name, parameter in trunk.named_parameters() if id(parameter) in numbers}

    gpt2, bert = decoder(), encoder()
    assert found(gpt2, 0) == set()
    assert found(gpt2, 1) == {
        name for name, _ in gpt2.named_parameters() if name.startswith(("wte.", "wpe.", "h.0."))
    }
    assert {name for name, _ in gpt2.named_parameters()} - found(gpt2, 2) == {"ln_f.weight", "ln_f.bias"}
    assert {name for name, _ in bert.named_parameters()} - found(bert, 2) == {
        name for name, _ in bert.named_parameters() if name.startswith(("encoder.layer.2.", "pooler."))
    }
    with pytest.raises(UserError, match=r"reward\.frozen_layers: 3 of a GPT2Model with 2 layers"):
        lowest(gpt2, 3)


def test_a_shortened_trunk_is_the_middle_of_the_whole(tmp_path: Path) -> None:
    """Its last hidden states are the whole's after that layer, and still are when they were saved and read."""
    whole, ids = encoder(), torch.tensor([[3, 5, 2, 7]])
    trunk = copy.deepcopy(whole)
    shorten(trunk, 2)
    with torch.no_grad():
        expected = whole(input_ids=ids, output_hidden_states=True).hidden_states[2]
        assert torch.equal(trunk(input_ids=ids).last_hidden_state, expected)
        trunk.save_pretrained(str(tmp_path))
        assert torch.equal(load_trunk(tmp_path)(input_ids=ids).last_hidden_state, expected)
    shorten(trunk, 2)  # a run that goes on finds it so
    assert trunk.config.num_hidden_layers == len(trunk.encoder.layer) == 2
    with pytest.raises(UserError, match=r"reward\.layers: 3 of a BertModel with 2 layers"):
        shorten(trunk, 3)


def test_layers_of_several_kinds_and_none() -> None:
    qwen = Qwen2Model(Qwen2Config(vocab_size=16, num_key_value_heads=2, **SIZES)).eval()
    shorten(qwen, 1)
    assert len(qwen.config.layer_types) == 1
    assert qwen(input_ids=torch.tensor([[1, 2]])).last_hidden_state.shape == (1, 2, 8)
    albert = AlbertModel(AlbertConfig(vocab_size=16, embedding_size=8, **SIZES))
    with pytest.raises(UserError, match=r"an? AlbertModel with layers that are not told apart"):
        lowest(albert, 1)
