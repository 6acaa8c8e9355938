"""``ask`` and ``sql``: questions across steps, replies, conversations and models."""

from __future__ import annotations

import math
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from oki_trace.cli import options, quantities
from oki_trace.cli.output import print_error
from oki_trace.errors import UsageError
from oki_trace.records import Role

if TYPE_CHECKING:
    from oki_trace.analysis.query_session import QuerySession


class AnswerFormat(StrEnum):
    """How an answer is printed."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


class Format(StrEnum):
    """How the result of SQL is printed."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    PARQUET = "parquet"


def register(app: typer.Typer) -> None:
    """Add these commands to ``app``."""
    app.command()(ask)
    app.command()(sql)


def ask(
    question: Annotated[
        str | None, typer.Argument(help="Its name; without one, all are listed.")
    ] = None,
    what: Annotated[
        list[str] | None,
        typer.Argument(help="For compare: two steps (2:5 4:5), two replies (2 4) or two models."),
    ] = None,
    by: Annotated[str | None, typer.Option("--by", help="Which view of it.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Only this model.")] = None,
    conversation: Annotated[
        int | None, typer.Option("--conversation", "-c", help="Only this conversation.")
    ] = None,
    message: Annotated[int | None, typer.Option("--message", help="Only this reply.")] = None,
    since: Annotated[
        str | None, typer.Option("--since", help="From this day or moment on.")
    ] = None,
    until: Annotated[
        str | None, typer.Option("--until", help="Up to this day, included, or moment.")
    ] = None,
    role: Annotated[
        Role | None, typer.Option("--role", help="Only after a message of this role; see --text.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option("--text", help="Only where this was said, up to and with the reply."),
    ] = None,
    top: Annotated[
        int | None, typer.Option("--top", "-n", min=1, help="At most this many rows.")
    ] = None,
    least: Annotated[
        float | None, typer.Option("--least", help="The least probability that counts.")
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(
            "--sample",
            min=1,
            help="How many steps' full tensors are read: 64 for heads, 640 for two models.",
        ),
    ] = None,
    format: Annotated[
        AnswerFormat, typer.Option("--format", "-f", help="How it is printed.")
    ] = AnswerFormat.TABLE,
    show_sql: Annotated[bool, typer.Option("--sql", help="Print its SQL instead.")] = False,
    db: options.Db = None,
    json: options.Json = False,
) -> None:
    """A built-in question over all that the store holds, or over a part of it.

    Example: oki-trace ask settle --by class

    Example: oki-trace ask

    Example: oki-trace ask compare 2:5 4:5

    Example: oki-trace ask uncertainty --model smollm2 --since 2026-01-01 --format csv
    """
    if least is not None and not 0 <= least <= 1:
        raise UsageError(f"--least {least} is no probability: give a number from 0 to 1.")
    from oki_trace.analysis import catalog
    from oki_trace.analysis.scope import Scope, moment
    from oki_trace.cli import answers

    format = AnswerFormat.JSON if json else format
    if question is None:
        answers.print_questions(as_json=format is AnswerFormat.JSON)
        return
    scope = Scope(
        model,
        conversation,
        message,
        moment(since) if since else None,
        moment(until, end=True) if until else None,
        role,
        text,
    )
    given = {"top": top, "least": least, "sample": sample}
    with _trove(db) as trove:
        found = catalog.answer(
            trove,
            question,
            tuple(what or ()),
            scope=scope,
            view=by,
            **{name: value for name, value in given.items() if value is not None},
        )
    if show_sql:
        print(found.sql)
    else:
        answers.print_answer(found, format)


def sql(
    query: Annotated[
        str | None, typer.Argument(metavar="SELECT", help="One SELECT statement, in quotes.")
    ] = None,
    tables: Annotated[bool, typer.Option("--tables", help="List the tables and columns.")] = False,
    format: Annotated[Format, typer.Option("--format", "-f", help="How it is printed.")] = (
        Format.TABLE
    ),
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most this many rows.")] = (
        1000
    ),
    timeout: Annotated[float, typer.Option("--timeout", help="At most this many seconds.")] = 30.0,
    memory: Annotated[
        str, typer.Option("--memory", help="How much memory the statement may take.")
    ] = "512MB",
    output: options.Output = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Write the cache anew from the store, first.")
    ] = False,
    db: options.Db = None,
    json: options.Json = False,
) -> None:
    """Your own question, in SQL (DuckDB's), over the whole store. Nothing can be changed by it.

    Example: oki-trace sql "SELECT layer, avg(kl) FROM lens_layer GROUP BY layer ORDER BY layer"

    Example: oki-trace sql --tables

    Example: oki-trace sql "FROM step WHERE prob < 0.1" --format parquet --output unsure.parquet
    """
    from oki_trace.analysis.sandbox import LEAST_MEMORY_BYTES
    from oki_trace.cli import answers

    format = Format.JSON if json else format
    if not 0 < timeout < math.inf:
        raise UsageError(f"--timeout {timeout} is no time: give a number of seconds, as 30.")
    memory_bytes = quantities.size(memory)
    if memory_bytes < LEAST_MEMORY_BYTES:
        raise UsageError(f"--memory {memory} is too little for DuckDB: give 200MB or more.")
    if tables:
        answers.print_tables(as_json=format is Format.JSON)
        return
    if query is None and not rebuild:
        raise UsageError("There is no question: give a SELECT statement, --tables or --rebuild.")
    if format is Format.PARQUET and output is None and sys.stdout.isatty():
        raise UsageError("Parquet is not for a terminal: give --output PATH.")
    if output is not None:
        options.not_the_store(output, options.store_of(db))
    with _trove(db) as trove:
        if rebuild:
            trove.rebuild()
        if query is None:
            print_error("The cache is written anew.")
            return
        if format is Format.PARQUET:
            result = trove.sql_result(
                query, limit=limit, seconds=timeout, memory_bytes=memory_bytes
            )
            answers.write_parquet(result.table, output)
            cut = result.cut
        else:
            found = trove.sql(query, limit=limit, seconds=timeout, memory_bytes=memory_bytes)
            answers.print_rows(found, format, output)
            cut = found.cut
    if cut:
        print_error(f"There are more rows than {limit:,}: give a higher --limit to see them.")


def _trove(db: str | None) -> QuerySession:
    """The store, open for questions; says what takes long on the first one."""
    from oki_trace.analysis.query_session import QuerySession
    from oki_trace.cli.answers import Upkeep

    return QuerySession(options.store_of(db), Upkeep())
