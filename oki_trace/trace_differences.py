"""Compares two traces of the same tokens, step by step.

A number that was not recorded is not compared: an imported trace may know a token by its
text alone, and no logits. NaN on one side alone is a difference.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oki_trace.records import IntArray, Lens, Step

# The difference in a lens's probability that goes with one nat of difference in logits.
_PROB_PER_NAT = 0.5


class Differences:
    """The largest differences so far, of logprobs and entropies in nats, of the lens in probs.

    ``complete``: every number was recorded, so none may be NaN. Infinity may be NaN: an
    export cannot express it.
    """

    def __init__(self, *, complete: bool = True) -> None:
        self._complete = complete
        self.logprob = self.entropy = self.lens = 0.0
        self.other_tops = self.not_numbers = self.other_texts = 0

    def explained(self, nats: float) -> bool:
        """Whether rounding of a logprob by up to ``nats`` explains all differences."""
        return (
            not self.not_numbers
            and max(self.logprob, self.entropy) <= nats
            and self.lens <= nats * _PROB_PER_NAT
        )

    def add(self, recorded: Step, again: Step) -> None:
        """Compare a step, without its lens."""
        self.other_texts += (recorded.token, recorded.token_bytes) != (
            again.token,
            again.token_bytes,
        )
        old, new = recorded.topk, again.topk
        if len(old.token_ids) and len(new.token_ids):
            self.other_tops += int(old.token_ids[0] != new.token_ids[0])
        old_logprobs = old.logits.astype(np.float64) - (recorded.logit - recorded.logprob)
        new_logprobs = new.logits.astype(np.float64) - (again.logit - again.logprob)
        self.logprob = max(
            self.logprob,
            self._difference(recorded.logprob, again.logprob),
            self._largest(old.token_ids, old_logprobs, new.token_ids, new_logprobs),
        )
        self.entropy = max(self.entropy, self._difference(recorded.entropy, again.entropy))

    def add_lens(self, recorded: Step, again: Lens) -> None:
        """Compare the lens of a step, if it was recorded."""
        old = recorded.lens
        if old is None:
            return
        if old.entropy.shape != again.entropy.shape:
            self.lens = math.inf
            return
        for layer in range(len(old.entropy)):
            self.lens = max(
                self.lens,
                self._difference(float(old.chosen_prob[layer]), float(again.chosen_prob[layer])),
                self._largest(
                    *(old.token_ids[layer], old.probs[layer]),
                    *(again.token_ids[layer], again.probs[layer]),
                ),
            )
            entropy = self._difference(float(old.entropy[layer]), float(again.entropy[layer]))
            self.entropy = max(self.entropy, entropy)

    def _largest(
        self,
        old_ids: IntArray,
        old: NDArray[np.floating[Any]],
        new_ids: IntArray,
        new: NDArray[np.floating[Any]],
    ) -> float:
        """The largest difference over the tokens of the recorded list; -1 is no token."""
        by_id = {int(token): float(value) for token, value in zip(new_ids, new, strict=True)}
        least = min(by_id.values(), default=math.inf)
        largest = 0.0
        for token, value in zip(old_ids.tolist(), old.tolist(), strict=True):
            if token >= 0:
                # A token below the new list's end is at most as likely as its last entry.
                other = by_id.get(token, min(least, value))
                largest = max(largest, self._difference(value, other))
        return largest

    def _difference(self, old: float, new: float) -> float:
        if old == new or (math.isnan(old) and not (self._complete and math.isfinite(new))):
            return 0.0
        if math.isnan(old):
            self.not_numbers += 1
            return 0.0
        return math.inf if math.isnan(new) else abs(old - new)
