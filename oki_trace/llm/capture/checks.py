"""Selects the lens and the attention tap that agree with the model itself.

Once per load, a few short forward passes compare the lens at the last layer with all
of the model's own logits, and the captured attention with the model's own eager
attention, in one pass and with a cache. A part that does not agree is not used,
and the reason is recorded. A model that treats long texts differently (a window, a
selection of keys, another rotary scaling) is also checked on a text longer than that,
where this machine can run one in a few seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from oki_trace.llm.capture.attention import (
    AttentionRows,
    AttentionTap,
    HookedTap,
    KernelTap,
    OutputAttentionsTap,
    attention_rows,
    last_rows,
)
from oki_trace.llm.capture.distribution import log_probs
from oki_trace.llm.capture.hooks import ModelHooks
from oki_trace.llm.capture.lens import LogitLens
from oki_trace.llm.capture.model_structure import ModelStructure, dummy_token_ids
from oki_trace.llm.capture.speedups import preallocate
from oki_trace.llm.decoding.forward_pass import cache_in
from oki_trace.llm.decoding.special_lengths import checkable_lengths
from oki_trace.llm.loading.hardware import computing_dtype
from oki_trace.llm.transformers_internals import (
    ALL_ATTENTION_FUNCTIONS,
    attention_configs,
    attention_implementation,
    eager_attention,
)

# Softmax weights in fp32 differ from eager ones by rounding alone. In 16 bits
# the two kernels round every layer's input differently, and single weights of a
# deep model drift apart (SmolLM2 in bfloat16: 3e-2); a wrong formula is further
# off in some head of some layer.
ATTENTION_TOLERANCE = {torch.float32: 1e-4}
ATTENTION_TOLERANCE_16_BIT = 1e-1

# The largest difference from 1 that rounding makes in the sum of a row of weights.
ROW_SUM_TOLERANCE = 2e-2

PROVENANCE = "attention of the newest position, final layer with attention, heads averaged"


@dataclass(frozen=True)
class SelectedLens:
    """The lens and its largest |Δlogprob|, or the reason why there is none.

    ``draft_inputs``: hidden states of inner layers, to compare a draft of the lens on.
    """

    projection: LogitLens | None
    error: float | None
    reason: str | None
    draft_inputs: tuple[Tensor, ...] = ()


@torch.no_grad()
def select_lens(model: Any, structure: ModelStructure, hooks: ModelHooks) -> SelectedLens:
    """The cheaper of the two lenses that agrees with the model, or the reason why neither does."""
    if structure.repeats:
        reason = "its blocks run several times for each token, so no layer has a single output"
        return SelectedLens(None, None, reason)
    with hooks.attach():
        logits = model(input_ids=structure.dummy_ids, use_cache=False).logits[0, -1:]
        hidden_states = hooks.take_hidden_states()
    checks = []
    for run_trunk in (False, True):
        lens = LogitLens(structure, run_trunk=run_trunk)
        check = lens.check(hidden_states[-1][None], logits)
        if check.reason is None:
            return SelectedLens(lens, check.error, None, () if run_trunk else hidden_states[:-1])
        checks.append(check)
    # A lens that ran and gave other numbers explains more than one that could not run.
    failure = next((check for check in checks if check.error is not None), checks[0])
    return SelectedLens(None, failure.error, failure.reason)


@dataclass(frozen=True)
class SelectedAttention:
    """The tap, the layers it covers, its largest |Δweight|, and the provenance of its rows.

    ``full_rows``: the weights of each head sum to 1, so there is no learned sink.
    """

    tap: AttentionTap | None
    layers: tuple[int, ...]
    error: float | None
    provenance: str
    full_rows: bool = True


def _no_attention(reason: str, error: float | None = None) -> SelectedAttention:
    return SelectedAttention(None, (), error, f"not available: {reason}")


@torch.no_grad()
def select_attention(model: Any, structure: ModelStructure) -> SelectedAttention:
    """The cheapest tap whose rows are the model's own eager ones, in one pass and with a cache.

    Layers that return something else than weights (linear attention returns its
    state) are left out.
    """
    ids = structure.dummy_ids
    if _adds_tokens(model, ids):
        return _no_attention("the model adds a token of its own to the sequence at every step")
    by_index = _eager_rows(model, ids)
    reference = {index: row for index, row in enumerate(by_index) if row is not None}
    if not reference:
        return _no_attention("the model returns no attention weights")
    if any(row.shape[1] != ids.shape[1] for row in reference.values()):
        return _no_attention("its keys are not token positions")
    eager_rows = list(reference.values())
    full_rows = all(bool(((row.sum(-1) - 1).abs() < ROW_SUM_TOLERANCE).all()) for row in eager_rows)
    tap = _module_tap(model, structure)
    with tap.attach():
        model(input_ids=ids, use_cache=False)
        tap.select_modules(ids.shape[1])
        rows = attention_rows(tap.take(None))
    error = _largest_difference(rows.values(), eager_rows)
    if _within_tolerance(model, error):
        lengths = checkable_lengths(model, structure.blocks, ids.device.type)
        error = max(error, _difference_from_eager(model, tap, reference, ids))
        if lengths.text_length is not None:
            long_ids = dummy_token_ids(model, lengths.text_length)
            long_error = _difference_from_eager(model, tap, reference, long_ids, one_pass=True)
            error = max(error, long_error)
        if _within_tolerance(model, error):
            provenance = PROVENANCE
            if lengths.unchecked is not None:
                provenance += f", not checked beyond {lengths.unchecked:,} tokens"
            return SelectedAttention(tap, tuple(rows), error, provenance, full_rows)
    if len(rows) == len(eager_rows):
        layers = dict(zip(reference, rows, strict=True))
    elif len(by_index) == structure.layers:
        layers = {index: index + 1 for index in reference}
    else:
        return _no_attention("it is not known which layers its attention weights belong to")
    return replace(_output_attentions(model, layers, ids, eager_rows), full_rows=full_rows)


def _within_tolerance(model: Any, error: float) -> bool:
    return error <= ATTENTION_TOLERANCE.get(computing_dtype(model), ATTENTION_TOLERANCE_16_BIT)


def _output_attentions(
    model: Any, layers: dict[int, int], ids: Tensor, eager_rows: list[Tensor]
) -> SelectedAttention:
    """The last resort, checked as it will be used: with the last token by itself."""
    try:
        tap = OutputAttentionsTap(model, layers, has_cache=True)
        rows = _last_token_rows(model, tap, ids)
        if rows is None:
            tap = OutputAttentionsTap(model, layers, has_cache=False)
            rows = _one_pass_rows(model, tap, ids)
        error = _largest_difference(rows.values(), eager_rows)
    except Exception as failure:  # whatever a model's own code raises, the turn goes on
        return _no_attention(f"output_attentions fails ({type(failure).__name__}: {failure})")
    if error == float("inf"):
        return _no_attention("with a cache its attention has different keys")
    if not _within_tolerance(model, error):
        return _no_attention(f"with a cache its attention differs by {error:.2g}", error)
    return SelectedAttention(tap, tuple(layers.values()), error, PROVENANCE)


def _difference_from_eager(
    model: Any, tap: AttentionTap, indices: Iterable[int], ids: Tensor, *, one_pass: bool = False
) -> float:
    """The largest |Δweight| between a tap and the model's eager rows for the last token by itself.

    With ``one_pass``, also those of one pass over all ``ids``; the eager rows stay those of
    the last token, since all eager weights of a long text would not fit into memory. 0 for
    a model without a cache, or one that needs more inputs than ids: ``generate()`` prepares
    those when it decodes.
    """
    eager_tap = OutputAttentionsTap(model, {index: index for index in indices}, has_cache=True)
    try:
        cached, eager_rows = (_last_token_rows(model, t, ids) for t in (tap, eager_tap))
        one_pass_rows = _one_pass_rows(model, tap, ids) if one_pass else None
    except Exception:  # whatever a model's own code raises, the turn goes on
        return 0.0
    if cached is None or eager_rows is None:
        return 0.0
    reference = list(eager_rows.values())
    if any(row.shape[1] > ids.shape[1] for row in cached.values()):
        return float("inf")
    error = _largest_difference(cached.values(), reference)
    if one_pass_rows is None:
        return error
    if len(one_pass_rows) != len(reference):
        return float("inf")
    for row, eager_row in zip(one_pass_rows.values(), reference, strict=True):
        # Keys that a cache has dropped must have no weight in one pass either.
        dropped, kept = row[:, : -eager_row.shape[1]], row[:, -eager_row.shape[1] :]
        error = max(error, float(dropped.abs().sum(-1).max()))
        error = max(error, _largest_difference([kept], [eager_row]))
    return error


def _one_pass_rows(model: Any, tap: AttentionTap, ids: Tensor) -> AttentionRows:
    """The last query's rows of ``tap`` in one pass over all tokens, without a cache."""
    with tap.attach(), tap.forward_arguments() as arguments:
        return attention_rows(tap.take(model(input_ids=ids, use_cache=False, **arguments)))


def _last_token_rows(model: Any, tap: AttentionTap, ids: Tensor) -> AttentionRows | None:
    """The rows of ``tap`` when all tokens but the last are in the cache; None without a cache."""
    named_cache = cache_in(model(input_ids=ids[:, :-1], use_cache=True))
    if named_cache is None:
        return None
    name, cache = named_cache
    preallocate(cache, 1)
    with tap.attach(), tap.forward_arguments() as arguments:
        outputs = model(input_ids=ids[:, -1:], **{name: cache}, **arguments)
        return attention_rows(tap.take(outputs))


@torch.no_grad()
def cache_difference(model: Any, structure: ModelStructure) -> float | None:
    """The largest |Δlogprob| between one pass over a text and its last token with a cache.

    The model's own code makes it, so a reply differs from teacher forcing by as much.
    None for a model without a cache, or one that needs more inputs than ids.
    """
    ids = structure.dummy_ids
    long = checkable_lengths(model, structure.blocks, ids.device.type).text_length
    differences = []
    for length in {ids.shape[1], long or ids.shape[1]}:
        ids = dummy_token_ids(model, length)
        try:
            one_pass = model(input_ids=ids, use_cache=False).logits[:, -1]
            named_cache = cache_in(model(input_ids=ids[:, :-1], use_cache=True))
            if named_cache is None:
                return None
            name, cache = named_cache
            cached = model(input_ids=ids[:, -1:], **{name: cache}, use_cache=True).logits[:, -1]
        except Exception:  # whatever a model's own code raises, the turn goes on
            return None
        difference = (log_probs(one_pass) - log_probs(cached)).abs()
        finite = difference[difference.isfinite()]
        differences.append(float(finite.max()) if len(finite) else 0.0)
    return max(differences)


def _adds_tokens(model: Any, ids: Tensor) -> bool:
    """Whether decoding runs the model on an additional token: a mask token to be filled in."""
    try:
        inputs = model.prepare_inputs_for_generation(ids, attention_mask=torch.ones_like(ids))
    except Exception:  # it may need more than this; decoding shows whether it works
        return False
    prepared = inputs.get("input_ids")
    return prepared is not None and prepared.shape[1] > ids.shape[1]


def _module_tap(model: Any, structure: ModelStructure) -> KernelTap | HookedTap:
    implementation = attention_implementation(model.config.get_text_config(decoder=True))
    if implementation in ALL_ATTENTION_FUNCTIONS:
        return KernelTap(structure.layer_of(), implementation)
    return HookedTap(structure.layer_of())


def _eager_rows(model: Any, ids: Tensor) -> list[Tensor | None]:
    """The model's own eager weights of the last position, (heads, keys), by index."""
    try:
        with eager_attention(attention_configs(model)):
            outputs = model(input_ids=ids, use_cache=False, output_attentions=True)
            return last_rows(outputs, ids.shape[1])
    except (ValueError, TypeError, AttributeError):
        return []


def _largest_difference(rows: Iterable[Tensor], reference: Sequence[Tensor]) -> float:
    """Over all heads of all layers; infinite when heads or keys are not the same.

    A row may be shorter than the reference where a cache has dropped keys that a
    window hides; the missing keys count as weight 0.
    """
    heads = [head for row in rows for head in row]
    reference_heads = [head for row in reference for head in row]
    if len(heads) != len(reference_heads):
        return float("inf")
    largest = 0.0
    for head, reference_head in zip(heads, reference_heads, strict=True):
        dropped = len(reference_head) - len(head)
        if dropped < 0:
            return float("inf")
        difference = reference_head.to(head.device, copy=True)
        difference[dropped:] -= head
        largest = max(largest, float(difference.abs().max()))
    return largest
