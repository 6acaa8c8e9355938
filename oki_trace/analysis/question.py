"""Questions and answers as records, shared by the command line, the explorer and tests."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from oki_trace.analysis.scope import Scope
from oki_trace.records import is_lens_name

if TYPE_CHECKING:
    from oki_trace.analysis.query_session import QuerySession

# How a value is shown: a token's text, several of them, a share of 1, a number, or a name.
Shown = Literal["token", "tokens", "share", "number", "name"]
Kind = Literal["columns", "lines", "ranked", "stacked", "cells", "dots"]
# The value of an option.
Value = float | str
Subject = Literal["step", "reply", "model"]

_PARAMETER = re.compile(r"\$(\w+)")


@dataclass(frozen=True, slots=True)
class Column:
    """A column of an answer. ``label``: its name on an axis, where ``name`` alone is unclear."""

    name: str
    shown: Shown
    meaning: str
    unit: str = ""
    label: str = ""

    @property
    def description(self) -> str:
        """The meaning with the unit, as a tooltip shows it."""
        return f"{self.meaning}, in {self.unit}" if self.unit else self.meaning


@dataclass(frozen=True, slots=True)
class Drawing:
    """A chart of an answer: the columns ``y`` over the columns ``x``.

    ``columns`` and ``lines`` have an ordered ``x``; ``ranked`` bars are named by ``x``; ``stacked``
    columns add up shares; ``cells`` are a grid with ``across`` as its vertical axis; ``dots`` are
    sized by ``y``. ``line`` is drawn over the columns, ``colour`` tells marks apart, and
    ``spread`` is a standard deviation, drawn as a whisker.
    """

    kind: Kind
    x: tuple[str, ...]
    y: tuple[str, ...]
    line: str | None = None
    colour: str | None = None
    across: str | None = None
    spread: str | None = None


@dataclass(frozen=True, slots=True)
class View:
    """One way to ask a question.

    ``sql`` is a whole statement: ``$scope`` stands for the SELECT of the replies that it is
    about, and every other ``$name`` for an option of the question. ``drawings``: by label,
    the default first. ``bar``: the column with bars in a terminal, when it is not the first that
    the default chart draws. ``reads_tensors``: the explorer waits for a click before it runs a
    link to this view. ``compares``: the kind of the two subjects that the view compares.
    ``offered``: False for a view that only ``Question.run`` chooses, by the data.
    """

    sql: str
    columns: tuple[Column, ...]
    drawings: Mapping[str, Drawing]
    label: str = ""
    bar: str = ""
    reads_tensors: bool = False
    compares: Subject | None = None
    offered: bool = True


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a question: a share of 1 when ``default`` is a float, or a whole number.

    With ``choices``, one of these texts. When ``default`` is another text, the name of a lens;
    with ``several``, names with commas between them.
    """

    default: Value
    label: str
    meaning: str
    least: int = 1
    choices: tuple[str, ...] = ()
    several: bool = False

    @property
    def is_name(self) -> bool:
        return isinstance(self.default, str) and not self.choices

    @property
    def is_share(self) -> bool:
        return isinstance(self.default, float)

    @property
    def range(self) -> str:
        """The allowed values in words."""
        if self.choices:
            return " or ".join(self.choices)
        if self.is_name:
            return "names of lenses with commas" if self.several else "the name of a lens"
        return "0 to 1" if self.is_share else f"a whole number from {self.least}"

    def parse(self, text: str) -> Value | None:
        """The value of ``text``; None when the option does not allow it."""
        if self.choices:
            return text if text in self.choices else None
        if self.is_name:
            names = list(dict.fromkeys(name.strip() for name in text.split(",")))
            allowed = self.several or len(names) == 1
            return ",".join(names) if allowed and all(map(is_lens_name, names)) else None
        try:
            value = float(text) if self.is_share else int(text)
        except ValueError:
            return None
        is_allowed = 0 <= value <= 1 if self.is_share else self.least <= value < 10**15
        return value if is_allowed else None


@dataclass(frozen=True, slots=True)
class Question:
    """``group``: its heading in the explorer; ``title``: its name below that heading.

    ``views``: by name, the default first. ``run`` replaces ``run_statement`` where an answer is
    more than the rows of one statement.
    """

    name: str
    group: str
    title: str
    meaning: str
    reading: str
    views: Mapping[str, View]
    options: Mapping[str, Option] = field(default_factory=dict)
    run: Callable[[QuerySession, Request], Answer] | None = None

    @property
    def compares(self) -> bool:
        """Whether it takes two subjects."""
        return any(view.compares for view in self.views.values())

    @property
    def offered(self) -> tuple[str, ...]:
        """The names of the views to choose from."""
        return tuple(name for name, view in self.views.items() if view.offered)


@dataclass(frozen=True, slots=True)
class Answer:
    """The rows of an answer, and how to show them.

    ``sql`` runs on its own: every parameter is written into it. ``about``: one line on the data
    behind the answer. ``bar``: the column that a terminal draws as bars.
    """

    question: str
    view: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]
    drawings: Mapping[str, Drawing]
    bar: str
    sql: str
    about: str = ""

    def column(self, name: str) -> tuple[Any, ...]:
        """The values of one column."""
        place = [column.name for column in self.columns].index(name)
        return tuple(row[place] for row in self.rows)


@dataclass(frozen=True, slots=True)
class Request:
    """A question with its arguments. ``options`` has a value for every option of the question."""

    question: Question
    view: str
    scope: Scope
    options: Mapping[str, Value]
    subjects: tuple[str, ...] = ()

    def bind(self, sql: str | None = None, **parameters: Any) -> tuple[str, dict[str, Any]]:
        """The statement of the view, or ``sql`` in its place, and the parameters that it uses.

        ``parameters`` come in addition to those of the scope and the options.
        """
        sql = (sql or self.question.views[self.view].sql).strip() + "\n"
        sql = sql.replace("$scope", self.scope.sql())
        values = {**self.options, **self.scope.parameters(), **parameters}
        return sql, {name: values[name] for name in set(_PARAMETER.findall(sql))}

    def answer(
        self,
        rows: tuple[tuple[Any, ...], ...],
        sql: str,
        parameters: Mapping[str, Any],
        about: str = "",
    ) -> Answer:
        """The answer that has these rows, by this statement and its parameters."""
        view = self.question.views[self.view]
        bar = view.bar or next(iter(view.drawings.values())).y[0]
        # In one pass: a value may look like a parameter.
        alone = _PARAMETER.sub(lambda match: _literal(parameters[match[1]]), sql)
        shown = (view.columns, rows, view.drawings, bar)
        return Answer(self.question.name, self.view, *shown, alone, about)


def run_statement(
    session: QuerySession, request: Request, sql: str | None = None, **parameters: Any
) -> Answer:
    """The rows of one statement; ``sql`` and ``parameters`` as in ``Request.bind``."""
    sql, parameters = request.bind(sql, **parameters)
    return request.answer(session.ask(sql, parameters).rows, sql, parameters)


def parse_step(text: str) -> tuple[int, int | None] | None:
    """``message:step`` or ``message``; None for anything else."""
    match = re.fullmatch(r"([0-9]{1,15})(?::([0-9]{1,15}))?", text)
    return match and (int(match[1]), int(match[2]) if match[2] else None)


def _literal(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, bool | int | float):
        return str(value)
    text = value.isoformat(" ") if isinstance(value, dt.datetime) else str(value)
    return "'" + text.replace("'", "''") + "'"
