"""The progress callback of long operations, and sizes and counts as text."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with the number of finished steps, replies or messages, and with their total."""


def size(count: float) -> str:
    """A number of bytes for people: ``2.1 MB``. Rounded before the unit is chosen."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.95 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} B" if unit == "B" else f"{value:,.1f} {unit}"


def counted(number: int, noun: str) -> str:
    """``1 reply``, ``2,000 replies``, ``3 branches``."""
    ending = "es" if noun.endswith(("ch", "sh", "s", "x")) else "s"
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}{ending}"
    return f"{number:,} {noun if number == 1 else plural}"
