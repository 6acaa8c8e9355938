"""From an answer to what is drawn and listed: pure functions, no Streamlit.

Which picture a view of a question has is said here, once for each. A token's
text is made visible before it goes into a picture or a table.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dashboard.viewdata.wording import Json, shorten
from oki_trace.sanitize import inert, visible

if TYPE_CHECKING:
    from oki_trace.analysis.questions import Answer, Column

Kind = Literal["columns", "lines", "ranked", "stacked", "cells", "dots"]


@dataclass(frozen=True, slots=True)
class Drawing:
    """``y`` over ``x``: columns or lines along an ordered ``x``; bars ranked, ``x`` naming each;
    columns of stacked shares; cells with ``across`` upwards; dots sized by ``y``.

    ``line`` is drawn over the columns; ``colour`` is the column that tells them
    apart; ``spread`` a standard deviation, drawn as a whisker.
    """

    kind: Kind
    x: tuple[str, ...]
    y: tuple[str, ...]
    line: str | None = None
    colour: str | None = None
    across: str | None = None
    spread: str | None = None


SHARES = ("reply", "assistant", "user", "system", "template", "first_token", "rest", "missing")


def _ranked(names: str, y: str, **more: Any) -> Drawing:
    return Drawing("ranked", tuple(names.split()), tuple(y.split()), **more)


def _lines(x: str, y: str) -> Drawing:
    return Drawing("lines", (x,), tuple(y.split()))


def _stacked(x: str) -> Mapping[str, Drawing]:
    return {"shares": Drawing("stacked", (x,), SHARES)}


# By question and view, the usual picture first.
DRAWINGS: Mapping[str, Mapping[str, Drawing]] = {
    "settle/layer": {
        "share of the steps": Drawing("columns", ("layer",), ("share",), line="cumulative_share"),
        "probability there": _lines("layer", "prob_there"),
    },
    "settle/model": {"depth": _ranked("model", "depth at_last")},
    "settle/position": {
        "depth": _lines("first", "depth at_last"),
        "probability": _lines("first", "prob prob_there"),
    },
    "settle/class": {
        "depth": _ranked("class", "depth at_last"),
        "probability": _ranked("class", "prob prob_there"),
    },
    "uncertainty/entropy": {"entropy": _ranked("chosen message step", "entropy")},
    "uncertainty/margin": {"margin": _ranked("chosen message step", "margin")},
    "uncertainty/reply": {
        "entropy": _ranked("message model", "worst entropy"),
        "surprisal": _ranked("message model", "surprisal"),
    },
    "uncertainty/token": {
        "how often": _ranked("nearly", "steps"),
        "probability": _ranked("nearly", "prob margin"),
    },
    "layers/layer": {
        "agreement": _lines("layer", "agreement chosen_prob"),
        "entropy": _lines("layer", "entropy"),
        "KL": _lines("layer", "kl"),
    },
    "rivals/step": {"probability": _ranked("held chosen message step", "held_prob prob")},
    "rivals/layer": {"share of the steps": Drawing("columns", ("layer",), ("share",))},
    "attention/layer": _stacked("layer"),
    "attention/step": _stacked("first"),
    "attention/evidence": _stacked("first"),
    "attention/grid": {
        name: Drawing("cells", ("first",), (name,), across="layer") for name in SHARES
    },
    "heads/head": {
        "where they are": Drawing("dots", ("head",), ("share",), colour="looks_at", across="layer"),
        "how much": _ranked("layer head looks_at", "share", spread="spread"),
    },
    "compare/step": {"probability": _ranked("token", "prob other_prob")},
    "compare/reply": {
        name: Drawing("columns", ("step",), (key,), colour="same_before")
        for name, key in (("JS", "js"), ("KL", "kl"), ("total variation", "tv"))
    },
    "compare/model": {"JS": _ranked("prompt reply other", "js"), "KL": _ranked("prompt", "kl")},
    "again/prompt": {
        "replies": _ranked("prompt", "replies texts"),
        "alike": _ranked("prompt", "alike"),
        "surprisal": _ranked("prompt", "surprisal", spread="surprisal_spread"),
    },
    "again/setting": {
        name: _ranked("prompt model precision temperature", name, spread=f"{name}_spread")
        for name in ("surprisal", "entropy", "tokens")
    },
    "again/reply": {
        "surprisal": _ranked("prompt precision temperature seed message", "surprisal entropy"),
        "depth": _ranked("prompt precision temperature seed message", "depth"),
        "tokens": _ranked("prompt precision temperature seed message", "tokens"),
    },
}

# Where a token that never came on top stands along the layers.
NEVER = "never"

# More bars or models in one picture can no longer be read.
MOST_BARS = 40
MOST_MODELS = 6
# Rows that can be chosen by their names; a longer list is no longer looked through.
MOST_NAMED = 200


def drawings(answer: Answer) -> Mapping[str, Drawing]:
    """The pictures of an answer, by what they show; a column of nothing but zeros has none."""
    found = DRAWINGS[f"{answer.question}/{answer.view}"]
    if next(iter(found.values())).kind != "cells":
        return found
    return {name: one for name, one in found.items() if any(answer.column(name))} or found


def models(answer: Answer) -> list[str]:
    """The models in an answer along layers, those with most steps first."""
    if not any(c.name == "model" for c in answer.columns) or answer.view != "layer":
        return []
    steps: Counter[str] = Counter()
    for model, count in zip(answer.column("model"), answer.column("steps"), strict=True):
        steps[str(model)] += count
    return [model for model, _ in steps.most_common()]


def marks(answer: Answer, drawing: Drawing) -> list[Json]:
    """A row a mark: x, y, what, model, across, low, high, at (the answer's row) and t0, t1, …

    ``what`` tells apart several measures, or is the value of the drawing's
    colour. The t's are every column of the row, as text.
    """
    rows = [dict(zip(_names(answer), row, strict=True)) for row in answer.rows]
    if drawing.kind == "ranked":
        rows = rows[:MOST_BARS]
    shown = answer.columns
    labels = _labels(rows, answer, drawing)
    found = []
    for at, (row, label) in enumerate(zip(rows, labels, strict=True)):
        hover = {f"t{i}": cell(c, row[c.name]) for i, c in enumerate(shown)}
        for name in drawing.y:
            value = _known(row[name])
            if value is None:
                continue
            spread = _known(row[drawing.spread]) if drawing.spread else None
            line = _known(row[drawing.line]) if drawing.line else None
            found.append(
                {
                    "x": label,
                    "y": value,
                    "what": spoken(name) if drawing.colour is None else str(row[drawing.colour]),
                    "model": inert(str(row.get("model", "")), keep=""),
                    "across": row[drawing.across] if drawing.across else None,
                    "line": line,
                    "low": None if spread is None else max(0.0, value - spread),
                    "high": None if spread is None else value + spread,
                    "at": at,
                    **hover,
                }
            )
    return found


def _labels(rows: Sequence[Json], answer: Answer, drawing: Drawing) -> list[str]:
    if drawing.x == ("first",):
        return buckets([row["first"] for row in rows])
    if drawing.kind != "ranked":
        return [NEVER if (v := row[drawing.x[0]]) is None else str(v) for row in rows]
    of = {column.name: column for column in answer.columns}
    # What is the same in all rows tells none from another, but for what the question is about.
    varied = {name for name in drawing.x if len({row[name] for row in rows}) > 1}
    if "step" in varied:
        varied.add("message")
    named = [name for name in drawing.x if name in varied or name == drawing.x[0]]
    seen: Counter[str] = Counter()
    labels = []
    for row in rows:
        label = shorten(_label(row, named, of, "step" in drawing.x), 46)
        seen[label] += 1
        labels.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return labels


def _label(row: Json, named: Sequence[str], of: Mapping[str, Column], is_step: bool) -> str:
    """What names a bar; a step as ``message:step``, as the command line takes it."""
    longest = 28 if len(named) < 3 else 18
    parts = []
    for name in named:
        if name == "step":
            continue
        text = cell(of[name], row[name])
        if name == "message" and is_step:
            text = f"{row['message']}:{row['step']}"
        elif name in _NUMBERED:
            text = "–" if row[name] is None else f"{_NUMBERED[name]} {row[name]:g}"
        parts.append(shorten(text, longest))
    if named[:2] == ["held", "chosen"]:
        parts[:2] = [f"{parts[0]} → {parts[1]}"]
    return " · ".join(parts)


# Numbers that say nothing without a name.
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
    """What ``first`` stands for: 0, 1, 2–3, 4–7, …"""
    return [str(n) if n < 2 else f"{n:,}–{2 * n - 1:,}" for n in firsts]


def columns(answer: Answer) -> list[tuple[str, str]]:
    """The texts that hovering over a mark shows: (column of ``marks``, name)."""
    return [(f"t{i}", column.name) for i, column in enumerate(answer.columns)]


def unit(answer: Answer, name: str) -> str:
    """A column's name as an axis has it, with its unit."""
    column = next(c for c in answer.columns if c.name == name)
    return f"{spoken(name)} (nats)" if "nats" in column.meaning else spoken(name)


_SPOKEN = {
    "kl": "KL",
    "js": "JS",
    "tv": "total variation",
    "worst": "at the least certain step",
    "at_last": "settled only in the last layer",
    "held_prob": "held at the layer",
    "prob": "probability",
    "prob_there": "probability there",
    "other_prob": "probability in the second",
}


def spoken(name: str) -> str:
    """A column's name as people read it."""
    return _SPOKEN.get(name, name.replace("_", " "))


def is_share(answer: Answer, name: str) -> bool:
    """Whether a column lies between 0 and 1."""
    return next(c for c in answer.columns if c.name == name).shown == "share"


# -------------------------------------------------------------------------- tables


def table(answer: Answer) -> dict[str, list[Any]]:
    """The answer's columns as a table shows them: numbers as numbers, tokens as they are seen."""
    return {
        column.name: [_shown(column, value) for value in answer.column(column.name)]
        for column in answer.columns
    }


def row_names(answer: Answer) -> list[str]:
    """The first rows by their number and their first cells: "3 · message 2 · step 5 · ␣Paris"."""
    first = answer.columns[:4]
    named = {"token", "tokens"}
    return [
        " · ".join(
            [
                str(number),
                *(
                    cell(column, value)
                    if column.shown in named
                    else f"{spoken(column.name)} {cell(column, value)}"
                    for column, value in zip(first, row, strict=False)
                ),
            ]
        )
        for number, row in enumerate(answer.rows[:MOST_NAMED], start=1)
    ]


def _shown(column: Column, value: Any) -> Any:
    if isinstance(value, bool) or column.shown in ("token", "tokens"):
        return None if value is None else cell(column, value)
    if isinstance(value, int | float):
        return _known(value)
    return None if value is None else cell(column, value)


def step_places(answer: Answer) -> list[dict[str, int] | None]:
    """Where in the chat each row is: conversation, message and step, as far as the row says."""
    names = [n for n in ("conversation", "message", "step") if n in _names(answer)]
    if "message" not in names:
        return [None] * len(answer.rows)
    wanted = [answer.column(name) for name in names]
    return [dict(zip(names, map(int, row), strict=True)) for row in zip(*wanted, strict=True)]


def cell(column: Column, value: Any) -> str:
    """A value as text that acts on nothing."""
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
    """A number with three digits, or as a power where it is next to nothing."""
    if not math.isfinite(value):
        return "–"
    if 0 < abs(value) < 0.0005:
        return f"{value:.1e}"
    return f"{value:z.3f}" if abs(value) < 10 else f"{value:z,.1f}"


def _names(answer: Answer) -> list[str]:
    return [column.name for column in answer.columns]


def _known(value: Any) -> float | int | None:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value
