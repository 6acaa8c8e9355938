"""Drafts a float32 model's lens in bfloat16: half the cost or less, and a bounded error.

Most of a lens is the head, applied to every layer of every step. Here the logits
are first drafted with the head in bfloat16; then the best tokens of each layer
and those that the model itself ranked high are computed again in float32, so these
and their order are exact. The draft remains in the sum over the many unlikely
tokens, so a probability may be off by ``DRAFT_TOLERANCE``.

Used on CPUs with bfloat16 instructions, for a large vocabulary, if the error
measured at load allows it; never when exact tensors are requested.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from oki_trace.llm.accelerate_internals import has_hook
from oki_trace.llm.capture.distribution import Distribution, derive, summarize, top_k
from oki_trace.llm.capture.lens import DRAFT_TOLERANCE, TOLERANCE, LensTarget, LogitLens
from oki_trace.llm.capture.model_structure import ModelStructure
from oki_trace.llm.capture.tiles import BLOCK, TileSums, share
from oki_trace.llm.loading.hardware import has_native_bfloat16

# Tokens of each layer that are computed again: several times the number that is kept.
RESCORED = 64
MAX_TOP_K = RESCORED // 4
# With a smaller vocabulary the head is not the bottleneck of a step.
LARGE_VOCABULARY = 8192


class NoDraft(Exception):
    """The lens of this model is not drafted; the message says why."""


@dataclass(frozen=True)
class DraftLens:
    """The draft of one model's lens; ``error`` is the largest |Δprob| measured at load.

    ``split`` are the dimensions of the states that enter the head as two halves, upper
    and lower bits: a few states are so large that rounding them would shift all logits
    together, which no sum over tokens averages out.
    """

    lens: LogitLens
    head: nn.Linear
    split: Tensor
    error: float
    max_top_k: int = MAX_TOP_K

    def projection(self) -> DraftProjection:
        """The projection for one reply: weights may change between replies."""
        return DraftProjection(self.lens, self.head, self.split)


class DraftProjection:
    """Projects residual streams as ``LogitLens`` does, within the bounds of this module."""

    def __init__(self, lens: LogitLens, head: nn.Linear, split: Tensor) -> None:
        self._lens = lens
        self._head = head.weight.detach()
        self._split = split
        self._rounded: Tensor | None = None
        self._memory = torch.empty(0, dtype=torch.bfloat16)

    @torch.no_grad()
    def project_steps(
        self, hidden: Tensor, exact_ids: Sequence[Tensor], k: int
    ) -> Iterator[Tensor]:
        """As ``LogitLens.project_steps``, for k up to ``MAX_TOP_K``."""
        states = self._lens.normed_states(hidden)
        layers = len(hidden) // len(exact_ids)
        drafts, tiles = self._draft(states, None, states.new_zeros(len(states), 1))
        parts = (x.split(layers) for x in (drafts, tiles.block_maxima, states, hidden))
        for ids, draft, maxima, of_step, streams in zip(exact_ids, *parts, strict=True):
            best = _best(draft, maxima, ids)
            scores = linear(of_step, self._head[best.ids])
            logits = draft.float()
            logits[:, best.ids] = scores
            unsure = best.unsure(scores, k)
            if unsure.any():
                logits[unsure] = self._lens.project(streams[unsure])
            yield logits

    @torch.no_grad()
    def summarize_steps(self, hidden: Tensor, steps: Sequence[LensTarget], k: int) -> Distribution:
        """As ``LogitLens.summarize_steps``, for k up to ``MAX_TOP_K``."""
        states = self._lens.normed_states(hidden)
        layers = len(hidden) // len(steps)
        probs = torch.stack([step.model.probs for step in steps])
        chosen_rows = self._head[[step.token_id for step in steps]]
        chosen = (states.unflatten(0, (-1, layers)) @ chosen_rows[:, :, None]).view(-1, 1)
        drafts, tiles = self._draft(states, probs, chosen)
        sums = tiles.row_sums()
        parts = (x.split(layers) for x in (drafts, tiles.block_maxima, states, hidden))
        summaries = []
        for i, (step, draft, maxima, of_step, streams) in enumerate(
            zip(steps, *parts, strict=True)
        ):
            best = _best(draft, maxima, torch.tensor([*step.exact_ids, step.token_id]))
            scores = linear(of_step, self._head[best.ids])
            top = best.top(scores, k)
            exact_chosen = scores[:, best.ids == step.token_id]
            rows = slice(i * layers, (i + 1) * layers)
            exact = sums.rows(rows).replaced(
                best.drafts, scores, probs[i, best.ids], chosen[rows], exact_chosen
            )
            summary = derive(exact, top, exact_chosen, [step.model])
            unsure = best.unsure(scores, k) | ~exact.finite
            if unsure.any():
                logits = self._lens.project(streams[unsure])
                summary.replace_rows(unsure, summarize(logits, [step.model], step.token_id, k))
            summaries.append(summary)
        return Distribution.join(summaries)

    def _draft(
        self, states: Tensor, probs: Tensor | None, chosen: Tensor
    ) -> tuple[Tensor, TileSums]:
        """The drafts (rows, vocab) in bfloat16, valid until the next call, and their sums."""
        if self._rounded is None:
            self._rounded = self._round()
        upper = states.bfloat16()
        lower = (states - upper)[:, self._split].bfloat16()
        inputs, head = torch.cat([upper, lower], 1), self._rounded
        rows, vocab = len(states), len(head)
        tiles = TileSums(chosen, vocab, probs)
        if len(self._memory) < rows * vocab:
            self._memory = inputs.new_empty(rows * vocab)
        drafts = self._memory[: rows * vocab].view(rows, vocab)

        def work(numbers: Iterator[int]) -> None:
            buffer = tiles.buffer()
            memory = inputs.new_empty(rows * tiles.length)
            for tile in numbers:
                tokens = slice(*tiles.span(tile))
                of_tile = head[tokens]
                draft = memory[: rows * len(of_tile)].view(rows, -1)
                torch.mm(inputs, of_tile.T, out=draft)
                tiles.add(tile, draft, buffer)
                drafts[:, tokens] = draft

        share(work, tiles.count)
        return drafts, tiles

    def _round(self) -> Tensor:
        vocab, width = self._head.shape
        rounded = torch.empty(vocab, width + len(self._split), dtype=torch.bfloat16)
        rounded[:, :width] = self._head
        rounded[:, width:] = self._head[:, self._split]
        return rounded


@dataclass(frozen=True)
class _Best:
    """The tokens of a step that are computed again: ``ids`` (n,), ``drafts`` (layers, n).

    ``own`` (layers, RESCORED) are the places in ``ids`` of each layer's best tokens, and
    ``lowest`` (layers,) the lowest draft of these.
    """

    ids: Tensor
    drafts: Tensor
    own: Tensor
    lowest: Tensor

    def unsure(self, scores: Tensor, k: int) -> Tensor:
        """The layers whose k best tokens may be others than those of the ``scores``."""
        error = (scores - self.drafts).abs().amax(-1)
        # No omitted token may reach the k-th, even if its draft is twice as wrong as any measured.
        return ~(scores.topk(k, -1).values[:, -1] - 2 * error > self.lowest)

    def top(self, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best scores and their ids, (layers, k)."""
        return top_k(scores.gather(1, self.own), k, ids=self.ids[self.own])


def _best(drafts: Tensor, block_maxima: Tensor, exact_ids: Tensor) -> _Best:
    """``drafts`` (layers, vocab) in bfloat16; ``exact_ids`` are computed again in any case."""
    vocab = drafts.shape[1]
    blocks = block_maxima.topk(RESCORED, sorted=False).indices
    ids = (blocks[:, :, None] * BLOCK + torch.arange(BLOCK)).flatten(1)
    remainder = torch.arange(vocab // BLOCK * BLOCK, vocab).expand(len(drafts), -1)
    ids = torch.cat([ids, remainder], 1)
    best = drafts.gather(1, ids).float().topk(RESCORED, sorted=False)
    best_ids = ids.gather(1, best.indices)
    all_ids = torch.cat([best_ids.flatten(), exact_ids]).unique()
    own = torch.searchsorted(all_ids, best_ids)
    return _Best(all_ids, drafts[:, all_ids].float(), own, best.values.amin(-1))


@torch.no_grad()
def draft_lens(lens: LogitLens, structure: ModelStructure, hidden: Sequence[Tensor]) -> DraftLens:
    """The draft of this model's lens, compared with the lens itself on streams (width,).

    Raises NoDraft if it does not apply, or if its numbers differ too much.
    """
    head = _plain_head(structure.model)
    if hidden[0].ndim != 1 or structure.position_axis != 1:
        raise NoDraft("the model has several residual streams")
    streams = torch.stack([h.to(head.weight.device) for h in hidden])
    weight, states = head.weight.detach(), lens.normed_states(streams)
    if states.shape[-1] != weight.shape[1] or states.dtype != weight.dtype:
        raise NoDraft("the head takes states that the last norm does not return")
    lost = (states - states.bfloat16()).square().mean(0) * weight.square().mean(0)
    split = lost.topk(weight.shape[1] // 8).indices
    none_wanted = torch.zeros(0, dtype=torch.long)
    drafted = next(
        DraftProjection(lens, head, split).project_steps(streams, [none_wanted], MAX_TOP_K)
    )
    whole = lens.project(streams)
    if drafted.shape != whole.shape:
        raise NoDraft("the head is more than one matrix")
    error = float((drafted.softmax(-1) - whole.softmax(-1)).abs().max())
    best, ids = top_k(whole, MAX_TOP_K)
    difference = (drafted.gather(-1, ids) - best).abs() / best.abs().clamp_min(1)
    if not error <= DRAFT_TOLERANCE / 2:
        raise NoDraft(f"its draft is off by {error:.2g} in probability")
    if not float(difference.max()) <= TOLERANCE[torch.float32]:
        raise NoDraft("something follows the head, such as a softcap")
    return DraftLens(lens, head, split, error)


def _plain_head(model: Any) -> nn.Linear:
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or has_hook(head):
        raise NoDraft("the head is not one plain matrix")
    if head.weight.dtype != torch.float32:
        raise NoDraft("the model does not compute in float32")
    if head.weight.shape[0] < LARGE_VOCABULARY:
        raise NoDraft("the vocabulary is small")
    if head.weight.device.type != "cpu":
        raise NoDraft("the model is not on the CPU")
    if not has_native_bfloat16():
        raise NoDraft("the CPU has no bfloat16 instructions")
    return head
