"""``migrate`` and ``info``: the store itself."""

from __future__ import annotations

from dataclasses import asdict

import typer
from rich.text import Text

from oki_trace.cli import options
from oki_trace.cli.output import console, inert, print_json, table
from oki_trace.reporting import size


def register(app: typer.Typer) -> None:
    """Add these commands to ``app``."""
    app.command()(info)
    app.command()(migrate)


def migrate(db: options.Db = None, json: options.Json = False) -> None:
    """Create the store, or bring it to this version's schema after a backup.

    Example: oki-trace migrate --db data/oki_trace.db
    """
    from oki_trace.store.schema import migrate as schema

    where = options.store_of(db)
    before = schema.current(where)
    schema.ensure(where)
    after = schema.current(where)
    if json:
        print_json({"store": options.shown(where), "before": before, "schema": after})
        return
    done = "is up to date" if before == after else "created" if before is None else "upgraded"
    console().print(Text(f"{options.shown(where)} {done} (schema {after})."))


def info(db: options.Db = None, json: options.Json = False) -> None:
    """Where the store is, what it holds, and how large it is.

    Example: oki-trace info --json
    """
    from oki_trace import __version__
    from oki_trace.settings import Settings
    from oki_trace.store.reading.reader import TraceReader

    with TraceReader(options.store_of(db)) as reader:
        found = reader.info()
    if json:
        per_token = {
            "bytes_per_token": found.bytes_per_token,
            "row_bytes_per_token": found.row_bytes_per_token,
            "tensor_bytes_per_token": found.tensor_bytes_per_token,
        }
        print_json({**asdict(found), **per_token, "version": __version__})
        return
    kept = f" ({found.tensor_steps:,} of {found.steps:,} have them)"
    rows = table("", "")
    rows.show_header = False
    for name, value in (
        ("store", inert(found.url, keep="")),
        ("schema", found.schema),
        ("size on disk", size(found.bytes)),
        ("  full tensors", size(found.tensor_bytes)),
        ("  rows", size(found.row_bytes)),
        ("  write-ahead log", size(found.log_bytes)),
        ("  free room", size(found.free_bytes)),
        ("a token's rows", size(round(found.row_bytes_per_token))),
        ("a token's tensors", size(round(found.tensor_bytes_per_token)) + kept),
        ("conversations", f"{found.conversations:,}"),
        ("messages", f"{found.messages:,}"),
        ("steps", f"{found.steps:,}"),
        ("default model", inert(Settings.from_environment().model_id, keep="")),
        ("oki-trace", __version__),
    ):
        rows.add_row(Text(name, style="dim"), Text(value))
    console().print(rows)
