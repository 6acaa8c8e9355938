"""The result of one forward pass, and the interfaces that the decoding loop uses.

The loop knows the hooks (``capture/hooks.py``) and the optional fast paths
(``capture/speedups.py``, ``fast/step_graph.py``) only by the protocols below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

# The names under which a model returns its cache and takes it; the first since transformers 5.24.
CACHE_NAMES = ("cache", "past_key_values")


@dataclass(frozen=True)
class LastQuery:
    """The inputs of one attention row: softmax(q Kᵀ · scaling + bias + mask).

    ``query`` (kv heads, heads per kv head, d) and ``key`` (kv heads, keys, d): each
    key head serves a run of consecutive query heads. The learned ``bias`` and the
    ``mask``, boolean or additive, are (1 or heads, keys).
    """

    query: Tensor
    key: Tensor
    scaling: float
    bias: Tensor | None
    mask: Tensor | None

    @torch.no_grad()
    def row(self) -> Tensor:
        """The attention weights, (heads, keys) in float32."""
        scores = torch.matmul(self.query, self.key.transpose(1, 2)).flatten(0, 1).float()
        scores *= self.scaling
        if self.bias is not None:
            scores = scores + self.bias
        if self.mask is not None:
            boolean = self.mask.dtype == torch.bool
            scores = (
                scores.masked_fill(~self.mask, float("-inf")) if boolean else scores + self.mask
            )
        return scores.softmax(-1)


AttentionCapture = dict[int, Tensor | LastQuery]
"""By layer, the last query's attention row (heads, keys), or the inputs it is computed from."""


@dataclass(frozen=True)
class ForwardPass:
    """The tensors of one forward pass at its last position, still on their devices.

    ``logits`` (vocab,) in the model's dtype; ``hidden_states`` L+1 rows (width,), before
    the final norm; ``attention`` by layer, see ``attention_rows``.
    """

    logits: Tensor
    hidden_states: tuple[Tensor, ...]
    attention: AttentionCapture


class ForwardHooks(Protocol):
    """Reads hidden states and attention while the model runs."""

    @property
    def splits_prompt(self) -> bool:
        """Whether the prompt's last token must run through the model by itself."""

    def attach(self) -> AbstractContextManager[None]:
        """Hook the model while this context lasts."""

    def forward_arguments(self) -> AbstractContextManager[dict[str, Any]]:
        """Around the forward pass of one step; yields extra arguments for the model."""

    def take_hidden_states(self) -> tuple[Tensor, ...]:
        """Return the hidden states of the last pass, and forget them."""

    def take_attention(self, outputs: Any) -> AttentionCapture:
        """Return the attention of the pass that returned ``outputs``, and forget it."""


class StepRun(Protocol):
    """Runs the decode steps of one reply."""

    def accepts(self, inputs: Mapping[str, Any]) -> bool:
        """Whether ``inputs`` are one more token after the steps it has run."""

    def step(self, token: Tensor) -> ForwardPass:
        """The pass of one more token, (1, 1)."""

    def matches_model(
        self, token: Tensor, own: Callable[[], ForwardPass]
    ) -> tuple[bool, ForwardPass]:
        """Return whether a step equals the model's ``own`` pass bit for bit, and that pass."""


class DecodeGraph(Protocol):
    """A faster way to run the decode steps of one model, with the same numbers."""

    def begin(self, inputs: Mapping[str, Any], steps: int) -> StepRun | None:
        """A run of the next ``steps`` of a reply; None where ``inputs`` do not fit it."""

    def release_copies(self, prompt_tokens: int) -> None:
        """Free memory before a prompt of so many tokens."""


class FastPaths(Protocol):
    """The optional fast paths of one model, for the decoding loop."""

    @property
    def step_graph(self) -> DecodeGraph | None:
        """Replays decode steps; None where the model has none."""

    def preallocate(self, cache: Any, new_tokens: int) -> None:
        """Let a cache grow in place by up to so many tokens."""

    def take_prefix(self, tokens: int) -> Any:
        """The cache of the first ``tokens`` tokens of the last reply, no longer kept; 0: None."""

    def keep_prefix(self, token_ids: Sequence[int], cache: Any) -> None:
        """Keep the cache of these tokens for the next reply."""


def cache_in(outputs: Any) -> tuple[str, Any] | None:
    """The cache among a model's outputs, with the name of its field; None without one."""
    named = ((name, getattr(outputs, name, None)) for name in CACHE_NAMES)
    return next((pair for pair in named if pair[1] is not None), None)
