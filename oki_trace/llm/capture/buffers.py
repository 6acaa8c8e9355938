"""Memory for the tensors that outlive a forward pass, allocated together.

If they were allocated one by one between the much larger tensors of the pass, they
would fragment the free memory, and a long prompt would take half as much again.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

_PERSISTENT = "_oki_trace_persistent"


class BufferPool:
    """A fixed number of buffers of one shape, all allocated when the first is taken."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._free: list[Tensor] = []

    def take(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialized tensor of this shape, with the dtype and device of ``like``."""
        if self._count:
            self._free = [like.new_empty(shape) for _ in range(self._count)]
            self._count = 0
        if self._free:
            buffer = self._free.pop()
            same_kind = (buffer.dtype, buffer.device) == (like.dtype, like.device)
            if same_kind and (*buffer.shape,) == (*shape,):
                return buffer
        return like.new_empty(shape)

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor`` in a new buffer."""
        return self.take(tensor.shape, tensor).copy_(tensor)


def mark_persistent(keys: Tensor) -> None:
    """Mark keys as a view of memory that stays allocated anyway."""
    setattr(keys, _PERSISTENT, True)


def is_persistent(keys: Tensor) -> bool:
    """Whether keys are a view of memory that stays allocated: a reference to them costs nothing."""
    return hasattr(keys, _PERSISTENT)
