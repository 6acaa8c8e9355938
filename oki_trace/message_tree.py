"""A conversation as a tree of messages: paths, siblings and the newest branch.

Each message names the one that it follows. Two messages that follow the same one are
siblings: replies to the same text, or versions of a text that was edited.
"""

from __future__ import annotations

from collections.abc import Sequence

from oki_trace.records import Message


def path_to(messages: Sequence[Message], message_id: int) -> list[Message]:
    """The messages from the first one to this one, each the parent of the next.

    Empty if the message is not among ``messages``.
    """
    by_id = {message.id: message for message in messages}
    path: list[Message] = []
    at: int | None = message_id
    while at is not None and (message := by_id.pop(at, None)) is not None:
        path.append(message)
        at = message.parent_id
    return path[::-1]


def newest_path(messages: Sequence[Message], through: int | None = None) -> list[Message]:
    """The path to the newest message; ``through``: the newest that comes after this message."""
    below = messages if through is None else subtree(messages, through)
    return path_to(messages, below[-1].id) if below else []


def siblings(messages: Sequence[Message], message: Message) -> list[Message]:
    """The messages that follow the same one as this message, itself included, oldest first."""
    return [other for other in messages if other.parent_id == message.parent_id]


def subtree(messages: Sequence[Message], message_id: int) -> list[Message]:
    """A message and all messages after it, oldest first; empty if it is not among ``messages``."""
    below: set[int | None] = {message_id}
    found = []
    for message in messages:  # a parent is older than the messages that follow it
        if message.id == message_id or message.parent_id in below:
            below.add(message.id)
            found.append(message)
    return found
