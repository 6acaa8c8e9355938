"""Reduces rows of logits to their k best tokens and statistics over the vocabulary.

A lens makes one row per layer at every step, each as long as the vocabulary, so
this part of capture touches the most memory. Every pass over the rows counts, and
each one below runs at the speed of the memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oki_trace.llm.capture.tiles import BLOCK, RowSums, TileSums, share


@dataclass(frozen=True)
class ModelDistribution:
    """The model's own distribution at one step: ``probs`` (vocab,), ``entropy`` in nats.

    ``values`` are the probs, or, with their logsumexp ``lse``, the logits: then the probs are
    computed when they are read, so a step that waits for its lens holds no second tensor.
    """

    values: Tensor
    entropy: float
    lse: float | None = None

    @property
    def probs(self) -> Tensor:
        """The probabilities (vocab,) in fp32."""
        return self.values if self.lse is None else (self.values.float() - self.lse).exp()


@dataclass(frozen=True)
class Distribution:
    """A summary of rows of logits; tensors on the CPU.

    ``token_ids``, ``logits``, ``probs`` (rows, k), rank 1 first; ``entropy``,
    ``lse`` (the logsumexp), ``chosen_rank``, ``chosen_prob``, ``kl`` (rows,).
    """

    token_ids: Tensor
    logits: Tensor
    probs: Tensor
    entropy: Tensor
    lse: Tensor
    chosen_rank: Tensor
    chosen_prob: Tensor
    kl: Tensor

    def row(self, i: int) -> Distribution:
        """The summary of one row, as of a single one."""
        return self.rows(slice(i, i + 1))

    def rows(self, rows: slice) -> Distribution:
        """The summary of some rows."""
        return Distribution(*(values[rows] for values in vars(self).values()))

    def replace_rows(self, rows: Tensor, other: Distribution) -> None:
        """Set the ``rows`` (a mask) to those of another summary."""
        for values, new in zip(vars(self).values(), vars(other).values(), strict=True):
            values[rows] = new

    @staticmethod
    def join(summaries: Sequence[Distribution]) -> Distribution:
        """The rows of several summaries, one after the other."""
        fields = zip(*(vars(summary).values() for summary in summaries), strict=True)
        return Distribution(*(torch.cat(values) for values in fields))


@torch.no_grad()
def model_distribution(logits: Tensor) -> ModelDistribution:
    """The distribution of the model's own logits (vocab,) in fp32."""
    shifted = logits - logits.max()
    weights = shifted.exp()
    total = weights.sum()
    probs = weights / total
    products = weights.mul_(shifted)
    # 0 · -inf, from an excluded token, counts as 0.
    return ModelDistribution(probs, float(total.log() - products.nansum() / total))


@torch.no_grad()
def summarize(
    logits: Tensor, models: Sequence[ModelDistribution], chosen_ids: int | Tensor, k: int
) -> Distribution:
    """Reduce logits (rows, vocab) in fp32.

    ``models``: the model's own distribution at each step; all steps have equally many rows,
    one after the other. ``chosen_ids`` is the same for all rows, or one for each (rows,).
    ``kl`` is KL(model ‖ row) in nats; 0 without ``models``: the rows are the model's own.
    ``chosen_rank`` counts the tokens strictly more likely than the chosen one, plus one. All
    derived numbers are within 1e-5 of double precision. (torch's softmax on the CPU adds a
    large vocabulary up term by term, with an error of 1e-5 for 262,144 tokens.)
    """
    if isinstance(chosen_ids, int):
        chosen = logits[:, chosen_ids, None]
    else:
        chosen = logits.gather(1, chosen_ids.to(logits.device)[:, None])
    probs = torch.stack([m.probs.to(logits.device) for m in models]) if models else None
    sums, block_maxima = _sums(logits, chosen, probs, excluded=False)
    if not sums.finite.all():
        sums, block_maxima = _sums(logits, chosen, probs, excluded=True)
    top = top_k(logits, min(k, logits.shape[-1]), block_maxima)
    return derive(sums, top, chosen, models)


def derive(
    sums: RowSums, top: tuple[Tensor, Tensor], chosen: Tensor, models: Sequence[ModelDistribution]
) -> Distribution:
    """The numbers of rows from their sums, their best logits and ids (rows, k), and the logits
    ``chosen`` (rows, 1).
    """
    top_logits, top_ids = (values.cpu() for values in top)
    log_total = sums.total.log()
    lse = (sums.largest + log_total)[:, None]
    if models:
        entropies = torch.tensor([m.entropy for m in models], dtype=torch.float64)
        kl = log_total - sums.cross - entropies.repeat_interleave(len(lse) // len(models))
    else:
        kl = torch.zeros_like(log_total)
    return Distribution(
        token_ids=top_ids,
        logits=top_logits,
        probs=(top_logits - lse).exp().float(),
        entropy=(log_total - sums.products / sums.total).clamp_min(0).float(),
        lse=lse[:, 0].float(),
        chosen_rank=sums.above.long() + 1,
        chosen_prob=(chosen.cpu() - lse)[:, 0].exp().float(),
        kl=kl.clamp_min(0).float(),
    )


def _sums(
    logits: Tensor, chosen: Tensor, probs: Tensor | None, *, excluded: bool
) -> tuple[RowSums, Tensor]:
    """The sums over each row, and the maxima of its blocks."""
    tiles = TileSums(chosen, logits.shape[1], probs, excluded=excluded)

    def work(numbers: Iterator[int]) -> None:
        buffer = tiles.buffer()
        for tile in numbers:
            tiles.add(tile, logits[:, slice(*tiles.span(tile))], buffer)

    share(work, tiles.count)
    return tiles.row_sums(), tiles.block_maxima


@torch.no_grad()
def log_probs(logits: Tensor) -> Tensor:
    """The log-probabilities of logits (rows, vocab), in fp64 on the CPU."""
    return logits.cpu().double().log_softmax(-1)


def top_k(
    logits: Tensor, k: int, block_maxima: Tensor | None = None, ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k largest of each row (rows, vocab) in fp32 and their ids, largest first.

    ``block_maxima`` (rows, whole blocks), where they are known; ``ids`` (rows, n) if the rows
    have n tokens of the vocabulary. Equal logits, common in 16-bit weights, are ordered by
    id, as in ``argmax``.
    """
    if ids is not None:
        return _largest(logits, ids, k)
    rows, vocab = logits.shape
    blocks = vocab // BLOCK
    if blocks <= 2 * k:
        ids = torch.arange(vocab, device=logits.device).expand(rows, vocab)
        return _largest(logits, ids, k)
    if block_maxima is None:
        block_maxima = logits[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK)).amax(-1)
    block_numbers = torch.arange(blocks, device=logits.device).expand(rows, blocks)
    _, best_blocks = _largest(block_maxima, block_numbers, k)
    offsets = torch.arange(BLOCK, device=logits.device)
    ids = (best_blocks[:, :, None] * BLOCK + offsets).view(rows, -1)
    remainder = torch.arange(blocks * BLOCK, vocab, device=logits.device).expand(rows, -1)
    ids = torch.cat([ids, remainder], -1)
    return _largest(logits.gather(-1, ids), ids, k)


def _largest(values: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values and their ids (below 2^31), the smaller id first among equals.

    One integer sorts by both: its upper half is the bits of the float, inverted where
    it is negative, which sort as floats do; its lower half is minus the id.
    """
    bits = (values + 0.0).view(torch.int32)  # adding 0.0 makes -0.0 equal to 0.0
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() * 2**31 - ids
    indices = order.topk(k, -1).indices
    return values.gather(-1, indices), ids.gather(-1, indices)
