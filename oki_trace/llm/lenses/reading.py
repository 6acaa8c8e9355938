"""Reads hidden states with an installed lens: its map, then the model's own tail and head.

The result is summarized as the Logit Lens's is. A lens has rows only for the layers that it
has a map for, and the last layer, which is the model's own distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from oki_trace.llm.capture.distribution import Distribution
from oki_trace.llm.capture.lens import LensProjection, LensTarget
from oki_trace.llm.lenses.library import load_transport
from oki_trace.llm.lenses.transport import Transport
from oki_trace.records import IntArray


class LensReader:
    """Reads the steps of a model with ``layers`` blocks, which the lens fits."""

    def __init__(self, transport: Transport, layers: int) -> None:
        self.name = transport.name
        self._transport = transport
        self._last = layers
        self._inner = transport.layers_below(layers)

    @property
    def layers(self) -> IntArray | None:
        """The layers of a reading, the last one included; None: all, from 0."""
        if len(self._inner) == self._last:
            return None
        return np.array([*self._inner, self._last])

    @property
    def rows(self) -> int:
        """How many layers below the last one it reads."""
        return len(self._inner)

    def transported(self, hidden_states: Tensor) -> Tensor:
        """Hidden states (steps, L or more, width) to (steps · rows, width), step by step."""
        if len(self._inner) == self._last:
            inner = hidden_states[:, : self._last]
        else:
            inner = hidden_states[:, self._inner]
        return self._transport(inner, self._last).flatten(0, 1)

    def summarize(
        self,
        hidden_states: Tensor,
        steps: Sequence[LensTarget],
        k: int,
        projection: LensProjection,
    ) -> list[Distribution]:
        """The summary of each step's rows, from hidden states (steps, L or more, width)."""
        summary = projection.summarize_steps(self.transported(hidden_states), steps, k)
        n = self.rows
        return [summary.rows(slice(i * n, (i + 1) * n)) for i in range(len(steps))]


def lens_readers(
    names: Sequence[str], model: Any, layers: int, streams: int
) -> tuple[LensReader, ...]:
    """The readers of the installed lenses of these names, for a model with so many blocks.

    ``streams`` is the number of its residual streams. Raises UsageError for a lens that is
    not installed, CaptureError for one that does not fit the model.
    """
    readers = []
    for name in sorted(names):
        transport = load_transport(name)
        transport.require_fit(model, layers, streams)
        readers.append(LensReader(transport, layers))
    return tuple(readers)
