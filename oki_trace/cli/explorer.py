"""``ui``: opens the explorer in the browser."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated

import typer

from oki_trace.cli import options
from oki_trace.cli.output import console, print_error


def ui(
    port: Annotated[int | None, typer.Option(help="The port to serve on.")] = None,
    host: Annotated[
        str,
        typer.Option(help="The address to listen on; only this machine can reach the default."),
    ] = "127.0.0.1",
    public: Annotated[
        bool,
        typer.Option(
            "--public", help="Allow a --host that other machines can reach. There is no password."
        ),
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Another host name for the explorer, such as that of a proxy. Repeatable.",
        ),
    ] = None,
    no_fast: options.NoFast = False,
    db: options.Db = None,
) -> None:
    """Open the explorer in the browser, on this machine only.

    Example: oki-trace ui --port 8600

    Example: oki-trace ui --db elsewhere.db
    """
    open_explorer(
        options.store_of(db), port, {}, host, public=public, names=tuple(allow_host or ())
    )


def open_explorer(
    db: str,
    port: int | None,
    query: Mapping[str, str],
    host: str = "127.0.0.1",
    *,
    public: bool = False,
    names: tuple[str, ...] = (),
) -> None:
    """Serve the explorer until interrupted; on a terminal, open a browser."""
    from oki_trace.launcher import checked_host, checked_name, free_port, is_loopback, serve, url_of
    from oki_trace.store.schema.migrate import ensure

    checked_host(host, public=public)
    for name in names:
        checked_name(name)
    ensure(db)
    chosen = free_port(port, host)
    url = url_of(chosen, query, host)
    if not is_loopback(host):
        print_error(
            f"Anyone who can reach {host} on port {chosen} can read, change and delete every "
            "conversation in this store, and use the model. The connection is not encrypted."
        )
    console().print(f"Explorer: {url}  (Ctrl-C to stop)")
    raise typer.Exit(
        serve(db, chosen, url, open_browser=sys.stdout.isatty(), host=host, names=names)
    )
