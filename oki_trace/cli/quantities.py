"""Parses ages and sizes: ``30d``, ``12h``, ``10GB``, ``500 MiB``."""

from __future__ import annotations

import datetime as dt
import re

from oki_trace.errors import UsageError

_HOURS = {"h": 1, "d": 24, "w": 24 * 7, "y": 24 * 365}
_BYTES = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
# Larger than any disk or memory, and fits into 64 bits.
_MOST_BYTES = 10**18
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def age(text: str) -> dt.timedelta:
    """An age such as ``30d``. Raises UsageError."""
    found = _QUANTITY.fullmatch(text)
    hours = _HOURS.get(found[2].lower()) if found else None
    if found is None or hours is None:
        raise UsageError(f"{text!r} is not an age. Write a number and h, d, w or y, as in 30d.")
    try:
        return dt.timedelta(hours=float(found[1]) * hours)
    except OverflowError as error:
        raise UsageError(f"{text!r} is too long. Write an age such as 30d.") from error


def size(text: str) -> int:
    """The bytes of a size such as ``10GB``. Raises UsageError."""
    found = _QUANTITY.fullmatch(text)
    factor = _BYTES.get(found[2].lower()) if found else None
    if found is None or factor is None:
        raise UsageError(f"{text!r} is not a size. Write a number and a unit, as in 10GB.")
    bytes_ = float(found[1]) * factor
    if bytes_ >= _MOST_BYTES:
        raise UsageError(f"{text!r} is too large. Write a size such as 10GB.")
    return round(bytes_)
