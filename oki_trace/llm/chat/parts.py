"""What a reply consists of: thinking, answer and tool calls, each with its steps.

Every step belongs to one part, and the markers around a part belong to it. A reply
that is cut off inside a part ends with that part: thinking that was not closed is
thinking. Pure functions of the reply's tokens and of how its model marks up replies.
"""

from __future__ import annotations

import codecs
import json
import logging
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from oki_trace.llm.chat.markers import ReplyFormat
from oki_trace.llm.chat.tool_calls import bare_call, calls_in, value_of
from oki_trace.records import Part, PartKind

log = logging.getLogger(__name__)


class ReplyToken(NamedTuple):
    """A token of a reply: its bytes (a special token's are its name), and whether it is special."""

    data: bytes
    is_special: bool


@dataclass(frozen=True)
class _Span:
    """A part as characters of the whole text: ``first`` to ``last`` are within its markers."""

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
            # Without tools an object with a name and parameters is what was asked for.
            form = replace(form, bare_calls=False)
        spans = list(_harmony(text.whole) if form.harmony else _marked(form, prompt, text))
    return _with_steps(spans, text)


def answer_of(parts: Sequence[Part]) -> str:
    """The text of the answer alone. What was said before and after a call are paragraphs."""
    return "\n\n".join(part.text for part in parts if part.kind == "answer")


class _Text:
    """The reply as one text with its special tokens, and where each token begins in it."""

    def __init__(self, tokens: Sequence[ReplyToken]) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pieces = [decoder.decode(token.data) for token in tokens]
        pieces.append(decoder.decode(b"", final=True))
        self.whole = "".join(pieces)
        self.starts: list[int] = []
        self.special: list[tuple[int, int]] = []
        at = 0
        for token, piece in zip(tokens, pieces, strict=False):
            self.starts.append(at)
            if token.is_special:
                self.special.append((at, at + len(piece)))
            at += len(piece)

    def plain(self, first: int, last: int) -> str:
        """What stands from ``first`` to ``last``, without special tokens."""
        kept, at = [], first
        for begin, end in self.special:
            if end <= first or begin >= last:
                continue
            kept.append(self.whole[at : max(begin, at)])
            at = max(at, end)
        kept.append(self.whole[at : max(last, at)])
        return "".join(kept)

    def step_at(self, position: int) -> int:
        """The first token that begins at ``position`` or after it."""
        return bisect_left(self.starts, position)


def _with_steps(spans: Sequence[_Span], text: _Text) -> tuple[Part, ...]:
    # What stands alone is kept to the last space: it is what the next turn begins with.
    alone = len(spans) == 1 and spans[0].first == 0
    count = len(text.starts)
    made: list[Part] = []
    start = 0
    for place, span in enumerate(spans):
        last = place == len(spans) - 1
        end = count if last else max(start, text.step_at(span.end))
        said = text.plain(span.first, span.last) if span.text is None else span.text
        said = said if alone else said.strip()
        if made and span.kind == "answer" and not said:
            # A marker by itself, such as one more end.
            made[-1] = replace(made[-1], end=end)
        elif end > start or said:
            made.append(Part(span.kind, said, start, end, span.name, span.arguments))
        start = end
    return tuple(made)


# ------------------------------------------------------------------------- by markers


def _marked(form: ReplyFormat, prompt: str, text: _Text) -> Iterator[_Span]:
    whole = text.whole
    at, thinks = 0, form.begins_thinking(prompt)
    close = [closing for _, closing in form.thinking]
    first = begin = 0
    while True:
        if thinks:
            if first == 0:
                first = _opened_twice(form, whole)
            where, closing = _earliest(whole, close, first)
            called, opening = _earliest(whole, [o for o, _ in form.tool_calls], first)
            if closing is None and opening is not None:
                # It called a tool without ending its thinking.
                yield _Span("thinking", begin, first, called, called)
                begin = first = at = called
                thinks = False
                continue
            if closing is None:
                yield _Span("thinking", begin, first, len(whole), len(whole))
                return
            end = _after_blank(whole, where + len(closing))
            yield _Span("thinking", begin, first, where, end)
            begin = first = at = end
            thinks = False
            continue
        openings = [*(o for o, _ in form.thinking), *(o for o, _ in form.tool_calls)]
        where, opening = _earliest(whole, openings, at)
        # A model that was trained to have its thinking opened for it may only close it.
        closed, closing = _earliest(whole, close, at)
        if closing is not None and (opening is None or closed < where) and begin == 0 and at == 0:
            end = _after_blank(whole, closed + len(closing))
            yield _Span("thinking", begin, first, closed, end)
            begin = first = at = end
            continue
        end = len(whole) if opening is None else where
        # A reply without any text is an empty answer; what ends one belongs to what it ends.
        if _is_something(text, begin, end) or (opening is None and begin == 0):
            yield from _answer(form, text, begin, end)
            begin = end
        if opening is None:
            return
        inside = where + len(opening)
        if opening in [o for o, _ in form.thinking]:
            first, thinks = inside, True
            close = [c for o, c in form.thinking if o == opening]
            continue
        end_marker = next(c for o, c in form.tool_calls if o == opening)
        last = whole.find(end_marker, inside) if end_marker else -1
        end = last + len(end_marker) if end_marker and last >= 0 else len(whole)
        yield from _calls(text, begin, inside, last if last >= 0 else len(whole), end)
        begin = first = at = end
        close = [closing for _, closing in form.thinking]


def _after_blank(whole: str, at: int) -> int:
    """Past the empty lines between thinking and answer, which are of neither."""
    return len(whole) - len(whole[at:].lstrip("\n"))


def _opened_twice(form: ReplyFormat, whole: str) -> int:
    """Where thinking begins whose marker the template has written, and the model once more."""
    start = len(whole) - len(whole.lstrip())
    openings = [o for o, _ in form.thinking if whole.startswith(o, start)]
    return start + len(openings[0]) if openings else 0


def _earliest(text: str, markers: Sequence[str], at: int) -> tuple[int, str | None]:
    found = [(where, marker) for marker in markers if (where := text.find(marker, at)) >= 0]
    return min(found, default=(len(text), None))


def _is_something(text: _Text, begin: int, end: int) -> bool:
    return bool(text.plain(begin, end).strip())


def _answer(form: ReplyFormat, text: _Text, begin: int, end: int) -> Iterator[_Span]:
    said = text.plain(begin, end)
    if form.bare_calls and begin == 0 and (call := bare_call(said)) is not None:
        yield _Span("tool_call", begin, begin, end, end, call.name, call.arguments)
        return
    first, last = begin, end
    for opening, closing in form.answer:
        where = text.whole.find(opening, first, last)
        if where >= 0 and not _is_something(text, first, where):
            first = where + len(opening)
        where = text.whole.find(closing, first, last)
        if where >= 0 and not _is_something(text, where + len(closing), last):
            last = where
    yield _Span("answer", begin, first, last, end)


def _calls(text: _Text, begin: int, first: int, last: int, end: int) -> Iterator[_Span]:
    written = text.whole[first:last]
    calls = calls_in(written) or calls_in(text.plain(first, last))
    if not calls:
        yield _Span("tool_call", begin, first, last, end)
        return
    # Several calls between one pair of markers: where one begins is where its name stands.
    places = [begin]
    for call in calls[1:]:
        after = text.whole.find(call.name, max(places[-1], first) + 1, last)
        places.append(after if after >= 0 else places[-1])
    for place, (call, start) in enumerate(zip(calls, places, strict=True)):
        stop = places[place + 1] if place + 1 < len(places) else end
        inner = (max(start, first), min(stop, last))
        one = None if len(calls) == 1 else json.dumps(call._asdict(), ensure_ascii=False)
        yield _Span("tool_call", start, *inner, stop, call.name, call.arguments, one)


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
        found = _MESSAGE.match(whole, at)
        if found is None or found.end() == at:
            # No message at all: the rest is what was said.
            yield _Span("answer", at, at, len(whole), len(whole))
            return
        header = f"{found['role'] or ''}{found['before'] or ''} {found['channel'] or ''}"
        channel = (found["channel"] or "").strip().split(" ")[0]
        if found["body"] is None:
            # A header, cut off, or text without any header.
            first = found.start("before") if found["channel"] is None else found.end()
            last = found.start("stop")
        else:
            first, last = found.span("body")
        called = _RECIPIENT.search(header)
        if called is not None:
            arguments = value_of(whole[first:last].strip())
            yield _Span("tool_call", at, first, last, found.end(), called[1], arguments)
        else:
            thinks = bool(channel) and "analysis".startswith(channel)
            kind: PartKind = "thinking" if thinks else "answer"
            yield _Span(kind, at, min(first, last), last, found.end())
        at = found.end()


# ----------------------------------------------------------------- declared by the tokenizer

_KINDS: dict[str, PartKind] = {
    "thinking": "thinking",
    "reasoning": "thinking",
    "reasoning_content": "thinking",
    "tool_calls": "tool_call",
}


def _declared(tokenizer: Any, prompt: str, whole: str, tools: Sequence[Any]) -> list[_Span] | None:
    """The parts as transformers' own parser reads them; None when it cannot."""
    try:
        parser = tokenizer.get_response_parser(prefix=prompt, tools=list(tools) or None)
        events = [*parser.feed(whole), *parser.finalize()[1]]
    except Exception as error:  # a declaration is of the model's maker, and can be wrong
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
            for name, arguments, text in _closed(kind, event["value"]):
                spans.append(_Span(kind, begin, inner, at, at, name, arguments, text))
                begin = at
            first = None
    return _closing_markers_included(spans, whole)


def _closed(kind: PartKind, value: Any) -> Iterator[tuple[str | None, Any, str | None]]:
    """(name, arguments, text) of what a region holds: several, of a list of calls."""
    if kind != "tool_call":
        yield None, None, value if isinstance(value, str) else None
        return
    for one in value if isinstance(value, list) else [value]:
        call = one.get("function", one) if isinstance(one, dict) else {}
        yield call.get("name"), call.get("arguments"), None


def _closing_markers_included(spans: list[_Span], whole: str) -> list[_Span]:
    """Between two parts stand the end of one and the beginning of the next: told by the answer,
    which has no markers of its own."""
    made = []
    for place, span in enumerate(spans):
        end = len(whole) if place == len(spans) - 1 else span.end
        if place + 1 < len(spans) and span.kind != "answer" and spans[place + 1].kind == "answer":
            end = spans[place + 1].first
        made.append(_Span(**{**vars(span), "end": end}))
    return made
