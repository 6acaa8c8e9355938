"""Compares the numbers of a reply with its model while the reply is decoded.

The checks at load cover the model as it was loaded, on a short text. Here the lens
at the last layer is compared with the logits that a token was chosen from, at the
first step, at each power of two, and at the last one; and each head's weights are
summed. Numbers that disagree are not stored from then on, the reply says so, and the
model is checked again before its next reply.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oki_trace.llm.capture.attention import AttentionRows
from oki_trace.llm.capture.lens import DRAFT_TOLERANCE, LogitLens
from oki_trace.records import ReplyChecks

# The largest difference from 1 that rounding makes in the sum of a row of weights.
_SUM_TOLERANCE = {torch.float32: 1e-3}
_SUM_TOLERANCE_16_BIT = 5e-2
# Steps at which the exact lens is computed as well as its draft.
_DRAFT_CHECK_STEPS = (0, 4)


class ReplyChecker:
    """Collects the checks of one reply. One thread checks the lens, another everything else."""

    def __init__(self, dtype: torch.dtype, *, full_rows: bool) -> None:
        """``full_rows``: the weights of each head sum to 1, else to at most 1."""
        self._sum_tolerance = _SUM_TOLERANCE.get(dtype, _SUM_TOLERANCE_16_BIT)
        self._full_rows = full_rows
        self._steps: set[int] = set()
        self._lens_error: float | None = None
        self._draft_error: float | None = None
        self._attention_error: float | None = None
        self._lens_fault: str | None = None
        self._attention_fault: str | None = None
        self._notes: list[str] = []

    @property
    def lens_holds(self) -> bool:
        """Whether no check of the lens has failed."""
        return self._lens_fault is None

    @property
    def attention_holds(self) -> bool:
        """Whether no check of the attention has failed."""
        return self._attention_fault is None

    @property
    def draft_holds(self) -> bool:
        """Whether no check of the lens's draft has failed."""
        return self._draft_error is None or self._draft_error <= DRAFT_TOLERANCE

    def is_due(self, step_index: int, *, last: bool) -> bool:
        """Whether a step is checked: the first, each power of two, the last."""
        return last or step_index & (step_index - 1) == 0

    def compares_draft(self, step_index: int) -> bool:
        """Whether the draft of a step is compared with the exact lens."""
        return step_index in _DRAFT_CHECK_STEPS

    def note(self, sentence: str) -> None:
        """Record which optimisation was given up to stay exact."""
        self._notes.append(sentence)

    def check_lens(
        self, step_index: int, lens: LogitLens, last_hidden: Tensor, logits: Tensor
    ) -> None:
        """Compare the lens at the last layer, (width,), with the step's logits (vocab,)."""
        self._steps.add(step_index)
        check = lens.check(last_hidden[None], logits[None])
        if check.error is not None:
            self._lens_error = max(self._lens_error or 0.0, check.error)
        if check.reason is not None and self.lens_holds:
            self._lens_fault = f"the lens of step {step_index} is not kept: {check.reason}"

    def check_draft(self, step_index: int, draft: Tensor, exact: Tensor) -> None:
        """Compare drafted logits (layers, vocab) with those of the exact lens."""
        error = float((draft.softmax(-1) - exact.softmax(-1)).abs().max())
        self._draft_error = max(self._draft_error or 0.0, error)
        if not error <= DRAFT_TOLERANCE:
            self.note(
                f"from step {step_index} on the lens was computed in float32 throughout, as its "
                f"draft was off by {error:.2g} in probability"
            )

    def check_attention(self, step_index: int, rows: AttentionRows) -> None:
        """Sum each head's weights."""
        self._steps.add(step_index)
        for layer, row in rows.items():
            excess = row.sum(-1, dtype=torch.float32) - 1
            error = float((excess.abs() if self._full_rows else excess.clamp_min(0)).max())
            if not error <= self._sum_tolerance and self.attention_holds:
                self._attention_fault = (
                    f"the attention of step {step_index} is not kept: the weights of a head of "
                    f"layer {layer} add up to {float(excess.abs().max()) + 1:.4g}"
                )
            self._attention_error = max(self._attention_error or 0.0, error)

    def report(self) -> ReplyChecks:
        """The results so far."""
        faults = [fault for fault in (self._lens_fault, self._attention_fault) if fault]
        return ReplyChecks(
            steps=tuple(sorted(self._steps)),
            lens=self._lens_error,
            draft=self._draft_error,
            attention=self._attention_error,
            fault="; ".join(faults) or None,
            notes=tuple(self._notes),
        )
