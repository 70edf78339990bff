"""Keys and values of a decode in buffers that have room for what is to come.

transformers' own cache joins the new column to all the old ones at every token, which copies everything that was
ever computed: a tenth of a small model's decode. Here a column is written into its place.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer


class RoomyLayer(DynamicLayer):
    """A layer's keys and values [B, H, n, D], the first n columns of buffers with `room` columns.

    Whatever `keys` and `values` are set to from outside is taken over at the next update.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new columns [B, H, N, D]; returns all that there are. Beyond the room the buffers grow."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        if self._buffers is None or after > self.room or not self._holds(self.keys):
            self.room = max(self.room, after)
            self._buffers = (self._roomy(self.keys, key_states), self._roomy(self.values, value_states))
        rows = key_states.shape[0]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:rows, :, before:after] = states
        self.keys, self.values = (buffer[:rows, :, :after] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` [n], ascending: they move to the front of the buffers."""
        if self._buffers is None or not self._holds(self.keys):
            super().batch_select_indices(indices)
            return
        length = self.get_seq_length()
        for buffer in self._buffers:
            buffer[: len(indices), :, :length] = buffer[:, :, :length].index_select(0, indices)
        self.keys, self.values = (buffer[: len(indices), :, :length] for buffer in self._buffers)

    def _holds(self, keys: Tensor | None) -> bool:
        """Whether `keys` are the buffer's and not somebody else's."""
        return keys is not None and self._buffers is not None and keys.data_ptr() == self._buffers[0].data_ptr()

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
