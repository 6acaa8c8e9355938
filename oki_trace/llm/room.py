"""A KV cache with room to grow, so that a step does not copy all that came before it.

transformers' dynamic cache makes each layer's keys and values anew, one token
longer, at every step. At a long context that copy takes as long as the model,
and the freed pieces, each a little too small for the next one, scatter the heap.
Here they stand at the front of a larger tensor: a step writes its own token
behind them. The model sees the same keys and values, as a view.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

# Tokens there is room for, beyond those there are. More of it is memory nobody may need.
ROOM = 128

_STAYS = "_oki_trace_stays"


class RoomyLayer(DynamicLayer):
    """A layer's keys and values (1, heads, tokens, width) at the front of larger tensors."""

    keys: Any
    values: Any

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """Take over what another layer holds."""
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self._have(keys, values)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new tokens behind those that are there; all of them, as views."""
        if not self.is_initialized or key_states.dtype != self.keys.dtype:
            return super().update(key_states, value_states, *args, **kwargs)
        start, new = self.keys.shape[-2], key_states.shape[-2]
        # Others are there when the cache was cropped or reordered meanwhile.
        if self.keys is not self._shown or start + new > self._key_room.shape[-2]:
            self._have(self.keys, self.values, more=new)
        self._key_room.narrow(-2, start, new).copy_(key_states)
        self._value_room.narrow(-2, start, new).copy_(value_states)
        self._show(start + new)
        return self.keys, self.values

    def _have(self, keys: Tensor, values: Tensor, more: int = 0) -> None:
        """Copy what there is to where there is room, one tensor after the other."""
        self._key_room = _with_room(keys, more)
        self._value_room = _with_room(values, more)
        self._show(keys.shape[-2])

    def _show(self, tokens: int) -> None:
        self.keys = self._shown = self._key_room.narrow(-2, 0, tokens)
        self.values = self._value_room.narrow(-2, 0, tokens)
        setattr(self.keys, _STAYS, True)


# Under which a model hands its cache out and takes it back; the first since transformers 5.24.
CACHE_NAMES = ("cache", "past_key_values")


def give_room(cache: Any) -> None:
    """From now on let the plain layers of a dynamic cache grow in place.

    Layers of other kinds (windows, states, quantized ones) stay as they are.
    """
    if type(cache) is not DynamicCache or cache.offloading:
        return
    for place, layer in enumerate(cache.layers):
        if type(layer) is not DynamicLayer or not layer.get_seq_length():
            continue
        keys, values = layer.keys, layer.values
        if keys is not None and values is not None and keys.shape[:-1] == values.shape[:-1]:
            cache.layers[place] = RoomyLayer(keys, values)


def stays(keys: Tensor) -> bool:
    """Whether holding on to these keys costs nothing: they are a view of what is held anyway."""
    return hasattr(keys, _STAYS)


def _with_room(held: Tensor, more: int) -> Tensor:
    shape = list(held.shape)
    shape[-2] += more + ROOM
    room = held.new_empty(shape)
    room.narrow(-2, 0, held.shape[-2]).copy_(held)
    return room
