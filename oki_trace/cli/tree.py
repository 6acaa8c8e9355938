"""Prints a conversation as a tree of branches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from oki_trace.cli.output import cell, console
from oki_trace.records import Message, Role

if TYPE_CHECKING:
    from oki_trace.store.reading.reader import TraceReader

_TEXT = 60


def print_tree(reader: TraceReader, messages: Sequence[Message]) -> None:
    """One line for each message: its number, its text, and for a branch where it departs.

    The probability of a branch is that of all its own tokens, from the fork on.
    """
    for message, depth in _in_depth(messages):
        line = Text("  " * depth).append(str(message.id), "bold").append(f"  {message.role}: ")
        line.append_text(cell(_shortened(message.content)))
        if message.role is Role.ASSISTANT:
            line.append(f"  {_about(reader, message)}", "dim")
        console().print(line, soft_wrap=True)


def _in_depth(messages: Sequence[Message]) -> Iterator[tuple[Message, int]]:
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


def _about(reader: TraceReader, message: Message) -> str:
    parts = []
    if message.branch_of is not None:
        parts.append(f"from {message.branch_of} at step {message.branch_step}")
    steps = reader.steps(message.id)
    if steps:
        logprob = sum(step.logprob for step in steps)
        parts.append(f"{len(steps)} tokens, logprob {logprob:z.2f} ({math.exp(logprob):.2g})")
    return " · ".join([*parts, "" if message.status == "complete" else str(message.status)]).strip(
        " ·"
    )


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _TEXT else f"{line[: _TEXT - 1].rstrip()}…"
