"""Ages and sizes as people write them: ``30d``, ``12h``, ``10GB``, ``500 MiB``."""

from __future__ import annotations

import datetime as dt
import re

from oki_trace.errors import UsageError

_HOURS = {"h": 1, "d": 24, "w": 24 * 7, "y": 24 * 365}
_BYTES = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
# No disk and no memory is larger; and it fits into 64 bits.
_MOST_BYTES = 10**18
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def age(text: str) -> dt.timedelta:
    """``30d`` and the like. Raises UsageError."""
    found = _QUANTITY.fullmatch(text)
    hours = _HOURS.get(found[2].lower()) if found else None
    if found is None or hours is None:
        raise UsageError(f"{text!r} is no age. Write a number and h, d, w or y, as in 30d.")
    try:
        return dt.timedelta(hours=float(found[1]) * hours)
    except OverflowError as error:
        raise UsageError(f"{text!r} is longer ago than there is time.") from error


def size(text: str) -> int:
    """``10GB`` and the like, in bytes. Raises UsageError."""
    found = _QUANTITY.fullmatch(text)
    factor = _BYTES.get(found[2].lower()) if found else None
    if found is None or factor is None:
        raise UsageError(f"{text!r} is no size. Write a number and kB, MB, GB or TB, as in 10GB.")
    bytes_ = float(found[1]) * factor
    if bytes_ >= _MOST_BYTES:
        raise UsageError(f"{text!r} is more than there is. Write a size such as 10GB.")
    return round(bytes_)
