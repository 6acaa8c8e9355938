"""Formats numbers, texts and tables for the pages: pure functions, no Streamlit."""

from __future__ import annotations

import datetime as dt
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from oki_trace.reporting import counted as counted
from oki_trace.sanitize import inert

Json = dict[str, Any]


def finite(value: float) -> float | None:
    """``value``, or None if it is NaN or infinite: an import may lack it, float16 may overflow."""
    return value if math.isfinite(value) else None


def format_number(value: float, digits: int, unit: str = "") -> str:
    """``value`` with ``digits`` decimals: a dash if not finite, ``<0.01`` if it rounds to 0."""
    if not math.isfinite(value):
        return "–"
    least = 10.0**-digits
    if 0 < abs(value) < least / 2:
        return f"{'>-' if value < 0 else '<'}{least:.{digits}f}{unit}"
    return f"{value:z.{digits}f}{unit}"


def shorten(text: str, length: int = 40) -> str:
    """``text``, cut to ``length`` characters and an ellipsis."""
    return text if len(text) <= length else f"{text[:length]}…"


def mark_line_ends(text: str) -> str:
    """A piece of running text, with a visible mark before each line end."""
    return text.replace("\n", "⏎\n")


def escape(text: str) -> str:
    """``text`` for a place that is read as Markdown, where it must appear unchanged.

    Markdown's own characters get a backslash. Streamlit then looks for addresses,
    icons, emoji and arrows, so an invisible word joiner separates the characters
    that would form one.
    """
    return _MARKDOWN.sub(r"\\\g<0>", _STREAMLIT.sub("\u2060", inert(text)))


def sentence(text: str) -> str:
    """``text`` with a full stop, escaped for Markdown: it may name a model."""
    return f"{escape(text.rstrip('.'))}."


_MARKDOWN = re.compile(r"[\\`*_{}\[\]()#+\-.!|:$<>~=&]")
_STREAMLIT = re.compile(
    r"(?<=www)(?=\.)"  # an address without a scheme
    r"|(?=@)|(?<=@)"  # a mail address
    r"|(?<=:)(?=\S)"  # an address with a scheme; :emoji:, :material/icon:, :red[text]
    r"|(?<=[-<>~=])(?=[-<>~=])"  # arrows and dashes
    r"|^(?=[ \t])",  # an indented line is code
    re.IGNORECASE | re.MULTILINE,
)


def csv_rows(rows: Sequence[Json]) -> list[list[Any]]:
    """``rows`` for a CSV file: the column names, then the values; times as ISO 8601."""
    if not rows:
        return []
    values = [
        [v.isoformat() if isinstance(v, dt.datetime) else v for v in row.values()] for row in rows
    ]
    return [list(rows[0]), *values]


class Column(NamedTuple):
    """A column of a table; ``meaning`` is its tooltip."""

    title: str
    meaning: str = ""
    is_number: bool = False


def table_data(
    label: str,
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    *,
    name: str = "",
    marked: Sequence[int] = (),
) -> Json:
    """The data of ``components/table.js``; ``name`` is its CSV file, without one there is none."""
    return {
        "label": label,
        "name": name,
        "head": [{"text": c.title, "title": c.meaning, "num": c.is_number} for c in columns],
        "rows": [list(row) for row in rows],
        "marked": list(marked),
    }
