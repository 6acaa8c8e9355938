"""How the command line prints: colours for people, plain text for pipes.

Text that a model wrote is never passed to the terminal as it is: control
characters, escape sequences and direction marks are shown as symbols, so a
reply can neither recolour the terminal nor rewrite what stands there.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text


def console() -> Console:
    """Standard output; colours only on a terminal."""
    # A pipe has no width: nothing is cut for the program that reads it.
    width = None if sys.stdout.isatty() else 1_000_000
    return _Console(highlight=False, width=width)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Left to the one place that handles it for every command."""
        raise BrokenPipeError


def complain(sentence: str) -> None:
    """One line on standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"[bold red]oki-trace:[/] {escape(inert(sentence, keep=''))}"
    )


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """``value`` as JSON on standard output, as it is: JSON escapes what is unsafe."""
    print(json.dumps(value, indent=indent, ensure_ascii=True, allow_nan=False))


def inert(text: str, keep: str = "\n\t") -> str:
    """``text`` with every character that a terminal would act on shown as a symbol."""
    return "".join(c if c in keep or _is_plain(c) else _symbol(c) for c in text)


def token(text: str) -> Text:
    """A token for a table: spaces and line ends visible."""
    return Text(inert(text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥"), keep=""))


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """An unframed table; the columns named in ``right`` are numbers."""
    made = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", no_wrap=True)
    return made


def size(count: int) -> str:
    """A number of bytes for people: ``2.1 MB``."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _is_plain(character: str) -> bool:
    return unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _symbol(character: str) -> str:
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else f"<U+{code:04X}>"
