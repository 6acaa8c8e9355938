"""``ask`` and ``sql``: questions across steps, replies, conversations and models."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from oki_trace.cli import options, quantities
from oki_trace.cli.output import print_error
from oki_trace.errors import UsageError
from oki_trace.records import Role

if TYPE_CHECKING:
    from oki_trace.analysis.query_session import QuerySession
    from oki_trace.analysis.question import Value

AnswerFormat = Literal["table", "json", "csv"]
ResultFormat = Literal["table", "json", "csv", "parquet"]
_FORMAT = typer.Option("--format", "-f", help="The output format.")


def ask(
    question: Annotated[
        str | None, typer.Argument(help="The name of a question; without a name, all are listed.")
    ] = None,
    what: Annotated[
        list[str] | None,
        typer.Argument(
            help="For compare: two steps (2:5 4:5), two replies or scores (2 4), or two models."
        ),
    ] = None,
    by: Annotated[
        str | None, typer.Option(help="How to group the answer; oki-trace ask lists the choices.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Only this model.")] = None,
    conversation: Annotated[
        int | None, typer.Option("--conversation", "-c", help="Only this conversation.")
    ] = None,
    message: Annotated[int | None, typer.Option(help="Only this reply.")] = None,
    since: Annotated[
        str | None, typer.Option(help="Only replies from this date or time on.")
    ] = None,
    until: Annotated[
        str | None, typer.Option(help="Only replies before this time, or up to this date.")
    ] = None,
    role: Annotated[
        Role | None,
        typer.Option(
            help="Only replies after a message of this role; with --text, one with this text."
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="Only replies with this text in the reply or in an earlier message."),
    ] = None,
    top: Annotated[
        int | None, typer.Option("--top", "-n", min=1, help="Maximum number of rows.")
    ] = None,
    least: Annotated[
        float | None, typer.Option(help="Minimum probability of a rival or a runner-up.")
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(
            min=1, help="Maximum number of steps to read; default 64 for heads, 640 for two models."
        ),
    ] = None,
    origin: Annotated[
        str | None,
        typer.Option(
            help="For uncertainty: generated (the default), sampled, forced, given or all tokens."
        ),
    ] = None,
    segment: Annotated[
        str | None, typer.Option(help="For prompt: only this part, such as user or system.")
    ] = None,
    lens: Annotated[
        list[str] | None,
        typer.Option(
            help="For layers, settle and rivals: an installed lens instead of the Logit Lens; "
            "for layers, several are compared."
        ),
    ] = None,
    set_option: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Set an option by its name, such as from_layer."
        ),
    ] = None,
    format: Annotated[AnswerFormat, _FORMAT] = "table",
    show_sql: Annotated[
        bool, typer.Option("--sql", help="Print the question's SQL instead.")
    ] = False,
    db: options.Db = None,
    json: options.Json = False,
) -> None:
    """Ask a built-in question about all or some of the replies in the store.

    Example: oki-trace ask settle --by class

    Example: oki-trace ask

    Example: oki-trace ask compare 2:5 4:5

    Example: oki-trace ask uncertainty --model smollm2 --since 2026-01-01 --format csv
    """
    if least is not None and not 0 <= least <= 1:
        raise UsageError(f"--least {least} is not a probability. Give a number from 0 to 1.")
    from oki_trace.analysis import questions
    from oki_trace.analysis.scope import Scope, parse_time
    from oki_trace.cli import answers

    format = "json" if json else format
    if question is None:
        answers.print_questions(as_json=format == "json")
        return
    first = parse_time(since) if since else None
    last = parse_time(until, end=True) if until else None
    scope = Scope(model, conversation, message, first, last, role, text)
    given = {"top": top, "least": least, "sample": sample}
    chosen: dict[str, Value] = {n: value for n, value in given.items() if value is not None}
    named = {"origin": origin, "segment": segment, "lens": ",".join(lens or ()) or None}
    pairs = [f"{name}={value}" for name, value in named.items() if value is not None]
    chosen |= questions.parse_options(question, [*pairs, *(set_option or ())])
    with _session(db) as session:
        answer = questions.answer(
            session, question, tuple(what or ()), scope=scope, view=by, **chosen
        )
    if show_sql:
        print(answer.sql)
    else:
        answers.print_answer(answer, format)


def sql(
    query: Annotated[
        str | None, typer.Argument(metavar="SELECT", help="One SELECT statement, in quotes.")
    ] = None,
    tables: Annotated[bool, typer.Option("--tables", help="List the tables and columns.")] = False,
    format: Annotated[ResultFormat, _FORMAT] = "table",
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=1, help="Maximum number of rows.")
    ] = 1000,
    timeout: Annotated[float, typer.Option(help="Time limit in seconds.")] = 30.0,
    memory: Annotated[str, typer.Option(help="Memory limit for the statement.")] = "512MB",
    output: options.Output = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Rebuild the cache from the store first.")
    ] = False,
    db: options.Db = None,
    json: options.Json = False,
) -> None:
    """Query the whole store with your own SQL, in DuckDB's dialect. Read-only.

    Example: oki-trace sql "SELECT lens, layer, avg(kl) FROM lens_layer GROUP BY ALL ORDER BY ALL"

    Example: oki-trace sql --tables

    Example: oki-trace sql "FROM step WHERE prob < 0.1" --format parquet --output unsure.parquet
    """
    from oki_trace.analysis.sandbox import LEAST_MEMORY_BYTES
    from oki_trace.cli import answers

    format = "json" if json else format
    if not 0 < timeout < math.inf:
        raise UsageError(f"--timeout {timeout} is not a time. Give seconds, such as 30.")
    memory_bytes = quantities.size(memory)
    if memory_bytes < LEAST_MEMORY_BYTES:
        raise UsageError(f"--memory {memory} is too little for DuckDB. Give 200MB or more.")
    if tables:
        answers.print_tables(as_json=format == "json")
        return
    if query is None and not rebuild:
        raise UsageError("The query is missing. Give a SELECT statement, --tables or --rebuild.")
    if format == "parquet" and output is None and sys.stdout.isatty():
        raise UsageError("Parquet cannot be printed on a terminal. Give --output PATH.")
    if output is not None:
        options.not_the_store(output, options.store_of(db))
    limits: Any = {"limit": limit, "seconds": timeout, "memory_bytes": memory_bytes}
    with _session(db) as session:
        if rebuild:
            session.rebuild()
        if query is None:
            print_error("The cache is rebuilt.")
            return
        if format == "parquet":
            result = session.sql_result(query, **limits)
            answers.write_parquet(result.table, output)
            cut = result.cut
        else:
            rows = session.sql(query, **limits)
            answers.print_rows(rows, format, output)
            cut = rows.cut
    if cut:
        print_error(f"There are more than {limit:,} rows. Raise --limit to see them.")


def _session(db: str | None) -> QuerySession:
    """The store, ready for questions; reports progress if the cache is far behind."""
    from oki_trace.analysis.query_session import QuerySession
    from oki_trace.cli.answers import CacheProgress

    return QuerySession(options.store_of(db), CacheProgress())
