"""A reply's text as it grows, and its parts when it has ended.

Most models mark up nothing, and the text is then what the tokenizer decodes. Where
thinking and calls are marked, each piece is told with the kind of part it is of.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from oki_trace.llm.capture.vocabulary import TextStream
from oki_trace.llm.chat.markers import format_of
from oki_trace.llm.chat.parts import ReplyToken, answer_of, parts_of
from oki_trace.records import Part, PartKind, Step

# Characters that are held back while more may come: a marker may have begun in them.
_HELD = 32
_SECONDS = 0.1


class ReplyText:
    """The text of one reply: tokens in, pieces and parts out."""

    def __init__(self, tokenizer: Any) -> None:
        self._form = format_of(tokenizer)
        self._stream = TextStream(tokenizer)
        self._tokens: list[ReplyToken] = []
        self._prompt = ""
        self._tools: Sequence[Any] = ()
        self._fresh = ""
        self._looked = 0.0
        # Of each part, how much of its text has been told.
        self._told: list[int] = []

    def replies_to(self, prompt: str, tools: Sequence[Any]) -> None:
        """Say what the reply goes on from, before its first token."""
        self._prompt, self._tools = prompt, tools

    def push(self, step: Step) -> None:
        self.push_token(step.token_id, step.token_bytes, step.is_special)

    def push_token(self, token_id: int, data: bytes, is_special: bool) -> None:
        """Add a token: its id, its bytes and whether it is special."""
        self._tokens.append(ReplyToken(data, is_special))
        self._fresh += self._stream.push(token_id)

    def fresh(self) -> Iterator[tuple[str, PartKind]]:
        """What can be told since it was last asked for: whole characters, outside of markers."""
        if self._form.is_plain:
            piece, self._fresh = self._fresh, ""
            if piece:
                yield piece, "answer"
            return
        # The whole reply is read again each time, so not with every token of a long one.
        now = time.monotonic()
        if now - self._looked >= _SECONDS:
            yield from self._pieces(_HELD)
            self._looked = time.monotonic()

    def rest(self) -> Iterator[tuple[str, PartKind]]:
        """What was held back; after ``finish``."""
        if self._form.is_plain:
            piece = self._fresh + self._stream.rest()
            self._fresh = ""
            if piece:
                yield piece, "answer"
            return
        yield from self._pieces(0)

    def finish(self) -> tuple[str, tuple[Part, ...]]:
        """The text of the answer, and all parts."""
        parts = self._parts()
        if len(parts) == 1 and parts[0].kind == "answer":
            # As the tokenizer decodes it, to the last space.
            return self._stream.finish(), parts
        return answer_of(parts), parts

    def _parts(self) -> tuple[Part, ...]:
        return parts_of(self._form, self._prompt, self._tokens, self._tools)

    def _pieces(self, held: int) -> Iterator[tuple[str, PartKind]]:
        parts = self._parts()
        for place, part in enumerate(parts):
            if place == len(self._told):
                self._told.append(0)
            last = place == len(parts) - 1
            end = len(part.text) - (held if last else 0)
            told = self._told[place]
            if end > told:
                self._told[place] = end
                yield part.text[told:end], part.kind
