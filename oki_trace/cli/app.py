"""The application of the command line: all commands, in the order of the help."""

from __future__ import annotations

import os
import re
import select
import shlex
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from oki_trace.cli import (
    ask,
    bench,
    branch,
    browse,
    chat,
    explorer,
    lens,
    maintain,
    score,
    store,
    transfer,
)

_SHORT_OPTION = re.compile("No such option: -[^-]")
# Its name is private in typer.
_UsageError: Any = typer.BadParameter.__mro__[1]


class _Commands(TyperGroup):
    """All commands. A command ends quietly when the reader of its output does (``| head``)."""

    def invoke(self, ctx: Any) -> Any:
        arguments = list(ctx.args)
        try:
            try:
                return super().invoke(ctx)
            except _UsageError as error:
                name = getattr(error.ctx, "info_name", None)
                command = name if name in ("chat", "score", "ask", "sql") else "run"
                error.message += _dash_advice(error.message, arguments, command)
                raise
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            if not _reader_is_gone():
                # Another pipe broke, such as that of a child process: the command has failed.
                raise
            # Discard the buffered output, so that Python does not complain at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None


def _reader_is_gone() -> bool:
    """Whether nobody reads standard output any more, as far as the system can tell."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return bool(poll.poll(0))


def _dash_advice(message: str, arguments: list[str], command: str) -> str:
    """Advice to add to ``message`` if a text may have been parsed as an option."""
    texts = [one for one in arguments if one.startswith("-") and " " in one]
    if not texts and not _SHORT_OPTION.match(message):
        return ""
    text = texts[0] if texts else "-5 + 3"
    separator = "" if not message else " " if message.endswith(".") else ". "
    return f"{separator}Put a text that begins with - after --: oki-trace {command} -- " + (
        shlex.quote(text)
    )


app = typer.Typer(
    cls=_Commands,
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

    Every command takes --debug, which shows tracebacks. Exit status: 0 success,
    1 failure, 2 wrong usage, 130 ended by Ctrl-C.

    Example: oki-trace demo
    """


for _command in (
    *(chat.demo, chat.run, chat.chat, branch.branch, score.score, browse.list_, browse.show),
    *(ask.ask, ask.sql, transfer.export, transfer.import_, store.info, store.migrate),
    *(maintain.rename, maintain.delete, maintain.prune, maintain.vacuum),
    *(store.verify, transfer.copy, explorer.ui, bench.bench),
):
    app.command(_command.__name__.strip("_"))(_command)
app.add_typer(lens.lens)
