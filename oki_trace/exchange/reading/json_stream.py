"""JSON read a piece at a time, from a file that may be hostile.

The standard library parses each value; this walks the objects and lists around
them, so that a document of any length is read with one value in memory, and
passes over what nobody asks for without holding it. What is not JSON by the
letter (NaN, Infinity, a name given twice, a number too large, bytes that are
not UTF-8, nesting without end) is an ExchangeError.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NoReturn

from oki_trace.errors import ExchangeError

# One value: a step, or a list that is not walked. Steps of large models take a megabyte.
MAX_VALUE_CHARACTERS = 64_000_000
# Of names that are passed over: deeper than anything is written by hand or by a program.
MAX_DEPTH = 50
_CHUNK = 1 << 18
_SPACE = re.compile(r"[ \t\r\n]*")
_NUMBER = set("-0123456789")
_LONGEST_TAIL = 32  # characters: of a number's fraction and exponent, with room
_CHARACTERS = r'(?:[^"\\\x00-\x1f]++|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*+'
_IN_STRING = re.compile(_CHARACTERS)
_LONGEST_ESCAPE = len(r"\u0000")
# Many small entries of a list, or members of an object, that are passed over at once.
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
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice in one object")
    return found


_DECODER = json.JSONDecoder(
    parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique
)


def loads(text: str) -> Any:
    """One value, whole. Raises ValueError or RecursionError for what is not JSON."""
    return _DECODER.decode(text)


class JsonStream:
    """Reads values, and walks into objects and lists, from a file of bytes.

    ``pulse`` is called with each piece that is read.
    """

    def __init__(self, file: BinaryIO, name: str, pulse: Callable[[], None] = lambda: None) -> None:
        self._file = file
        self._name = name
        self._pulse = pulse
        self._start(0)

    def _start(self, offset: int) -> None:
        # A mark of the byte order may stand at the very beginning, and nowhere else.
        encoding = "utf-8" if offset else "utf-8-sig"
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._offset = offset  # in bytes, of the text's first character
        self._text = ""
        self._at = 0
        self._at_beginning = not offset
        self._ended = False

    def wrong(self, what: str) -> ExchangeError:
        """The error for this file."""
        return ExchangeError(f"{self._name} cannot be imported: {what}. Nothing was.")

    def tell(self) -> int:
        """Where the next value begins, in bytes."""
        self.peek()
        return self._offset + self._bytes_before(self._at)

    def seek(self, offset: int) -> None:
        """Go on from a place that ``tell`` has told."""
        self._file.seek(offset)
        self._start(offset)

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            assert found is not None
            self._at = found.end()
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
                value, end = self._decoded()
                # A number near the end of what was read may go on behind it.
                near = first in _NUMBER and end > len(self._text) - _LONGEST_TAIL
                length = end - self._at  # reading on moves both
                if not near or not self._more():
                    self._at += length
                    return value
            except json.JSONDecodeError as error:
                if not self._may_go_on(error) or not self._more():
                    what = f"it ends in the middle, or is not JSON ({error.msg})"
                    raise self.wrong(what) from error
            if len(self._text) - self._at > MAX_VALUE_CHARACTERS:
                raise self.wrong(f"a value is longer than {MAX_VALUE_CHARACTERS:,} characters")
            # Twice as much each time, so that trying again stays cheap.
            while len(self._text) - self._at < wanted and self._more():
                pass
            wanted *= 2

    def skip(self, depth: int = 0) -> None:
        """Pass over the next value, however long, and hold none of it."""
        first = self._first()
        try:
            _, end = self._decoded()
            if first not in _NUMBER or end <= len(self._text) - _LONGEST_TAIL:
                self._at = end
                return
        except json.JSONDecodeError as error:
            if not self._may_go_on(error):
                raise self.wrong(f"it is not JSON ({error.msg})") from error
        if depth > MAX_DEPTH:
            raise self.wrong("it is nested too deeply")
        if first in "{[":
            self._skip_within(first, depth)
        elif first == '"':
            self._skip_string()
        else:
            self.value()

    def items(self, *, unique: bool = True) -> Iterator[str]:
        """The names of an object; the caller takes the value of each before the next.

        That none is given twice is seen to by remembering them, unless the caller does it.
        """
        self._take("{")
        seen: set[str] = set()
        if self.peek() != "}":
            while True:
                name = self.value()
                if not isinstance(name, str) or name in seen:
                    raise self.wrong("it is not JSON, or gives a name twice in one object")
                if unique:
                    seen.add(name)
                self._take(":")
                yield name
                if self.peek() != ",":
                    break
                self._take(",")
        self._take("}")

    def elements(self) -> Iterator[None]:
        """The places of a list; the caller takes the value at each before the next."""
        self._take("[")
        if self.peek() != "]":
            while True:
                yield
                if self.peek() != ",":
                    break
                self._take(",")
        self._take("]")

    def end(self) -> None:
        """Nothing may follow."""
        if self.peek():
            raise self.wrong("something stands after its end")

    # ------------------------------------------------------------------- within

    def _first(self) -> str:
        first = self.peek()
        if not first:
            raise self.wrong("it ends in the middle")
        return first

    def _decoded(self) -> tuple[Any, int]:
        """What can be decoded from here, and where it ends; JSONDecodeError where nothing can."""
        try:
            return _DECODER.raw_decode(self._text, self._at)
        except json.JSONDecodeError:
            raise
        except ValueError as error:
            too_long = "digits" in str(error)
            what = "a number has too many digits" if too_long else str(error)
            raise self.wrong(what) from error
        except RecursionError as error:
            raise self.wrong("it is nested too deeply") from error

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        """Whether what follows may mend it."""
        unfinished = error.msg.startswith("Unterminated string")
        return unfinished or error.pos >= len(self._text) - _LONGEST_TAIL

    def _skip_within(self, first: str, depth: int) -> None:
        """An object or a list, entry by entry; small ones many at once."""
        small, last = (_MEMBERS, "}") if first == "{" else (_ENTRIES, "]")
        self._take(first)
        if self.peek() != last:
            while True:
                found = small.match(self._text, self._at)
                assert found is not None
                self._at = found.end()
                if first == "{":
                    if self.peek() != '"':
                        raise self.wrong("it is not JSON (an object without a name)")
                    self.skip(depth + 1)
                    self._take(":")
                self.skip(depth + 1)
                if self.peek() != ",":
                    break
                self._take(",")
        self._take(last)

    def _skip_string(self) -> None:
        self._at += 1
        while True:
            found = _IN_STRING.match(self._text, self._at)
            assert found is not None
            self._at = found.end()
            left = len(self._text) - self._at
            if left and self._text[self._at] == '"':
                self._at += 1
                return
            # An escape may be cut in two.
            cut = left < _LONGEST_ESCAPE and (not left or self._text[self._at] == "\\")
            if not cut or not self._more():
                raise self.wrong("it ends in the middle, or is not JSON (a string that is none)")

    def _take(self, character: str) -> None:
        found = self.peek()
        if found != character:
            what = "it ends in the middle" if not found else "it is not JSON of oki-trace"
            raise self.wrong(what)
        self._at += 1

    def _bytes_before(self, at: int) -> int:
        if self._text.isascii():
            return at
        return len(self._text[:at].encode("utf-8"))

    def _more(self) -> bool:
        """Read on; False at the end of the file."""
        if self._ended:
            return False
        try:
            data = self._file.read(_CHUNK)
            text = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise self.wrong("it is not UTF-8 text") from error
        except OSError as error:
            raise self.wrong(str(error.strerror or error)) from error
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
