"""``export``, ``import`` and ``copy``: move conversations to files and to other stores."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from oki_trace.cli import options, quantities
from oki_trace.cli.output import console, print_error, print_json, progress_bar
from oki_trace.exchange.formats import Format
from oki_trace.reporting import counted


def export(
    conversation: Annotated[
        int, typer.Option("--conversation", "-c", help="The conversation's number.")
    ],
    format: Annotated[
        Format,
        typer.Option(
            "--format",
            "-f",
            help="json, jsonl and parquet have all data; html is a report to read; "
            "trace-v1 is for viewers of version 1.",
        ),
    ] = Format.JSON,
    message: options.MessageId = None,
    branch: Annotated[
        int | None,
        typer.Option(metavar="MESSAGE", help="Only the branch with this message. Default: all."),
    ] = None,
    tensors: Annotated[
        bool,
        typer.Option("--tensors", help="Also write the full tensors, to a .safetensors file."),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            show_default="standard output",
            help="The file, or the folder for parquet; - is standard output.",
        ),
    ] = None,
    db: options.Db = None,
) -> None:
    """Write a conversation and its traces to a file.

    The file is written atomically. `oki-trace import` reads every format except html.

    Example: oki-trace export --conversation 1 --format html --output paris.html

    Example: oki-trace export -c 1 --output paris.json --tensors

    Example: oki-trace export -c 1 --format parquet --output paris

    Example: oki-trace export -c 1 --branch 7 --output one-branch.json

    Example: oki-trace export -c 1 --format trace-v1 --message 2 --output old.json
    """
    from oki_trace.exchange import exporting
    from oki_trace.store.reading.reader import TraceReader

    store = options.store_of(db)
    target = None
    if output is not None and str(output) != "-":
        target = options.not_the_store(output, store)
    with TraceReader(store) as reader, progress_bar("exporting") as progress:
        written = exporting.export(
            reader,
            conversation,
            format,
            target,
            sys.stdout,
            message_id=message,
            branch=branch,
            tensors=tensors,
            # A progress bar would mix with the text on the same terminal.
            progress=None if target is None and sys.stdout.isatty() else progress,
            tell=print_error,
        )
    for path in written:
        print_error(f"wrote {path}")


def import_(
    path: Annotated[
        Path, typer.Argument(help="A file, a folder or a zip of tables; - is standard input.")
    ],
    memory: Annotated[str, typer.Option(help="Memory limit for reading the file.")] = "400MB",
    db: options.Db = None,
    json: options.Json = False,
) -> None:
    """Import a file that export wrote: json, jsonl, parquet or trace-v1.

    The file is checked completely before the store changes, and the import is atomic.

    Conversations get new numbers, which are printed.

    The tensors of name.json are read from name.safetensors in the same folder.

    Example: oki-trace import paris.json

    Example: oki-trace import paris.zip --db elsewhere.db

    Example: oki-trace import - < paris.jsonl
    """
    from oki_trace.exchange.importing import import_path, import_stream

    store = options.store_of(db)
    memory_bytes = quantities.size(memory)
    with progress_bar("importing") as progress:
        if str(path) == "-":
            done = import_stream(sys.stdin.buffer, store, progress, memory_bytes=memory_bytes)
        else:
            path = options.not_the_store(path, store)
            done = import_path(path, store, progress, memory_bytes=memory_bytes)
    if json:
        names = ("conversations", "messages", "steps", "changed", "without_digest")
        print_json({name: getattr(done, name) for name in names})
        return
    if done.tensors_from is not None:
        print_error(f"with the tensors of {done.tensors_from}")
    if done.changed:
        print_error(
            f"{counted(done.changed, 'message')} changed after recording. For details: "
            f"oki-trace verify {done.conversations[0]}"
        )
    if done.without_digest:
        print_error(
            f"{counted(done.without_digest, 'message')} without a digest: changes after recording "
            "cannot be detected"
        )
    contents = f"{counted(done.messages, 'message')}, {counted(done.steps, 'step')}"
    numbers = ", ".join(map(str, done.conversations))
    noun = "conversation" if len(done.conversations) == 1 else "conversations"
    console().print(f"Imported as {noun} {numbers} ({contents}). See: oki-trace show {numbers}")


def copy(
    to: Annotated[str, typer.Option(metavar="PATH_OR_URL", help="The target store.")],
    conversations: Annotated[
        list[int] | None,
        typer.Argument(help="Conversation numbers, from oki-trace list.", show_default="all"),
    ] = None,
    db: options.Db = None,
    json: options.Json = False,
) -> None:
    """Copy conversations to another store, a file or a PostgreSQL database.

    Each conversation is copied atomically and gets a new number, which is printed.

    Conversations that the target already has are skipped. The source store is not changed.

    Repeat the command to finish an interrupted copy.

    Example: oki-trace copy --to postgresql://me@host/traces

    Example: oki-trace copy 1 2 --to some.db
    """
    from oki_trace.store.writing.copy import Fate
    from oki_trace.store.writing.copy import copy as copy_store

    done = []
    out = console()
    with progress_bar("copying") as progress:
        for one in copy_store(options.store_of(db), to, conversations or None, progress):
            done.append(one)
            if not json:
                number = "" if one.new_id is None else f" as {one.new_id}"
                steps = counted(one.steps, "step")
                out.print(f"conversation {one.conversation_id}: {one.fate}{number} ({steps})")
    if json:
        print_json(
            [
                {
                    "conversation": one.conversation_id,
                    "new": one.new_id,
                    "fate": one.fate.name.lower(),
                    "steps": one.steps,
                }
                for one in done
            ]
        )
        return
    copied = sum(one.fate is Fate.COPIED for one in done)
    out.print(f"Copied {counted(copied, 'conversation')} to {options.shown(to)}.")
