"""A model with its probes attached and checked against the model itself.

Checked once per load, on a short forward pass: the lens at the last layer
against the model's own logits, all of them; the captured attention against the
model's eager attention. What does not agree is not shown, and the report says
why. The errors found travel with every reply.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from oki_trace.llm.anatomy import Anatomy, dissect, input_device
from oki_trace.llm.attention import AttentionTap, Rows
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


_made: weakref.WeakKeyDictionary[Any, Instrument] = weakref.WeakKeyDictionary()


def instrument(model: Any, tokenizer: Any) -> Instrument:
    """Find the model's parts, attach to them, and check what they give.

    The first call for a model runs three short forward passes; later calls
    return the same instrument.
    """
    found = _made.get(model)
    if found is not None and found.tokenizer is tokenizer:
        return found
    anatomy = dissect(model)
    tap, layers, error, provenance = _checked_attention(model, anatomy)
    probe = Probe(anatomy, tap)
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
        attention_layers=layers,
        attention_check=error,
        provenance=provenance,
    )
    _made[model] = made
    return made


@torch.no_grad()
def _checked_lens(
    model: Any, anatomy: Anatomy, probe: Probe
) -> tuple[LogitLens | None, float | None, str | None]:
    with probe.attached():
        logits = model(input_ids=anatomy.probe_ids, use_cache=False).logits[0, -1:]
        last_block = probe.take_hidden()[-1][None]
        probe.take_attention()
    lens = LogitLens(anatomy)
    check = lens.check(last_block, logits)
    return (lens if check.reason is None else None), check.error, check.reason


@torch.no_grad()
def _checked_attention(
    model: Any, anatomy: Anatomy
) -> tuple[AttentionTap | None, tuple[int, ...], float | None, str]:
    """The tap, the layers it covers, its error, and what to say of it."""
    implementation = str(model.config._attn_implementation)
    tap = AttentionTap(anatomy.layer_of(), implementation)
    with tap.attached():
        model(input_ids=anatomy.probe_ids, use_cache=False)
    rows = tap.take()
    tap.forget_idle_modules()
    reference = _eager_rows(model, anatomy.probe_ids)
    if not rows:
        why = "this model has no attention" if not reference else "its attention is not reachable"
        return None, (), None, f"not available: {why}"
    if len(reference) != len(rows):
        return None, (), None, "not available: the model gives no eager attention to check against"
    error = _largest_difference(rows, reference)
    tolerance = ATTENTION_TOLERANCE.get(model.dtype, ATTENTION_TOLERANCE_16_BIT)
    if error > tolerance:
        return None, (), error, f"not available: it differs from eager attention by {error:.2g}"
    return tap, tuple(rows), error, PROVENANCE


def _eager_rows(model: Any, probe_ids: Tensor) -> list[Tensor]:
    """The model's own eager weights of the last position, (heads, keys) a layer."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        attentions = model(input_ids=probe_ids, use_cache=False, output_attentions=True).attentions
    except (ValueError, TypeError, AttributeError):
        return []
    finally:
        model.set_attn_implementation(before)
    return [weights[0, :, -1].float() for weights in attentions or () if weights is not None]


def _largest_difference(rows: Rows, reference: list[Tensor]) -> float:
    worst = 0.0
    for row, eager in zip(rows.values(), reference, strict=True):
        if row.shape != eager.shape:
            return float("inf")
        worst = max(worst, float((row - eager.to(row.device)).abs().max()))
    return worst


def _quantization(model: Any) -> str | None:
    if getattr(model, "is_loaded_in_4bit", False):
        return "4-bit"
    if getattr(model, "is_loaded_in_8bit", False):
        return "8-bit"
    method = getattr(model, "quantization_method", None)
    return None if method is None else str(getattr(method, "value", method))
