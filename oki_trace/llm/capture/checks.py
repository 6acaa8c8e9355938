"""Which lens and which way to the attention agree with the model itself.

Asked once per load, on a few short forward passes: the lens at the last layer
against the model's own logits, all of them; the captured attention against the
model's own eager attention, in one pass and with a cache. What does not agree
is not used, and why is said. A model that treats long texts differently (a window,
a choice of keys, another rotary scaling) is checked on a text longer than that,
where this machine can run one in a few seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from oki_trace.llm.capture.attention import (
    AttentionTap,
    HookedTap,
    KernelTap,
    OutputAttentionsTap,
    Rows,
    attention_rows,
    eager,
    last_rows,
)
from oki_trace.llm.capture.distribution import log_probs
from oki_trace.llm.capture.hooks import ModelHooks
from oki_trace.llm.capture.lens import LogitLens
from oki_trace.llm.capture.model_structure import ModelStructure, dummy_token_ids
from oki_trace.llm.capture.speedups import preallocate
from oki_trace.llm.decoding.forward_pass import cache_in
from oki_trace.llm.decoding.special_lengths import checkable
from oki_trace.llm.loading.hardware import computing_dtype

# Softmax weights in fp32 differ from eager ones by rounding alone. In 16 bits
# the two kernels round every layer's input differently, and single weights of a
# deep model drift apart (SmolLM2 in bfloat16: 3e-2); a wrong formula is further
# off in some head of some layer.
ATTENTION_TOLERANCE = {torch.float32: 1e-4}
ATTENTION_TOLERANCE_16_BIT = 1e-1

# What rounding leaves of 1 in a row of weights.
FULL_ROW = 2e-2

PROVENANCE = "attention of the newest position, final layer with attention, heads averaged"


@dataclass(frozen=True)
class CheckedLens:
    """The lens, its error, why there is none; ``drafts_from`` the streams to try its draft on."""

    lens: LogitLens | None
    error: float | None
    reason: str | None
    drafts_from: tuple[Tensor, ...] = ()


@torch.no_grad()
def check_lens_projection(model: Any, structure: ModelStructure, hooks: ModelHooks) -> CheckedLens:
    """The cheaper of two lenses that agrees with the model; else what is wrong with them."""
    if structure.repeats:
        reason = "its blocks run several times for each token, so no layer is one place"
        return CheckedLens(None, None, reason)
    with hooks.attach():
        logits = model(input_ids=structure.dummy_ids, use_cache=False).logits[0, -1:]
        hidden = hooks.take_hidden_states()
    checks = []
    for run_trunk in (False, True):
        lens = LogitLens(structure, run_trunk=run_trunk)
        checks.append(lens.check(hidden[-1][None], logits))
        if checks[-1].reason is None:
            return CheckedLens(lens, checks[-1].error, None, () if run_trunk else hidden[:-1])
    # One that ran and gave another answer says more than one that could not run.
    told = next((check for check in checks if check.error is not None), checks[0])
    return CheckedLens(None, told.error, told.reason)


@dataclass(frozen=True)
class CheckedAttention:
    """The way to the weights, the layers it covers, its error, and what to say of it.

    ``full_rows``: each head's weights add up to 1, there is no learned sink.
    """

    tap: AttentionTap | None
    layers: tuple[int, ...]
    error: float | None
    provenance: str
    full_rows: bool = True


def _no_attention(why: str, error: float | None = None) -> CheckedAttention:
    return CheckedAttention(None, (), error, f"not available: {why}")


@torch.no_grad()
def check_attention_taps(model: Any, structure: ModelStructure) -> CheckedAttention:
    """The cheapest tap whose rows are the model's own eager ones, in one pass and with a cache.

    Layers that answer with something else, as linear attention does with its
    state, are left out.
    """
    ids = structure.dummy_ids
    if _adds_tokens(model, ids):
        return _no_attention("it adds a token of its own to the sequence at every step")
    answers = _eager_rows(model, ids)
    reference = {place: row for place, row in enumerate(answers) if row is not None}
    if not reference:
        return _no_attention("this model gives no attention weights")
    if any(row.shape[1] != ids.shape[1] for row in reference.values()):
        return _no_attention("its keys are not token positions")
    own = list(reference.values())
    full = all(bool(((row.sum(-1) - 1).abs() < FULL_ROW).all()) for row in own)
    watching = _watching_tap(model, structure)
    with watching.attach():
        model(input_ids=ids, use_cache=False)
        watching.settle(ids.shape[1])
        rows = attention_rows(watching.take(None))
    error = _largest_difference(rows, own)
    long = checkable(model, structure.blocks, structure.dummy_ids.device.type)
    if _agrees(model, error):
        error = max(error, _difference_with_cache(model, watching, tuple(reference), ids))
        error = max(error, _difference_in_long(model, watching, tuple(reference), long.length))
        if _agrees(model, error):
            provenance = PROVENANCE
            if long.left_out is not None:
                provenance += f", not checked beyond {long.left_out:,} tokens"
            return CheckedAttention(watching, tuple(rows), error, provenance, full)
    if len(rows) == len(own):
        layers = dict(zip(reference, rows, strict=True))
    elif len(answers) == structure.layers:
        layers = {place: place + 1 for place in reference}
    else:
        return _no_attention("which layers its attention is of cannot be told")
    found = _asked_attention(model, layers, ids, own)
    return replace(found, full_rows=full)


def _difference_in_long(
    model: Any, watching: AttentionTap, places: tuple[int, ...], length: int | None
) -> float:
    """Between a tap and the model's eager answers on a text beyond the special lengths.

    The answers are those to the last token by itself: to ask for all of a long text
    would take memory for all its weights.
    """
    if length is None:
        return 0.0
    ids = dummy_token_ids(model, length)
    asked = OutputAttentionsTap(model, {place: place for place in places}, has_cache=True)
    try:
        own = _last_by_itself(model, asked, ids)
        cached = _last_by_itself(model, watching, ids)
        with watching.attach(), watching.forward_arguments() as arguments:
            rows = attention_rows(watching.take(model(input_ids=ids, use_cache=False, **arguments)))
    except Exception:  # it needs more than ids for it, as with a short text
        return 0.0
    if own is None or cached is None:
        return 0.0
    reference = list(own.values())
    if len(rows) != len(reference):
        return float("inf")
    return max(_beyond_the_cache(rows, reference), _largest_difference(cached, reference))


def _beyond_the_cache(rows: Rows, reference: list[Tensor]) -> float:
    """``_largest_difference`` where ``rows`` begin before the keys that a cache has kept.

    What they give to those keys has to be nothing.
    """
    kept = [(row, own.shape[1]) for row, own in zip(rows.values(), reference, strict=True)]
    before = max(float(row[:, :-keys].abs().sum(-1).max()) for row, keys in kept)
    return max(before, _largest_difference(dict(enumerate(r[:, -k:] for r, k in kept)), reference))


@torch.no_grad()
def cache_difference(model: Any, structure: ModelStructure) -> float | None:
    """The largest |Δlogprob| between one pass over a text and its last token upon a cache.

    It is the model's own doing, and is what a reply's numbers differ by from those of
    teacher forcing. None where there is no cache, or where it takes more than ids.
    """
    lengths = {
        structure.dummy_ids.shape[1],
        checkable(model, structure.blocks, structure.dummy_ids.device.type).length or 0,
    } - {0}
    found = []
    for length in lengths:
        ids = dummy_token_ids(model, length)
        try:
            whole = model(input_ids=ids, use_cache=False).logits[:, -1]
            named = cache_in(model(input_ids=ids[:, :-1], use_cache=True))
            if named is None:
                return None
            name, cache = named
            last = model(input_ids=ids[:, -1:], **{name: cache}, use_cache=True).logits[:, -1]
        except Exception:  # whatever a model's own code raises, the turn goes on
            return None
        apart = (log_probs(whole) - log_probs(last)).abs()
        found.append(float(apart[apart.isfinite()].max()) if apart.isfinite().any() else 0.0)
    return max(found)


def _agrees(model: Any, error: float) -> bool:
    return error <= ATTENTION_TOLERANCE.get(computing_dtype(model), ATTENTION_TOLERANCE_16_BIT)


def _asked_attention(
    model: Any, layers: dict[int, int], ids: Tensor, own: list[Tensor]
) -> CheckedAttention:
    """The last resort, checked in the way it will be used: the last token by itself."""
    try:
        tap = OutputAttentionsTap(model, layers, has_cache=True)
        found = _last_by_itself(model, tap, ids)
        if found is None:
            tap = OutputAttentionsTap(model, layers, has_cache=False)
            with tap.forward_arguments() as arguments:
                found = attention_rows(tap.take(model(input_ids=ids, **arguments)))
        error = _largest_difference(found, own)
    except Exception as failure:  # whatever a model's own code raises, the turn goes on
        return _no_attention(f"asking for it fails ({type(failure).__name__}: {failure})")
    if error == float("inf"):
        return _no_attention("with a cache its keys are not those of one pass")
    if not _agrees(model, error):
        return _no_attention(f"with a cache it differs from one pass by {error:.2g}", error)
    return CheckedAttention(tap, tuple(layers.values()), error, PROVENANCE)


def _difference_with_cache(
    model: Any, watching: AttentionTap, places: tuple[int, ...], ids: Tensor
) -> float:
    """Between a tap and the model's own eager answers when the last token comes by itself.

    0 for a model that has no cache, or that needs more than ids for it: decoding
    goes through generate()'s own preparation, which gives it that.
    """
    asked = OutputAttentionsTap(model, {place: place for place in places}, has_cache=True)
    try:
        rows, own = (_last_by_itself(model, tap, ids) for tap in (watching, asked))
    except Exception:
        return 0.0
    if rows is None or own is None:
        return 0.0
    if any(row.shape[1] > ids.shape[1] for row in rows.values()):
        return float("inf")
    return _largest_difference(rows, list(own.values()))


def _last_by_itself(model: Any, tap: AttentionTap, ids: Tensor) -> Rows | None:
    """The rows of ``tap`` when all tokens but the last are in the cache; None without a cache."""
    outputs = model(input_ids=ids[:, :-1], use_cache=True)
    named = cache_in(outputs)
    if named is None:
        return None
    name, cache = named
    preallocate(cache, 1)
    with tap.attach(), tap.forward_arguments() as arguments:
        outputs = model(input_ids=ids[:, -1:], **{name: cache}, **arguments)
        return attention_rows(tap.take(outputs))


def _adds_tokens(model: Any, ids: Tensor) -> bool:
    """Whether decoding runs the model on more tokens than there are: a mask to be filled in."""
    try:
        inputs = model.prepare_inputs_for_generation(ids, attention_mask=torch.ones_like(ids))
    except Exception:  # it may want more than this; whether it can decode shows when it does
        return False
    given = inputs.get("input_ids")
    return given is not None and given.shape[1] > ids.shape[1]


def _watching_tap(model: Any, structure: ModelStructure) -> KernelTap | HookedTap:
    implementation = str(model.config.get_text_config(decoder=True)._attn_implementation)
    if implementation in ALL_ATTENTION_FUNCTIONS:
        return KernelTap(structure.layer_of(), implementation)
    return HookedTap(structure.layer_of())


def _eager_rows(model: Any, dummy_ids: Tensor) -> list[Tensor | None]:
    """The model's own eager weights of the last position, (heads, keys) an answering layer."""
    try:
        with eager(model):
            outputs = model(input_ids=dummy_ids, use_cache=False, output_attentions=True)
            return last_rows(outputs, dummy_ids.shape[1])
    except (ValueError, TypeError, AttributeError):
        return []


def _largest_difference(rows: Rows, reference: list[Tensor]) -> float:
    """Between all heads of all layers; infinite when they are not the same heads and keys.

    A row may be shorter than the model's own where a cache has dropped keys
    that a window hides.
    """
    heads = [head for row in rows.values() for head in row]
    own_heads = [head for row in reference for head in row]
    if len(heads) != len(own_heads):
        return float("inf")
    worst = 0.0
    for head, own in zip(heads, own_heads, strict=True):
        dropped = len(own) - len(head)
        if dropped < 0:
            return float("inf")
        apart = own.to(head.device, copy=True)
        apart[dropped:] -= head
        worst = max(worst, float(apart.abs().max()))
    return worst
