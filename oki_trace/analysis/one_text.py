"""Aligns the steps of two messages that have the same text, such as a reply and its score.

By token where both models have one vocabulary, else by characters. The store keeps no vocabulary,
so two count as one if the shared text consists of the same token ids with the same texts, and no
id among the candidates of the two messages has two texts.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeVar

from oki_trace.errors import QuestionError
from oki_trace.explain import quoted
from oki_trace.records import Message, StepSummary
from oki_trace.sanitize import visible
from oki_trace.store.reading.reader import Reader, TraceReader

Steps = Sequence[StepSummary]


@dataclass(frozen=True, slots=True)
class Span:
    """The same text in both messages: their steps from the first index up to the second."""

    left: tuple[int, int]
    right: tuple[int, int]
    text: bytes


@dataclass(frozen=True, slots=True)
class OneText:
    """Two messages with the same text: their scored steps, and the shared text as spans.

    ``by`` "token", every span is one token of each; by "character", a span is the text between
    two boundaries that the tokens of both have in common. ``why`` says in a sentence which it
    is. ``given``: of each message, whether its steps are those of given tokens.
    """

    by: Literal["token", "character"]
    why: str
    left: tuple[StepSummary, ...]
    right: tuple[StepSummary, ...]
    given: tuple[bool, bool]
    spans: tuple[Span, ...]


def has_given_text(reader: Reader, message: Message) -> bool:
    """Whether a message is a scored text that has steps."""
    return message.is_score and not message.tokens and reader.given_count(message.id) > 0


def scored_steps(reader: TraceReader, message: Message) -> list[StepSummary]:
    """The steps of a message's own text: its generated tokens, else the given ones."""
    return reader.steps(message.id, given=not message.tokens)


def one_text(reader: TraceReader, first: Message, second: Message) -> OneText:
    """The alignment of two messages, of which one may have a part of the other's text.

    Raises QuestionError if they have different texts.
    """
    left, right = scored_steps(reader, first), scored_steps(reader, second)
    given = (not first.tokens, not second.tokens)
    clash = _clash(
        _texts_by_id(reader, first.id, left, given=given[0]),
        _texts_by_id(reader, second.id, right, given=given[1]),
    )
    tokens = None if clash else shared_tokens(left, right)
    if tokens is not None:
        count = f"{len(tokens):,} tokens have" if len(tokens) > 1 else "1 token has"
        why = f"Aligned by token: the {count} the same ids and texts under both models."
        return OneText("token", why, tuple(left), tuple(right), given, tuple(tokens))
    spans = shared_text(left, right)
    if not spans:
        raise QuestionError(
            f"Messages {first.id} and {second.id} have different texts: compare a reply with its "
            "score (`oki-trace score --message N --model M`), or two scores of one text."
        )
    reason = clash or "the two messages split the text into different tokens"
    why = f"Aligned by characters: {reason}, so surprisal per byte is compared."
    return OneText("character", why, tuple(left), tuple(right), given, tuple(spans))


def shared_tokens(left: Steps, right: Steps) -> list[Span] | None:
    """The tokens of the shorter message in the longer one, at the same positions or at the end.

    None where they are not there with the same ids and texts.
    """
    one = [(step.token_id, step.token) for step in left]
    two = [(step.token_id, step.token) for step in right]
    if not one or not two:
        return None
    if len(one) > len(two):
        mirrored = shared_tokens(right, left)
        return mirrored and [Span(span.right, span.left, span.text) for span in mirrored]
    same_place = left[0].position - right[0].position
    first = same_place if _is_at(one, two, same_place) else _last_place(one, two)
    if first is None:
        return None
    return [
        Span((i, i + 1), (first + i, first + i + 1), step.token_bytes)
        for i, step in enumerate(left)
    ]


def shared_text(left: Steps, right: Steps) -> list[Span]:
    """The text of the shorter message in the longer one, between common token boundaries.

    A special token is no text: it has no bytes, and none at the edge of a span belongs to it.
    Where that leaves two texts, such as a marker that only one tokenizer knows, it has those of
    its spelling. Empty where neither text contains the other.
    """
    for spelled in (False, True):
        one, two = (
            [b"" if step.is_special and not spelled else step.token_bytes for step in steps]
            for steps in (left, right)
        )
        texts = b"".join(one), b"".join(two)
        text = min(texts, key=len)
        starts = [whole.rfind(text) for whole in texts]
        if text and min(starts) >= 0:
            return _spans(text, _boundaries(one, starts[0]), _boundaries(two, starts[1]))
    return []


Boundaries = dict[int, tuple[int, int]]


def _boundaries(pieces: Sequence[bytes], start: int) -> Boundaries:
    """By offset in the shared text: the indices after the token that ends and of the next one."""
    boundaries = {-start: (0, 0)}
    offset = -start
    for index, piece in enumerate(pieces, start=1):
        offset += len(piece)
        ended, _ = boundaries.get(offset, (index, index))
        boundaries[offset] = (ended, index)
    return boundaries


def _spans(text: bytes, left: Boundaries, right: Boundaries) -> list[Span]:
    common = sorted(
        offset
        for offset in left.keys() & right.keys()
        if 0 <= offset <= len(text) and not _is_within_character(text, offset)
    )
    return [
        Span(
            (left[start][1], left[end][0]),
            (right[start][1], right[end][0]),
            text[start:end],
        )
        for start, end in pairwise(common)
    ]


def _is_within_character(text: bytes, offset: int) -> bool:
    return offset < len(text) and text[offset] & 0xC0 == 0x80


Key = TypeVar("Key", bound=Hashable)


def _is_at(part: Sequence[Key], whole: Sequence[Key], place: int) -> bool:
    return place >= 0 and whole[place : place + len(part)] == part


def _last_place(part: Sequence[Key], whole: Sequence[Key]) -> int | None:
    places = range(len(whole) - len(part), -1, -1)
    return next(
        (at for at in places if whole[at] == part[0] and _is_at(part, whole, at)),
        None,
    )


def _texts_by_id(
    reader: TraceReader, message_id: int, steps: Steps, *, given: bool
) -> dict[int, str]:
    texts = {step.token_id: step.token for step in steps}
    for candidates in reader.candidates(message_id, given=given).values():
        texts.update(zip(candidates.token_ids.tolist(), candidates.tokens, strict=True))
    return texts


def _clash(left: dict[int, str], right: dict[int, str]) -> str:
    """Why the ids of the two do not mean the same tokens; empty where nothing shows that."""
    if min(left, default=0) < 0 or min(right, default=0) < 0:
        return "tokens of an imported trace have no ids"
    for token_id in sorted(left.keys() & right.keys()):
        if left[token_id] != right[token_id]:
            one, two = (quoted(visible(texts[token_id])) for texts in (left, right))
            return f"the vocabularies differ (token {token_id:,} is {one} or {two})"
    return ""
