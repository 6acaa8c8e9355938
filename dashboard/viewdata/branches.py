"""The branches of a conversation on the pages: pure functions of records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dashboard.viewdata.wording import Json, counted
from oki_trace.message_tree import newest_path
from oki_trace.records import Message, Prompt, Role, Status, StepSummary
from oki_trace.sanitize import visible

# Tokens of a typed text that are shown one by one.
TOKENS_SHOWN = 30


def shown_path(
    messages: Sequence[Message], branch: int | None, message: int | None
) -> list[Message]:
    """The path to show: the newest one through ``branch``; it contains ``message`` if it exists."""
    ids = {one.id for one in messages}
    path = newest_path(messages, branch if branch in ids else None)
    if message in ids and all(one.id != message for one in path):
        path = newest_path(messages, message)
    return path


def first_live(messages: Sequence[Message]) -> int | None:
    """From which message on a path is drawn anew while a reply is live; None without one.

    The messages after a live reply are drawn with it, so that their order stays; the messages that
    it answers too where their tokens are traced, which are shown as soon as they are measured.
    """
    first = next((n for n, message in enumerate(messages) if message.status.is_live), None)
    if first is None:
        return None
    policy = messages[first].policy
    if policy is not None and policy.trace_prompt is not None:
        while first > 0 and messages[first - 1].role is not Role.ASSISTANT:
            first -= 1
    return first


def can_regenerate(message: Message) -> bool:
    """Whether a message is a finished reply that was generated, not a scored text."""
    generated = message.role is Role.ASSISTANT and message.prompt_len is not None
    return generated and not message.status.is_live and (message.tokens > 0)


def can_continue(message: Message) -> bool:
    """Whether a reply ended before the model ended it."""
    early = message.status in (Status.STOPPED, Status.INTERRUPTED)
    return can_regenerate(message) and (early or message.reason == "token limit")


def compared_with(message: Message, others: Sequence[Message]) -> int | None:
    """The reply to compare a reply with: the one it departs from, else the nearest sibling."""
    replies = [other.id for other in others if can_regenerate(other)]
    if message.id not in replies or len(replies) < 2:
        return None
    if message.branch_of in replies:
        return message.branch_of
    at = replies.index(message.id)
    return replies[at - 1] if at else replies[1]


def typed_text(tokens: Sequence[tuple[int, str]]) -> str:
    """The tokens of a typed text, each with its id."""
    shown = "  ".join(f"{visible(text)} ({number})" for number, text in tokens[:TOKENS_SHOWN])
    more = "" if len(tokens) <= TOKENS_SHOWN else f"  and {len(tokens) - TOKENS_SHOWN:,} more"
    return f"{counted(len(tokens), 'token')}: {shown}{more}"


def shared_steps(
    message: Message, prefix: Mapping[int, StepSummary]
) -> Sequence[StepSummary] | None:
    """The steps of a branch's beginning, in order; None where some are not known any more."""
    steps = [prefix[at] for at in sorted(prefix)]
    return steps if len(steps) == message.prefix_len else None


def with_plain_beginning(shown: Json, message: Message, prompt: Prompt) -> Json:
    """The data of a reply, with the tokens of its beginning before it, which have no steps."""
    first = len(prompt) - message.prefix_len
    tokens = [
        {"text": prompt.tokens[at], "mark": False, "value": None, "part": "shared"}
        | {"title": "The shared beginning of a branch; its steps were deleted", "untraced": True}
        for at in range(first, len(prompt))
    ]
    return {**shown, "tokens": [*tokens, *shown["tokens"]], "first": -len(tokens)}
