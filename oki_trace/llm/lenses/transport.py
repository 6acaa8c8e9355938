"""Carries the hidden states of a layer to the basis of the last one, as a lens maps them.

The maps are kept in float32, or in bfloat16 where they are very large, and never in
float16: the late residual streams of some models exceed its largest number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from oki_trace.errors import CaptureError
from oki_trace.llm.lenses.files import FittedOn, Kind

# Maps that are larger than this in float32 are kept in bfloat16.
_LARGE_BYTES = 2**32


class Transport:
    """The maps of one lens, by layer.

    A "jacobian" makes ``W h`` of a layer's residual stream h, a "tuned" one ``h + W h + b``.
    ``weights`` (width, width) and ``biases`` (width,) by layer.
    """

    def __init__(
        self,
        name: str,
        kind: Kind,
        fitted: FittedOn,
        weights: Mapping[int, Tensor],
        biases: Mapping[int, Tensor],
    ) -> None:
        self.name = name
        self.fitted = fitted
        self._adds = kind == "tuned"
        self.layers = tuple(sorted(weights))
        size = 4 * len(weights) * fitted.width**2
        dtype = torch.bfloat16 if size > _LARGE_BYTES else torch.float32
        self._weights = {layer: weights[layer].to(dtype) for layer in self.layers}
        self._biases = {layer: bias.float() for layer, bias in biases.items()}

    def require_fit(self, model: Any, layers: int, streams: int = 1) -> None:
        """Raise CaptureError, which says what the lens was fitted on, if it fits no such model.

        ``model`` has the embeddings and the head; ``layers`` is its number of blocks and
        ``streams`` that of its residual streams.
        """
        reason = self._misfit(model, layers, streams)
        if reason is not None:
            raise CaptureError(
                f"The lens {self.name} does not fit this model: {reason}. It was fitted on "
                f"{self.fitted.description}."
            )

    def _misfit(self, model: Any, layers: int, streams: int) -> str | None:
        width = int(model.get_input_embeddings().weight.shape[-1])
        if streams != 1:
            return "the model has several residual streams"
        if self.fitted.width != width:
            return f"the model's width is {width}"
        if (self.fitted.layers or layers) != layers or self.layers[0] >= layers:
            return f"the model has {layers} layers"
        expected, head = self.fitted.unembed_hash, model.get_output_embeddings()
        if expected and head is not None and unembedding_hash(head.weight) != expected:
            return "the model's head has other weights"
        return None

    @torch.no_grad()
    def __call__(self, hidden_states: Tensor, layers: Sequence[int]) -> Tensor:
        """Hidden states (steps, layers, width) of these layers, mapped, in their own dtype."""
        assert hidden_states.shape[1] == len(layers)
        device = hidden_states.device
        mapped = torch.empty_like(hidden_states)
        for i, layer in enumerate(layers):
            weight = self._weights[layer] = self._weights[layer].to(device)
            stream = hidden_states[:, i].float()
            result = linear(stream.to(weight.dtype), weight).float()
            if layer in self._biases:
                result += self._biases[layer].to(device)
            if self._adds:
                result += stream
            mapped[:, i] = result
        return mapped


def unembedding_hash(weight: Tensor) -> str:
    """The hash of a head (vocab, width) that a Tuned Lens's config.json names.

    It is that of the matrix as numpy prints it with one digit, so it tells models apart, and
    not dtypes or the rounding of quantized weights.
    """
    # numpy prints the first and last three rows and columns of a matrix of this size.
    text = np.array_str(weight.detach().float().cpu().numpy(), precision=1)
    return hashlib.sha256(text.encode()).hexdigest()
