"""Keys and values in buffers with room: the same decode as with transformers' own cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache

from llm_rlhf.models.causal import LanguagePolicy
from llm_rlhf.models.decoding import PlainGPT2, RoomyLayer, roomy_cache
from llm_rlhf.models.lora import LoRAConfig, add_lora
from llm_rlhf.models.precision import Precision


def small_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).eval()


@torch.no_grad()
def decode(
    model: PreTrainedModel, cache: DynamicCache | None, change: Callable[[DynamicCache], None]
) -> torch.Tensor:
    """The logits of two prompts' last column, four tokens on, with something done to the cache half way."""
    tokens = torch.arange(12).view(2, 6) % 20
    output = model(input_ids=tokens, past_key_values=cache, use_cache=True)
    change(output.past_key_values)
    rows = output.past_key_values.layers[0].keys.shape[0]
    for token in range(4):
        output = model(
            input_ids=torch.full((rows, 1), token), past_key_values=output.past_key_values, use_cache=True
        )
    logits: torch.Tensor = output.logits
    return logits


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: None,
        lambda cache: cache.batch_repeat_interleave(3),
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
    ],
    ids=["as it is", "repeated", "a row dropped"],
)
@pytest.mark.parametrize("room", [10, 3], ids=["enough room", "too little"])
def test_it_decodes_as_transformers_own(room: int, change: Callable[[DynamicCache], None]) -> None:
    model = small_model()
    cache = roomy_cache(model.config, room)
    assert cache is not None
    torch.testing.assert_close(decode(model, cache, change), decode(model, None, change), rtol=0, atol=1e-6)


@torch.no_grad()
def test_columns_are_written_in_place() -> None:
    model = small_model()
    cache = roomy_cache(model.config, 10)
    assert cache is not None
    model(input_ids=torch.zeros(2, 6, dtype=torch.long), past_key_values=cache, use_cache=True)
    layer = cache.layers[0]
    assert isinstance(layer, RoomyLayer)
    assert layer.keys is not None
    before = layer.keys.data_ptr()
    for rows in (2, 1):
        if rows == 1:
            cache.batch_select_indices(torch.tensor([1]))
        model(input_ids=torch.zeros(rows, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
        assert layer.keys.data_ptr() == before
    assert layer.get_seq_length() == 8


def test_a_model_with_a_window_makes_its_own_cache() -> None:
    assert roomy_cache(MistralConfig(num_hidden_layers=2, sliding_window=4), 10) is None


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_new", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@torch.no_grad()
def test_plain_steps_are_transformers_steps(activation: str, padded: bool, precision: Precision) -> None:
    """In bfloat16, too: what autocast computes, to a few units in the last of its places."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=20, n_positions=32, n_embd=16, n_layer=2, n_head=2, activation_function=activation
    )
    policy = LanguagePolicy(GPT2LMHeadModel(config).eval())
    policy.precision = precision
    tolerance = 2e-6 if precision == "float32" else 4e-3
    prompts = torch.arange(18).view(3, 6)
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[1, :4] = 0 if padded else 1
    caches = [roomy_cache(config, 12), None]
    plain = PlainGPT2.of(policy.model, precision)
    assert plain is not None
    for index, cache in enumerate(caches):
        caches[index] = policy.step(prompts, mask, cache=cache, use_cache=True)[2]
    for token in range(5):
        if token == 2:  # a row ends
            mask = mask[1:]
            for cache in caches:
                assert cache is not None
                cache.batch_select_indices(torch.tensor([1, 2]))
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.long)], 1)
        tokens = torch.arange(len(mask)) + token
        assert caches[0] is not None
        logits, hidden = plain.step(tokens, mask, caches[0])
        expected, states, _ = policy.step(tokens.unsqueeze(1), mask, cache=caches[1], use_cache=True)
        assert logits.dtype == hidden.dtype == expected.dtype == states.dtype == torch.float32
        torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance / 2)
        torch.testing.assert_close(hidden, states, rtol=0, atol=tolerance)


def test_what_plain_steps_leave_to_transformers() -> None:
    sizes: dict[str, Any] = {"vocab_size": 20, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    assert PlainGPT2.of(model) is not None
    assert PlainGPT2.of(model.train()) is None  # dropout
    options: list[dict[str, Any]] = [
        {"activation_function": "silu"},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"add_cross_attention": True},
    ]
    for option in options:
        assert PlainGPT2.of(GPT2LMHeadModel(GPT2Config(**sizes, **option)).eval()) is None
    adapted = small_model()
    add_lora(adapted, LoRAConfig(), base="somewhere")
    assert PlainGPT2.of(adapted) is None
    llama = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    assert PlainGPT2.of(LlamaForCausalLM(llama)) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert PlainGPT2.of(small_model()) is None
