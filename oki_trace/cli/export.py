"""``export``: a conversation as a file."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from oki_trace.cli import options
from oki_trace.cli.output import complain


class Format(StrEnum):
    """The formats a conversation can be written in."""

    JSON = "json"


def register(app: typer.Typer) -> None:
    """Add these commands to ``app``."""
    app.command()(export)


def export(
    conversation: Annotated[int, typer.Option("--conversation", "-c", help="Its number.")],
    format: Annotated[Format, typer.Option("--format", "-f", help="The file's format.")] = (
        Format.JSON
    ),
    message: Annotated[
        int | None, typer.Option("--message", help="Only this message's trace.")
    ] = None,
    output: options.Output = None,
    db: options.Db = None,
) -> None:
    """Write a conversation and its traces as JSON.

    Example: oki-trace export --conversation 1 --output paris.json
    """
    import sys

    from oki_trace.exchange.json_export import write_conversation
    from oki_trace.store.reader import TraceReader

    with TraceReader(options.store_of(db)) as reader:
        if output is None:
            write_conversation(reader, conversation, sys.stdout, message)
        else:
            from oki_trace.exchange.files import replacing

            with replacing(output) as file:
                write_conversation(reader, conversation, file, message)
            complain(f"wrote {output}")
