"""Prints answers and rows as tables, CSV, JSON and Parquet."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

from rich.text import Text

from oki_trace.analysis import questions, results
from oki_trace.analysis.engine import Rows
from oki_trace.analysis.question import Answer, Column
from oki_trace.analysis.tables import FUNCTIONS, TABLES
from oki_trace.cli.output import (
    bar,
    cell,
    console,
    print_error,
    print_json,
    print_text,
    table,
    token,
)
from oki_trace.sanitize import inert

_BAR_WIDTH = 20
# The longest text in a cell of a terminal's table.
_MAX_CELL = 60


def print_questions(*, as_json: bool) -> None:
    """List the questions and their views."""
    every = questions.QUESTIONS.values()
    if as_json:
        print_json(
            [
                {"name": q.name, "meaning": q.meaning, "reading": q.reading, "by": list(q.offered)}
                for q in every
            ]
        )
        return
    rows = table("question", "by", "meaning")
    for question in every:
        rows.add_row(question.name, ", ".join(question.offered), question.meaning)
    console().print(rows)
    print_text()
    print_text("Examples: oki-trace ask settle --by class, oki-trace ask compare 2:5 4:5")


def print_tables(*, as_json: bool) -> None:
    """List the tables, columns and functions that SQL can use; the tables alone as JSON."""
    if as_json:
        print_json(
            {
                t.name: {
                    "meaning": t.meaning,
                    "columns": [
                        {"name": c.name, "type": c.kind, "meaning": c.meaning} for c in t.columns
                    ],
                }
                for t in TABLES
            }
        )
        return
    for one in TABLES:
        rows = table("", "", "", header=False)
        for column in one.columns:
            rows.add_row("  " + column.name, Text(column.kind, style="dim"), column.meaning)
        console().print(_titled(one.name, f": {one.meaning}"))
        console().print(rows)
    print_text()
    print_text("Functions that read the full tensors, and return NULL without them:")
    print_text()
    for function in FUNCTIONS:
        rest = f"({', '.join(function.parameters)}): {function.meaning}"
        console().print(_titled(function.name, rest), soft_wrap=True)
        print_text("  " + function.returns, "dim")


def _titled(name: str, rest: str) -> Text:
    return Text(name, style="bold").append(rest, style="not bold")


def print_answer(answer: Answer, format: str) -> None:
    """Print an answer as a table with bars, as JSON or as CSV."""
    names = [column.name for column in answer.columns]
    if format == "json":
        print_json(
            {
                "question": answer.question,
                "by": answer.view,
                "about": answer.about,
                "columns": [{"name": c.name, "meaning": c.description} for c in answer.columns],
                "rows": results.objects(names, answer.rows),
                "sql": answer.sql,
            }
        )
        return
    if format == "csv":
        text = io.StringIO()
        results.write_csv(names, answer.rows, text)
        _write(text.getvalue(), None)
        return
    question = questions.QUESTIONS[answer.question]
    print_text(question.meaning, "bold")
    if answer.about:
        print_text(answer.about)
    print_text(question.reading, "dim")
    print_text()
    if not answer.rows:
        print_text(
            "No steps match. Relax the filters: `oki-trace list` shows conversations and models."
        )
        return
    charted, full = _charted(answer)
    headings: list[str] = []
    for name in names:
        headings += [name, ""] if name == charted else [name]
    right = tuple(c.name for c in answer.columns if c.shown in ("share", "number"))
    rows = table(*headings, right=right)
    for row in answer.rows:
        cells: list[Text] = []
        for column, value in zip(answer.columns, row, strict=True):
            cells.append(_cell(column, value))
            if column.name == charted:
                cells.append(bar((value or 0) / full, _BAR_WIDTH))
        rows.add_row(*cells)
    console().print(rows)


def _charted(answer: Answer) -> tuple[str | None, float]:
    """The column that gets bars (one at most, to fit the line), and the value of a full bar."""
    for column in answer.columns:
        if column.name == answer.bar:
            values = [abs(v) for v in answer.column(column.name) if isinstance(v, int | float)]
            largest = max(values, default=0.0)
            is_wide_share = column.shown == "share" and largest > 0.4
            return column.name, 1.0 if is_wide_share else largest or 1.0
    return None, 1.0


def _cell(column: Column, value: Any) -> Text:
    if value is None:
        return Text("–", style="dim")
    if column.shown == "token":
        return token(str(value))
    if column.shown == "tokens":
        return Text("  ").join(token(str(one)) for one in value)
    if isinstance(value, list | tuple):
        return Text("  ".join(_number(one) for one in value))
    if isinstance(value, float):
        return Text(_number(value))
    if isinstance(value, int):
        return Text(str(value) if column.shown == "name" else f"{value:,}")
    text = inert(" ".join(str(value).split()), keep="")
    return cell(text if len(text) <= _MAX_CELL else text[: _MAX_CELL - 1] + "…")


def _number(value: float) -> str:
    if 1e-6 <= abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:z.3f}" if abs(value) < 10 else f"{value:z,.1f}"


def print_rows(rows: Rows, format: str, output: Path | None) -> None:
    """Write the result of SQL to a file or to standard output."""
    if format == "table" and output is None:
        printed = table(*(inert(name, keep="") for name in rows.columns))
        for row in rows.rows:
            printed.add_row(*(_plain_cell(value) for value in row))
        console().print(printed)
        return
    text = io.StringIO()
    if format == "json":
        json.dump(results.objects(rows.columns, rows.rows), text, indent=2, allow_nan=False)
        text.write("\n")
    else:
        results.write_csv(rows.columns, rows.rows, text)
    _write(text.getvalue(), output)


def _plain_cell(value: Any) -> Text:
    if value is None:
        return Text("NULL", style="dim")
    if isinstance(value, float):
        return Text(f"{value:z.6g}")
    return cell(str(results.plain(value)))


def _write(text: str, output: Path | None) -> None:
    if output is None:
        sys.stdout.write(inert(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()
        return
    from oki_trace.exchange.files import replacing

    with replacing(output) as file:
        file.write(text)
    print_error(f"wrote {output}")


def write_parquet(rows: Any, output: Path | None) -> None:
    """Write an Arrow table as Parquet to a file or to standard output."""
    data = results.parquet(rows)
    if output is None:
        sys.stdout.buffer.write(data)
        return
    from oki_trace.exchange.files import replacing

    with replacing(output, "wb") as file:
        file.write(data)
    print_error(f"wrote {output}")


class CacheProgress:
    """Reports on standard error how far the cache is, if many messages are new."""

    def __init__(self) -> None:
        self._reported = 0

    def __call__(self, done: int, total: int) -> None:
        if total >= 200 and (done == total or done - self._reported >= 200):
            self._reported = done
            print_error(f"Reading new messages from the store: {done:,} of {total:,}.")
