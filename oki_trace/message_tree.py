"""A conversation as a tree of messages: paths, siblings and the newest branch.

Each message names the one that it follows. Two messages that follow the same one are
siblings: replies to the same text, or versions of a text that was edited.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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


def in_depth(messages: Sequence[Message]) -> Iterator[tuple[Message, int]]:
    """Every message after its parent, with the number of forks before it."""
    children: dict[int | None, list[Message]] = {}
    for message in messages:
        children.setdefault(message.parent_id, []).append(message)
    roots = children.get(None, [])
    shown: set[int] = set()
    # In a damaged store, a message may follow one that is missing, or itself in a loop.
    for root in [*roots, *messages]:
        waiting = [(root, int(len(roots) > 1))]
        while waiting:
            message, depth = waiting.pop()
            if message.id in shown:
                continue
            shown.add(message.id)
            yield message, depth
            following = children.get(message.id, [])
            deeper = depth + (len(following) > 1)
            waiting += [(child, deeper) for child in reversed(following)]


def branches_at(messages: Sequence[Message], reply_id: int, step: int) -> list[Message]:
    """The branches that depart from a reply at a step, oldest first."""
    return [m for m in messages if m.branch_of == reply_id and m.branch_step == step]
