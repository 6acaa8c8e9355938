"""Reduces the tensors of a decoded step to plain records.

The tensors are reduced on their own device, and copied to the CPU once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oki_trace.llm.capture.attention import AttentionRows, QueryRows, attention_rows
from oki_trace.llm.capture.choice_analysis import analyze_choice
from oki_trace.llm.capture.distribution import (
    Distribution,
    ModelDistribution,
    model_distribution,
    summarize,
)
from oki_trace.llm.capture.instrument import Instrument
from oki_trace.llm.capture.lens import LensProjection, LensTarget, LogitLens
from oki_trace.llm.capture.reply_checks import ReplyChecker
from oki_trace.llm.capture.vocabulary import Vocabulary
from oki_trace.llm.decoding.decode import RawStep
from oki_trace.llm.lenses.reading import LensReader
from oki_trace.records import Candidates, CapturePolicy, LayerAttention, Lens, Step, TensorRecord


@dataclass(frozen=True, eq=False)
class PendingLens:
    """The inputs of a step's lens, and nothing else: several of these are in memory.

    ``hidden_states`` are L+1 rows (width,); ``last_layer`` summarizes the row of layer
    L, which is the model's own; ``logits`` (vocab,) in fp32 only where the lens of this
    step is checked against them.
    """

    step_index: int
    token_id: int
    hidden_states: tuple[Tensor, ...]
    model: ModelDistribution
    last_layer: Distribution
    logits: Tensor | None

    @property
    def target(self) -> LensTarget:
        """What its lens is compared with."""
        return LensTarget(self.token_id, self.model, self.last_layer.token_ids[0])


class StepReducer:
    """Reduces the steps of one reply. One thread calls ``step``, another may call ``lenses``."""

    def __init__(
        self, instrument: Instrument, policy: CapturePolicy, draft: LensProjection | None = None
    ) -> None:
        """``draft``: that of another reducer of the same turn."""
        self.checker = instrument.checker()
        self.draft = instrument.draft_for(policy, draft)
        self._vocabulary = instrument.vocabulary
        self._policy = policy
        self._lens = instrument.lens.projection
        *self._inner_layers, last = policy.layers_read(instrument.structure.layers)
        is_whole = len(self._inner_layers) == last
        self._layers = None if is_whole else np.array([*self._inner_layers, last])
        self._readers = instrument.readers_for(policy, self._inner_layers)

    @property
    def kept_tokens(self) -> int:
        """How many tokens of a distribution the records need."""
        return max(self._policy.topk_logits, self._policy.topk_lens, 2)

    def step(self, raw: RawStep, *, last: bool) -> tuple[Step, PendingLens]:
        """The record of a step without its lens, and the inputs of the lens.

        ``last``: no step follows.
        """
        logits = raw.logits.float()
        model = model_distribution(logits)
        summary = summarize(logits[None], [model], raw.token_id, self.kept_tokens)
        return self.summarized_step(raw, model, summary, last=last)

    def summarized_step(
        self,
        raw: RawStep,
        model: ModelDistribution,
        summary: Distribution,
        *,
        last: bool,
        reduced: tuple[LayerAttention, ...] | None = None,
    ) -> tuple[Step, PendingLens]:
        """The same for a step whose distribution, or attention too, was reduced before."""
        logits = raw.logits.float()
        is_checked = self.checker.is_due(raw.step_index, last=last)
        attention = _at_positions(attention_rows(raw.attention), raw.position)
        if is_checked:
            self.checker.check_attention(raw.step_index, attention)
        if not self.checker.attention_holds:
            attention, reduced = {}, None
        if reduced is None:
            reduced = _attention(raw.position, attention, self._policy.topk_evidence)
        checked_logits = logits if is_checked else None
        tensors = () if self._policy.tensors == "none" else tuple(_tensors(raw, attention))
        step = _step(raw, reduced, summary, self._vocabulary, self._policy.topk_logits)
        return replace(step, tensors=tensors) if tensors else step, PendingLens(
            raw.step_index, raw.token_id, raw.hidden_states, model, summary, checked_logits
        )

    @torch.no_grad()
    def lenses(self, steps: Sequence[PendingLens]) -> list[Lens]:
        """The lens of a few steps: layers 0 to L-1 projected together, layer L the model's own.

        After them come their readings by installed lenses. Ends before a step at which the
        lens disagrees with the model; empty without a lens.
        """
        lens, checker = self._lens, self.checker
        if lens is None or self._policy.no_lens:
            return []
        steps = [step for step in steps if _lens_holds(step, lens, checker)]
        if not steps:
            return []
        if not self._inner_layers:
            return [self._record(step, None) for step in steps]
        logit = self._logit_lenses(steps, lens)
        return [*logit, *(one for reader in self._readers for one in self._read(reader, steps))]

    def _logit_lenses(self, steps: Sequence[PendingLens], lens: LogitLens) -> list[Lens]:
        draft, checker = self.draft, self.checker
        if draft is None or not checker.draft_holds:
            return self._lenses(steps, lens)
        compared = [step for step in steps if checker.compares_draft(step.step_index)]
        exact = [self._compared(step, lens, draft) for step in compared]
        if not checker.draft_holds:
            return self._lenses(steps, lens)
        others = [step for step in steps if step not in compared]
        lenses = [*exact, *self._lenses(others, draft)]
        return sorted(lenses, key=lambda lens: lens.step_index)

    def _compared(self, step: PendingLens, lens: LogitLens, draft: LensProjection) -> Lens:
        """The exact lens of a step, with which its draft is compared."""
        inner, k, target = self._inner([step]), self._policy.topk_lens, step.target
        logits = lens.project(inner)
        drafted = draft.project_steps(inner, [target.exact_ids], k)
        self.checker.check_draft(step.step_index, next(drafted), logits)
        summary = summarize(logits, [step.model], step.token_id, k)
        return self._record(step, summary)

    def _read(self, reader: LensReader, steps: Sequence[PendingLens]) -> Iterator[Lens]:
        """The readings of the steps by an installed lens, always with the exact projection."""
        assert self._lens is not None
        k = self._policy.topk_lens
        hidden = _streams(steps, reader.inner).unflatten(0, (len(steps), -1))
        targets = [step.target for step in steps]
        summaries = reader.summarize(hidden, targets, k, self._lens)
        for step, inner in zip(steps, summaries, strict=True):
            made = lens_record(step.step_index, inner, step.last_layer, self._vocabulary, k)
            yield replace(made, name=reader.name, layers=reader.layers)

    def _lenses(self, steps: Sequence[PendingLens], projection: LensProjection) -> list[Lens]:
        if not steps:
            return []
        inner, k = self._inner(steps), self._policy.topk_lens
        summary = projection.summarize_steps(inner, [step.target for step in steps], k)
        layers = len(inner) // len(steps)
        return [
            self._record(step, summary.rows(slice(i * layers, (i + 1) * layers)))
            for i, step in enumerate(steps)
        ]

    def _inner(self, steps: Sequence[PendingLens]) -> Tensor:
        """The hidden states (steps · layers, width) of the layers read below the last one."""
        return _streams(steps, self._inner_layers)

    def _record(self, step: PendingLens, inner: Distribution | None) -> Lens:
        """The lens of one step, from the summary of its inner layers; None: it has none."""
        k = self._policy.topk_lens
        made = lens_record(step.step_index, inner, step.last_layer, self._vocabulary, k)
        return replace(made, layers=self._layers)


def _streams(steps: Sequence[PendingLens], layers: Sequence[int]) -> Tensor:
    """The hidden states (steps · layers, width) of these layers."""
    device = steps[0].hidden_states[-1].device
    streams = (step.hidden_states[layer] for step in steps for layer in layers)
    return torch.stack([stream.to(device) for stream in streams])


def _lens_holds(step: PendingLens, lens: LogitLens, checker: ReplyChecker) -> bool:
    if step.logits is not None and checker.lens_holds:
        checker.check_lens(step.step_index, lens, step.hidden_states[-1], step.logits)
    return checker.lens_holds


def _at_positions(rows: AttentionRows, position: int) -> AttentionRows:
    """The rows whose keys are the positions before ``position``, or the last of these.

    A cache of fixed length has slots for later tokens, which get no weight and are cut
    off here. A row with weight on such a slot is left out.
    """
    cut = {}
    for layer, row in rows.items():
        if row.shape[1] <= position:
            cut[layer] = row
        elif not row[:, position:].any():
            cut[layer] = row[:, :position]
    return cut


def _step(
    raw: RawStep,
    attention: tuple[LayerAttention, ...],
    summary: Distribution,
    vocabulary: Vocabulary,
    k: int,
) -> Step:
    probs = summary.probs[0]
    logit = float(raw.logits[raw.token_id])
    ids = summary.token_ids[0, :k]
    choice = analyze_choice(raw.choice, raw.logits, ids, vocabulary)
    return Step(
        step_index=raw.step_index,
        origin=raw.origin,
        position=raw.position,
        token_id=raw.token_id,
        token=vocabulary.text(raw.token_id),
        token_bytes=vocabulary.token_bytes(raw.token_id),
        is_special=vocabulary.is_special(raw.token_id),
        logit=logit,
        prob=float(summary.chosen_prob[0]),
        logprob=logit - float(summary.lse[0]),
        entropy=float(summary.entropy[0]),
        rank=int(summary.chosen_rank[0]),
        margin=float(probs[0] - probs[1]) if len(probs) > 1 else 1.0,
        sampled_prob=choice.chosen_prob,
        elapsed_ms=raw.elapsed_ms,
        topk=Candidates(
            token_ids=ids.numpy(),
            tokens=_texts(vocabulary, ids),
            logits=summary.logits[0, :k].numpy(),
            probs=probs[:k].numpy(),
            sampled_probs=choice.sampled_probs,
            noise=choice.noise,
        ),
        decision=choice.decision,
        attention=attention,
    )


def top_attention(
    attention: QueryRows, positions: Sequence[int], k: int
) -> list[tuple[LayerAttention, ...]]:
    """The most attended positions of each layer, for many queries at once.

    ``attention`` has rows of the queries that predict ``positions``, heads averaged; a row's
    last key is the newest of the last query, and later keys than its own have no weight.
    """
    by_query: list[list[LayerAttention]] = [[] for _ in positions]
    for layer, rows in attention.items():
        mean = rows.mean(1)
        count, keys = mean.shape
        ahead = torch.arange(count - 1, -1, -1, device=mean.device)  # keys after a query's own
        missing = (1 - mean.sum(1)).clamp_min(0).tolist()
        later = torch.arange(keys, device=mean.device)[None] >= keys - ahead[:, None]
        top = mean.masked_fill(later, -1.0).topk(min(k, keys))
        weights = top.values.cpu().numpy()
        indices = (top.indices + (positions[-1] - keys)).cpu().numpy()
        for i, own in enumerate(by_query):
            n = min(k, keys - (count - 1 - i))
            own.append(LayerAttention(layer, indices[i, :n], weights[i, :n], missing[i]))
    return [tuple(layers) for layers in by_query]


def _attention(position: int, attention: AttentionRows, k: int) -> tuple[LayerAttention, ...]:
    """Each layer's most attended positions, heads averaged; one reduction per shape of rows."""
    layers_by_shape: dict[tuple[Any, ...], list[int]] = {}
    for layer, row in attention.items():
        layers_by_shape.setdefault((row.shape, row.device), []).append(layer)
    by_layer: dict[int, LayerAttention] = {}
    for layers in layers_by_shape.values():
        mean = torch.stack([attention[layer] for layer in layers]).mean(1)
        keys = mean.shape[1]
        top = mean.topk(min(k, keys))
        # The newest query is at position - 1: the model has not seen the token it predicts.
        positions = (top.indices + (position - keys)).cpu().numpy()
        weights, missing = top.values.cpu().numpy(), (1 - mean.sum(1)).clamp_min(0).tolist()
        for reduced in map(LayerAttention, layers, positions, weights, missing):
            by_layer[reduced.layer] = reduced
    return tuple(by_layer[layer] for layer in attention)


def _tensors(raw: RawStep, attention: AttentionRows) -> Iterator[TensorRecord]:
    yield _record("logits", raw.logits)
    if raw.hidden_states:
        device = raw.hidden_states[0].device
        yield _record("hidden_states", torch.stack([h.to(device) for h in raw.hidden_states]))
    if attention:
        yield _attentions(raw.position, attention)


def _attentions(position: int, attention: AttentionRows) -> TensorRecord:
    """Every layer and head in one tensor, columns aligned by position (see ``TensorRecord``)."""
    rows = list(attention.values())
    heads, keys = max(r.shape[0] for r in rows), max(r.shape[1] for r in rows)
    if all(r.shape == (heads, keys) for r in rows):
        stacked = torch.stack([r.cpu() for r in rows])
    else:
        stacked = torch.zeros(len(rows), heads, keys)
        for target, r in zip(stacked, rows, strict=True):
            target[: r.shape[0], keys - r.shape[1] :] = r
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


def lens_record(
    step_index: int, inner: Distribution | None, last: Distribution, vocabulary: Vocabulary, k: int
) -> Lens:
    """The lens of one step, from the summary of its inner layers and that of the last one.

    ``inner`` None: no inner layer was read.
    """

    def all_layers(field: str) -> Any:
        last_row = getattr(last, field).numpy()
        last_row = last_row[:, :k] if last_row.ndim == 2 else last_row
        return last_row if inner is None else np.concatenate([getattr(inner, field), last_row])

    ids = all_layers("token_ids")
    fields = ("logits", "probs", "entropy", "chosen_rank", "chosen_prob", "kl")
    return Lens(
        step_index=step_index,
        token_ids=ids,
        tokens=tuple(_texts(vocabulary, row) for row in ids),
        **{field: all_layers(field) for field in fields},
    )


def _texts(vocabulary: Vocabulary, ids: Any) -> tuple[str, ...]:
    return tuple(vocabulary.text(i) for i in ids.tolist())
