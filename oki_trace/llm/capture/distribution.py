"""Reduces rows of logits to their k best tokens and statistics over the vocabulary.

A lens makes one row per layer at every step, each as long as the vocabulary, so
this part of capture touches the most memory. Every pass over the rows counts, and
each one below runs at the speed of the memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Tokens per block: the best k tokens are in the k blocks with the largest maxima.
BLOCK = 64
# Tokens per piece on the CPU, so that the rows of a piece stay in a core's cache.
_PIECE = 4096


@dataclass(frozen=True)
class ModelDistribution:
    """The model's own distribution at one step: ``probs`` (vocab,), ``entropy`` in nats."""

    probs: Tensor
    entropy: float


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
        return Distribution(*(values[i : i + 1] for values in vars(self).values()))


@torch.no_grad()
def model_distribution(logits: Tensor) -> ModelDistribution:
    """The distribution of the model's own logits (vocab,) in fp32."""
    shifted = logits - logits.max()
    weights = shifted.exp()
    total = weights.sum()
    probs = weights / total
    return ModelDistribution(probs, float(total.log() - _sum(weights.mul_(shifted)) / total))


@torch.no_grad()
def summarize(
    logits: Tensor, model: ModelDistribution | None, chosen_id: int | Tensor, k: int
) -> Distribution:
    """Reduce logits (rows, vocab) in fp32.

    ``chosen_id`` is the same for all rows, or one for each (rows,). ``kl`` is KL(model ‖
    row) in nats; 0 without ``model``: the rows are the model's own. ``chosen_rank`` counts
    the tokens strictly more likely than the chosen one, plus one. All derived numbers are
    within 1e-5
    of double precision: exponents are relative to each row's largest logit, and
    sums are made in pieces. (torch's softmax on the CPU adds a large vocabulary
    up term by term, with an error of 1e-5 for 262,144 tokens.)
    """
    top_logits, top_ids = top_k(logits, min(k, logits.shape[-1]))
    largest = top_logits[:, :1]
    if isinstance(chosen_id, int):
        chosen = logits[:, chosen_id, None]
    else:
        chosen = logits.gather(1, chosen_id.to(logits.device)[:, None])
    model_probs = None if model is None else model.probs.to(logits.device)
    total, products, cross, above = _sums(logits, largest, chosen, model_probs)
    log_total = total.log()
    kl = torch.zeros_like(total) if model is None else log_total - cross - model.entropy
    return Distribution(
        token_ids=top_ids.cpu(),
        logits=top_logits.cpu(),
        probs=((top_logits - largest).exp() / total[:, None]).cpu(),
        entropy=(log_total - products / total).clamp_min(0).cpu(),
        lse=(largest[:, 0] + log_total).cpu(),
        chosen_rank=above.long().cpu() + 1,
        chosen_prob=((chosen - largest).exp()[:, 0] / total).cpu(),
        kl=kl.clamp_min(0).cpu(),
    )


def _sums(
    logits: Tensor, largest: Tensor, chosen: Tensor, model_probs: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Over each row: Σ e^s, Σ s·e^s and Σ p·s, where s is a logit minus the largest and p
    the model's probability (0 without), and the number of logits above the chosen one.
    """
    piece = _PIECE if logits.device.type == "cpu" else logits.shape[-1]
    sums = []
    parts = logits.split(piece, -1)
    split_probs = [None] * len(parts) if model_probs is None else model_probs.split(piece)
    for part, probs in zip(parts, split_probs, strict=True):
        shifted = part - largest
        weights = shifted.exp()
        total = weights.sum(-1)
        products = _sum(weights.mul_(shifted))
        # Ones as floats: sums of booleans are many times slower, and no vocabulary has 2^24 tokens.
        above = torch.gt(part, chosen, out=weights).sum(-1)
        cross = torch.zeros_like(total) if probs is None else _sum(shifted.mul_(probs))
        sums.append(torch.stack([total, products, cross, above]))
    total, products, cross, above = torch.stack(sums).sum(0)
    return total, products, cross, above


def _sum(products: Tensor) -> Tensor:
    """Σ along the last axis; 0 · -inf, from an excluded token, counts as 0."""
    total = products.sum(-1)
    return products.nansum(-1) if torch.isnan(total).any() else total


@torch.no_grad()
def log_probs(logits: Tensor) -> Tensor:
    """The log-probabilities of logits (rows, vocab), in fp64 on the CPU."""
    return logits.cpu().double().log_softmax(-1)


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row (rows, vocab) in fp32 and their ids, largest first.

    Equal logits, common in 16-bit weights, are ordered by id, as in ``argmax``.
    """
    rows, vocab = logits.shape
    blocks = vocab // BLOCK
    if blocks <= 2 * k:
        ids = torch.arange(vocab, device=logits.device).expand(rows, vocab)
        return _largest(logits, ids, k)
    body = logits[:, : blocks * BLOCK].view(rows, blocks, BLOCK)
    block_numbers = torch.arange(blocks, device=logits.device).expand(rows, blocks)
    _, best_blocks = _largest(body.amax(-1), block_numbers, k)
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
