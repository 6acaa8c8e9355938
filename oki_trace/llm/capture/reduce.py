"""What is kept of a decoded step: its tensors reduced to plain records.

The tensors are reduced where they are, and copied to the CPU once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oki_trace.llm.capture.attention import Rows, attention_rows
from oki_trace.llm.capture.distribution import (
    Distribution,
    ModelDistribution,
    model_distribution,
    summarize,
)
from oki_trace.llm.capture.lens import LensProjection, LogitLens
from oki_trace.llm.capture.reply_checks import ReplyChecker
from oki_trace.llm.capture.vocabulary import Vocabulary
from oki_trace.llm.decoding.decode import RawStep
from oki_trace.llm.decoding.sampling import analyze_choice
from oki_trace.records import Candidates, CapturePolicy, LayerAttention, Lens, Step
from oki_trace.records import Tensor as TensorRecord


@dataclass(frozen=True)
class PendingLens:
    """What the lens of a step still needs, and no more: these wait for each other.

    ``hidden_states`` are L+1 rows (width,), ``last`` is its layer L, the model's own;
    ``logits`` (vocab,) fp32, of a step whose lens is to be checked by them.
    """

    step_index: int
    token_id: int
    hidden_states: tuple[Tensor, ...]
    own: ModelDistribution
    last: Distribution
    logits: Tensor | None


def make_step(
    raw: RawStep,
    vocabulary: Vocabulary,
    policy: CapturePolicy,
    checker: ReplyChecker,
    *,
    last: bool = False,
) -> tuple[Step, PendingLens]:
    """The record of a step, without its lens, and what the lens is made of.

    ``last``: no step follows.
    """
    logits = raw.logits.float()
    own = model_distribution(logits)
    most = max(policy.topk_logits, policy.topk_lens, 2)
    row = summarize(logits[None], own, raw.token_id, most)
    due = checker.is_due(raw.step_index, last=last)
    rows = _at_positions(attention_rows(raw.attention), raw.position)
    if due:
        checker.check_attention(raw.step_index, rows)
    if not checker.attention_holds:
        rows = {}
    pending = PendingLens(
        raw.step_index, raw.token_id, raw.hidden_states, own, row, logits if due else None
    )
    return _step(raw, rows, row, vocabulary, policy), pending


@torch.no_grad()
def compute_lenses(
    steps: Sequence[PendingLens],
    lens: LogitLens,
    draft: LensProjection | None,
    checker: ReplyChecker,
    vocabulary: Vocabulary,
    k: int,
) -> list[Lens]:
    """The lens of a few steps: layers 0 to L-1 projected together, layer L the model's own.

    Ends before a step at which the lens does not hold.
    """
    held = [seen for seen in steps if _holds(seen, lens, checker)]
    if not held:
        return []
    layers = len(held[0].hidden_states) - 1
    device = held[0].hidden_states[-1].device
    streams = torch.stack([h.to(device) for seen in held for h in seen.hidden_states[:layers]])
    wanted = [torch.tensor([*seen.last.token_ids[0], seen.token_id]) for seen in held]
    use = draft if draft is not None and checker.draft_holds else lens
    found = []
    for seen, rows, of_step in zip(
        held, use.project_steps(streams, wanted, k), streams.split(layers), strict=True
    ):
        if use is draft and checker.compares_draft(seen.step_index):
            whole = lens.project(of_step)
            checker.check_draft(seen.step_index, rows, whole)
            rows = whole
        elif use is draft and not checker.draft_holds:
            rows = lens.project(of_step)
        found.append(_lens(seen, rows, vocabulary, k))
    return found


def _holds(seen: PendingLens, lens: LogitLens, checker: ReplyChecker) -> bool:
    if seen.logits is not None and checker.lens_holds:
        checker.check_lens(seen.step_index, lens, seen.hidden_states[-1], seen.logits)
    return checker.lens_holds


def _at_positions(rows: Rows, position: int) -> Rows:
    """The rows whose keys are the positions before ``position``, or the last of these.

    A cache of fixed length has places for tokens to come, which get no weight and
    are left out here. A row with weight on such a place is left out as a whole.
    """
    found = {}
    for layer, row in rows.items():
        if row.shape[1] <= position:
            found[layer] = row
        elif not row[:, position:].any():
            found[layer] = row[:, :position]
    return found


def _step(
    raw: RawStep,
    attention: Rows,
    row: Distribution,
    vocabulary: Vocabulary,
    policy: CapturePolicy,
) -> Step:
    probs = row.probs[0]
    logit = float(raw.logits[raw.token_id])
    decided = analyze_choice(raw.choice, raw.logits, vocabulary)
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
        prob=float(row.chosen_prob[0]),
        logprob=logit - float(row.lse[0]),
        entropy=float(row.entropy[0]),
        rank=int(row.chosen_rank[0]),
        margin=float(probs[0] - probs[1]) if len(probs) > 1 else 1.0,
        sampled_prob=None if decided is None else decided.chosen_prob,
        elapsed_ms=raw.elapsed_ms,
        topk=Candidates(
            token_ids=ids.numpy(),
            tokens=_texts(vocabulary, ids),
            logits=row.logits[0, :kept].numpy(),
            probs=probs[:kept].numpy(),
            sampled_probs=None if decided is None else decided.probs_of(ids),
            noise=None if decided is None else decided.noise_of(ids),
        ),
        decision=None if decided is None else decided.decision,
        attention=_attention(raw.position, attention, policy.topk_evidence),
        tensors=() if policy.tensors == "none" else tuple(_tensors(raw, attention)),
    )


def _attention(position: int, attention: Rows, k: int) -> tuple[LayerAttention, ...]:
    """Heads averaged; layers of one shape are reduced together."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for layer, weights in attention.items():
        alike.setdefault((weights.shape, weights.device), []).append(layer)
    found: dict[int, LayerAttention] = {}
    for layers in alike.values():
        mean = torch.stack([attention[layer] for layer in layers]).mean(1)
        keys = mean.shape[1]
        top = mean.topk(min(k, keys))
        # The newest query stands at position - 1: the token it predicts is not seen yet.
        positions = (top.indices + (position - keys)).cpu().numpy()
        tops, missing = top.values.cpu().numpy(), (1 - mean.sum(1)).clamp_min(0).tolist()
        for row, layer in enumerate(layers):
            found[layer] = LayerAttention(layer, positions[row], tops[row], missing[row])
    return tuple(found[layer] for layer in attention)


def _tensors(raw: RawStep, attention: Rows) -> Iterator[TensorRecord]:
    yield _record("logits", raw.logits)
    if raw.hidden_states:
        yield _record(
            "hidden_states",
            torch.stack([h.to(raw.hidden_states[0].device) for h in raw.hidden_states]),
        )
    if attention:
        yield _attentions(raw.position, attention)


def _attentions(position: int, attention: Rows) -> TensorRecord:
    """Every layer and head in one tensor, columns aligned by position (see records.Tensor)."""
    rows = list(attention.values())
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
        layers=tuple(attention),
        key_offset=position - keys,
    )


def _record(name: Any, tensor: Tensor) -> TensorRecord:
    dtype = str(tensor.dtype).removeprefix("torch.")
    host = tensor.cpu()
    array = host.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else host.numpy()
    return TensorRecord(name=name, array=array, dtype=dtype)


def _lens(seen: PendingLens, inner: Tensor, vocabulary: Vocabulary, k: int) -> Lens:
    """Of one step, from the logits (L, vocab) of its inner layers."""
    row = summarize(inner, seen.own, seen.token_id, k)

    def joined(name: str) -> Any:
        inside, last = getattr(row, name).numpy(), getattr(seen.last, name).numpy()
        return np.concatenate([inside, last[:, :k] if last.ndim == 2 else last])

    ids = joined("token_ids")
    return Lens(
        step_index=seen.step_index,
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
