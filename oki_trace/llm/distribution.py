"""What is kept of a row of logits: its best tokens, and a few numbers about all of them.

A lens makes a row a layer at every step, each as long as the vocabulary, so
this is the part of capture that touches the most memory. Every pass over the
rows counts, and each of those below runs at the speed of the memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Tokens a block: the best k tokens lie in the k blocks with the best maxima.
BLOCK = 64


@dataclass(frozen=True)
class Own:
    """The model's own distribution of one step: ``probs`` (vocab,), ``entropy`` in nats."""

    probs: Tensor
    entropy: float


@dataclass(frozen=True)
class Distribution:
    """What is kept of rows of logits; tensors on the CPU.

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


@torch.no_grad()
def own_distribution(logits: Tensor) -> Own:
    """Of the model's own logits (vocab,) in fp32."""
    probs = logits.softmax(-1)
    best = probs.argmax()
    lse = logits[best] - probs[best].log()
    return Own(probs, float(lse - _expectation(probs, logits[None])[0]))


@torch.no_grad()
def summarize(logits: Tensor, own: Own, chosen_id: int, k: int) -> Distribution:
    """Reduce logits (rows, vocab) in fp32.

    ``kl`` is KL(own ‖ row) in nats. ``chosen_rank`` counts the tokens strictly
    more likely than the chosen one, plus one.
    """
    top_logits, top_ids = top_k(logits, min(k, logits.shape[-1]))
    probs = logits.softmax(-1)
    top_probs = probs.gather(-1, top_ids)
    # Cheaper than a second pass over the vocabulary, and as exact.
    lse = top_logits[:, 0] - top_probs[:, 0].log()
    mean_logit = (probs.mul_(logits)).sum(-1)
    if torch.isnan(mean_logit).any():
        # 0 · -inf: a token ruled out counts as nothing.
        mean_logit = probs.nansum(-1)
    mean_under_own = _expectation(own.probs.to(logits.device), logits)
    chosen = logits[:, chosen_id]
    # Ones as floats: sums of booleans are many times slower, and 2^24 is no vocabulary.
    ahead = torch.gt(logits, chosen[:, None], out=probs).sum(-1)
    return Distribution(
        token_ids=top_ids.cpu(),
        logits=top_logits.cpu(),
        probs=top_probs.cpu(),
        entropy=(lse - mean_logit).clamp_min(0).cpu(),
        lse=lse.cpu(),
        chosen_rank=ahead.long().cpu() + 1,
        chosen_prob=(chosen - lse).exp().cpu(),
        kl=(lse - own.entropy - mean_under_own).clamp_min(0).cpu(),
    )


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row (rows, vocab) in fp32 and their ids, largest first.

    Equal logits, common in 16-bit weights, come in the order of their ids, as
    ``argmax`` picks them.
    """
    rows, vocab = logits.shape
    blocks = vocab // BLOCK
    if blocks <= 2 * k:
        ids = torch.arange(vocab, device=logits.device).expand(rows, vocab)
        return _first(logits, ids, k)
    body = logits[:, : blocks * BLOCK].view(rows, blocks, BLOCK)
    numbers = torch.arange(blocks, device=logits.device).expand(rows, blocks)
    _, best = _first(body.amax(-1), numbers, k)
    within = torch.arange(BLOCK, device=logits.device)
    ids = (best[:, :, None] * BLOCK + within).view(rows, -1)
    rest = torch.arange(blocks * BLOCK, vocab, device=logits.device).expand(rows, -1)
    ids = torch.cat([ids, rest], -1)
    return _first(logits.gather(-1, ids), ids, k)


def _first(values: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values and their ids (below 2^31), the smaller id first where they are equal.

    One integer holds both: the bits of a float, the negative ones turned over,
    sort as the floats do; below them, the id counted backwards.
    """
    bits = (values + 0.0).view(torch.int32)  # and no -0.0 below 0.0
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() * 2**31 - ids
    found = order.topk(k, -1).indices
    return values.gather(-1, found), ids.gather(-1, found)


def _expectation(probs: Tensor, logits: Tensor) -> Tensor:
    """Σ p · logit of each row, where 0 · -inf, a token ruled out, counts as 0."""
    found = logits @ probs
    if torch.isnan(found).any():
        found = torch.nansum(probs * logits, -1)
    return found
