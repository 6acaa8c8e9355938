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
    """Reads the steps of a model with ``last`` blocks, which the lens fits.

    ``inner`` are the layers that it reads, those of ``layers`` that the lens has a map for.
    """

    def __init__(self, transport: Transport, last: int, layers: Sequence[int]) -> None:
        self.name = transport.name
        self.inner = [layer for layer in transport.layers if layer < last and layer in layers]
        self._transport = transport
        self._last = last

    @property
    def layers(self) -> IntArray | None:
        """The layers of a reading, the last one included; None: all, from 0."""
        return None if len(self.inner) == self._last else np.array([*self.inner, self._last])

    def summarize(
        self,
        hidden_states: Tensor,
        steps: Sequence[LensTarget],
        k: int,
        projection: LensProjection,
    ) -> list[Distribution]:
        """The summary of each step, from hidden states (steps, inner, width) of ``inner``."""
        rows = self.transported(hidden_states)
        summary = projection.summarize_steps(rows, steps, k)
        n = len(self.inner)
        return [summary.rows(slice(i * n, (i + 1) * n)) for i in range(len(steps))]

    def transported(self, hidden_states: Tensor) -> Tensor:
        """Hidden states (steps, inner, width) as the tail takes them: (steps · inner, width)."""
        return self._transport(hidden_states, self.inner).flatten(0, 1)


def lens_readers(
    names: Sequence[str], model: Any, last: int, streams: int, layers: Sequence[int]
) -> tuple[LensReader, ...]:
    """The readers of the installed lenses of these names, for a model with ``last`` blocks.

    ``streams`` is the number of its residual streams; a lens that has no map for one of the
    ``layers`` is left out. Raises UsageError for a lens that is not installed, CaptureError
    for one that does not fit the model.
    """
    readers = []
    for name in sorted(names):
        transport = load_transport(name)
        transport.require_fit(model, last, streams)
        readers.append(LensReader(transport, last, layers))
    return tuple(reader for reader in readers if reader.inner)
