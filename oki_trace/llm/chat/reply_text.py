"""The text of a reply while it grows, and its parts when it has ended.

For most models, which use no markers, it is the text that the tokenizer decodes.
Where thinking and calls are marked, each piece comes with the kind of its part.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from oki_trace.llm.capture.vocabulary import TextStream, Vocabulary
from oki_trace.llm.chat.markers import format_of
from oki_trace.llm.chat.parts import ReplyToken, answer_of, parts_of
from oki_trace.records import Part, PartKind, Prompt, Step

# Characters at the end that are held back: they may begin a marker.
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
        self._parsed_at = 0.0
        # The number of characters of each part that were returned.
        self._returned: list[int] = []
        self._prefix_len = 0

    def replies_to(
        self, prompt: Prompt, tools: Sequence[Any], prefix_len: int, vocabulary: Vocabulary
    ) -> str:
        """Set the prompt and the tools, before the first token.

        The last ``prefix_len`` tokens of the prompt are the beginning of the reply. Its text
        is returned, and is part of the whole text, but not of the pieces.
        """
        prefix = prompt.token_ids[len(prompt) - prefix_len :]
        tokens = [ReplyToken(vocabulary.token_bytes(i), vocabulary.is_special(i)) for i in prefix]
        text = b"".join(token.data for token in tokens).decode("utf-8", errors="replace")
        self._prompt, self._tools = prompt.text.removesuffix(text), tools
        for token_id, token in zip(prefix, tokens, strict=True):
            self.push_token(token_id, *token)
        self._prefix_len = prefix_len
        for _ in self._plain() if self._form.is_plain else self._pieces(0):
            pass  # nothing of it is new
        readable = [token.data for token in tokens if not token.is_special]
        return b"".join(readable).decode("utf-8", errors="replace")

    def push(self, step: Step) -> None:
        self.push_token(step.token_id, step.token_bytes, step.is_special)

    def push_token(self, token_id: int, data: bytes, is_special: bool) -> None:
        """Add a token: its id, its bytes and whether it is special."""
        self._tokens.append(ReplyToken(data, is_special))
        self._fresh += self._stream.push(token_id)

    def fresh(self) -> Iterator[tuple[str, PartKind]]:
        """The text since the last call: whole characters, without markers."""
        if self._form.is_plain:
            yield from self._plain()
        # The whole reply is parsed each time, so not at every token.
        elif time.monotonic() - self._parsed_at >= _SECONDS:
            yield from self._pieces(_HELD)
            self._parsed_at = time.monotonic()

    def rest(self) -> Iterator[tuple[str, PartKind]]:
        """The text that was held back; after ``finish``."""
        if self._form.is_plain:
            self._fresh += self._stream.rest()
            yield from self._plain()
        else:
            yield from self._pieces(0)

    def finish(self) -> tuple[str, tuple[Part, ...]]:
        """The text of the answer, and all parts; their steps are those of the reply's own."""
        parts = tuple(
            replace(
                part,
                start=max(part.start - self._prefix_len, 0),
                end=max(part.end - self._prefix_len, 0),
            )
            for part in self._parts()
        )
        if len(parts) == 1 and parts[0].kind == "answer":
            # As the tokenizer decodes it, with all its spaces.
            return self._stream.finish(), parts
        return answer_of(parts), parts

    def _parts(self) -> tuple[Part, ...]:
        return parts_of(self._form, self._prompt, self._tokens, self._tools)

    def _plain(self) -> Iterator[tuple[str, PartKind]]:
        piece, self._fresh = self._fresh, ""
        if piece:
            yield piece, "answer"

    def _pieces(self, held: int) -> Iterator[tuple[str, PartKind]]:
        parts = self._parts()
        self._returned += [0] * (len(parts) - len(self._returned))
        for place, part in enumerate(parts):
            begin = self._returned[place]
            end = len(part.text) - (held if place == len(parts) - 1 else 0)
            if end > begin:
                self._returned[place] = end
                yield part.text[begin:end], part.kind
