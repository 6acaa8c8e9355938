"""The lens of a float32 model for less than half its price, and how far it may be off.

Most of a lens is the head, applied to every layer of every step. Here a draft
of all logits is made with the head in bfloat16, and the tokens that matter, the
best of each layer with the model's own, are scored again in float32: these are
exact, as is the order of the best. What is left to the draft is the sum over
the many unlikely tokens, so a probability may be off by ``PROB_BOUND``.

Used on CPUs that multiply bfloat16 natively, for a large vocabulary, where the
numbers found at load allow it; never where exact tensors were asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from oki_trace.llm.capture.anatomy import Anatomy
from oki_trace.llm.capture.distribution import top_k
from oki_trace.llm.capture.lens import TOLERANCE, LogitLens
from oki_trace.llm.loading.hardware import has_native_bfloat16

# The largest |Δprob| against the whole lens in float32.
PROB_BOUND = 1e-3
# Tokens of each layer that are scored again, several times what is kept of it.
SCORED = 64
MOST_KEPT = SCORED // 4
# Below this a head is not what a step waits for.
LARGE_VOCABULARY = 8192


@dataclass(frozen=True)
class Shortlist:
    """What a draft of one model's lens is made with; ``error`` is the |Δprob| found at load.

    ``twice`` are the dimensions of the states that the head takes in two halves,
    upper and lower bits: in a few of them states are so large that rounding them
    would move all logits together, which no sum over tokens averages out.
    """

    lens: LogitLens
    head: nn.Linear
    twice: Tensor
    error: float

    def draft(self) -> Draft:
        """For one reply: weights may change between two."""
        return Draft(self.lens, self.head, self.twice)


class Draft:
    """Projects residual streams as ``LogitLens`` does, within the bounds of this module."""

    def __init__(self, lens: LogitLens, head: nn.Linear, twice: Tensor) -> None:
        self._lens = lens
        self._head = head.weight.detach()
        self._twice = twice
        self._rounded: Tensor | None = None

    @torch.no_grad()
    def each(self, hidden: Tensor, wanted: Sequence[Tensor], k: int) -> Iterator[Tensor]:
        """As ``LogitLens.each``, for k up to ``MOST_KEPT``."""
        if self._rounded is None:
            self._rounded = self._round()
        states = self._lens.states(hidden)
        upper = states.bfloat16()
        lower = (states - upper)[:, self._twice].bfloat16()
        drafts = linear(torch.cat([upper, lower], 1), self._rounded)
        layers = len(hidden) // len(wanted)
        parts = (x.split(layers) for x in (drafts, states, hidden))
        for ids, draft, seen, streams in zip(wanted, *parts, strict=True):
            logits, unsure = self._scored(draft.float(), seen, ids, k)
            if unsure.any():
                logits[unsure] = self._lens.project(streams[unsure])
            yield logits

    def _round(self) -> Tensor:
        vocab, width = self._head.shape
        rounded = torch.empty(vocab, width + len(self._twice), dtype=torch.bfloat16)
        rounded[:, :width] = self._head
        rounded[:, width:] = self._head[:, self._twice]
        return rounded

    def _scored(
        self, logits: Tensor, states: Tensor, wanted: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """A step's draft with its best tokens in float32, and the rows where k are not sure."""
        best, ids = top_k(logits, SCORED)
        ids = torch.cat([ids.flatten(), wanted]).unique()
        scores = linear(states, self._head[ids])
        error = (scores - logits[:, ids]).abs().amax(-1)
        logits[:, ids] = scores
        # No token left out may reach the k-th, were its draft twice as wrong as any seen.
        unsure = ~(scores.topk(k, -1).values[:, -1] - 2 * error > best[:, -1])
        return logits, unsure


@torch.no_grad()
def shortlist(lens: LogitLens, anatomy: Anatomy, hidden: Sequence[Tensor]) -> Shortlist | None:
    """The way to draft this model's lens, held against the lens itself on streams (width,).

    None where it is not worth it, where the head is more than one matrix, and
    where the numbers differ.
    """
    head = _plain_head(anatomy.model)
    if head is None or hidden[0].ndim != 1 or anatomy.position_axis != 1:
        return None
    streams = torch.stack([h.to(head.weight.device) for h in hidden])
    weight, states = head.weight.detach(), lens.states(streams)
    if states.shape[-1] != weight.shape[1] or states.dtype != weight.dtype:
        return None
    lost = (states - states.bfloat16()).square().mean(0) * weight.square().mean(0)
    twice = lost.topk(weight.shape[1] // 8).indices
    own = torch.zeros(0, dtype=torch.long)
    drafted = next(Draft(lens, head, twice).each(streams, [own], MOST_KEPT))
    whole = lens.project(streams)
    if drafted.shape != whole.shape:
        return None
    error = float((drafted.softmax(-1) - whole.softmax(-1)).abs().max())
    best, ids = top_k(whole, MOST_KEPT)
    apart = (drafted.gather(-1, ids) - best).abs() / best.abs().clamp_min(1)
    if not (error <= PROB_BOUND / 2 and float(apart.max()) <= TOLERANCE[torch.float32]):
        return None
    return Shortlist(lens, head, twice, error)


def _plain_head(model: Any) -> nn.Linear | None:
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or hasattr(head, "_hf_hook"):
        return None
    weight = head.weight
    worth_it = weight.dtype == torch.float32 and weight.shape[0] >= LARGE_VOCABULARY
    return head if worth_it and weight.device.type == "cpu" and has_native_bfloat16() else None
