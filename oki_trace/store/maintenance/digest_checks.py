"""Whether a step is what it was when it was recorded, by the digests that were kept then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from oki_trace.records import Message, Step, Tensor
from oki_trace.store.digest import BEFORE_DIGESTS, of_tensors, of_whole_step


def is_as_recorded(step: Step) -> bool:
    """Whether a step with its full tensors is what the digests say that it brings with it.

    One that brings none is; so are tensors that were left out.
    """
    if step.digest is not None and step.digest != of_whole_step(step):
        return False
    return (
        step.tensor_digest is None
        or not step.tensors
        or step.tensor_digest == of_tensors(step.tensors)
    )


def step_changes(message: Message, step: Step) -> Iterator[str]:
    """The rows of a step."""
    if step.digest is None:
        if message.digest != BEFORE_DIGESTS:
            yield "its digest is missing"
    elif step.digest != of_whole_step(step):
        yield "its rows are not those that were recorded (another digest)"


def tensor_changes(message: Message, step: Step, tensors: Sequence[Tensor]) -> Iterator[str]:
    """All the full tensors of a step."""
    if step.tensor_digest is None:
        if message.digest != BEFORE_DIGESTS:
            yield "the digest of its tensors is missing"
    elif step.tensor_digest != of_tensors(tensors):
        yield "its tensors are not those that were recorded (another digest)"
