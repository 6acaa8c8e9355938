"""Reads JSON one value at a time, from a file that may be malicious.

The standard library parses each value; this module walks the objects and lists around
the values. A document of any length is therefore read with one value in memory, and
names that are not needed are skipped without holding their values. Anything that is
not strictly JSON (NaN, Infinity, a name twice in one object, a number out of
range, bytes that are not UTF-8, endless nesting) is an ExchangeError.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NoReturn

from oki_trace.exchange.refusal import refused

# One value: a step, or a list that is not walked. Steps of large models take a megabyte.
MAX_VALUE_CHARACTERS = 64_000_000
# Of values that are skipped: more than people or programs write.
MAX_DEPTH = 50
_CHUNK = 1 << 18
_SPACE = re.compile(r"[ \t\r\n]*")
_NUMBER = set("-0123456789")
_LONGEST_TAIL = 32  # characters: of a number's fraction and exponent, with some to spare
_CHARACTERS = r'(?:[^"\\\x00-\x1f]++|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*+'
_IN_STRING = re.compile(_CHARACTERS)
_LONGEST_ESCAPE = len(r"\u0000")
# Many small entries of a list, or members of an object, that are skipped at once.
_S = r"[ \t\r\n]*+"
_NUMERAL = r"-?(?:0|[1-9]\d*+)(?:\.\d++)?(?:[eE][-+]?\d++)?"
_SMALL = rf'(?:"{_CHARACTERS}"|{_NUMERAL}|true|false|null|\[{_S}\]|\{{{_S}\}})'
_ENTRIES = re.compile(rf"(?:{_S}{_SMALL}{_S},)*+")
_MEMBERS = re.compile(rf'(?:{_S}"{_CHARACTERS}"{_S}:{_S}{_SMALL}{_S},)*+')


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("an object has the same name twice")
    return values


_DECODER = json.JSONDecoder(
    parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique
)
# The whole of one value. Raises ValueError or RecursionError for text that is not JSON.
loads = _DECODER.decode


class JsonStream:
    """Reads values from a file of bytes, and walks its objects and lists.

    ``pulse`` is called after each piece that is read. Raises ExchangeError.
    """

    def __init__(self, file: BinaryIO, pulse: Callable[[], None] = lambda: None) -> None:
        self._file = file
        self._pulse = pulse
        self._start(0)

    def tell(self) -> int:
        """Where the next value begins, in bytes."""
        self.peek()
        return self._offset + self._bytes_before(self._at)

    def seek(self, offset: int) -> None:
        """Continue at a place that ``tell`` returned, or at the beginning."""
        self._file.seek(offset)
        self._start(offset)

    def _start(self, offset: int) -> None:
        # Only the very beginning may have a byte order mark.
        encoding = "utf-8" if offset else "utf-8-sig"
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._offset = offset  # in bytes, of the text's first character
        self._text = ""
        self._at = 0
        self._at_beginning = not offset
        self._ended = False

    def count(self, name: str, most: int) -> int:
        """How often objects have this name, at most ``most``; the place is lost."""
        quoted = f'"{name}"'.encode()
        self._file.seek(0)
        count, tail = 0, b""
        while count < most and (data := self._file.read(_CHUNK)):
            self._pulse()
            data = tail + data
            count += data.count(quoted)
            tail = data[1 - len(quoted) :]
        return min(count, most)

    def peek(self) -> str:
        """The next character that is not a space; empty at the end."""
        while True:
            self._at = self._end_of(_SPACE)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def value(self) -> Any:
        """The next value, whole."""
        first = self._first()
        wanted = _CHUNK
        while True:
            try:
                value, end = self._decode()
                # A number near the end of the text may continue after it.
                near = first in _NUMBER and end > len(self._text) - _LONGEST_TAIL
                length = end - self._at  # reading moves both
                if not near or not self._more():
                    self._at += length
                    return value
            except json.JSONDecodeError as error:
                if not self._may_continue(error) or not self._more():
                    reason = f"it ends in the middle, or is not JSON ({error.msg})"
                    raise refused(reason) from error
            if len(self._text) - self._at > MAX_VALUE_CHARACTERS:
                raise refused(f"a value is longer than {MAX_VALUE_CHARACTERS:,} characters")
            # Twice as much each time, so that decoding again stays cheap.
            while len(self._text) - self._at < wanted and self._more():
                pass
            wanted *= 2

    def skip(self, depth: int = 0) -> None:
        """Skip the next value, of any length, and hold none of it."""
        first = self._first()
        try:
            _, end = self._decode()
            if first not in _NUMBER or end <= len(self._text) - _LONGEST_TAIL:
                self._at = end
                return
        except json.JSONDecodeError as error:
            if not self._may_continue(error):
                raise refused(f"it is not JSON ({error.msg})") from error
        if depth > MAX_DEPTH:
            raise refused("it is nested too deeply")
        if first in "{[":
            self._skip_within(first, depth)
        elif first == '"':
            self._skip_string()
        else:
            self.value()

    def items(self, *, unique: bool = True) -> Iterator[str]:
        """The names of an object; the caller takes the value of each before the next name.

        ``unique``: names are remembered, and one that comes twice is refused.
        """
        names: set[str] = set()
        for _ in self._within("{", "}"):
            name = self.value()
            if not isinstance(name, str) or name in names:
                raise refused("it is not JSON, or an object has the same name twice")
            if unique:
                names.add(name)
            self._take(":")
            yield name

    def elements(self) -> Iterator[None]:
        """The places of a list; the caller takes the value at each before the next."""
        return self._within("[", "]")

    def end(self) -> None:
        """Raise unless the file ends here."""
        if self.peek():
            raise refused("it continues after the end of its JSON")

    # ------------------------------------------------------------------- text

    def _within(self, first: str, last: str) -> Iterator[None]:
        self._take(first)
        if self.peek() != last:
            yield
            while self.peek() == ",":
                self._take(",")
                yield
        self._take(last)

    def _first(self) -> str:
        first = self.peek()
        if not first:
            raise refused("it ends in the middle")
        return first

    def _decode(self) -> tuple[Any, int]:
        """The value that begins here, and where it ends. Raises JSONDecodeError without one."""
        try:
            return _DECODER.raw_decode(self._text, self._at)
        except json.JSONDecodeError:
            raise
        except ValueError as error:
            # Python refuses to parse a whole number of more than some thousand digits.
            too_long = "digits" in str(error)
            raise refused("a number has too many digits" if too_long else str(error)) from error
        except RecursionError as error:
            raise refused("it is nested too deeply") from error

    def _may_continue(self, error: json.JSONDecodeError) -> bool:
        """Whether the text that follows may complete the value."""
        unfinished = error.msg.startswith("Unterminated string")
        return unfinished or error.pos >= len(self._text) - _LONGEST_TAIL

    def _skip_within(self, first: str, depth: int) -> None:
        """An object or a list, entry by entry; many small ones at once."""
        is_object = first == "{"
        for _ in self._within(first, "}" if is_object else "]"):
            self._at = self._end_of(_MEMBERS if is_object else _ENTRIES)
            if is_object:
                if self.peek() != '"':
                    raise refused("it is not JSON (a member without a name)")
                self.skip(depth + 1)
                self._take(":")
            self.skip(depth + 1)

    def _skip_string(self) -> None:
        self._at += 1
        while True:
            self._at = self._end_of(_IN_STRING)
            rest = len(self._text) - self._at
            if rest and self._text[self._at] == '"':
                self._at += 1
                return
            # An escape may be cut in two.
            cut = rest < _LONGEST_ESCAPE and (not rest or self._text[self._at] == "\\")
            if not cut or not self._more():
                raise refused("it ends in the middle, or is not JSON (a string without an end)")

    def _take(self, character: str) -> None:
        found = self.peek()
        if found != character:
            raise refused("it is not an oki-trace export" if found else "it ends in the middle")
        self._at += 1

    def _end_of(self, pattern: re.Pattern[str]) -> int:
        """Where a pattern that also matches nothing ends."""
        match = pattern.match(self._text, self._at)
        assert match is not None
        return match.end()

    def _bytes_before(self, at: int) -> int:
        return at if self._text.isascii() else len(self._text[:at].encode("utf-8"))

    def _more(self) -> bool:
        """Read the next piece; False at the end of the file."""
        if self._ended:
            return False
        try:
            data = self._file.read(_CHUNK)
            text = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise refused("it is not UTF-8 text") from error
        except OSError as error:
            raise refused(str(error.strerror or error)) from error
        self._pulse()
        self._ended = not data
        if self._at_beginning and data.startswith(codecs.BOM_UTF8):
            self._offset = len(codecs.BOM_UTF8)
        self._at_beginning = False
        if self._at:
            self._offset += self._bytes_before(self._at)
            self._text, self._at = self._text[self._at :], 0
        self._text += text
        return bool(data)
