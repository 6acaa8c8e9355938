"""Answers and rows in a terminal, as CSV and as JSON."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

from rich.text import Text

from oki_trace.analysis import catalog, results
from oki_trace.analysis.engine import Rows
from oki_trace.analysis.questions import Answer, Column
from oki_trace.analysis.tables import FUNCTIONS, TABLES
from oki_trace.cli.output import console, inert, print_error, print_json, table, token
from oki_trace.errors import ExchangeError

_BAR = 20
# The longest text in a cell of a terminal's table.
_LONGEST = 60


def print_questions(*, as_json: bool) -> None:
    """What can be asked, and in which views."""
    if as_json:
        print_json(
            [
                {"name": q.name, "meaning": q.meaning, "reading": q.reading, "by": list(q.views)}
                for q in catalog.QUESTIONS.values()
            ]
        )
        return
    rows = table("question", "by", "what it tells")
    for question in catalog.QUESTIONS.values():
        rows.add_row(question.name, ", ".join(question.views), question.meaning)
    console().print(rows)
    console().print("\nAsk one: oki-trace ask settle --by class, oki-trace ask compare 2:5 4:5")


def print_tables(*, as_json: bool) -> None:
    """The tables, columns and functions that SQL can use; as JSON the tables alone."""
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
        rows = table("", "", "")
        rows.show_header = False
        for column in one.columns:
            rows.add_row("  " + column.name, Text(column.kind, style="dim"), column.meaning)
        console().print(Text(one.name, style="bold").append(f": {one.meaning}", style="not bold"))
        console().print(rows)
    console().print("\nFunctions that read the full tensors; NULL where there are none:\n")
    for function in FUNCTIONS:
        told = Text(function.name, style="bold").append(
            f"({', '.join(function.takes)}): {function.meaning}", style="not bold"
        )
        console().print(told, soft_wrap=True)
        console().print(Text("  " + function.gives, style="dim"), soft_wrap=True)


def print_answer(answer: Answer, format: str) -> None:
    """An answer as a table with bars, as JSON or as CSV."""
    names = [column.name for column in answer.columns]
    if format == "json":
        print_json(
            {
                "question": answer.question,
                "by": answer.view,
                "about": answer.about,
                "columns": [{"name": c.name, "meaning": c.meaning} for c in answer.columns],
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
    out = console()
    question = catalog.QUESTIONS[answer.question]
    out.print(Text(question.meaning, style="bold"), soft_wrap=True)
    if answer.about:
        out.print(Text(inert(answer.about, keep="")), soft_wrap=True)
    out.print(Text(question.reading, style="dim"), soft_wrap=True)
    out.print()
    if not answer.rows:
        out.print(
            "No steps there: widen the filters. `oki-trace list` shows conversations and models."
        )
        return
    drawn = _drawn(answer)
    headings: list[str] = []
    for column in answer.columns:
        headings += [column.name, ""] if column.name in drawn else [column.name]
    right = tuple(c.name for c in answer.columns if c.shown in ("share", "number"))
    rows = table(*headings, right=right)
    for row in answer.rows:
        cells: list[Text] = []
        for column, value in zip(answer.columns, row, strict=True):
            cells.append(_cell(column, value))
            if column.name in drawn:
                cells.append(_bar((value or 0) / drawn[column.name]))
        rows.add_row(*cells)
    out.print(rows)


def _drawn(answer: Answer) -> dict[str, float]:
    """The column that has bars (one, or the line gets too long), and what a full bar is."""
    found: dict[str, float] = {}
    for column in answer.columns:
        if column.name in answer.picture.y[:1]:
            values = [v for v in answer.column(column.name) if isinstance(v, int | float)]
            largest = max(map(abs, values), default=0.0)
            found[column.name] = (
                1.0 if column.shown == "share" and largest > 0.4 else largest or 1.0
            )
    return found


def _bar(share: float) -> Text:
    eighths = round(max(0.0, min(share, 1.0)) * _BAR * 8)
    drawn = "█" * (eighths // 8) + (chr(0x2590 - eighths % 8) if eighths % 8 else "")
    return Text(drawn, style="cyan")


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
    return _short(str(value))


def _number(value: float) -> str:
    if 1e-6 <= abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:z.3f}" if abs(value) < 10 else f"{value:z,.1f}"


def _short(text: str) -> Text:
    shown = inert(" ".join(text.split()), keep="")
    return Text(shown if len(shown) <= _LONGEST else shown[: _LONGEST - 1] + "…")


def print_rows(found: Rows, format: str, output: Path | None) -> None:
    """The result of SQL, to a file or to standard output."""
    if format == "table" and output is None:
        rows = table(*(inert(name, keep="") for name in found.columns))
        for row in found.rows:
            rows.add_row(*(_plain_cell(value) for value in row))
        console().print(rows)
        return
    text = io.StringIO()
    if format == "json":
        import json

        json.dump(results.objects(found.columns, found.rows), text, indent=2, allow_nan=False)
        text.write("\n")
    else:
        results.write_csv(found.columns, found.rows, text)
    _write(text.getvalue(), output)


def _plain_cell(value: Any) -> Text:
    if value is None:
        return Text("NULL", style="dim")
    if isinstance(value, float):
        return Text(f"{value:z.6g}")
    return Text(inert(str(results.plain(value)), keep=""))


def _write(text: str, output: Path | None) -> None:
    if output is None:
        sys.stdout.write(inert(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()
        return
    from oki_trace.exchange.files import replacing

    with replacing(output) as file:
        file.write(text)
    print_error(f"wrote {output}")


def write_parquet(found: Any, output: Path | None) -> None:
    """An Arrow table as Parquet, to a file or to standard output."""
    data = results.parquet(found)
    if output is None:
        sys.stdout.buffer.write(data)
        return
    try:
        output.write_bytes(data)
    except OSError as error:
        raise ExchangeError(
            f"Cannot write {output}: {error.strerror or error}. Choose another --output."
        ) from error
    print_error(f"wrote {output}")


class Upkeep:
    """Says, on standard error, that the cache is being written when that takes long."""

    def __init__(self) -> None:
        self._told = 0

    def __call__(self, done: int, of_all: int) -> None:
        if of_all >= 200 and (done == of_all or done - self._told >= 200):
            self._told = done
            print_error(f"Reading what is new in the store: {done:,} of {of_all:,} messages.")
