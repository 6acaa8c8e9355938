"""The commands, gathered."""

from __future__ import annotations

from typing import Annotated

import typer

from oki_trace.cli import browse, explorer, export, store, talk

app = typer.Typer(
    help="See what a local language model does at every step and every layer.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from oki_trace import __version__

        typer.echo(f"oki-trace {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """See what a local language model does at every step and every layer.

    Every command takes --debug, which shows tracebacks.
    """


for _module in (talk, browse, export, store, explorer):
    _module.register(app)
