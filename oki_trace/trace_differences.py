"""How far two traces of the same tokens are apart, a step at a time.

What was not recorded is not held against a trace: an imported one may know a token
by its text alone, and no logits. A number where the model gives one and the trace
says NaN is a difference, the largest there is.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oki_trace.records import IntArray, Lens, Step

# What a lens may be off in probability for each nat that the logits may be off.
_PROB_PER_NAT = 0.5


class Differences:
    """The largest differences so far. ``recorded`` comes first in each pair.

    ``complete``: whether every number was recorded, so that none may be NaN. An
    infinity may: an export cannot say it.
    """

    def __init__(self, *, complete: bool = True) -> None:
        self._complete = complete
        self.logprob = self.entropy = self.lens = 0.0
        self.other_tops = self.not_numbers = self.other_texts = 0

    def explained(self, nats: float) -> bool:
        """Whether rounding explains all of them, which makes so many nats of a logprob."""
        return (
            not self.not_numbers
            and self.logprob <= nats
            and self.entropy <= nats
            and self.lens <= nats * _PROB_PER_NAT
        )

    def add(self, recorded: Step, again: Step) -> None:
        """A step without its lens."""
        texts = (recorded.token, recorded.token_bytes), (again.token, again.token_bytes)
        self.other_texts += texts[0] != texts[1]
        told, now = recorded.topk, again.topk
        if len(told.token_ids) and len(now.token_ids):
            self.other_tops += int(told.token_ids[0] != now.token_ids[0])
        self.logprob = max(self.logprob, self._off(recorded.logprob, again.logprob))
        self.entropy = max(self.entropy, self._off(recorded.entropy, again.entropy))
        normaliser = again.logit - again.logprob
        told_logprobs = told.logits.astype(np.float64) - (recorded.logit - recorded.logprob)
        now_logprobs = now.logits.astype(np.float64) - normaliser
        off = self._apart(told.token_ids, told_logprobs, now.token_ids, now_logprobs)
        self.logprob = max(self.logprob, off)

    def add_lens(self, recorded: Step, again: Step, lens: Lens) -> None:
        """The lens of a step, where it was recorded. ``again`` is the step of ``lens``."""
        before = recorded.lens
        if before is None:
            return
        if before.entropy.shape != lens.entropy.shape:
            self.lens = math.inf
            return
        for layer in range(len(lens.entropy)):
            here = (before.chosen_prob, lens.chosen_prob)
            off = self._off(float(here[0][layer]), float(here[1][layer]))
            entries = self._apart(
                before.token_ids[layer],
                before.probs[layer],
                lens.token_ids[layer],
                lens.probs[layer],
            )
            self.lens = max(self.lens, off, entries)
            entropy = self._off(float(before.entropy[layer]), float(lens.entropy[layer]))
            self.entropy = max(self.entropy, entropy)

    def _apart(
        self,
        told_ids: IntArray,
        told: NDArray[np.floating[Any]],
        now_ids: IntArray,
        now: NDArray[np.floating[Any]],
    ) -> float:
        """Over the tokens that both lists have: the others are near the end of either."""
        known = {int(token): float(value) for token, value in zip(now_ids, now, strict=True)}
        least = min(known.values(), default=math.inf)
        off = 0.0
        for token, value in zip(told_ids.tolist(), told.tolist(), strict=True):
            if token < 0:
                continue
            # One that is not in the list now is at most as likely as its last.
            other = known.get(token, min(least, value))
            off = max(off, self._off(value, other))
        return off

    def _off(self, told: float, now: float) -> float:
        if told == now or (math.isnan(told) and not (self._complete and math.isfinite(now))):
            return 0.0
        if math.isnan(told):
            self.not_numbers += 1
            return 0.0
        return math.inf if math.isnan(now) else abs(told - now)
