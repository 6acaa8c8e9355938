"""JSON read a piece at a time, from a file that may be hostile.

The standard library parses each value; this walks the objects and lists around
them, so that a document of any length is read with one step in memory. What is
not JSON by the letter (NaN, Infinity, a name given twice, a number too large,
bytes that are not UTF-8, nesting without end) is an ExchangeError.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn

from oki_trace.errors import ExchangeError

# One value: a step, or a list that is not walked. Steps of large models take a megabyte.
MAX_VALUE_CHARACTERS = 64_000_000
_CHUNK = 1 << 18
_SPACE = re.compile(r"[ \t\r\n]*")
_NUMBER = set("-0123456789")
_LONGEST_TAIL = 32  # characters: of a number's fraction and exponent, with room


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
    """Reads values, and walks into objects and lists, from a file of bytes."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._at = 0
        self._ended = False

    def wrong(self, what: str) -> ExchangeError:
        """The error for this file."""
        return ExchangeError(f"{self._name} cannot be imported: {what}. Nothing was.")

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
        first = self.peek()
        if not first:
            raise self.wrong("it ends in the middle")
        wanted = _CHUNK
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                # A number near the end of what was read may go on behind it.
                near = first in _NUMBER and end > len(self._text) - _LONGEST_TAIL
                length = end - self._at  # reading on moves both
                if not near or not self._more():
                    self._at += length
                    return value
            except json.JSONDecodeError as error:
                # What follows may mend it.
                if not self._more():
                    what = f"it ends in the middle, or is not JSON ({error.msg})"
                    raise self.wrong(what) from error
            except ValueError as error:
                raise self.wrong(str(error)) from error
            except RecursionError as error:
                raise self.wrong("it is nested too deeply") from error
            if len(self._text) - self._at > MAX_VALUE_CHARACTERS:
                raise self.wrong(f"a value is longer than {MAX_VALUE_CHARACTERS:,} characters")
            # Twice as much each time, so that trying again stays cheap.
            while len(self._text) - self._at < wanted and self._more():
                pass
            wanted *= 2

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

    def _take(self, character: str) -> None:
        found = self.peek()
        if found != character:
            what = "it ends in the middle" if not found else "it is not JSON of oki-trace"
            raise self.wrong(what)
        self._at += 1

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
        self._ended = not data
        if self._at:
            self._text, self._at = self._text[self._at :], 0
        self._text += text
        return bool(data)
