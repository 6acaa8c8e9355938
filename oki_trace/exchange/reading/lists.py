"""Reads the lists of a step as arrays, and checks their ranks and their order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from oki_trace.exchange.refusal import refused

# How far the entries of a list may be out of order: exp() is not monotone to the last bit.
_ORDER = 1e-5


def floats(entries: Sequence[Any], name: str) -> Any:
    """As 32-bit floats: a missing number is NaN, and -0 becomes 0."""
    values = np.array([entry.get(name) for entry in entries], dtype=np.float32)
    return values + np.float32(0)


def optional_floats(entries: Sequence[Any], name: str) -> Any:
    """None where no entry has the number."""
    if all(entry.get(name) is None for entry in entries):
        return None
    return floats(entries, name)


def check_ranks(entries: Iterable[Any], where: str) -> None:
    """Raise unless the ranks that are given are 1, 2, 3 and so on."""
    for rank, entry in enumerate(entries, start=1):
        if entry.get("rank") not in (None, rank):
            raise refused(f"{where}: the ranks of its entries are not 1, 2, 3 and so on")


def check_falling(values: Any, where: str, name: str, list_numbers: Any = None) -> None:
    """Raise unless the largest value comes first, in each of several lists."""
    finite = np.isfinite(values)
    values = values[finite]
    before, after = values[:-1], values[1:]
    rises = after > before + _ORDER * np.maximum(1, np.abs(before))
    if list_numbers is not None:
        numbers = list_numbers[finite]
        rises &= numbers[1:] == numbers[:-1]
    if rises.any():
        raise refused(f"{where}: its entries are not in the order of their {name}")
