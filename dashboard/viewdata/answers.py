"""The data of an answer's charts and tables: pure functions, no Streamlit.

A token's text is made visible before it goes into a chart or a table.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dashboard.viewdata.wording import Json, shorten
from oki_trace.analysis.question import Answer, Column, Drawing
from oki_trace.sanitize import inert, visible

# The place among the layers of a token that never comes to the top.
NEVER = "never"

# More bars or models in one chart are unreadable.
MOST_BARS = 40
MOST_MODELS = 6
# The rows in the list of names.
MOST_NAMED = 200


def drawings(answer: Answer) -> Mapping[str, Drawing]:
    """The charts of an answer by label, without grids that hold nothing but zeros."""
    offered = {
        label: drawing
        for label, drawing in answer.drawings.items()
        if drawing.kind != "cells" or any(answer.column(drawing.y[0]))
    }
    return offered or answer.drawings


def models(answer: Answer) -> list[str]:
    """The models in an answer along layers, those with most steps first."""
    names = _names(answer)
    if not {"model", "layer", "steps"} <= set(names) or answer.view != "layer":
        return []
    steps: Counter[str] = Counter()
    for model, count in zip(answer.column("model"), answer.column("steps"), strict=True):
        steps[str(model)] += count
    return [model for model, _ in steps.most_common()]


def marks(answer: Answer, drawing: Drawing) -> list[Json]:
    """A dictionary for each mark: x, y, what, model, across, low, high, at and t0, t1, …

    ``what`` tells several measures apart, or is the value of the drawing's colour. ``at`` is the
    number of the answer's row, and the t's are its columns as text.
    """
    rows = [dict(zip(_names(answer), row, strict=True)) for row in answer.rows]
    if drawing.kind == "ranked":
        rows = rows[:MOST_BARS]
    drawn = []
    for at, (row, label) in enumerate(zip(rows, _labels(rows, answer, drawing), strict=True)):
        hover = {f"t{i}": cell(c, row[c.name]) for i, c in enumerate(answer.columns)}
        for name in drawing.y:
            value = _finite(row[name])
            if value is None:
                continue
            spread = _finite(row[drawing.spread]) if drawing.spread else None
            colour = drawing.colour
            drawn.append(
                {
                    "x": label,
                    "y": value,
                    "what": spoken(answer, name) if colour is None else str(row[colour]),
                    "model": inert(str(row.get("model", "")), keep=""),
                    "across": row[drawing.across] if drawing.across else None,
                    "line": _finite(row[drawing.line]) if drawing.line else None,
                    "low": None if spread is None else max(0.0, value - spread),
                    "high": None if spread is None else value + spread,
                    "at": at,
                    **hover,
                }
            )
    return drawn


def _labels(rows: Sequence[Json], answer: Answer, drawing: Drawing) -> list[str]:
    if drawing.x == ("from_step",):
        return buckets([row["from_step"] for row in rows])
    if drawing.kind != "ranked":
        return [NEVER if (v := row[drawing.x[0]]) is None else str(v) for row in rows]
    of = {column.name: column for column in answer.columns}
    # A value that all rows share tells none from another, except for the first, the subject.
    varied = {name for name in drawing.x if len({row[name] for row in rows}) > 1}
    if "step" in varied or any("step" in drawing.x and row["step"] is None for row in rows):
        varied.add("message")
    named = [name for name in drawing.x if name in varied or name == drawing.x[0]]
    counts: Counter[str] = Counter()
    labels = []
    for row in rows:
        label = shorten(_label(row, named, of, "step" in drawing.x), 46)
        counts[label] += 1
        labels.append(label if counts[label] == 1 else f"{label} ({counts[label]})")
    return labels


def _label(row: Json, named: Sequence[str], of: Mapping[str, Column], is_step: bool) -> str:
    """The name of a bar; a step as ``message:step``, as the command line takes it."""
    longest = 28 if len(named) < 3 else 18
    parts = []
    for name in named:
        if name == "step":
            continue
        text = cell(of[name], row[name])
        if name == "message" and is_step:
            text = f"{row['message']}:{row['step']}"
            if row["step"] is None:  # a given token has none
                text = f"{row['message']} · position {row['position']}"
        elif name in _NUMBERED:
            text = "–" if row[name] is None else f"{_NUMBERED[name]} {row[name]:g}"
        parts.append(shorten(text, longest))
    if named[:2] == ["rival", "chosen"]:
        parts[:2] = [f"{parts[0]} → {parts[1]}"]
    return " · ".join(parts)


# Numbers that mean nothing without a name.
_NUMBERED = {
    "message": "message",
    "layer": "layer",
    "head": "head",
    "temperature": "temp",
    "seed": "seed",
    "reply": "message",
    "other": "message",
}


def buckets(firsts: Sequence[int]) -> list[str]:
    """The ranges of steps that begin with these: 0, 1, 2–3, 4–7, …"""
    return [str(n) if n < 2 else f"{n:,}–{2 * n - 1:,}" for n in firsts]


def columns(answer: Answer) -> list[tuple[str, str]]:
    """The texts of a mark's tooltip: (key in ``marks``, name)."""
    return [(f"t{i}", column.name) for i, column in enumerate(answer.columns)]


def spoken(answer: Answer, name: str) -> str:
    """A column's name as people read it."""
    return _column(answer, name).label or name.replace("_", " ")


def unit(answer: Answer, name: str) -> str:
    """A column's name with its unit, for an axis."""
    of = _column(answer, name).unit
    return f"{spoken(answer, name)} ({of})" if of else spoken(answer, name)


def is_share(answer: Answer, name: str) -> bool:
    """Whether a column lies between 0 and 1."""
    return _column(answer, name).shown == "share"


def _column(answer: Answer, name: str) -> Column:
    return next(column for column in answer.columns if column.name == name)


# -------------------------------------------------------------------------- tables


def table(answer: Answer) -> dict[str, list[Any]]:
    """The answer's columns for a table: numbers as numbers, tokens made visible."""
    return {
        column.name: [_value(column, value) for value in answer.column(column.name)]
        for column in answer.columns
    }


def row_names(answer: Answer) -> list[str]:
    """The first rows by number and first cells: "3 · message 2 · step 5 · ␣Paris"."""

    def name(column: Column, value: Any) -> str:
        text = cell(column, value)
        is_token = column.shown in ("token", "tokens")
        return text if is_token else f"{spoken(answer, column.name)} {text}"

    return [
        " · ".join([str(number), *map(name, answer.columns[:4], row)])
        for number, row in enumerate(answer.rows[:MOST_NAMED], start=1)
    ]


def _value(column: Column, value: Any) -> Any:
    if value is None or column.shown in ("token", "tokens") or isinstance(value, bool):
        return None if value is None else cell(column, value)
    return _finite(value) if isinstance(value, int | float) else cell(column, value)


def step_places(answer: Answer) -> list[dict[str, int] | None]:
    """The place in the chat of each row: conversation, message and step, as far as it has them.

    A given token has a position in place of a step.
    """
    names = [n for n in ("conversation", "message", "step", "position") if n in _names(answer)]
    if "message" not in names:
        return [None] * len(answer.rows)
    places: list[dict[str, int] | None] = []
    for row in zip(*(answer.column(name) for name in names), strict=True):
        place: dict[str, int] = {
            name: int(value) for name, value in zip(names, row, strict=True) if value is not None
        }
        if "step" in place:
            place.pop("position", None)
        places.append(place)
    return places


def cell(column: Column, value: Any) -> str:
    """A value as text without control characters."""
    if value is None:
        return "–"
    if column.shown == "token":
        return visible(str(value))
    if column.shown == "tokens":
        return "  ".join(visible(str(one)) for one in value)
    if isinstance(value, list | tuple):
        return "  ".join(number(one) for one in value)
    if isinstance(value, float):
        return number(value)
    if isinstance(value, int):
        return str(value) if column.shown == "name" else f"{value:,}"
    return inert(" ".join(str(value).split()), keep="")


def number(value: float) -> str:
    """A number with three decimals, or as a power of ten when it is close to 0."""
    if not math.isfinite(value):
        return "–"
    if 0 < abs(value) < 0.0005:
        return f"{value:.1e}"
    return f"{value:z.3f}" if abs(value) < 10 else f"{value:z,.1f}"


def _names(answer: Answer) -> list[str]:
    return [column.name for column in answer.columns]


def _finite(value: Any) -> float | int | None:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value
