"""Taking typed values out of what a file says, without believing any of it."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Iterator
from typing import Any

from oki_trace.errors import ExchangeError

MAX_INTEGER = 2**31 - 1
_MAX_FLOAT32 = 3.4028234e38
_MISSING: Any = object()
NAN = float("nan")


class Fields:
    """The named values of one object. A wrong one is an ExchangeError that says where it stands.

    A default stands in for a name that is missing or null; without one it has to be there.
    """

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise wrong(f"{where} is no object")
        self._values: dict[str, Any] = values
        self.where = where

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def raw(self, name: str) -> Any:
        return self._values.get(name)

    def text(self, name: str, default: Any = _MISSING, most: int | None = None) -> Any:
        value = self._get(name, default)
        if value is default:
            return default
        if not isinstance(value, str):
            raise self.wrong(name, "is no text")
        if most is not None and len(value) > most:
            raise self.wrong(name, f"is longer than {most:,} characters")
        return value

    def flag(self, name: str, default: Any = _MISSING) -> Any:
        value = self._get(name, default)
        if value is not default and not isinstance(value, bool):
            raise self.wrong(name, "is neither true nor false")
        return value

    def integer(
        self, name: str, default: Any = _MISSING, low: int = 0, high: int = MAX_INTEGER
    ) -> Any:
        value = self._get(name, default)
        if value is default:
            return default
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(name, f"is no whole number from {low} to {high:,}")
        return value

    def number(self, name: str, default: Any = NAN) -> Any:
        value = self._get(name, default)
        return value if value is default else as_number(value, self, name)

    def list(self, name: str, most: int, default: Any = _MISSING) -> Any:
        value = self._get(name, default)
        if value is default:
            return default
        if not isinstance(value, list):
            raise self.wrong(name, "is no list")
        if len(value) > most:
            raise self.wrong(name, f"has more than {most:,} entries")
        return value

    def integers(
        self, name: str, most: int, default: Any = _MISSING, high: int = MAX_INTEGER
    ) -> Any:
        """A tuple of whole numbers from 0."""
        values = self.list(name, most, default)
        if values is default:
            return default
        if any(type(value) is not int or not 0 <= value <= high for value in values):
            raise self.wrong(name, "is no list of whole numbers")
        return tuple(values)

    def texts(self, name: str, most: int, default: Any = _MISSING) -> Any:
        values = self.list(name, most, default)
        if values is default:
            return default
        if not all(isinstance(value, str) for value in values):
            raise self.wrong(name, "is no list of texts")
        return tuple(values)

    def objects(self, name: str, most: int) -> Iterator[Fields]:
        """Each entry of a list of objects; none where there is no list."""
        for place, entry in enumerate(self.list(name, most, [])):
            yield Fields(entry, f"{self.where}, {name} {place + 1}")

    def object(self, name: str) -> Fields | None:
        value = self._values.get(name)
        return None if value is None else Fields(value, f"{self.where}, {name}")

    def time(self, name: str) -> dt.datetime | None:
        """A moment; one without a time zone is taken as UTC."""
        text = self.text(name, None, most=64)
        if text is None:
            return None
        try:
            moment = dt.datetime.fromisoformat(text)
            return (moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)).astimezone(dt.UTC)
        except (ValueError, OverflowError) as error:
            raise self.wrong(name, "is no time") from error

    def wrong(self, name: str, what: str) -> ExchangeError:
        return wrong(f"{self.where}: {name} {what}")

    def _get(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        if value is not None:
            return value
        if default is _MISSING:
            raise self.wrong(name, "is missing")
        return default


def as_number(value: Any, fields: Fields, name: str) -> float:
    """A number that a 32-bit float can hold; infinities and NaN are such."""
    if type(value) not in (int, float):
        raise fields.wrong(name, "is no number")
    try:
        number = float(value)
    except OverflowError as error:
        raise fields.wrong(name, "is too large a number") from error
    if math.isfinite(number) and abs(number) > _MAX_FLOAT32:
        raise fields.wrong(name, "is too large a number")
    return number


def wrong(what: str) -> ExchangeError:
    """The error for a file that cannot be imported."""
    return ExchangeError(f"The file cannot be imported: {what}. Nothing was.")
