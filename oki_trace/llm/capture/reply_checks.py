"""A reply's own numbers, held against its model while it is decoded.

The checks at load hold for the model as it was then, on a short text. Here the lens
at the last layer is compared with the very logits that a token was chosen by, at
the first step, at each power of two, and at the last one; and each head's weights
are added up. What disagrees is no longer kept, the reply says so, and the model is
checked anew before the next.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oki_trace.llm.capture.attention import Rows
from oki_trace.llm.capture.lens import DRAFT_TOLERANCE, LensCheck, LogitLens
from oki_trace.records import ReplyChecks

# What rounding leaves of 1 in a row of float32 weights, and of 16-bit ones.
_SUM_TOLERANCE = {torch.float32: 1e-3}
_SUM_TOLERANCE_16_BIT = 5e-2
# Steps at which the whole lens is computed beside its draft.
_DRAFTED = (0, 4)


class ReplyChecker:
    """Collects the checks of one reply. The lens is checked in one thread, all else in another."""

    def __init__(self, dtype: torch.dtype, *, full_rows: bool) -> None:
        self._sum_tolerance = _SUM_TOLERANCE.get(dtype, _SUM_TOLERANCE_16_BIT)
        self._full_rows = full_rows
        self._steps: set[int] = set()
        self._lens: float | None = None
        self._draft: float | None = None
        self._attention: float | None = None
        self._lens_fault: str | None = None
        self._attention_fault: str | None = None
        self._notes: list[str] = []

    @property
    def lens_holds(self) -> bool:
        return self._lens_fault is None

    @property
    def attention_holds(self) -> bool:
        return self._attention_fault is None

    @property
    def draft_holds(self) -> bool:
        return self._draft is None or self._draft <= DRAFT_TOLERANCE

    def is_due(self, step_index: int, *, last: bool) -> bool:
        """Whether a step is checked: the first, each power of two, the last."""
        return last or step_index & (step_index - 1) == 0

    def compares_draft(self, step_index: int) -> bool:
        """Whether the draft of a step is compared with the whole lens."""
        return step_index in _DRAFTED

    def note(self, sentence: str) -> None:
        """Say what was given up to stay exact."""
        self._notes.append(sentence)

    def check_lens(
        self, step_index: int, lens: LogitLens, last_block: Tensor, logits: Tensor
    ) -> None:
        """Hold the lens at the last layer, (width,), against the step's logits (vocab,)."""
        self._steps.add(step_index)
        found: LensCheck = lens.check(last_block[None], logits[None])
        if found.error is not None:
            self._lens = max(self._lens or 0.0, found.error)
        if found.reason is not None and self.lens_holds:
            self._lens_fault = f"the lens of step {step_index} is not kept: {found.reason}"

    def check_draft(self, step_index: int, drafted: Tensor, whole: Tensor) -> None:
        """Hold drafted logits (layers, vocab) against those of the whole lens."""
        error = float((drafted.softmax(-1) - whole.softmax(-1)).abs().max())
        self._draft = max(self._draft or 0.0, error)
        if not error <= DRAFT_TOLERANCE:
            self.note(
                f"from step {step_index} on the lens was computed in float32 throughout, as its "
                f"draft was off by {error:.2g} in probability"
            )

    def check_attention(self, step_index: int, rows: Rows) -> None:
        """Add up each head's weights."""
        self._steps.add(step_index)
        for layer, row in rows.items():
            excess = row.sum(-1, dtype=torch.float32) - 1
            off = float((excess.abs() if self._full_rows else excess.clamp_min(0)).max())
            if not off <= self._sum_tolerance and self.attention_holds:
                self._attention_fault = (
                    f"the attention of step {step_index} is not kept: the weights of a head of "
                    f"layer {layer} add up to {float(excess.abs().max()) + 1:.4g}"
                )
            self._attention = max(self._attention or 0.0, off)

    def report(self) -> ReplyChecks:
        """All that was found."""
        faults = [fault for fault in (self._lens_fault, self._attention_fault) if fault]
        return ReplyChecks(
            steps=tuple(sorted(self._steps)),
            lens=self._lens,
            draft=self._draft,
            attention=self._attention,
            fault="; ".join(faults) or None,
            notes=tuple(self._notes),
        )
