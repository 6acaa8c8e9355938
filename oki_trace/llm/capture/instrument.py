"""A model with its probes attached and checked against the model itself.

Checked once, and again whenever the model was changed, on short forward passes:
the lens at the last layer against the model's own logits, all of them; the
captured attention against the model's eager attention. What does not agree is not
shown, and the report says why. The errors found travel with every reply, which
checks its own numbers besides (``reply_checks.py``).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from oki_trace.errors import CaptureError
from oki_trace.llm.capture.checks import (
    cache_difference,
    check_attention_taps,
    check_lens_projection,
)
from oki_trace.llm.capture.fingerprint import Fingerprint, fingerprint, tokenizer_fingerprint
from oki_trace.llm.capture.hooks import ModelHooks
from oki_trace.llm.capture.lens import LensProjection, LogitLens
from oki_trace.llm.capture.model_structure import ModelStructure, find_structure
from oki_trace.llm.capture.reply_checks import ReplyChecker
from oki_trace.llm.capture.speedups import DRAFT_LENS, Speedups, are_off, speedups
from oki_trace.llm.capture.vocabulary import Vocabulary
from oki_trace.llm.decoding.model_lock import lock_model, unwrap_compiled
from oki_trace.llm.loading.hardware import computing_dtype, input_device
from oki_trace.llm.loading.model_classes import TEXT_ONLY, is_mistral_common, takes_more_than_text
from oki_trace.records import CapturePolicy, CaptureReport


@dataclass(frozen=True)
class Instrument:
    """What is needed to trace one model; made by ``instrument()``."""

    model: Any
    tokenizer: Any
    vocabulary: Vocabulary
    structure: ModelStructure
    hooks: ModelHooks
    lens: LogitLens | None
    lens_check: float | None
    lens_reason: str | None
    fast: Speedups
    attention_layers: tuple[int, ...]
    attention_check: float | None
    full_rows: bool
    provenance: str
    cache_check: float | None

    @property
    def moves_weights(self) -> bool:
        """Whether weights are moved to where they are needed, call by call (accelerate's hooks)."""
        return any(hasattr(module, "_hf_hook") for module in self.model.modules())

    def draft_for(self, policy: CapturePolicy) -> LensProjection | None:
        """The draft of the lens for one reply, where it may be less than exact."""
        draft = self.fast.draft_lens
        if draft is None or self._no_draft(policy) is not None:
            return None
        return draft.projection()

    def checker(self) -> ReplyChecker:
        """What checks the numbers of one reply."""
        checker = ReplyChecker(computing_dtype(self.model), full_rows=self.full_rows)
        if takes_more_than_text(self.model.config):
            checker.note(f"traced {TEXT_ONLY}")
        return checker

    def _no_draft(self, policy: CapturePolicy) -> str | None:
        """Why the lens of a reply under ``policy`` is not drafted."""
        if self.fast.draft_lens is None:
            return self.fast.off[DRAFT_LENS]
        if policy.tensors == "exact":
            return "exact tensors were asked for"
        most = self.fast.draft_lens.max_top_k
        if policy.topk_lens > most:
            return f"more than {most} tokens per layer were asked for"
        return None

    def report(self, policy: CapturePolicy) -> CaptureReport:
        """What a reply traced under ``policy`` will hold."""
        no_draft, draft = self._no_draft(policy), self.fast.draft_lens
        parameter = self.model.get_input_embeddings().weight
        return CaptureReport(
            policy=policy,
            layers=self.structure.layers,
            width=int(parameter.shape[-1]),
            dtype=str(computing_dtype(self.model)).removeprefix("torch."),
            device=str(input_device(self.model)),
            quantization=_quantization(self.model),
            evidence_provenance=self.provenance,
            attention_layers=self.attention_layers,
            attention_check=self.attention_check,
            logit_lens_available=self.lens is not None,
            lens_reason=self.lens_reason,
            lens_check=self.lens_check,
            lens_draft=draft.error if draft and no_draft is None else None,
            cache_check=self.cache_check,
            speedups={**self.fast.off, DRAFT_LENS: no_draft},
            versions=f"transformers {version('transformers')}, torch {version('torch')}",
        )


@dataclass(frozen=True)
class _Checked:
    """What was found of a model as it was: all of an instrument that outlives a reply."""

    fingerprint: Fingerprint
    parts: dict[str, Any]
    vocabulary: Vocabulary
    of_tokenizer: tuple[Any, ...]

    def is_stale(self, model: Any) -> bool:
        """Whether the model was changed, or fast paths were switched on or off."""
        fast: Speedups = self.parts["fast"]
        return fast.are_off != are_off() or self.fingerprint != fingerprint(model)


# Beside the models, not on them: they can be copied, pickled and collected as before.
_checked: weakref.WeakKeyDictionary[Any, _Checked] = weakref.WeakKeyDictionary()


def instrument(model: Any, tokenizer: Any) -> Instrument:
    """Find the model's parts, attach to them, and check what they give.

    The first call for a model runs a few short forward passes; later calls do so
    only when the model or its tokenizer was changed (``fingerprint.py``). Waits
    while another thread traces the model. Raises CaptureError for a model that
    cannot be traced.
    """
    model = unwrap_compiled(model)
    _refuse_prompt_tuning(model)
    _refuse_mistral_common(tokenizer)
    with lock_model(model):
        found = _checked.get(model)
        of_tokenizer = tokenizer_fingerprint(tokenizer)
        if found is None or found.is_stale(model):
            _checked.pop(model, None)
            parts = _parts(model)
            # After the checks, which may have let the model set itself up.
            seen = fingerprint(model)
            found = _Checked(seen, parts, Vocabulary(tokenizer), of_tokenizer)
        elif found.of_tokenizer != of_tokenizer:
            found = replace(found, vocabulary=Vocabulary(tokenizer), of_tokenizer=of_tokenizer)
        _checked[model] = found
    return Instrument(model=model, tokenizer=tokenizer, vocabulary=found.vocabulary, **found.parts)


def forget(model: Any) -> None:
    """Check the model anew before its next reply: its numbers were not what they should be."""
    _checked.pop(unwrap_compiled(model), None)


def _parts(model: Any) -> dict[str, Any]:
    structure = find_structure(model)
    attention = check_attention_taps(model, structure)
    hooks = ModelHooks(structure, attention.tap)
    lens = check_lens_projection(model, structure, hooks)
    drafted = lens.lens if lens.drafts_from else None
    return {
        "structure": structure,
        "hooks": hooks,
        "lens": lens.lens,
        "lens_check": lens.error,
        "lens_reason": lens.reason,
        "fast": speedups(model, structure, hooks, drafted, lens.drafts_from),
        "attention_layers": attention.layers,
        "attention_check": attention.error,
        "full_rows": attention.full_rows,
        "provenance": attention.provenance,
        "cache_check": cache_difference(model, structure),
    }


def _refuse_prompt_tuning(model: Any) -> None:
    adapter = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise CaptureError(
            "The model has a prompt-tuning or prefix-tuning adapter, whose virtual tokens have "
            "no text to show. Trace its base model, or one with a LoRA adapter."
        )


def _refuse_mistral_common(tokenizer: Any) -> None:
    if is_mistral_common(tokenizer):
        raise CaptureError(
            "The tokenizer is mistral-common's, which tells no token's own text. Load it with "
            "AutoTokenizer.from_pretrained(..., mistral_format=False)."
        )


def _quantization(model: Any) -> str | None:
    if getattr(model, "is_loaded_in_4bit", False):
        return "4-bit"
    if getattr(model, "is_loaded_in_8bit", False):
        return "8-bit"
    method = getattr(model, "quantization_method", None)
    return None if method is None else str(getattr(method, "value", method))
