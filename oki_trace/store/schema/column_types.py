"""Column types that behave the same on SQLite and PostgreSQL.

Guarantee: any Python string, aware time or whole number of a trace can be written to
both, and reads back the same from both.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from typing import Any

from sqlalchemy import BigInteger, DateTime, Dialect, Integer, Text
from sqlalchemy.dialects import sqlite
from sqlalchemy.types import TypeDecorator, TypeEngine

NUL_SIGN = "\N{SYMBOL FOR NULL}"

# PostgreSQL rejects NUL in text; a lone surrogate has no UTF-8 encoding.
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


def storable(text: str) -> str:
    """``text`` as both engines can store it: NUL becomes U+2400, a lone surrogate U+FFFD.

    The bytes of a token are stored too, so a trace loses nothing.
    """
    if _UNSTORABLE.search(text) is None:
        return text
    return _UNSTORABLE.sub(
        lambda m: NUL_SIGN if m.group() == "\x00" else "\N{REPLACEMENT CHARACTER}", text
    )


class BrokenTime(dt.datetime):
    """Stands for a stored time that cannot be read: 1970-01-01, with the ``stored`` value."""

    stored: object = None

    @classmethod
    def of(cls, stored: object) -> BrokenTime:
        time = cls(1970, 1, 1, tzinfo=dt.UTC)
        time.stored = stored
        return time


class BrokenDocument(str):
    """Stands for a stored JSON document that cannot be parsed: its text."""


def read_document(text: str) -> Any:
    """A JSON document, or its text as a BrokenDocument."""
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return BrokenDocument(text)


class ModelText(TypeDecorator[str]):
    """Text of a model or a user, made storable when it is written."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else storable(value)


class _TextTime(sqlite.DATETIME):
    """SQLite's text as a time, or as a BrokenTime if it is none."""

    def result_processor(self, dialect: Dialect, coltype: object) -> Any:
        read: Any = super().result_processor(dialect, coltype)

        def process(value: Any) -> dt.datetime | None:
            try:
                time: dt.datetime | None = None if value is None else read(value)
                return time
            except (ValueError, TypeError):
                return BrokenTime.of(value)

        return process


class UtcTime(TypeDecorator[dt.datetime]):
    """A time: written with any time zone, read in UTC.

    SQLite stores no time zone, so the stored text is always UTC.
    """

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: dt.datetime | None, dialect: Dialect) -> dt.datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("A time without a time zone cannot be stored: add a time zone.")
        return value.astimezone(dt.UTC)

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name == "sqlite":
            return dialect.type_descriptor(_TextTime())  # type: ignore[no-untyped-call]
        return super().load_dialect_impl(dialect)

    def process_result_value(
        self, value: dt.datetime | None, dialect: Dialect
    ) -> dt.datetime | None:
        if value is None or isinstance(value, BrokenTime):
            return value
        return value.replace(tzinfo=dt.UTC) if value.tzinfo is None else value.astimezone(dt.UTC)


# SQLite numbers rows automatically only in a column declared INTEGER, and an
# INTEGER has 64 bits there anyway.
BigId = BigInteger().with_variant(Integer, "sqlite")
