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
# Tokens whose rows are worked on at a time: what they take stays in a core's cache.
_PIECE = 4096


@dataclass(frozen=True)
class ModelDistribution:
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
def model_distribution(logits: Tensor) -> ModelDistribution:
    """Of the model's own logits (vocab,) in fp32."""
    shifted = logits - logits.max()
    weights = shifted.exp()
    total = weights.sum()
    probs = weights / total
    return ModelDistribution(probs, float(total.log() - _sum(weights.mul_(shifted)) / total))


@torch.no_grad()
def summarize(logits: Tensor, own: ModelDistribution, chosen_id: int, k: int) -> Distribution:
    """Reduce logits (rows, vocab) in fp32.

    ``kl`` is KL(own ‖ row) in nats. ``chosen_rank`` counts the tokens strictly
    more likely than the chosen one, plus one. All that is derived is within 1e-5
    of double precision: exponents are taken from each row's largest logit, and
    sums are made in pieces. (torch's softmax on the CPU adds a large vocabulary
    up term by term, and is off by 1e-5 for 262,144 tokens.)
    """
    top_logits, top_ids = top_k(logits, min(k, logits.shape[-1]))
    largest, chosen = top_logits[:, :1], logits[:, chosen_id, None]
    total, products, cross, ahead = _sums(logits, largest, chosen, own.probs.to(logits.device))
    log_total = total.log()
    return Distribution(
        token_ids=top_ids.cpu(),
        logits=top_logits.cpu(),
        probs=((top_logits - largest).exp() / total[:, None]).cpu(),
        entropy=(log_total - products / total).clamp_min(0).cpu(),
        lse=(largest[:, 0] + log_total).cpu(),
        chosen_rank=ahead.long().cpu() + 1,
        chosen_prob=((chosen - largest).exp()[:, 0] / total).cpu(),
        kl=(log_total - cross - own.entropy).clamp_min(0).cpu(),
    )


def _sums(
    logits: Tensor, largest: Tensor, chosen: Tensor, own_probs: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Over each row: Σ e^s, Σ s·e^s and Σ own·s, where s is a logit less the largest,
    and how many logits are above the chosen one.
    """
    piece = _PIECE if logits.device.type == "cpu" else logits.shape[-1]
    found = []
    for part, probs in zip(logits.split(piece, -1), own_probs.split(piece), strict=True):
        shifted = part - largest
        weights = shifted.exp()
        total = weights.sum(-1)
        products = _sum(weights.mul_(shifted))
        # Ones as floats: sums of booleans are many times slower, and 2^24 is no vocabulary.
        ahead = torch.gt(part, chosen, out=weights).sum(-1)
        cross = _sum(shifted.mul_(probs))
        found.append(torch.stack([total, products, cross, ahead]))
    total, products, cross, ahead = torch.stack(found).sum(0)
    return total, products, cross, ahead


def _sum(products: Tensor) -> Tensor:
    """Σ along the last axis, where 0 · -inf, a token ruled out, counts as 0."""
    found = products.sum(-1)
    return products.nansum(-1) if torch.isnan(found).any() else found


@torch.no_grad()
def log_probs(logits: Tensor) -> Tensor:
    """The log-probabilities of logits (rows, vocab), in fp64 on the CPU."""
    return logits.cpu().double().log_softmax(-1)


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
