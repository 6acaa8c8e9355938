"""An instrumented model: its structure, hooks, lens and attention tap, checked against itself.

A model is checked once, and again whenever it was changed, on short forward passes:
the lens at the last layer against all of the model's own logits; the captured attention
against the model's eager attention. A part that does not agree is not shown, and the
report says why. The measured errors are stored with every reply, which also checks its
own numbers (``reply_checks.py``).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from oki_trace.errors import CaptureError
from oki_trace.llm.capture.checks import (
    SelectedAttention,
    SelectedLens,
    cache_difference,
    select_attention,
    select_lens,
)
from oki_trace.llm.capture.fingerprint import Fingerprint, fingerprint, tokenizer_fingerprint
from oki_trace.llm.capture.hooks import ModelHooks
from oki_trace.llm.capture.lens import LensProjection
from oki_trace.llm.capture.model_structure import ModelStructure, find_structure
from oki_trace.llm.capture.reply_checks import ReplyChecker
from oki_trace.llm.capture.speedups import DRAFT_LENS, Speedups, are_off, speedups
from oki_trace.llm.capture.vocabulary import Vocabulary
from oki_trace.llm.decoding.model_lock import lock_model
from oki_trace.llm.lenses.reading import LensReader, lens_readers
from oki_trace.llm.loading.hardware import computing_dtype, input_device
from oki_trace.llm.loading.model_classes import TEXT_ONLY, is_mistral_common, takes_more_than_text
from oki_trace.llm.torch_internals import uncompiled
from oki_trace.records import CapturePolicy, CaptureReport


@dataclass(frozen=True)
class CheckedModel:
    """The parts of one model and the results of their checks; it does not keep the model alive."""

    structure: ModelStructure
    hooks: ModelHooks
    lens: SelectedLens
    attention: SelectedAttention
    fast: Speedups
    cache_check: float | None


@dataclass(frozen=True)
class Instrument(CheckedModel):
    """Everything needed to trace one model; made by ``instrument()``."""

    model: Any
    tokenizer: Any
    vocabulary: Vocabulary

    def draft_for(
        self, policy: CapturePolicy, made: LensProjection | None = None
    ) -> LensProjection | None:
        """The draft of the lens for one reply; None where the reply needs an exact lens.

        ``made``: the draft of this reply's prompt, which serves the reply too.
        """
        draft = self.fast.draft_lens
        if draft is None or self._no_draft(policy):
            return None
        return made or draft.projection()

    def readers_for(self, policy: CapturePolicy, layers: Sequence[int]) -> tuple[LensReader, ...]:
        """The readers of the installed lenses of a reply, for the ``layers`` below the last one.

        Raises CaptureError, UsageError.
        """
        if not policy.lenses:
            return ()
        if self.lens.projection is None:
            raise CaptureError(
                f"No lens can read this model: {self.lens.reason}. Leave out the lenses."
            )
        shape = self.structure.layers, self.structure.streams
        return lens_readers(policy.lenses, self.model, *shape, layers)

    def checker(self) -> ReplyChecker:
        """The checker of the numbers of one reply."""
        checker = ReplyChecker(computing_dtype(self.model), full_rows=self.attention.full_rows)
        if takes_more_than_text(self.model.config):
            checker.note(f"traced {TEXT_ONLY}")
        return checker

    def _no_draft(self, policy: CapturePolicy) -> str | None:
        """Why the lens of a reply under ``policy`` is not drafted; None where it is."""
        draft = self.fast.draft_lens
        if draft is None:
            return self.fast.off[DRAFT_LENS]
        if policy.tensors == "exact":
            return "exact tensors were requested"
        if policy.topk_lens > draft.max_top_k:
            return f"more than {draft.max_top_k} tokens per layer were requested"
        return None

    def report(self, policy: CapturePolicy) -> CaptureReport:
        """The contents of a reply that is traced under ``policy``."""
        no_draft, draft = self._no_draft(policy), self.fast.draft_lens
        return CaptureReport(
            policy=policy,
            layers=self.structure.layers,
            width=int(self.model.get_input_embeddings().weight.shape[-1]),
            dtype=str(computing_dtype(self.model)).removeprefix("torch."),
            device=str(input_device(self.model)),
            quantization=_quantization(self.model),
            evidence_provenance=self.attention.provenance,
            attention_layers=self.attention.layers,
            attention_check=self.attention.error,
            logit_lens_available=self.lens.projection is not None,
            lens_reason=self.lens.reason,
            lens_check=self.lens.error,
            lens_draft=draft.error if draft and no_draft is None else None,
            cache_check=self.cache_check,
            speedups={**self.fast.off, DRAFT_LENS: no_draft},
            versions=f"transformers {version('transformers')}, torch {version('torch')}",
        )


@dataclass(frozen=True)
class _CacheEntry:
    """A checked model, and the fingerprints for which the checks hold."""

    checked: CheckedModel
    model_fingerprint: Fingerprint
    vocabulary: Vocabulary
    tokenizer_fingerprint: tuple[Any, ...]

    def is_stale(self, model: Any) -> bool:
        """Whether the model was changed, or fast paths were switched on or off."""
        fast = self.checked.fast
        return fast.are_off != are_off() or self.model_fingerprint != fingerprint(model)


# Not an attribute of the models: they can be copied, pickled and collected as before.
_cache: weakref.WeakKeyDictionary[Any, _CacheEntry] = weakref.WeakKeyDictionary()


def instrument(model: Any, tokenizer: Any) -> Instrument:
    """Find the model's parts, hook them, and check their numbers.

    The first call for a model runs a few short forward passes; later calls do so
    only when the model or its tokenizer was changed (``fingerprint.py``). Waits
    while another thread traces the model. Raises CaptureError for a model that
    cannot be traced.
    """
    model = uncompiled(model)
    _require_traceable(model, tokenizer)
    with lock_model(model):
        entry = _cache.get(model)
        of_tokenizer = tokenizer_fingerprint(tokenizer)
        if entry is None or entry.is_stale(model):
            _cache.pop(model, None)
            checked = _check(model)
            # After the checks, in which the model may have initialised itself.
            of_model = fingerprint(model)
            entry = _CacheEntry(checked, of_model, Vocabulary(tokenizer), of_tokenizer)
        elif entry.tokenizer_fingerprint != of_tokenizer:
            entry = replace(
                entry, vocabulary=Vocabulary(tokenizer), tokenizer_fingerprint=of_tokenizer
            )
        _cache[model] = entry
    return Instrument(
        **vars(entry.checked), model=model, tokenizer=tokenizer, vocabulary=entry.vocabulary
    )


def forget(model: Any) -> None:
    """Check the model again before its next reply, as a reply's own checks failed."""
    _cache.pop(uncompiled(model), None)


def _check(model: Any) -> CheckedModel:
    structure = find_structure(model)
    attention = select_attention(model, structure)
    hooks = ModelHooks(structure, attention.tap)
    lens = select_lens(model, structure, hooks)
    drafted = lens.projection if lens.draft_inputs else None
    fast = speedups(model, structure, hooks, drafted, lens.draft_inputs)
    lens = replace(lens, draft_inputs=())
    return CheckedModel(structure, hooks, lens, attention, fast, cache_difference(model, structure))


def _require_traceable(model: Any, tokenizer: Any) -> None:
    adapter = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise CaptureError(
            "The model has a prompt-tuning or prefix-tuning adapter, whose virtual tokens have "
            "no text to show. Trace its base model, or one with a LoRA adapter."
        )
    if is_mistral_common(tokenizer):
        raise CaptureError(
            "The tokenizer is mistral-common's, which does not give the text of a single token. "
            "Load it with AutoTokenizer.from_pretrained(..., mistral_format=False)."
        )


def _quantization(model: Any) -> str | None:
    if getattr(model, "is_loaded_in_4bit", False):
        return "4-bit"
    if getattr(model, "is_loaded_in_8bit", False):
        return "8-bit"
    method = getattr(model, "quantization_method", None)
    return None if method is None else str(getattr(method, "value", method))
