"""What makes a decode fast without changing what it computes.

Keys and values lie in buffers that have room for what is to come: transformers' own cache joins the new column to
all the old ones at every token, which copies everything that was ever computed. And a GPT-2 takes its steps in
plain tensor operations, the same ones in the same order: much of a small model's decode is transformers'
bookkeeping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.pytorch_utils import Conv1D

from llm_rlhf.models.precision import Precision


class RoomyLayer(DynamicLayer):
    """A layer's keys and values [B, H, n, D], the first n columns of buffers with `room` columns.

    Whatever `keys` and `values` are set to from outside is taken over at the next update.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._seen: Tensor | None = None  # the keys as this layer set them last

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new columns [B, H, N, D]; returns all that there are. Beyond the room the buffers grow."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        if self._buffers is None or after > self.room or self.keys is not self._seen:
            self.room = max(self.room, after)
            self._buffers = (self._roomy(self.keys, key_states), self._roomy(self.values, value_states))
        rows = key_states.shape[0]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:rows, :, before:after] = states
        return self._show(rows, after)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` [n], ascending: they move to the front of the buffers."""
        if self._buffers is None or self.keys is not self._seen:
            super().batch_select_indices(indices)
            return
        length = self.get_seq_length()
        for buffer in self._buffers:
            buffer[: len(indices), :, :length] = buffer[:, :, :length].index_select(0, indices)
        self._show(len(indices), length)

    def _show(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Let keys and values be this part of the buffers."""
        assert self._buffers is not None
        keys, values = (buffer[:rows, :, :length] for buffer in self._buffers)
        self.keys, self.values, self._seen = keys, values, keys
        return keys, values

    def _roomy(self, held: Tensor | None, states: Tensor) -> Tensor:
        rows, heads, _, width = states.shape
        buffer = states.new_empty(rows, heads, self.room, width)
        if held is not None and held.numel():
            buffer[:, :, : held.shape[-2]] = held
        return buffer


def roomy_cache(config: PreTrainedConfig, room: int) -> DynamicCache | None:
    """An empty cache for a decode of at most `room` tokens, prompt included.

    None for a model whose layers keep something else than all keys and values (a window, a state), and which makes
    its own.
    """
    cache = DynamicCache(config=config)
    if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.layers = [RoomyLayer(room) for _ in cache.layers]
    return cache


class PlainGPT2:
    """Single-token steps of a GPT-2 as plain tensor operations, on the model's own weights as they are now.

    With precision "bf16" matrix products and attention are bfloat16's, with weights that were cast once; the sum of
    the layers, norms and results are float32's: what autocast computes.
    """

    def __init__(self, model: GPT2LMHeadModel, precision: Precision) -> None:
        """Use `PlainGPT2.of`, which refuses what this cannot do."""
        body: Any = model.transformer
        config = model.config
        self.words: Tensor = body.wte.weight
        self.dtype = torch.bfloat16 if precision == "bf16" else self.words.dtype
        self.places: Tensor = body.wpe.weight
        self.heads, self.epsilon = config.n_head, config.layer_norm_epsilon
        self.activation = ACTIVATIONS[config.activation_function]
        self.blocks: list[list[Tensor]] = [
            [
                *(block.ln_1.weight, block.ln_1.bias, *self._cast(block.attn.c_attn, block.attn.c_proj)),
                *(block.ln_2.weight, block.ln_2.bias, *self._cast(block.mlp.c_fc, block.mlp.c_proj)),
            ]
            for block in body.h
        ]
        self.last: tuple[Tensor, Tensor] = (body.ln_f.weight, body.ln_f.bias)
        self.head = model.lm_head.weight.to(self.dtype)

    @classmethod
    def of(cls, model: nn.Module, precision: Precision = "float32") -> PlainGPT2 | None:
        """None for another model, one with adapters, dropout, or options that only transformers knows; and under an
        autocast that is not the precision's own."""
        if type(model) is not GPT2LMHeadModel:
            return None
        config = model.config
        projections = [
            m for m in model.transformer.h.modules() if hasattr(m, "weight") and not isinstance(m, nn.LayerNorm)
        ]
        plain = (
            config.activation_function in ACTIVATIONS
            and config.scale_attn_weights
            and not (config.scale_attn_by_inverse_layer_idx or config.reorder_and_upcast_attn)
            and not config.add_cross_attention
            and all(type(module) is Conv1D for module in projections)
            and not any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in model.modules())
            and (precision == "bf16" or not torch.is_autocast_enabled(model.device.type))
        )
        return cls(model, precision) if plain else None

    def _cast(self, *projections: nn.Module) -> Iterator[Tensor]:
        """Weight and bias of each."""
        for projection in projections:
            for parameter in (projection.weight, projection.bias):
                assert isinstance(parameter, Tensor)
                yield parameter.to(self.dtype)

    def step(self, tokens: Tensor, attention_mask: Tensor, cache: DynamicCache) -> tuple[Tensor, Tensor]:
        """One more token of each row, [B], where attention_mask [B, past + 1] covers it; the cache is written to.

        Returns logits [B, 1, V] and hidden states [B, 1, D], as wide as the weights.
        """
        rows, width = len(tokens), self.words.shape[1]
        padded = not bool(attention_mask[:, 0].all())
        mask = attention_mask.bool().view(rows, 1, 1, -1) if padded else None
        hidden = F.embedding(tokens, self.words) + F.embedding(attention_mask.sum(1) - 1, self.places)
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            norm_1, shift_1, wide, wide_bias, back, back_bias, norm_2, shift_2, up, up_bias, down, down_bias = block
            normed = F.layer_norm(hidden, (width,), norm_1, shift_1, self.epsilon).to(self.dtype)
            query, key, value = (
                part.view(rows, 1, self.heads, -1).transpose(1, 2)
                for part in torch.addmm(wide_bias, normed, wide).split(width, dim=1)
            )
            assert isinstance(layer, RoomyLayer)
            keys, values = layer.update(key, value)
            seen = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
            hidden = torch.addmm(back_bias, seen.transpose(1, 2).reshape(rows, width), back) + hidden
            normed = F.layer_norm(hidden, (width,), norm_2, shift_2, self.epsilon).to(self.dtype)
            hidden = hidden + torch.addmm(down_bias, self.activation(torch.addmm(up_bias, normed, up)), down)
        hidden = F.layer_norm(hidden, (width,), *self.last, self.epsilon).unsqueeze(1)
        return F.linear(hidden.to(self.dtype), self.head).to(hidden.dtype), hidden


def _tanh_gelu(numbers: Tensor) -> Tensor:
    return F.gelu(numbers, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
}
