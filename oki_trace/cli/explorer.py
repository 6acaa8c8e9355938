"""``ui``: the explorer in the browser."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated

import typer

from oki_trace.cli import options
from oki_trace.cli.output import console


def register(app: typer.Typer) -> None:
    """Add these commands to ``app``."""
    app.command()(ui)


def ui(
    port: Annotated[int | None, typer.Option("--port", help="The port to serve on.")] = None,
    db: options.Db = None,
) -> None:
    """Open the explorer, on this machine alone.

    Example: oki-trace ui --port 8600

    Example: oki-trace ui --db elsewhere.db
    """
    open_explorer(options.store_of(db), port, {})


def open_explorer(db: str, port: int | None, query: Mapping[str, str]) -> None:
    """Serve the explorer until interrupted; on a terminal, open the browser on it."""
    from oki_trace.launcher import free_port, serve, url_of
    from oki_trace.store.migrate import ensure

    ensure(db)
    chosen = free_port(port)
    url = url_of(chosen, query)
    console().print(f"Explorer: {url}  (Ctrl-C to stop)")
    raise typer.Exit(serve(db, chosen, url, open_browser=sys.stdout.isatty()))
