"""Compares measured numbers, up to the rounding of float32."""

from __future__ import annotations

import math
from typing import Any

from numpy.typing import NDArray

# float32, summed over a vocabulary or a row of weights in another order.
ROUNDING = 1e-4


def is_falling(values: NDArray[Any]) -> bool:
    """Whether the largest value comes first; an unknown one (NaN) has no place."""
    known = values[values == values]
    return bool((known[1:] <= known[:-1]).all())


def is_close(one: float, other: float, tolerance: float, *, relative: bool = True) -> bool:
    """Whether two numbers agree; NaN agrees with NaN alone."""
    if math.isnan(one) or math.isnan(other):
        return math.isnan(one) and math.isnan(other)
    return math.isclose(one, other, rel_tol=tolerance if relative else 0.0, abs_tol=tolerance)
