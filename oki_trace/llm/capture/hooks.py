"""The forward hooks on a model: the residual stream at every layer, and the attention.

Of a reply's passes only the newest position is kept, copied at once, so that the
activations of a long prompt are freed as they are in a plain run. Of given text every
position is kept, a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor

from oki_trace.llm.capture.attention import AttentionTap, EveryQuery, QueryRows
from oki_trace.llm.capture.buffers import BufferPool
from oki_trace.llm.capture.model_structure import ModelStructure, residual_stream
from oki_trace.llm.decoding.forward_pass import AttentionCapture


class ModelHooks:
    """Collects the tensors of one forward pass at a time; ``take_*`` empties it."""

    def __init__(self, structure: ModelStructure, tap: AttentionTap | None) -> None:
        """``tap`` captures the attention; None where the model has none."""
        self._blocks = structure.blocks
        self._axis = structure.position_axis
        self._tap = tap
        self._hidden_states: dict[int, Tensor] = {}
        self._pool = BufferPool(0)
        self._every_position = False

    def take_hidden_states(self) -> tuple[Tensor, ...]:
        """L+1 rows (width,): the input of block 1, then the output of each block.

        (streams, width) where the model carries several residual streams. All positions,
        (T, width), under ``attach(every_query=…)``.
        """
        hidden_states, self._hidden_states = self._hidden_states, {}
        return tuple(hidden_states[layer] for layer in sorted(hidden_states))

    def take_attention(self, outputs: Any) -> AttentionCapture:
        """The attention by layer, of the pass that returned ``outputs``; empty without a tap."""
        return self._tap.take(outputs) if self._tap else {}

    def take_every_query(self, outputs: Any) -> QueryRows:
        """By layer, the weights of all queries of a pass under ``attach(every_query=…)``."""
        return self._tap.take_every_query(outputs) if self._tap else {}

    @property
    def splits_prompt(self) -> bool:
        """Whether the prompt's last token must run through the model by itself."""
        return self._tap is not None and self._tap.splits_prompt

    def forward_arguments(self) -> AbstractContextManager[dict[str, Any]]:
        """Around the forward pass of one step; yields extra arguments for the model."""
        return self._tap.forward_arguments() if self._tap else nullcontext({})

    @contextmanager
    def attach(
        self, *, pooled: bool = True, every_query: EveryQuery | None = None
    ) -> Iterator[None]:
        """Hook the model while this context lasts.

        With ``pooled``, the buffers for the first pass are allocated together. With
        ``every_query``, all positions of a pass are captured, and that much of their
        attention.
        """
        pooled = pooled and every_query is None
        self._pool = BufferPool(len(self._blocks) + 1 if pooled else 0)
        handles = [
            self._blocks[0].register_forward_pre_hook(self._keep_input, with_kwargs=True),
            *(
                block.register_forward_hook(self._output_hook(layer))
                for layer, block in enumerate(self._blocks, 1)
            ),
        ]
        tap = self._tap.attach(every_query) if self._tap else nullcontext()
        self._every_position = every_query is not None
        try:
            with tap:
                yield
        finally:
            self._every_position = False
            for handle in handles:
                handle.remove()
            self._hidden_states.clear()

    def _keep_input(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = args[0] if args else kwargs["hidden_states"]
        self._hidden_states[0] = self._newest(stream)

    def _output_hook(self, layer: int) -> Any:
        def keep_output(module: Any, args: Any, output: Any) -> None:
            self._hidden_states[layer] = self._newest(residual_stream(output))

        return keep_output

    def _newest(self, stream: Tensor) -> Tensor:
        """A copy of a residual stream's last position, (width,), or of all, (T, width).

        The axis before that of the positions is a batch of one.
        """
        if self._every_position:
            return stream.select(self._axis - 1, 0).movedim(self._axis - 1, 0).clone()
        return self._pool.copy(stream.select(self._axis, -1).select(self._axis - 1, 0))
