"""From a decoded step to what is kept of it.

The tensors of a step are reduced where they are, copied to the CPU once, and
leave as plain records. The lens, which costs several times the model's own
head, is computed for a few steps together: its records trail their steps and
are complete before the reply ends.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oki_trace.llm.ahead import Ahead, shared_cores
from oki_trace.llm.decode import RawStep, decode
from oki_trace.llm.instrument import Instrument
from oki_trace.llm.lens import summarize
from oki_trace.llm.vocabulary import Vocabulary
from oki_trace.records import (
    Candidates,
    CapturePolicy,
    Generation,
    LayerAttention,
    Lens,
    Prompt,
    Step,
)
from oki_trace.records import Tensor as TensorRecord

LENS_BATCH = 4


def capture(
    instrument: Instrument,
    prompt: Prompt,
    generation: Generation,
    policy: CapturePolicy,
    should_stop: Callable[[], bool],
) -> Iterator[tuple[Step, str | None] | Lens]:
    """Decode and yield each step with its stop reason, and, a few steps later, its lens.

    Every step's lens has been yielded when the iterator ends or raises.
    """
    if generation.max_new_tokens == 0:
        return

    def decoded() -> Generator[RawStep]:
        return decode(instrument.model, instrument.probe, prompt.token_ids, generation)

    if instrument.moves_weights:
        # Weights that come and go with each call cannot serve two threads.
        with closing(decoded()) as alone:
            yield from _follow(alone, instrument, policy, should_stop)
        return
    with shared_cores() as threads, closing(Ahead(decoded, threads)) as ahead:
        yield from _follow(ahead, instrument, policy, should_stop)


def _follow(
    steps: Iterator[RawStep],
    instrument: Instrument,
    policy: CapturePolicy,
    should_stop: Callable[[], bool],
) -> Iterator[tuple[Step, str | None] | Lens]:
    waiting: list[RawStep] = []
    try:
        for raw in steps:
            waiting.append(raw)
            stopped = raw.finished is None and should_stop()
            yield _step(raw, instrument, policy), "stopped" if stopped else raw.finished
            if stopped:
                break
            # Steps first: a token is on screen before anyone computes its lens.
            late = isinstance(steps, Ahead) and steps.waiting
            if len(waiting) >= LENS_BATCH and not late:
                yield from _lenses(waiting, instrument, policy)
                waiting.clear()
    except Exception:
        yield from _lenses(waiting, instrument, policy)
        raise
    yield from _lenses(waiting, instrument, policy)


def _step(raw: RawStep, instrument: Instrument, policy: CapturePolicy) -> Step:
    vocabulary = instrument.vocabulary
    logits = raw.logits.float()
    row = summarize(logits[None], logits, raw.token_id, max(policy.topk_logits, 2))
    probs = row.probs[0]
    prob = float(row.chosen_prob[0])
    lse = float(logits.logsumexp(-1))
    logit = float(logits[raw.token_id])
    sampled = None if raw.scores is None else raw.scores.softmax(-1).cpu()
    kept = policy.topk_logits
    ids = row.token_ids[0, :kept]
    return Step(
        step_index=raw.step_index,
        position=raw.position,
        token_id=raw.token_id,
        token=vocabulary.text(raw.token_id),
        token_bytes=vocabulary.token_bytes(raw.token_id),
        is_special=vocabulary.is_special(raw.token_id),
        logit=logit,
        prob=prob,
        logprob=logit - lse,
        entropy=float(row.entropy[0]),
        rank=int(row.chosen_rank[0]),
        margin=float(probs[0] - probs[1]) if len(probs) > 1 else 1.0,
        sampled_prob=None if sampled is None else float(sampled[raw.token_id]),
        elapsed_ms=raw.elapsed_ms,
        topk=Candidates(
            token_ids=ids.numpy(),
            tokens=_texts(vocabulary, ids),
            logits=row.logits[0, :kept].numpy(),
            probs=probs[:kept].numpy(),
            sampled_probs=None if sampled is None else sampled[ids].numpy(),
        ),
        attention=tuple(
            _layer_attention(layer, weights, raw.position, policy.topk_evidence)
            for layer, weights in raw.attention.items()
        ),
        tensors=() if policy.tensors == "none" else tuple(_tensors(raw)),
    )


def _layer_attention(layer: int, weights: Tensor, position: int, k: int) -> LayerAttention:
    mean = weights.mean(0)
    top = mean.topk(min(k, mean.shape[0]))
    # The newest query stands at position - 1: the token it predicts is not seen yet.
    first_key = position - mean.shape[0]
    return LayerAttention(
        layer=layer,
        positions=(top.indices + first_key).cpu().numpy(),
        weights=top.values.cpu().numpy(),
        missing=max(0.0, 1.0 - float(mean.sum())),
    )


def _tensors(raw: RawStep) -> Iterator[TensorRecord]:
    yield _record("logits", raw.logits)
    if raw.hidden:
        yield _record(
            "hidden_states", torch.stack([h.to(raw.hidden[0].device) for h in raw.hidden])
        )
    if raw.attention:
        yield _attentions(raw)


def _attentions(raw: RawStep) -> TensorRecord:
    """Every layer and head in one tensor, columns aligned by position (see records.Tensor)."""
    rows = list(raw.attention.values())
    heads, keys = max(r.shape[0] for r in rows), max(r.shape[1] for r in rows)
    if all(r.shape == (heads, keys) for r in rows):
        stacked = torch.stack([r.cpu() for r in rows])
    else:
        stacked = torch.zeros(len(rows), heads, keys)
        for into, r in zip(stacked, rows, strict=True):
            into[: r.shape[0], keys - r.shape[1] :] = r
    return TensorRecord(
        name="attentions",
        array=stacked.numpy(),
        dtype="float32",
        layers=tuple(raw.attention),
        key_offset=raw.position - keys,
    )


def _record(name: Any, tensor: Tensor) -> TensorRecord:
    dtype = str(tensor.dtype).removeprefix("torch.")
    host = tensor.cpu()
    array = host.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else host.numpy()
    return TensorRecord(name=name, array=array, dtype=dtype)


def _lenses(
    steps: Sequence[RawStep], instrument: Instrument, policy: CapturePolicy
) -> Iterator[Lens]:
    """The lens of these steps: layers 0 to L-1 projected together, layer L the model's own."""
    if instrument.lens is None or not steps:
        return
    layers = instrument.anatomy.layers
    device = steps[0].hidden[-1].device
    streams = torch.stack([h.to(device) for raw in steps for h in raw.hidden[:layers]])
    projected = instrument.lens.project(streams)
    for raw, inner in zip(steps, projected.split(layers), strict=True):
        own = raw.logits.float().to(inner.device)
        yield _lens(raw, inner, own, instrument.vocabulary, policy.topk_lens)


def _lens(raw: RawStep, inner: Tensor, own: Tensor, vocabulary: Vocabulary, k: int) -> Lens:
    parts = [summarize(rows, own, raw.token_id, k) for rows in (inner, own[None])]

    def joined(name: str) -> Any:
        return np.concatenate([getattr(part, name).numpy() for part in parts])

    ids = joined("token_ids")
    return Lens(
        step_index=raw.step_index,
        token_ids=ids,
        tokens=tuple(_texts(vocabulary, row) for row in ids),
        logits=joined("logits"),
        probs=joined("probs"),
        entropy=joined("entropy"),
        chosen_rank=joined("chosen_rank"),
        chosen_prob=joined("chosen_prob"),
        kl=joined("kl"),
    )


def _texts(vocabulary: Vocabulary, ids: Any) -> tuple[str, ...]:
    return tuple(vocabulary.text(i) for i in ids.tolist())
