"""``migrate`` and ``info``: the store itself."""

from __future__ import annotations

from dataclasses import asdict

import typer
from rich.text import Text

from oki_trace.cli import options
from oki_trace.cli.output import console, inert, print_json, size, table


def register(app: typer.Typer) -> None:
    """Add these commands to ``app``."""
    app.command()(info)
    app.command()(migrate)


def migrate(db: options.Db = None, json: options.Json = False) -> None:
    """Create the store, or bring it to this version's schema after a backup.

    Example: oki-trace migrate --db data/oki_trace.db
    """
    from oki_trace.store import migrate as schema

    where = options.store_of(db)
    before = schema.current(where)
    schema.ensure(where)
    after = schema.current(where)
    if json:
        print_json({"store": where, "before": before, "schema": after})
        return
    done = "is up to date" if before == after else "created" if before is None else "upgraded"
    console().print(Text(f"{inert(where, keep='')} {done} (schema {after})."))


def info(db: options.Db = None, json: options.Json = False) -> None:
    """Where the store is, what it holds, and how large it is.

    Example: oki-trace info --json
    """
    from oki_trace import __version__
    from oki_trace.settings import Settings
    from oki_trace.store.reader import TraceReader

    with TraceReader(options.store_of(db)) as reader:
        found = reader.info()
    per_token = found.bytes / found.steps if found.steps else 0.0
    if json:
        print_json({**asdict(found), "bytes_per_token": per_token, "version": __version__})
        return
    rows = table("", "")
    rows.show_header = False
    for name, value in (
        ("store", inert(found.url, keep="")),
        ("schema", found.schema),
        ("size", size(found.bytes)),
        ("  of it full tensors", size(found.tensor_bytes)),
        ("a token takes", size(round(per_token))),
        ("conversations", f"{found.conversations:,}"),
        ("messages", f"{found.messages:,}"),
        ("steps", f"{found.steps:,}"),
        ("default model", inert(Settings.from_environment().model_id, keep="")),
        ("oki-trace", __version__),
    ):
        rows.add_row(Text(name, style="dim"), Text(value))
    console().print(rows)
