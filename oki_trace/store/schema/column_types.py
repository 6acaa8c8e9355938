"""Column types that mean the same on SQLite and PostgreSQL.

The guarantee: any Python string, any aware time and any whole number a trace
holds can be written on both, and reads back the same from both.
"""

from __future__ import annotations

import datetime as dt
import re
from typing import Any

from sqlalchemy import BigInteger, DateTime, Dialect, Integer, Text
from sqlalchemy.dialects import sqlite
from sqlalchemy.types import TypeDecorator, TypeEngine

from oki_trace.store.reading.damage import BrokenTime

NUL_SIGN = "\N{SYMBOL FOR NULL}"

# PostgreSQL text refuses NUL; half a surrogate pair has no UTF-8 at all.
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


def storable(text: str) -> str:
    """``text`` as both engines can hold it: NUL shown as U+2400, a lone surrogate as U+FFFD.

    A token's own bytes are kept beside it, so nothing of a trace is lost by this.
    """
    if _UNSTORABLE.search(text) is None:
        return text
    return _UNSTORABLE.sub(
        lambda m: NUL_SIGN if m.group() == "\x00" else "\N{REPLACEMENT CHARACTER}", text
    )


class ModelText(TypeDecorator[str]):
    """Text written by a model or a user, made storable on the way in."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else storable(value)


class _TextTime(sqlite.DATETIME):
    """SQLite's text as a time, or as a BrokenTime: it may have been changed to anything."""

    def result_processor(self, dialect: Dialect, coltype: object) -> Any:
        read: Any = super().result_processor(dialect, coltype)

        def process(value: Any) -> dt.datetime | None:
            try:
                found: dt.datetime | None = None if value is None else read(value)
                return found
            except (ValueError, TypeError):
                return BrokenTime.of(value)

        return process


class UtcTime(TypeDecorator[dt.datetime]):
    """A moment: aware on the way in, in UTC on the way out.

    SQLite keeps no time zone, so the stored text is always UTC.
    """

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: dt.datetime | None, dialect: Dialect) -> dt.datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("A time without a time zone cannot be stored: give it one.")
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
