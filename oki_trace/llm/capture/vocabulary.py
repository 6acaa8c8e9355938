"""The text and bytes of each token id, and whether it is special.

A tokenizer's ``decode([id])`` is lossy: half a UTF-8 character becomes U+FFFD
and SentencePiece drops a leading space. Here every id keeps its own bytes, so the
joined bytes of a text's tokens are the text (with the space that SentencePiece puts
before it).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

from oki_trace.errors import CaptureError
from oki_trace.llm.tokenizers_internals import decoder_types
from oki_trace.sanitize import visible

Scheme = Literal["byte-level", "sentencepiece", "bytes", "plain"]
# ByT5 has one token per byte of this text's UTF-8, each the character with that code. (In
# byte-level BPE the last one is another character.)
_BYTE_TOKENS_SAMPLE = "\u00e9\x01"


def byte_level_alphabet() -> dict[str, int]:
    """The byte of each character in byte-level BPE (GPT-2's ``bytes_to_unicode``, inverted)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(0x100 + i): byte for i, byte in enumerate(others)},
    }


def bytes_to_text(raw: bytes) -> str:
    """The text of UTF-8 bytes; each byte as ``<0xE2>`` where they are no valid UTF-8."""
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
        self._texts: dict[int, str] = {}
        self._bytes: dict[int, bytes] = {}

    def has(self, token_id: int) -> bool:
        """Whether the tokenizer itself has a token of this id."""
        return 0 <= token_id < len(self._tokenizer) or token_id in self._added

    def text(self, token_id: int) -> str:
        """The token as text, control characters unchanged."""
        text = self._texts.get(token_id)
        if text is None:
            unused = self._piece(token_id) is None
            text = f"<unused {token_id}>" if unused else bytes_to_text(self.token_bytes(token_id))
            self._texts[token_id] = text
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The token's own bytes; empty for an id that the tokenizer does not use."""
        raw = self._bytes.get(token_id)
        if raw is None:
            raw = self._bytes[token_id] = self._encode(token_id)
        return raw

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a marker rather than text (end of turn, padding, unused)."""
        added = self._added.get(token_id)
        if added is not None:
            return bool(added.special) or token_id in self._special
        return token_id in self._special or self._piece(token_id) is None

    def _piece(self, token_id: int) -> str | None:
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        return piece if isinstance(piece, str) else None

    def _encode(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        if added is not None:
            content = str(added.content)
            # Gemma's runs of spaces are added tokens, but decoded like any other piece.
            is_piece = self._scheme == "sentencepiece" and not self.is_special(token_id)
            return (content.replace("▁", " ") if is_piece else content).encode()
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
        decoders = decoder_types(self._tokenizer)
        if decoders is None and self._has_byte_tokens():
            return "bytes"
        if decoders is None:
            first_ids = list(range(min(1000, len(self._tokenizer))))
            pieces = self._tokenizer.convert_ids_to_tokens(first_ids)
            return "sentencepiece" if any("▁" in str(piece) for piece in pieces) else "plain"
        if "ByteLevel" in decoders:
            return "byte-level"
        if decoders & {"ByteFallback", "Metaspace", "Replace"}:
            return "sentencepiece"
        return "plain"

    def _has_byte_tokens(self) -> bool:
        try:
            ids = self._tokenizer(_BYTE_TOKENS_SAMPLE, add_special_tokens=False)["input_ids"]
            pieces = self._tokenizer.convert_ids_to_tokens(ids)
        except Exception:  # a tokenizer's own code can raise anything
            return False
        return list(pieces) == [chr(byte) for byte in _BYTE_TOKENS_SAMPLE.encode()]


def require_embeddings(model: Any, ids: Sequence[int], vocabulary: Vocabulary) -> None:
    """Raise CaptureError where the model has no embedding for one of the ids."""
    try:
        rows = int(model.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError, IndexError):
        return
    largest = max(ids, default=0)
    if largest >= rows and not vocabulary.has(largest):
        raise CaptureError(
            f"The model has no token with the id {largest:,}. Choose an id below {rows:,}."
        )
    if largest >= rows:
        raise CaptureError(
            f"The tokenizer gives {visible(vocabulary.text(largest))} the id {largest:,}, but the "
            f"model has embeddings for only {rows:,} tokens. Load the tokenizer that belongs to "
            "the model, or call model.resize_token_embeddings(len(tokenizer)) and train them."
        )


class TextStream:
    """Turns token ids into text as they come; a character is returned when it is complete.

    The joined pieces and ``rest()`` equal ``finish()``, which is
    ``tokenizer.decode(ids, skip_special_tokens=True)`` without the clean-up of spaces.
    Only the last few tokens are decoded again at each step.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # Tokens from ``start`` are decoded again; the text of those before ``end`` was returned.
        self._start = self._end = 0
        self._returned_chars = 0

    def push(self, token_id: int) -> str:
        """Add a token; return the text that is complete with it, perhaps none."""
        self._ids.append(token_id)
        before = self._decode(self._ids[self._start : self._end])
        now = self._decode(self._ids[self._start :])
        if now.endswith("\N{REPLACEMENT CHARACTER}") or len(now) <= len(before):
            return ""
        self._start, self._end = self._end, len(self._ids)
        piece = now[len(before) :]
        self._returned_chars += len(piece)
        return piece

    def rest(self) -> str:
        """The text that ``push`` has not returned: the beginning of an incomplete character."""
        return self.finish()[self._returned_chars :]

    def finish(self) -> str:
        """The whole text, with an incomplete character as U+FFFD."""
        return self._decode(self._ids)

    def _decode(self, ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
