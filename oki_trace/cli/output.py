"""How the command line prints: colours for people, plain text for pipes.

Text that a model wrote is never passed to the terminal as it is: control
characters, escape sequences and direction marks are shown as symbols, so a
reply can neither recolour the terminal nor rewrite what stands there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from oki_trace.sanitize import inert as inert
from oki_trace.sanitize import visible


def console() -> Console:
    """Standard output; colours only on a terminal."""
    # A pipe has no width: nothing is cut for the program that reads it.
    width = None if sys.stdout.isatty() else 1_000_000
    return _Console(highlight=False, width=width)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Left to the one place that handles it for every command."""
        raise BrokenPipeError


def print_error(sentence: str) -> None:
    """One line on standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"[bold red]oki-trace:[/] {escape(inert(sentence, keep=''))}"
    )


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """``value`` as JSON on standard output, as it is: JSON escapes what is unsafe."""
    print(json.dumps(value, indent=indent, ensure_ascii=True, allow_nan=False))


def token(text: str) -> Text:
    """A token for a table: spaces and line ends visible."""
    return Text(visible(text))


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """An unframed table; the columns named in ``right`` are numbers."""
    made = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", no_wrap=True)
    return made


@contextmanager
def bar(doing: str) -> Iterator[Callable[[int, int], None] | None]:
    """A callback (done, of all) that draws a progress bar; None where there is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as drawn:
        task = drawn.add_task(doing, total=None)
        yield lambda done, total: drawn.update(task, completed=done, total=total)
