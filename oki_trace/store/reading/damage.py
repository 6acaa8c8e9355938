"""Handles invalid stored values: replaces them by harmless ones and reports the damage.

A store is a file that other programs can change. An invalid value marks its message,
conversation or steps as damaged; everything else is still read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from oki_trace.errors import DamagedSteps, OkiTraceError
from oki_trace.records import Role
from oki_trace.store.liveness import status_of
from oki_trace.store.schema.column_types import BrokenDocument, BrokenTime

_T = TypeVar("_T")
_N = TypeVar("_N", int, float)

# What Python raises for a value of another kind than a record holds.
_WRONG_KIND = (ValueError, TypeError, KeyError, AttributeError, IndexError, ZeroDivisionError)


class Damage:
    """The invalid values of one row; false if it has none."""

    def __init__(self) -> None:
        self._problems: list[str] = []

    def __str__(self) -> str:
        return "; ".join(self._problems)

    def __bool__(self) -> bool:
        return bool(self._problems)

    @property
    def sentence(self) -> str | None:
        """All problems in one sentence, or None."""
        return str(self) or None

    def add(self, problem: str) -> None:
        self._problems.append(problem)

    def status(self, value: object) -> None:
        if status_of(value) != value:
            self.add(f"its status is {_quoted(value)}")

    def role(self, value: object) -> Role:
        try:
            return Role(str(value))
        except ValueError:
            self.add(f"its role is {_quoted(value)}")
            return Role.USER

    def time(self, name: str, value: _T) -> _T:
        if isinstance(value, BrokenTime):
            self.add(f"its {name} is {_quoted(value.stored)}")
        return value

    def part(self, name: str, read: Callable[[Any], _T], value: Any) -> _T | None:
        """The record that ``read`` makes of a document; None if there is none, or no record."""
        try:
            if isinstance(value, BrokenDocument):
                raise ValueError("not JSON")
            return None if value is None else read(value)
        except (*_WRONG_KIND, OkiTraceError) as error:
            self.add(f"its {name} is invalid ({type(error).__name__})")
            return None

    def number(self, name: str, value: Any, kind: type[_N]) -> _N | None:
        """A number of this kind (an int is a float too), or None."""
        if value is None or isinstance(value, kind) or (kind is float and isinstance(value, int)):
            number: _N | None = value
            return number
        self.add(f"its {name} is {_quoted(value)}")
        return None

    def text(self, name: str, value: Any) -> str:
        """A text; any other value becomes the text that shows it."""
        if isinstance(value, str):
            return value
        self.add(f"its {name} is not text")
        return "" if value is None else repr(value)[:200]


def _quoted(value: object) -> str:
    return repr(value if isinstance(value, str | int | float) else str(value))[:80]


@contextmanager
def report_damaged_steps(message_id: int) -> Iterator[None]:
    """Turn errors from invalid values in a step's rows into DamagedSteps."""
    try:
        yield
    except _WRONG_KIND as error:
        why = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise DamagedSteps(
            f"The steps of message {message_id} are damaged ({why}): see `oki-trace verify`; "
            "restore a backup, or delete its conversation."
        ) from error
