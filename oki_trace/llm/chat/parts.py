"""The parts of a reply: thinking, answer and tool calls, each with its steps.

Every step belongs to one part, and a part includes the markers around it. A reply
that is cut off inside a part ends with that part: thinking that was not closed is
thinking. Pure functions of the reply's tokens and of its model's markers.
"""

from __future__ import annotations

import codecs
import json
import logging
import re
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from oki_trace.llm.chat.markers import ReplyFormat
from oki_trace.llm.chat.tool_calls import bare_call, calls_in, json_or_text
from oki_trace.records import Part, PartKind

log = logging.getLogger(__name__)


class ReplyToken(NamedTuple):
    """A token of a reply: its bytes (a special token's are its name), and whether it is special."""

    data: bytes
    is_special: bool


@dataclass(frozen=True)
class _Span:
    """A part as characters of the whole text: ``first`` to ``last`` are inside its markers.

    ``text`` is the part's text if it differs from those characters.
    """

    kind: PartKind
    begin: int
    first: int
    last: int
    end: int
    name: str | None = None
    arguments: Any = None
    text: str | None = None


def parts_of(
    form: ReplyFormat, prompt: str, tokens: Sequence[ReplyToken], tools: Sequence[Any] = ()
) -> tuple[Part, ...]:
    """The parts of a reply to ``prompt``, in order; none of a reply without a token.

    ``tools`` are the schemas that the template was given: the declared parser reads
    the types of arguments from them, and without any a bare object is no call.
    """
    if not tokens:
        return ()
    text = _Text(tokens)
    spans: list[_Span] | None = None
    if form.parser is not None:
        spans = _declared(form.parser, prompt, text.whole, tools)
    if spans is None:
        if form.bare_calls and not tools:
            # Without tools, an object with a name and parameters is the requested answer.
            form = replace(form, bare_calls=False)
        spans = list(_harmony(text.whole) if form.harmony else _marked(form, prompt, text))
    return _with_steps(spans, text)


def answer_of(parts: Sequence[Part]) -> str:
    """The text of the answer alone; its texts before and after a call are paragraphs."""
    return "\n\n".join(part.text for part in parts if part.kind == "answer")


class _Text:
    """The reply as one text with its special tokens, and where each token begins in it."""

    def __init__(self, tokens: Sequence[ReplyToken]) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pieces = [decoder.decode(token.data) for token in tokens]
        pieces.append(decoder.decode(b"", final=True))
        ends = list(accumulate(map(len, pieces)))
        self.whole = "".join(pieces)
        self.starts = [0, *ends][: len(tokens)]
        bounds = zip(tokens, self.starts, ends, strict=False)
        self.special = [(start, end) for token, start, end in bounds if token.is_special]

    def plain(self, first: int, last: int) -> str:
        """The characters from ``first`` to ``last``, without special tokens."""
        kept, at = [], first
        for begin, end in self.special:
            if first < end and begin < last:
                kept.append(self.whole[at : max(begin, at)])
                at = max(at, end)
        return "".join([*kept, self.whole[at : max(last, at)]])

    def is_blank(self, first: int, last: int) -> bool:
        return not self.plain(first, last).strip()

    def step_at(self, position: int) -> int:
        """The first token that begins at ``position`` or after it."""
        return bisect_left(self.starts, position)


def _with_steps(spans: Sequence[_Span], text: _Text) -> tuple[Part, ...]:
    # A single part keeps its spaces: the next turn's prompt begins with it.
    alone = len(spans) == 1 and spans[0].first == 0
    parts: list[Part] = []
    start = 0
    for place, span in enumerate(spans, 1):
        end = max(start, text.step_at(span.end)) if place < len(spans) else len(text.starts)
        content = text.plain(span.first, span.last) if span.text is None else span.text
        content = content if alone else content.strip()
        if parts and span.kind == "answer" and not content:
            # A marker by itself, such as a second end of turn.
            parts[-1] = replace(parts[-1], end=end)
        elif end > start or content:
            parts.append(Part(span.kind, content, start, end, span.name, span.arguments))
        start = end
    return tuple(parts)


# ------------------------------------------------------------------------- by markers


def _marked(form: ReplyFormat, prompt: str, text: _Text) -> Iterator[_Span]:
    whole = text.whole
    closing_of, call_end_of = dict(form.thinking), dict(form.tool_calls)
    openings = [*closing_of, *call_end_of]
    begin = 0
    opened = form.begins_thinking(prompt)
    # A model trained with prompts that open its thinking may only close it.
    closed, _ = _earliest(whole, closing_of.values(), 0)
    if opened or closed < _earliest(whole, openings, 0)[0]:
        first = _after_second_opening(form, whole) if opened else 0
        span = _thinking(whole, 0, first, closing_of.values(), call_end_of)
        yield span
        begin = span.end
        if begin == len(whole):
            return
    while True:
        where, opening = _earliest(whole, openings, begin)
        # Blanks before a marker belong to its part. A reply without any text is an empty answer.
        if not text.is_blank(begin, where) or (not opening and begin == 0):
            yield _answer(form, text, begin, where)
            begin = where
        if not opening:
            return
        inside = where + len(opening)
        if opening in closing_of:
            span = _thinking(whole, begin, inside, [closing_of[opening]], call_end_of)
            yield span
            begin = span.end
        else:
            last, marker = _earliest(whole, filter(None, [call_end_of[opening]]), inside)
            end = last + len(marker)
            yield from _calls(text, begin, inside, last, end)
            begin = end


def _thinking(
    whole: str, begin: int, first: int, closings: Collection[str], calls: Collection[str]
) -> _Span:
    """Thinking up to the marker that closes it; without one, up to a call or to the end."""
    last, closing = _earliest(whole, closings, first)
    if not closing:
        last, _ = _earliest(whole, calls, first)
        return _Span("thinking", begin, first, last, last)
    end = last + len(closing)
    # Empty lines between thinking and answer belong to neither text.
    end += len(whole[end:]) - len(whole[end:].lstrip("\n"))
    return _Span("thinking", begin, first, last, end)


def _after_second_opening(form: ReplyFormat, whole: str) -> int:
    """The start of thinking that the template has opened, and that the model may open again."""
    start = len(whole) - len(whole.lstrip())
    return next((start + len(o) for o, _ in form.thinking if whole.startswith(o, start)), 0)


def _earliest(text: str, markers: Iterable[str], at: int) -> tuple[int, str]:
    """The position of the first marker, and the marker; the end of the text and "" without any."""
    places = ((text.find(marker, at), marker) for marker in markers)
    return min((place for place in places if place[0] >= 0), default=(len(text), ""))


def _answer(form: ReplyFormat, text: _Text, begin: int, end: int) -> _Span:
    if form.bare_calls and begin == 0 and (call := bare_call(text.plain(begin, end))) is not None:
        return _Span("tool_call", begin, begin, end, end, call.name, call.arguments)
    first, last = begin, end
    for opening, closing in form.answer:
        where = text.whole.find(opening, first, last)
        if where >= 0 and text.is_blank(first, where):
            first = where + len(opening)
        where = text.whole.find(closing, first, last)
        if where >= 0 and text.is_blank(where + len(closing), last):
            last = where
    return _Span("answer", begin, first, last, end)


def _calls(text: _Text, begin: int, first: int, last: int, end: int) -> Iterator[_Span]:
    calls = calls_in(text.whole[first:last]) or calls_in(text.plain(first, last))
    if len(calls) < 2:
        name, arguments = calls[0] if calls else (None, None)
        yield _Span("tool_call", begin, first, last, end, name, arguments)
        return
    # Several calls inside one pair of markers: each begins with its name.
    starts = [begin]
    for call in calls[1:]:
        after = text.whole.find(call.name, max(starts[-1], first) + 1, last)
        starts.append(after if after >= 0 else starts[-1])
    for call, start, stop in zip(calls, starts, [*starts[1:], end], strict=True):
        written = json.dumps(call._asdict(), ensure_ascii=False)
        inner = max(start, first), min(stop, last)
        yield _Span("tool_call", start, *inner, stop, call.name, call.arguments, written)


# --------------------------------------------------------------------------- harmony

_MESSAGE = re.compile(
    r"(?:<\|start\|>(?P<role>[^<]*))?(?P<before>[^<]*)"
    r"(?:<\|channel\|>(?P<channel>[^<]*)(?:<\|constrain\|>(?P<type>[^<]*))?)?"
    r"(?:<\|message\|>(?P<body>.*?))?"
    r"(?P<stop><\|end\|>|<\|return\|>|<\|call\|>|(?=<\|start\|>)|\Z)",
    re.DOTALL,
)
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([^\s<]+)")


def _harmony(whole: str) -> Iterator[_Span]:
    at = 0
    while at < len(whole):
        message = _MESSAGE.match(whole, at)
        if message is None or message.end() == at:
            # Not a message: the rest is text.
            yield _Span("answer", at, at, len(whole), len(whole))
            return
        header = f"{message['role'] or ''}{message['before'] or ''} {message['channel'] or ''}"
        channel = (message["channel"] or "").strip().split(" ")[0]
        if message["body"] is None:
            # A header that was cut off, or text without any header.
            first = message.start("before") if message["channel"] is None else message.end()
            last = message.start("stop")
        else:
            first, last = message.span("body")
        end = message.end()
        recipient = _RECIPIENT.search(header)
        if recipient is not None:
            arguments = json_or_text(whole[first:last].strip())
            yield _Span("tool_call", at, first, last, end, recipient[1], arguments)
        else:
            thinks = bool(channel) and "analysis".startswith(channel)
            kind: PartKind = "thinking" if thinks else "answer"
            yield _Span(kind, at, min(first, last), last, end)
        at = end


# ----------------------------------------------------------------- declared by the tokenizer

_KINDS: dict[str, PartKind] = {
    "thinking": "thinking",
    "reasoning": "thinking",
    "reasoning_content": "thinking",
    "tool_calls": "tool_call",
}


def _declared(tokenizer: Any, prompt: str, whole: str, tools: Sequence[Any]) -> list[_Span] | None:
    """The parts as transformers' own parser reads them; None if it cannot."""
    try:
        parser = tokenizer.get_response_parser(prefix=prompt, tools=list(tools) or None)
        events = [*parser.feed(whole), *parser.finalize()[1]]
    except Exception as error:  # the declaration comes with the model, and can be wrong
        log.warning("the reply is read by its markers: %s", error)
        return None
    spans: list[_Span] = []
    at = begin = 0
    first: int | None = None
    for event in events:
        kind = _KINDS.get(event["field"], "answer")
        if event["type"] == "region_chunk":
            where = whole.find(event["text"], at)
            if where < 0:
                return None
            first = where if first is None else first
            at = where + len(event["text"])
        elif event["type"] == "region_close":
            inner = at if first is None else first
            for name, arguments, text in _contents(kind, event["value"]):
                spans.append(_Span(kind, begin, inner, at, at, name, arguments, text))
                begin = at
            first = None
    # The markers between a part and an answer, which has none of its own, belong to the former.
    for place, (span, following) in enumerate(pairwise(spans)):
        if span.kind != "answer" and following.kind == "answer":
            spans[place] = replace(span, end=following.first)
    if spans:
        spans[-1] = replace(spans[-1], end=len(whole))
    return spans


def _contents(kind: PartKind, value: Any) -> Iterator[tuple[str | None, Any, str | None]]:
    """(name, arguments, text) of each part in a region, which may be a list of calls."""
    if kind != "tool_call":
        yield None, None, value if isinstance(value, str) else None
        return
    for item in value if isinstance(value, list) else [value]:
        call = item.get("function", item) if isinstance(item, dict) else {}
        yield call.get("name"), call.get("arguments"), None
