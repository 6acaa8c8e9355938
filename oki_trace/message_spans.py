"""Where the messages of a conversation are in a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from oki_trace.records import Message, Prompt, Role

# A message is shown by its tokens where these are its own; an earlier reply has its own steps.
_ROLES = ("system", "user", "tool")


def message_spans(prompt: Prompt, messages: Sequence[Message]) -> dict[int, range]:
    """The positions of each message in a prompt that follows ``messages``, by message id.

    A message is left out where the prompt does not tell its tokens from those of another.
    """
    runs: dict[str, list[range]] = {role: [] for role in _ROLES}
    for segment, group in groupby(range(len(prompt)), prompt.segments.__getitem__):
        positions = list(group)
        if segment in runs:
            runs[segment].append(range(positions[0], positions[-1] + 1))
    spans = {}
    for role, found in runs.items():
        said = [message for message in messages if message.role is Role(role)]
        certain = len(said) == len(found)
        # The last messages are in the prompt even if the first ones are not.
        for message, span in zip(reversed(said), reversed(found), strict=False):
            text = "".join(prompt.tokens[at] for at in span)
            if not certain and text.strip() != message.content.strip():
                break
            spans[message.id] = span
    return spans


def scored_span(prompt_len: int, first: int) -> range:
    """The positions of a scored text whose first step is at position ``first``.

    The first token of all belongs to it, although it has no probability of its own.
    """
    return range(0 if first == 1 else first, prompt_len)
