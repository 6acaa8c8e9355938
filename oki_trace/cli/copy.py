"""``copy``: conversations from this store to another."""

from __future__ import annotations

from typing import Annotated

import typer

from oki_trace.cli import options
from oki_trace.cli.output import bar, console, print_json
from oki_trace.reporting import counted


def register(app: typer.Typer) -> None:
    """Add these commands to ``app``."""
    app.command()(copy)


def copy(
    to: Annotated[str, typer.Option("--to", metavar="PATH_OR_URL", help="The store to copy to.")],
    conversations: Annotated[
        list[int] | None,
        typer.Argument(help="Their numbers, as in: oki-trace list", show_default="all"),
    ] = None,
    db: options.Db = None,
    json: options.Json = False,
) -> None:
    """Copy conversations to another store: a file or a PostgreSQL database, either way.

    Each is copied atomically and gets a new number there, which is printed.
    What is there already is not copied again, so a copy that was broken off is
    finished by the same command. This store is only read.

    Example: oki-trace copy --to postgresql://me@host/traces

    Example: oki-trace copy 1 2 --to some.db
    """
    from oki_trace.store.writing.copy import Fate
    from oki_trace.store.writing.copy import copy as copy_store

    done = []
    out = console()
    with bar("copying") as progress:
        for one in copy_store(options.store_of(db), to, conversations or None, progress):
            done.append(
                {
                    "conversation": one.conversation_id,
                    "new": one.new_id,
                    "fate": one.fate.name.lower(),
                    "steps": one.steps,
                }
            )
            if not json:
                there = "" if one.new_id is None else f" as {one.new_id}"
                steps = counted(one.steps, "step")
                out.print(f"conversation {one.conversation_id}: {one.fate}{there} ({steps})")
    if json:
        print_json(done)
        return
    copied = sum(1 for one in done if one["fate"] == Fate.COPIED.name.lower())
    out.print(f"Copied {counted(copied, 'conversation')} to {options.shown(to)}.")
