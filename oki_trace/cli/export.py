"""``export``: a conversation as a file or a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from oki_trace.cli import options
from oki_trace.cli.output import bar, print_error
from oki_trace.exchange.formats import Format


def register(app: typer.Typer) -> None:
    """Add these commands to ``app``."""
    app.command()(export)


def export(
    conversation: Annotated[int, typer.Option("--conversation", "-c", help="Its number.")],
    format: Annotated[
        Format,
        typer.Option(
            "--format",
            "-f",
            help="html: a report to read; json, jsonl, parquet: all of it; "
            "trace-v1: for the viewers of that format.",
        ),
    ] = Format.JSON,
    message: Annotated[
        int | None, typer.Option("--message", help="Only this message's trace.")
    ] = None,
    tensors: Annotated[
        bool,
        typer.Option("--tensors", help="Full tensors too, as safetensors beside json or jsonl."),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            show_default="standard output",
            help="File or, for parquet, folder to write; - is standard output.",
        ),
    ] = None,
    db: options.Db = None,
) -> None:
    """Write a conversation and its traces as a file.

    The file is written atomically. `oki-trace import` reads all formats
    but html back.

    Example: oki-trace export --conversation 1 --format html --output paris.html

    Example: oki-trace export -c 1 --output paris.json --tensors

    Example: oki-trace export -c 1 --format parquet --output paris

    Example: oki-trace export -c 1 --format trace-v1 --message 2 --output old.json
    """
    import sys

    from oki_trace.exchange import exporting
    from oki_trace.store.reading.reader import TraceReader

    store = options.store_of(db)
    target = None
    if output is not None and str(output) != "-":
        target = options.not_the_store(output, store)
    with TraceReader(store) as reader, bar("exporting") as progress:
        written = exporting.export(
            reader,
            conversation,
            format,
            target,
            sys.stdout,
            message_id=message,
            tensors=tensors,
            # Bar and text would meet on one terminal.
            progress=None if target is None and sys.stdout.isatty() else progress,
            tell=print_error,
        )
    for path in written:
        print_error(f"wrote {path}")
