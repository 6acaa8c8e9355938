"""A preallocated KV cache: a decode step writes its own token and copies nothing.

transformers' dynamic cache rebuilds each layer's keys and values, one token
longer, at every step. At a long context that copy takes as long as the model,
and the freed tensors, each slightly too small for the next, fragment the heap.
Here keys and values are a view of the front of a larger tensor.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache

from oki_trace.llm.capture.buffers import BufferPool, mark_persistent
from oki_trace.llm.transformers_internals import DynamicLayer

# The most tokens allocated in advance. Memory that is never written to costs a CPU nothing.
MAX_SPARE = 1024


class PreallocatedLayer(DynamicLayer):
    """A layer's keys and values (1, heads, tokens, width) at the front of larger tensors."""

    keys: Any
    values: Any

    def __init__(
        self, layer: DynamicLayer, key_pool: BufferPool, value_pool: BufferPool, spare: int
    ) -> None:
        """Take over the contents of ``layer``, and allocate ``spare`` more tokens."""
        super().__init__()
        self._pools = key_pool, value_pool
        self._spare = spare
        self._key_view: Tensor | None = None
        self._key_buffer: Tensor
        self._value_buffer: Tensor
        if layer.get_seq_length():
            self.lazy_initialization(layer.keys, layer.values)  # type: ignore[arg-type]
            self.update(layer.keys, layer.values)  # type: ignore[arg-type]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the new tokens; returns all keys and values, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length, new = self.get_seq_length(), key_states.shape[-2]
        same_shape = key_states.shape[:-1] == value_states.shape[:-1] and key_states.ndim == 4
        if not same_shape or (length and key_states.dtype != self.keys.dtype):
            return super().update(key_states, value_states, *args, **kwargs)
        keys, values = self._reserve(new, key_states, value_states)
        keys.narrow(-2, length, new).copy_(key_states)
        values.narrow(-2, length, new).copy_(value_states)
        self.set_length(length + new)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, a negative number of them; the buffers stay."""
        if self.is_preallocated and tokens_to_remove < 0:
            self.set_length(self.get_seq_length() + tokens_to_remove)
        else:
            super().crop(tokens_to_remove)

    @property
    def is_preallocated(self) -> bool:
        """Whether its keys and values are views of the larger tensors."""
        return self._key_view is not None and self.keys is self._key_view

    def buffers(self, new: int) -> tuple[Tensor, Tensor]:
        """The whole tensors of keys and values, with space for ``new`` more tokens."""
        return self._reserve(new, self.keys, self.values)

    def set_length(self, tokens: int) -> None:
        """Make the first ``tokens`` of the buffers the layer's keys and values."""
        self.keys = self._key_view = self._key_buffer.narrow(-2, 0, tokens)
        self.values = self._value_buffer.narrow(-2, 0, tokens)
        mark_persistent(self.keys)

    def _reserve(self, new: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        length = self.get_seq_length()
        # The keys are another tensor if the cache was cropped or reordered meanwhile.
        if self.keys is not self._key_view or length + new > self._key_buffer.shape[-2]:
            self._key_buffer = self._grown(0, self.keys, keys, length + new)
            self._value_buffer = self._grown(1, self.values, values, length + new)
            self.set_length(length)
        return self._key_buffer, self._value_buffer

    def _grown(self, which: int, current: Tensor, like: Tensor, tokens: int) -> Tensor:
        """A larger tensor that begins with ``current``."""
        shape = (*like.shape[:-2], tokens + self._spare, like.shape[-1])
        buffer = self._pools[which].take(shape, like)
        if current.numel():
            buffer.narrow(-2, 0, current.shape[-2]).copy_(current)
        return buffer


def preallocate(cache: Any, tokens: int) -> None:
    """Let the plain layers of a dynamic cache grow in place by up to ``tokens`` tokens.

    Beyond that, or beyond ``MAX_SPARE``, a layer moves to a larger tensor. Layers with
    a window, a state or quantized values are left unchanged.
    """
    if type(cache) is not DynamicCache or cache.offloading:
        return
    plain = [i for i, layer in enumerate(cache.layers) if type(layer) is DynamicLayer]
    pools = BufferPool(len(plain)), BufferPool(len(plain))
    for i in plain:
        cache.layers[i] = PreallocatedLayer(cache.layers[i], *pools, min(tokens, MAX_SPARE))  # type: ignore[arg-type]


def preallocated_layers(cache: Any) -> list[PreallocatedLayer]:
    """The layers of a cache if all are preallocated; else an empty list."""
    layers: list[Any] = cache.layers if type(cache) is DynamicCache else []
    usable = all(type(layer) is PreallocatedLayer and layer.is_preallocated for layer in layers)
    return list(layers) if usable else []
