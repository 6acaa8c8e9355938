"""Checks the lenses of a step: every lens ends in the model's own distribution.

The digest of a step covers its Logit Lens. A reading by an installed lens has no digest, so
its numbers are compared with each other too. An unknown number (NaN) is no disagreement.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from oki_trace.errors import UsageError
from oki_trace.records import CaptureReport, Lens, Message, Step, require_lens_name
from oki_trace.store.maintenance.tolerance import ROUNDING, is_close, is_falling

# How far rounding may take a probability above 1, or a distance below 0.
_SLACK = 1e-3


def lenses_agree(message: Message, step: Step, *, complete: bool) -> Iterator[str]:
    """Compare the lenses of a step with its other rows.

    ``complete``: no part of the reply is missing.
    """
    capture, lens = message.capture, step.lens
    if capture is None:
        return
    given_up = message.checks is not None and message.checks.fault is not None
    expected = complete and not given_up
    if lens is None:
        policy = capture.policy.for_prompt if step.step_index < 0 else capture.policy
        if capture.logit_lens_available and not policy.no_lens and expected:
            yield "its lens is missing"
    else:
        if not capture.logit_lens_available:
            yield "it has a lens, although the model has none"
        yield from _layers_agree(lens, step, capture)
        yield from _last_layer_agrees(lens, step, "its lens")
    policy = capture.policy.for_prompt if step.step_index < 0 else capture.policy
    missing = sorted(set(policy.lenses) - {reading.name for reading in step.lenses})
    if missing and expected:
        yield f"its reading by {', '.join(missing)} is missing"
    for reading in step.lenses:
        yield from _reading_agrees(reading, step, capture.layers)


def _layers_agree(lens: Lens, step: Step, capture: CaptureReport) -> Iterator[str]:
    """The Logit Lens has the layers at which the policy says that it reads."""
    policy = capture.policy if step.step_index < 0 else capture.policy.for_reply
    try:
        wanted = policy.layers_read(capture.layers)
    except UsageError as error:
        yield str(error)
        return
    numbers = lens.layer_numbers.tolist()
    if numbers != list(wanted):
        missing, more = set(wanted) - set(numbers), set(numbers) - set(wanted)
        parts = [f"lacks layer {_list(missing)}"] if missing else []
        parts += [f"has layer {_list(more)}, at which it did not read"] if more else []
        yield f"its lens {' and '.join(parts)}"


def _list(layers: set[int]) -> str:
    return ", ".join(map(str, sorted(layers)))


def _last_layer_agrees(lens: Lens, step: Step, name: str) -> Iterator[str]:
    """The last layer is the distribution from which the token was chosen."""
    k = min(lens.token_ids.shape[1], len(step.topk.tokens))
    if not k:
        return
    last, own = lens.logits[-1, :k], step.topk.logits[:k]
    if not np.allclose(last, own, rtol=ROUNDING, atol=ROUNDING, equal_nan=True):
        yield f"{name} at the last layer is not the model's own distribution"
    if not is_close(float(lens.chosen_prob[-1]), step.prob, ROUNDING):
        yield f"{name} at the last layer gives its token another probability"
    if lens.chosen_rank[-1] != step.rank:
        yield f"{name} at the last layer has its token at rank {lens.chosen_rank[-1]}"


def _reading_agrees(lens: Lens, step: Step, layers: int) -> Iterator[str]:
    name = f"its reading by {lens.name}"
    try:
        require_lens_name(lens.name)
    except UsageError:
        yield f"it has a reading by {lens.name!r}, which names no lens"
        return
    numbers = lens.layer_numbers.tolist()
    if numbers[-1] != layers or numbers[0] < 0 or any(b <= a for a, b in pairwise(numbers)):
        yield f"{name} has layers up to {numbers[-1]} instead of {layers}"
        return
    yield from _last_layer_agrees(lens, step, name)
    if lens.kl[-1] > _SLACK:
        yield f"{name} is {lens.kl[-1]:.3g} nats from the model's own distribution"
    for row, layer in enumerate(numbers):
        if not _is_distribution(lens, row, step.token_id):
            yield f"{name} at layer {layer} is no distribution"


def _is_distribution(lens: Lens, row: int, token_id: int) -> bool:
    """Whether the numbers of a layer can be those of one distribution."""
    probs, ids = lens.probs[row], lens.token_ids[row].tolist()
    chosen_prob, rank = float(lens.chosen_prob[row]), int(lens.chosen_rank[row])
    known = [*probs.tolist(), chosen_prob]
    if not all(-_SLACK <= prob <= 1 + _SLACK for prob in known if prob == prob):
        return False
    if np.nansum(probs) > 1 + _SLACK or not is_falling(probs) or not is_falling(lens.logits[row]):
        return False
    if lens.entropy[row] < -_SLACK or lens.kl[row] < -_SLACK or rank < 0:
        return False
    listed = [token for token in ids if token >= 0]
    if len(set(listed)) != len(listed):
        return False
    if token_id in listed and not np.isnan(probs[ids.index(token_id)]):
        return is_close(float(probs[ids.index(token_id)]), chosen_prob, ROUNDING)
    # Tokens that are not listed are no more likely than those that are.
    least = float(probs[-1])
    return not chosen_prob > least + ROUNDING if least == least else True
