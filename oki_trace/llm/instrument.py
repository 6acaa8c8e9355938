"""A model with its probes attached and checked against the model itself.

Checked once per load, on a short forward pass: the lens at the last layer
against the model's own logits, all of them; the captured attention against the
model's eager attention. What does not agree is not shown, and the report says
why. The errors found travel with every reply.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from oki_trace.llm.anatomy import Anatomy, dissect, input_device
from oki_trace.llm.attention import (
    AskingTap,
    AttentionTap,
    BesideTap,
    HookedTap,
    Rows,
    eager,
    last_rows,
)
from oki_trace.llm.lens import LogitLens
from oki_trace.llm.probe import Probe
from oki_trace.llm.vocabulary import Vocabulary
from oki_trace.records import CapturePolicy, CaptureReport

# Softmax weights in fp32 differ from eager ones by rounding alone; 16-bit
# eager weights are themselves rounded to about 4e-3.
ATTENTION_TOLERANCE = {torch.float32: 1e-4}
ATTENTION_TOLERANCE_16_BIT = 2e-2

PROVENANCE = "attention of the newest position, final layer with attention, heads averaged"


@dataclass(frozen=True)
class Instrument:
    """What is needed to trace one model; made by ``instrument()``."""

    model: Any
    tokenizer: Any
    vocabulary: Vocabulary
    anatomy: Anatomy
    probe: Probe
    lens: LogitLens | None
    lens_check: float | None
    lens_reason: str | None
    attention_layers: tuple[int, ...]
    attention_check: float | None
    provenance: str

    @property
    def moves_weights(self) -> bool:
        """Whether weights are moved to where they are needed, call by call (accelerate's hooks)."""
        return any(hasattr(module, "_hf_hook") for module in self.model.modules())

    def report(self, policy: CapturePolicy) -> CaptureReport:
        """What a reply traced under ``policy`` will hold."""
        parameter = self.model.get_input_embeddings().weight
        return CaptureReport(
            policy=policy,
            layers=self.anatomy.layers,
            width=int(parameter.shape[-1]),
            dtype=str(self.model.dtype).removeprefix("torch."),
            device=str(input_device(self.model)),
            quantization=_quantization(self.model),
            evidence_provenance=self.provenance,
            attention_layers=self.attention_layers,
            attention_check=self.attention_check,
            logit_lens_available=self.lens is not None,
            lens_reason=self.lens_reason,
            lens_check=self.lens_check,
            versions=f"transformers {version('transformers')}, torch {version('torch')}",
        )


# Kept on the model itself, so that it goes when the model goes.
_KEPT = "_oki_trace_instrument"


def instrument(model: Any, tokenizer: Any) -> Instrument:
    """Find the model's parts, attach to them, and check what they give.

    The first call for a model runs three short forward passes; later calls
    return the same instrument.
    """
    found: Instrument | None = model.__dict__.get(_KEPT)
    if found is not None and found.tokenizer is tokenizer:
        return found
    anatomy = dissect(model)
    attention = _checked_attention(model, anatomy)
    probe = Probe(anatomy, attention.tap)
    lens, lens_error, reason = _checked_lens(model, anatomy, probe)
    made = Instrument(
        model=model,
        tokenizer=tokenizer,
        vocabulary=Vocabulary(tokenizer),
        anatomy=anatomy,
        probe=probe,
        lens=lens,
        lens_check=lens_error,
        lens_reason=reason,
        attention_layers=attention.layers,
        attention_check=attention.error,
        provenance=attention.provenance,
    )
    model.__dict__[_KEPT] = made
    return made


@torch.no_grad()
def _checked_lens(
    model: Any, anatomy: Anatomy, probe: Probe
) -> tuple[LogitLens | None, float | None, str | None]:
    with probe.attached():
        logits = model(input_ids=anatomy.probe_ids, use_cache=False).logits[0, -1:]
        last_block = probe.take_hidden()[-1][None]
    lens = LogitLens(anatomy)
    check = lens.check(last_block, logits)
    return (lens if check.reason is None else None), check.error, check.reason


@dataclass(frozen=True)
class _Attention:
    """The way to the weights, the layers it covers, its error, and what to say of it."""

    tap: AttentionTap | None
    layers: tuple[int, ...]
    error: float | None
    provenance: str


@torch.no_grad()
def _checked_attention(model: Any, anatomy: Anatomy) -> _Attention:
    """The cheapest tap whose rows are the model's own eager ones."""
    watching = _watching_tap(model, anatomy)
    with watching.attached():
        rows = watching.take(model(input_ids=anatomy.probe_ids, use_cache=False))
    watching.forget_idle_modules()
    reference = _eager_rows(model, anatomy.probe_ids)
    if not reference:
        return _Attention(None, (), None, "not available: this model has no attention weights")
    length = anatomy.probe_ids.shape[1]
    if any(row.shape[1] != length for row in reference):
        return _Attention(None, (), None, "not available: its keys are not token positions")
    error = _largest_difference(rows, reference)
    if error <= ATTENTION_TOLERANCE.get(model.dtype, ATTENTION_TOLERANCE_16_BIT):
        return _Attention(watching, tuple(rows), error, PROVENANCE)
    layers = tuple(rows) if len(rows) == len(reference) else anatomy.numbers
    if len(layers) != len(reference):
        why = "which layers its attention is of cannot be told"
        return _Attention(None, (), None, f"not available: {why}")
    return _asked_attention(model, anatomy, layers, reference)


def _asked_attention(
    model: Any, anatomy: Anatomy, layers: tuple[int, ...], reference: list[Tensor]
) -> _Attention:
    """The last resort, checked in the way it will be used: the last token by itself."""
    ids = anatomy.probe_ids
    try:
        cache = getattr(model(input_ids=ids[:, :-1], use_cache=True), "past_key_values", None)
        tap = AskingTap(model, layers, has_cache=cache is not None)
        with tap.asking() as arguments:
            if cache is None:
                outputs = model(input_ids=ids, **arguments)
            else:
                outputs = model(input_ids=ids[:, -1:], past_key_values=cache, **arguments)
        error = _largest_difference(tap.take(outputs), reference)
    except Exception as failure:  # whatever a model's own code raises, the turn goes on
        why = f"asking for it fails ({type(failure).__name__}: {failure})"
        return _Attention(None, (), None, f"not available: {why}")
    if error > ATTENTION_TOLERANCE.get(model.dtype, ATTENTION_TOLERANCE_16_BIT):
        why = f"with a cache it differs from eager attention by {error:.2g}"
        return _Attention(None, (), error, f"not available: {why}")
    return _Attention(tap, layers, error, PROVENANCE)


def _watching_tap(model: Any, anatomy: Anatomy) -> BesideTap | HookedTap:
    implementation = str(model.config._attn_implementation)
    if implementation in ALL_ATTENTION_FUNCTIONS:
        return BesideTap(anatomy.layer_of(), implementation)
    return HookedTap(anatomy.layer_of())


def _eager_rows(model: Any, probe_ids: Tensor) -> list[Tensor]:
    """The model's own eager weights of the last position, (heads, keys) a layer."""
    try:
        with eager(model):
            return last_rows(model(input_ids=probe_ids, use_cache=False, output_attentions=True))
    except (ValueError, TypeError, AttributeError):
        return []


def _largest_difference(rows: Rows, reference: list[Tensor]) -> float:
    if len(rows) != len(reference):
        return float("inf")
    worst = 0.0
    for row, own in zip(rows.values(), reference, strict=True):
        if row.shape != own.shape:
            return float("inf")
        worst = max(worst, float((row - own.to(row.device)).abs().max()))
    return worst


def _quantization(model: Any) -> str | None:
    if getattr(model, "is_loaded_in_4bit", False):
        return "4-bit"
    if getattr(model, "is_loaded_in_8bit", False):
        return "8-bit"
    method = getattr(model, "quantization_method", None)
    return None if method is None else str(getattr(method, "value", method))
