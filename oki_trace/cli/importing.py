"""``import``: what ``export`` wrote, and traces of version 1, into the store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from oki_trace.cli import options, quantities
from oki_trace.cli.output import bar, console, print_error, print_json
from oki_trace.reporting import counted


def register(app: typer.Typer) -> None:
    """Add these commands to ``app``."""
    app.command("import")(import_)


def import_(
    path: Annotated[
        Path, typer.Argument(help="A file, a folder or a zip of tables; - is standard input.")
    ],
    memory: Annotated[
        str, typer.Option("--memory", help="How much memory reading the file may take.")
    ] = "400MB",
    db: options.Db = None,
    json: options.Json = False,
) -> None:
    """Take an export into the store: json, jsonl, parquet, trace-v1.

    All of the file is checked first; then it is there whole, or nothing is. It
    gets new numbers, which are told. The tensors of name.json are looked for in
    name.safetensors beside it. A file that would take more memory is refused.

    Example: oki-trace import paris.json

    Example: oki-trace import paris.zip --db elsewhere.db

    Example: oki-trace import - < paris.jsonl
    """
    import sys

    from oki_trace.exchange.importing import import_path, import_stream

    store = options.store_of(db)
    most = quantities.size(memory)
    with bar("importing") as progress:
        if str(path) == "-":
            done = import_stream(sys.stdin.buffer, store, progress, memory_bytes=most)
        else:
            path = options.not_the_store(path, store)
            done = import_path(path, store, progress, memory_bytes=most)
    if json:
        print_json(
            {
                "conversations": list(done.conversations),
                "messages": done.messages,
                "steps": done.steps,
                "changed": done.changed,
                "without_digest": done.without_digest,
            }
        )
        return
    if done.tensors_from is not None:
        print_error(f"with the tensors of {done.tensors_from}")
    what = f"{counted(done.messages, 'message')}, {counted(done.steps, 'step')}"
    numbers = ", ".join(map(str, done.conversations))
    noun = "conversation" if len(done.conversations) == 1 else "conversations"
    if done.changed:
        print_error(
            f"{counted(done.changed, 'message')} changed since recorded: oki-trace verify "
            f"{done.conversations[0]} says where"
        )
    if done.without_digest:
        print_error(
            f"{counted(done.without_digest, 'message')} without a digest: whether they were "
            "changed since recorded cannot be told"
        )
    console().print(f"Imported as {noun} {numbers} ({what}). See: oki-trace show {numbers}")
