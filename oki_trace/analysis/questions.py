"""A question as a record, and its answer: what the command line, a page and a test share."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from oki_trace.analysis.query_session import QuerySession
from oki_trace.analysis.scope import Scope
from oki_trace.errors import UsageError

# How a column is best shown: a token's text, a share of 1 (a bar), a number, a name.
Shown = Literal["token", "tokens", "share", "number", "name"]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of an answer. ``meaning`` gives the unit."""

    name: str
    shown: Shown
    meaning: str


@dataclass(frozen=True, slots=True)
class Picture:
    """What to draw: ``y`` over ``x``; ``across`` makes it a grid of cells."""

    x: str
    y: tuple[str, ...]
    across: str | None = None


@dataclass(frozen=True, slots=True)
class View:
    """One way to ask a question: its SQL, which begins after the scope, and what comes back."""

    sql: str
    columns: tuple[Column, ...]
    picture: Picture


@dataclass(frozen=True, slots=True)
class Question:
    """``views`` by name, the usual one first. ``parameters``: name, default and meaning."""

    name: str
    meaning: str
    reading: str
    views: Mapping[str, View]
    parameters: Mapping[str, tuple[Any, str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """``rows`` under ``columns``. ``sql`` stands alone: every value is written into it.

    ``about`` says in one line what it was worked out from.
    """

    question: str
    view: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]
    picture: Picture
    sql: str
    about: str = ""

    def column(self, name: str) -> tuple[Any, ...]:
        """The values of one column."""
        at = [column.name for column in self.columns].index(name)
        return tuple(row[at] for row in self.rows)

    def told(self, about: str) -> Answer:
        """The same, with this line on what it was worked out from."""
        return replace(self, about=about)


def ask(
    trove: QuerySession,
    question: Question,
    scope: Scope | None = None,
    view: str | None = None,
    **given: Any,
) -> Answer:
    """Ask a question that is one SQL statement. Raises UsageError for an unknown view."""
    scope = scope or Scope()
    name = view or next(iter(question.views))
    chosen = question.views.get(name)
    if chosen is None:
        raise UsageError(
            f"{question.name} can be asked by {', '.join(question.views)}, not by {name}."
        )
    parameters = {
        name: given.get(name, default) for name, (default, _) in question.parameters.items()
    }
    parameters |= scope.parameters()
    sql = scope.sql() + chosen.sql
    used = {name: value for name, value in parameters.items() if "$" + name in sql}
    found = trove.ask(sql, used)
    return Answer(
        question.name, name, chosen.columns, found.rows, chosen.picture, standing_alone(sql, used)
    )


def standing_alone(sql: str, parameters: Mapping[str, Any]) -> str:
    """``sql`` with its parameters written in, as ``oki-trace sql`` takes it."""
    # In one pass: what is written in may look like a parameter.
    return re.sub(r"\$(\w+)", lambda found: _literal(parameters[found[1]]), sql)


def _literal(value: Any) -> str:
    if isinstance(value, bool | int | float):
        return str(value)
    text = value.isoformat(" ") if isinstance(value, dt.datetime) else str(value)
    return "'" + text.replace("'", "''") + "'"


def columns(text: str) -> tuple[Column, ...]:
    """A line a column: name, how it is shown, meaning."""
    lines = (line.split(maxsplit=2) for line in text.splitlines() if line)
    return tuple(Column(name, shown, meaning) for name, shown, meaning in lines)  # type: ignore[arg-type]
