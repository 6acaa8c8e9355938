"""Aligns the steps of two replies to the same messages, a branch and its reply among them.

The prompt of a branch ends with the tokens that it keeps of the reply it departs from, so its first
step stands beside the step at which it departs.
"""

from __future__ import annotations

from dataclasses import dataclass

from oki_trace.message_tree import path_to
from oki_trace.records import Message
from oki_trace.store.reading.reader import Reader

_PIECE = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, slots=True)
class Alignment:
    """Step ``first_from + i`` of the first reply stands beside step ``second_from + i``.

    At least one of the two numbers is 0. The steps of a reply before its number stand beside
    tokens in the prompt of the other; ``kept_same``: for each of them, whether its token is the
    same. ``same_text``: whether both models read the same messages and tokens before the first
    steps that stand beside each other.
    """

    first_from: int
    second_from: int
    kept_same: tuple[bool, ...]
    same_text: bool

    @property
    def swapped(self) -> Alignment:
        """The same alignment with the first reply as the second."""
        return Alignment(self.second_from, self.first_from, self.kept_same, self.same_text)

    @property
    def kept(self) -> int:
        """How many tokens both begin with, in a row, before any steps stand beside each other."""
        return next((i for i, same in enumerate(self.kept_same) if not same), len(self.kept_same))


def align_replies(reader: Reader, first: Message, second: Message) -> Alignment:
    """How the steps of two replies that have begun stand beside each other."""
    if first.prefix_len > second.prefix_len:
        return align_replies(reader, second, first).swapped
    if _read_before(reader, first) != _read_before(reader, second):
        return Alignment(0, 0, (), False)
    if not second.prefix_len:
        return Alignment(0, 0, (), True)
    tokens = _kept_tokens(reader, second)
    shared, kept = tokens[: first.prefix_len], tokens[first.prefix_len :]
    own = [(step.token_id, step.token) for step in reader.steps(first.id)[: len(kept)]]
    same = tuple(_is_same(*pair) for pair in zip(own, kept, strict=False))
    begins_alike = all(map(_is_same, _kept_tokens(reader, first), shared))
    same_text = begins_alike and len(own) == len(kept) and all(same)
    return Alignment(len(kept), 0, same, same_text)


def _read_before(reader: Reader, reply: Message) -> list[tuple[str, str]]:
    """The messages that a reply answers."""
    path = path_to(reader.messages(reply.conversation_id), reply.id)
    return [(str(message.role), message.content) for message in path[:-1]]


def _kept_tokens(reader: Reader, reply: Message) -> list[tuple[int, str]]:
    """The id and text of each token at the end of its prompt that the reply begins with."""
    if not reply.prefix_len:
        return []
    prompt = reader.prompt(reply.id)
    start = len(prompt) - reply.prefix_len
    return list(zip(prompt.token_ids[start:], prompt.tokens[start:], strict=True))


def _is_same(one: tuple[int, str], other: tuple[int, str]) -> bool:
    """By text, so that two vocabularies can be compared; pieces of a character by id."""
    return one[1] == other[1] and (one[0] == other[0] or _PIECE not in one[1])
