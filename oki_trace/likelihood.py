"""The likelihood of a text, from the steps of its tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from oki_trace.records import Step, StepSummary


@dataclass(frozen=True, slots=True)
class Score:
    """A text's likelihood: ``tokens`` that were scored, their ``bytes``, the sum of their logprobs.

    ``logprob`` is in nats.
    """

    tokens: int
    bytes: int
    logprob: float

    @property
    def perplexity(self) -> float:
        """Exp of the mean surprisal of a token; NaN without a token."""
        if not self.tokens:
            return math.nan
        try:
            return math.exp(-self.logprob / self.tokens)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """The surprisal of the text in bits, by its bytes; comparable across tokenizers."""
        return -self.logprob / math.log(2) / self.bytes if self.bytes else math.nan


def score_of(steps: Iterable[Step | StepSummary]) -> Score:
    """The score of these tokens. A special token, which is no text, has no bytes."""
    tokens = size = 0
    logprob = 0.0
    for step in steps:
        tokens += 1
        size += 0 if step.is_special else len(step.token_bytes)
        logprob += step.logprob
    return Score(tokens, size, logprob)
