"""Prints a conversation as a tree of branches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from oki_trace.cli.output import cell, console
from oki_trace.message_tree import in_depth
from oki_trace.records import Message, Role

if TYPE_CHECKING:
    from oki_trace.store.reading.reader import TraceReader

_TEXT = 60


def print_tree(reader: TraceReader, messages: Sequence[Message]) -> None:
    """One line for each message: its number, its text, and for a branch where it departs.

    The probability of a branch is that of all its own tokens, from the fork on.
    """
    logprobs = reader.logprobs(messages[0].conversation_id) if messages else {}
    for message, depth in in_depth(messages):
        line = Text("  " * depth).append(str(message.id), "bold").append(f"  {message.role}: ")
        line.append_text(cell(_shortened(message.content)))
        if message.role is Role.ASSISTANT:
            line.append(f"  {_about(message, logprobs.get(message.id))}", "dim")
        console().print(line, soft_wrap=True)


def _about(message: Message, logprob: float | None) -> str:
    parts = []
    if message.branch_of is not None:
        parts.append(f"from {message.branch_of} at step {message.branch_step}")
    if logprob is not None:
        parts.append(f"{message.tokens} tokens, logprob {logprob:z.2f} ({math.exp(logprob):.2g})")
    return " · ".join([*parts, "" if message.status == "complete" else str(message.status)]).strip(
        " ·"
    )


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _TEXT else f"{line[: _TEXT - 1].rstrip()}…"
