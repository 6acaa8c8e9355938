"""What each token id is: its text, its bytes, and whether it is special.

A tokenizer's ``decode([id])`` is lossy: half a UTF-8 character becomes U+FFFD
and SentencePiece drops a leading space. Here every id keeps its own bytes, so
that the bytes of a text's tokens, joined, are the text (SentencePiece puts a
space before it, which is then there too).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

from oki_trace.errors import CaptureError
from oki_trace.sanitize import visible

Scheme = Literal["byte-level", "sentencepiece", "bytes", "plain"]
# Each byte of its UTF-8 is a token of ByT5, whose text is the character of that number. (In
# byte-level BPE the last is another character.)
_IN_BYTES = "\u00e9\x01"


def byte_level_alphabet() -> dict[str, int]:
    """The printable stand-in of each byte in byte-level BPE (GPT-2's ``bytes_to_unicode``)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    stand_in = 0x100
    for byte in range(0x100):
        if byte not in printable:
            alphabet[chr(stand_in)] = byte
            stand_in += 1
    return alphabet


def bytes_to_text(raw: bytes) -> str:
    """The text of these bytes; where they are not whole UTF-8, each byte as ``<0xE2>``."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in raw)


class Vocabulary:
    """The tokens of one tokenizer, by id. Any id below the model's head size is valid."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {int(i): t for i, t in tokenizer.added_tokens_decoder.items()}
        self._special = set(tokenizer.all_special_ids)
        self._alphabet = byte_level_alphabet()
        self._text: dict[int, str] = {}
        self._bytes: dict[int, bytes] = {}

    def text(self, token_id: int) -> str:
        """How the token reads; control characters are kept as they are."""
        found = self._text.get(token_id)
        if found is None:
            found = self._text[token_id] = self._read(token_id)
        return found

    def token_bytes(self, token_id: int) -> bytes:
        """The token's own bytes; empty for an id that the tokenizer does not use."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._encode(token_id)
        return found

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a marker rather than text (end of turn, padding, unused)."""
        added = self._added.get(token_id)
        if added is not None:
            return bool(added.special) or token_id in self._special
        return token_id in self._special or self._piece(token_id) is None

    def _read(self, token_id: int) -> str:
        if self._piece(token_id) is None:
            return f"<unused {token_id}>"
        return bytes_to_text(self.token_bytes(token_id))

    def _piece(self, token_id: int) -> str | None:
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        return piece if isinstance(piece, str) else None

    def _encode(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        if added is not None:
            content = str(added.content)
            # Gemma adds its runs of spaces to the vocabulary: decoded like any other piece.
            spaced = self._scheme == "sentencepiece" and not self.is_special(token_id)
            return (content.replace("▁", " ") if spaced else content).encode()
        piece = self._piece(token_id)
        if piece is None:
            return b""
        if self._scheme == "byte-level":
            try:
                return bytes(self._alphabet[character] for character in piece)
            except KeyError:
                return piece.encode()
        if self._scheme == "sentencepiece":
            if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                return bytes([int(piece[3:5], 16)])
            return piece.replace("▁", " ").encode()
        if self._scheme == "bytes" and len(piece) == 1 and ord(piece) < 0x100:
            return bytes([ord(piece)])
        return str(self._tokenizer.decode([token_id])).encode()

    @cached_property
    def _scheme(self) -> Scheme:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        decoder = getattr(backend, "decoder", None)
        if decoder is None and self._gives_bytes():
            return "bytes"
        if decoder is None:
            pieces = self._tokenizer.convert_ids_to_tokens(list(range(min(1000, self._size))))
            return "sentencepiece" if any("▁" in str(piece) for piece in pieces) else "plain"
        kinds = _decoder_kinds(json.loads(decoder.__getstate__()))
        if "ByteLevel" in kinds:
            return "byte-level"
        if kinds & {"ByteFallback", "Metaspace", "Replace"}:
            return "sentencepiece"
        return "plain"

    def _gives_bytes(self) -> bool:
        try:
            ids = self._tokenizer(_IN_BYTES, add_special_tokens=False)["input_ids"]
            pieces = self._tokenizer.convert_ids_to_tokens(ids)
        except Exception:  # a tokenizer is a program, and this is one more text for it
            return False
        return list(pieces) == [chr(byte) for byte in _IN_BYTES.encode()]

    @property
    def _size(self) -> int:
        return len(self._tokenizer)


def _decoder_kinds(state: dict[str, Any]) -> set[str]:
    kinds = {str(state.get("type"))}
    for part in state.get("decoders", ()):
        kinds |= _decoder_kinds(part)
    return kinds


def require_embeddings(model: Any, ids: Sequence[int], vocabulary: Vocabulary) -> None:
    """Raise CaptureError where the tokenizer gives ids that the model has no embedding for."""
    try:
        rows = int(model.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError, IndexError):
        return
    largest = max(ids, default=0)
    if largest >= rows:
        raise CaptureError(
            f"The tokenizer gives {visible(vocabulary.text(largest))} the id {largest:,}, and the "
            f"model has embeddings for {rows:,} tokens. Load the tokenizer that belongs to the "
            "model, or call model.resize_token_embeddings(len(tokenizer)) and train them."
        )


class TextStream:
    """Turns token ids into text as they come, emitting a character only when it is whole.

    The pieces joined and ``rest()`` are ``finish()``, which is
    ``tokenizer.decode(ids, skip_special_tokens=True)`` with no space tidied
    away. Only the last few tokens are decoded again at each step.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0
        self._read = 0
        self._given = 0

    def push(self, token_id: int) -> str:
        """Add a token; return the text that has become whole with it, perhaps none."""
        self._ids.append(token_id)
        before = self._decode(self._ids[self._start : self._read])
        now = self._decode(self._ids[self._start :])
        if now.endswith("\N{REPLACEMENT CHARACTER}") or len(now) <= len(before):
            return ""
        self._start, self._read = self._read, len(self._ids)
        piece = now[len(before) :]
        self._given += len(piece)
        return piece

    def rest(self) -> str:
        """What ``push`` has held back: the beginning of a character that was never finished."""
        return self.finish()[self._given :]

    def finish(self) -> str:
        """The whole text, and the only place where an unfinished character shows."""
        return self._decode(self._ids)

    def _decode(self, ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
