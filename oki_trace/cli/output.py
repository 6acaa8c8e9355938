"""Prints for the command line: with colours on a terminal, as plain text into a pipe.

Text from a model never reaches the terminal unchanged: control characters, escape
sequences and direction marks become symbols.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from oki_trace.reporting import Progress
from oki_trace.sanitize import inert, visible


def console() -> Console:
    """Standard output; colours only on a terminal."""
    # A pipe has no width, so nothing is cut for the program that reads it.
    width = None if sys.stdout.isatty() else 1_000_000
    return _Console(highlight=False, width=width)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Raise: ``app`` handles a closed pipe for every command."""
        raise BrokenPipeError


def print_text(text: str = "", style: str = "", *, keep: str = "") -> None:
    """Print a line of text from any source; ``keep`` are control characters to leave in it."""
    console().print(Text(inert(text, keep), style=style), soft_wrap=True)


def print_error(sentence: str) -> None:
    """Print one line on standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"[bold red]oki-trace:[/] {escape(inert(sentence, keep=''))}"
    )


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Print JSON in ASCII, in which every unsafe character is escaped."""
    print(json.dumps(value, indent=indent, ensure_ascii=True, allow_nan=False))


def cell(text: str, style: str = "") -> Text:
    """Text for one cell of a table."""
    return Text(inert(text, keep=""), style=style)


def token(text: str) -> Text:
    """A token for a table; spaces and line ends are visible."""
    return Text(visible(text))


def bar(share: float, width: int) -> Text:
    """A horizontal bar for a share of 0 to 1, in eighths of a character."""
    eighths = round(max(0.0, min(share, 1.0)) * width * 8)
    partial = chr(0x2590 - eighths % 8) if eighths % 8 else ""
    return Text("█" * (eighths // 8) + partial, style="cyan")


def table(*columns: str, right: tuple[str, ...] = (), header: bool = True) -> Table:
    """A table without a frame; the columns in ``right`` are aligned right."""
    made = Table(
        box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0), show_header=header
    )
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", no_wrap=True)
    return made


@contextmanager
def progress_bar(activity: str) -> Iterator[Progress | None]:
    """A progress bar on standard error; None where that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as ProgressDisplay

    columns = (TextColumn(activity), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with ProgressDisplay(*columns, console=Console(stderr=True), transient=True) as display:
        task = display.add_task(activity, total=None)
        yield lambda done, total: display.update(task, completed=done, total=total)
