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

from oki_trace.llm.anatomy import Anatomy, dissect, input_device
from oki_trace.llm.checks import checked_attention, checked_lens
from oki_trace.llm.graph import StepGraph
from oki_trace.llm.jit import step_graph
from oki_trace.llm.lens import LogitLens
from oki_trace.llm.probe import Probe
from oki_trace.llm.shortlist import MOST_KEPT, Draft, Shortlist
from oki_trace.llm.vocabulary import Vocabulary
from oki_trace.records import CapturePolicy, CaptureReport


@dataclass(frozen=True)
class Instrument:
    """What is needed to trace one model; made by ``instrument()``."""

    model: Any
    tokenizer: Any
    vocabulary: Vocabulary
    anatomy: Anatomy
    probe: Probe
    graph: StepGraph | None
    lens: LogitLens | None
    lens_check: float | None
    lens_reason: str | None
    shortlist: Shortlist | None
    attention_layers: tuple[int, ...]
    attention_check: float | None
    provenance: str

    @property
    def moves_weights(self) -> bool:
        """Whether weights are moved to where they are needed, call by call (accelerate's hooks)."""
        return any(hasattr(module, "_hf_hook") for module in self.model.modules())

    def lens_for(self, policy: CapturePolicy) -> LogitLens | Draft | None:
        """What makes the lens of one reply: a draft where that may be less than exact."""
        drafted = self._shortlist_for(policy)
        return self.lens if drafted is None else drafted.draft()

    def _shortlist_for(self, policy: CapturePolicy) -> Shortlist | None:
        exact = policy.tensors == "exact" or policy.topk_lens > MOST_KEPT
        return None if exact else self.shortlist

    def report(self, policy: CapturePolicy) -> CaptureReport:
        """What a reply traced under ``policy`` will hold."""
        drafted = self._shortlist_for(policy)
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
            lens_draft=None if drafted is None else drafted.error,
            versions=f"transformers {version('transformers')}, torch {version('torch')}",
        )


# Kept on the model itself, so that it goes when the model goes.
_KEPT = "_oki_trace_instrument"


def instrument(model: Any, tokenizer: Any) -> Instrument:
    """Find the model's parts, attach to them, and check what they give.

    The first call for a model runs a few short forward passes; later calls
    return the same instrument.
    """
    found: Instrument | None = model.__dict__.get(_KEPT)
    if found is not None and found.tokenizer is tokenizer:
        return found
    anatomy = dissect(model)
    attention = checked_attention(model, anatomy)
    probe = Probe(anatomy, attention.tap)
    lens = checked_lens(model, anatomy, probe)
    made = Instrument(
        model=model,
        tokenizer=tokenizer,
        vocabulary=Vocabulary(tokenizer),
        anatomy=anatomy,
        probe=probe,
        graph=step_graph(model, anatomy, probe),
        lens=lens.lens,
        lens_check=lens.error,
        lens_reason=lens.reason,
        shortlist=lens.shortlist,
        attention_layers=attention.layers,
        attention_check=attention.error,
        provenance=attention.provenance,
    )
    model.__dict__[_KEPT] = made
    return made


def _quantization(model: Any) -> str | None:
    if getattr(model, "is_loaded_in_4bit", False):
        return "4-bit"
    if getattr(model, "is_loaded_in_8bit", False):
        return "8-bit"
    method = getattr(model, "quantization_method", None)
    return None if method is None else str(getattr(method, "value", method))
