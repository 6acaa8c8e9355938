"""What is in a row that cannot be there: read as something harmless, and told.

A store is a file that others can change. One value that makes no sense marks what
it belongs to as damaged; all else is still read.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from oki_trace.errors import DamagedSteps, OkiTraceError
from oki_trace.records import Role, Status

_T = TypeVar("_T")

# What Python raises where a value is not of the kind that a record has.
NONSENSE = (ValueError, TypeError, KeyError, AttributeError, IndexError, ZeroDivisionError)


class BrokenTime(dt.datetime):
    """In the place of a time that is none: the beginning of 1970."""

    told: object = None

    @classmethod
    def of(cls, told: object) -> BrokenTime:
        made = cls(1970, 1, 1, tzinfo=dt.UTC)
        made.told = told
        return made


class BrokenDocument(str):
    """In the place of a JSON document that is none: its text."""


def document(text: str) -> Any:
    """A JSON document, or its text as a BrokenDocument."""
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return BrokenDocument(text)


def status_of(text: object) -> Status:
    """A stored status; a reply of an unknown one has failed."""
    try:
        return Status(str(text))
    except ValueError:
        return Status.FAILED


class Damage:
    """What is found to be damaged in one row."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def __str__(self) -> str:
        return "; ".join(self._found)

    def told(self) -> str | None:
        """One sentence, or None."""
        return str(self) or None

    def add(self, what: str) -> None:
        self._found.append(what)

    def status(self, text: object) -> Status:
        status = status_of(text)
        if status != text:
            self.add(f"its status is {_quoted(text)}")
        return status

    def role(self, text: object) -> Role:
        try:
            return Role(str(text))
        except ValueError:
            self.add(f"its role is {_quoted(text)}")
            return Role.USER

    def time(self, name: str, when: _T) -> _T:
        if isinstance(when, BrokenTime):
            self.add(f"its {name} is {_quoted(when.told)}")
        return when

    def part(self, name: str, read: Callable[[Any], _T | None], stored: Any) -> _T | None:
        """A document as the record that ``read`` makes of it; None where it makes none."""
        try:
            if isinstance(stored, BrokenDocument):
                raise ValueError("no JSON")
            return read(stored)
        except (*NONSENSE, OkiTraceError) as error:
            self.add(f"its {name} makes no sense ({type(error).__name__})")
            return None

    def whole(self, name: str, value: Any) -> int | None:
        """A whole number, or None."""
        if value is None or isinstance(value, int):
            return value
        self.add(f"its {name} is {_quoted(value)}")
        return None

    def measured(self, name: str, value: Any) -> float | None:
        """A measured number, or None."""
        if value is None or isinstance(value, int | float):
            return value
        self.add(f"its {name} is {_quoted(value)}")
        return None

    def text(self, name: str, value: Any) -> str:
        """A text; what is none is shown as one."""
        if isinstance(value, str):
            return value
        self.add(f"its {name} is no text")
        return "" if value is None else repr(value)[:200]


def _quoted(value: object) -> str:
    return repr(value if isinstance(value, str | int | float) else str(value))[:80]


@contextmanager
def steps_told(message_id: int) -> Iterator[None]:
    """Turn what a step's rows that make no sense raise into DamagedSteps."""
    try:
        yield
    except NONSENSE as error:
        why = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise DamagedSteps(
            f"The steps of message {message_id} are damaged ({why}): see `oki-trace verify`; "
            "restore a backup, or delete its conversation."
        ) from error
