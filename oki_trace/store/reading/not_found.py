"""Errors for ids and tensors that a store does not have, with the reason or the fix."""

from __future__ import annotations

from oki_trace.errors import NotFound
from oki_trace.records import Message


def no_conversation(conversation_id: int) -> NotFound:
    return NotFound(
        f"There is no conversation {conversation_id} in this store: `oki-trace list` shows them."
    )


def no_message(message_id: int) -> NotFound:
    return NotFound(
        f"There is no message {message_id} in this store: `oki-trace show N` lists a "
        "conversation's."
    )


def no_step(message_id: int, step_index: int) -> NotFound:
    return NotFound(
        f"Message {message_id} has no step {step_index}: `oki-trace show` lists its steps."
    )


def no_given_step(message_id: int, position: int) -> NotFound:
    return NotFound(
        f"Message {message_id} has no step for the given token at position {position}: trace the "
        "prompt with --trace-prompt."
    )


def no_tensor(message: Message, index: int, name: str, *, given: bool = False) -> NotFound:
    """The error says why the tensor is missing: pruned, left out of an export, or never kept."""
    place = f"The given token at position {index}" if given else f"Step {index}"
    missing = f"{place} of message {message.id} has no tensor {name}"
    if message.tensors_pruned_at is not None:
        return NotFound(
            f"{missing} any more: its tensors were pruned on {message.tensors_pruned_at:%Y-%m-%d}. "
            "Generate the reply again to get them."
        )
    if message.capture is not None and message.capture.tensors_left_out:
        return NotFound(
            f"{missing}: the tensors were left out of the export that it was imported from. Export "
            "it with --tensors and import that."
        )
    return NotFound(f"{missing}: generate with --tensors half, compact or exact to keep them.")
