"""A KV cache with room to grow, so that a step does not copy all that came before it.

transformers' dynamic cache makes each layer's keys and values anew, one token
longer, at every step. At a long context that copy takes as long as the model,
and the freed pieces, each a little too small for the next one, scatter the heap.
Here they stand at the front of a larger tensor: a step writes its own token
behind them. The model sees the same keys and values, as a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

# Tokens there is room for, beyond those there are, when as many may come. Memory that
# nobody writes to costs a CPU nothing, and a GPU little.
ROOM = 1024

# Under which a model hands its cache out and takes it back; the first since transformers 5.24.
CACHE_NAMES = ("cache", "past_key_values")

_STAYS = "_oki_trace_stays"


class BufferPool:
    """Places for tensors that outlive a pass of the model, one a layer, all made at the first.

    Made one by one between the pass's own, far larger ones, they would split the
    free memory those leave behind: a long prompt then takes half as much again.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._left: list[Tensor] = []

    def place(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """An empty tensor of this shape, of the type and on the device of ``like``."""
        if self._places:
            self._left = [like.new_empty(shape) for _ in range(self._places)]
            self._places = 0
        if self._left:
            found = self._left.pop()
            if (*found.shape,) == (*shape,) and (found.dtype, found.device) == (
                like.dtype,
                like.device,
            ):
                return found
        return like.new_empty(shape)

    def copy(self, tensor: Tensor) -> Tensor:
        """``tensor`` in a place of its own."""
        return self.place(tensor.shape, tensor).copy_(tensor)


class PreallocatedLayer(DynamicLayer):
    """A layer's keys and values (1, heads, tokens, width) at the front of larger tensors."""

    keys: Any
    values: Any

    def __init__(
        self, layer: DynamicLayer, for_keys: BufferPool, for_values: BufferPool, room: int
    ) -> None:
        """Take over what another layer holds, if it holds anything; have room for so many more."""
        super().__init__()
        self._shelves = for_keys, for_values
        self._room = room
        self._shown: Tensor | None = None
        self._key_room: Tensor
        self._value_room: Tensor
        if layer.get_seq_length():
            self.lazy_initialization(layer.keys, layer.values)  # type: ignore[arg-type]
            self.update(layer.keys, layer.values)  # type: ignore[arg-type]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new tokens behind those that are there; all of them, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        there, new = self.get_seq_length(), key_states.shape[-2]
        alike = key_states.shape[:-1] == value_states.shape[:-1] and key_states.ndim == 4
        if not alike or (there and key_states.dtype != self.keys.dtype):
            return super().update(key_states, value_states, *args, **kwargs)
        keys, values = self._with_room(new, key_states, value_states)
        keys.narrow(-2, there, new).copy_(key_states)
        values.narrow(-2, there, new).copy_(value_states)
        self.show(there + new)
        return self.keys, self.values

    @property
    def roomy(self) -> bool:
        """Whether what it holds stands where there is room."""
        return self._shown is not None and self.keys is self._shown

    def room_for(self, new: int) -> tuple[Tensor, Tensor]:
        """Where it keeps its keys and its values, with places for so many tokens behind them."""
        return self._with_room(new, self.keys, self.values)

    def show(self, tokens: int) -> None:
        """Hold the first so many tokens that were written."""
        self.keys = self._shown = self._key_room.narrow(-2, 0, tokens)
        self.values = self._value_room.narrow(-2, 0, tokens)
        mark_as_staying(self.keys)

    def _with_room(self, new: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        there = self.get_seq_length()
        # Others are shown when the cache was cropped or reordered meanwhile.
        if self.keys is not self._shown or there + new > self._key_room.shape[-2]:
            self._key_room = self._moved(0, self.keys, keys, there + new)
            self._value_room = self._moved(1, self.values, values, there + new)
            self.show(there)
        return self._key_room, self._value_room

    def _moved(self, which: int, held: Tensor, new: Tensor, tokens: int) -> Tensor:
        """What is held, where there is room for this many tokens and more."""
        shape = (*new.shape[:-2], tokens + self._room, new.shape[-1])
        room = self._shelves[which].place(shape, new)
        if held.numel():
            room.narrow(-2, 0, held.shape[-2]).copy_(held)
        return room


def give_room(cache: Any, tokens: int) -> None:
    """From now on let the plain layers of a dynamic cache grow in place, up to so many tokens.

    More of them, or more than ROOM, are moved to where there is room again. Layers of
    other kinds (windows, states, quantized ones) stay as they are.
    """
    if type(cache) is not DynamicCache or cache.offloading:
        return
    plain = [place for place, layer in enumerate(cache.layers) if type(layer) is DynamicLayer]
    shelves = BufferPool(len(plain)), BufferPool(len(plain))
    for place in plain:
        cache.layers[place] = PreallocatedLayer(cache.layers[place], *shelves, min(tokens, ROOM))  # type: ignore[arg-type]


def cache_in(outputs: Any) -> tuple[str, Any] | None:
    """The cache among a model's outputs, with the name it has there; None where there is none."""
    found = ((name, getattr(outputs, name, None)) for name in CACHE_NAMES)
    return next((named for named in found if named[1] is not None), None)


def mark_as_staying(keys: Tensor) -> None:
    """Say of keys that they are a view of what is held anyway."""
    setattr(keys, _STAYS, True)


def stays(keys: Tensor) -> bool:
    """Whether holding on to these keys costs nothing: they are a view of what is held anyway."""
    return hasattr(keys, _STAYS)
