"""Runs ``oki-trace`` as a user does."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# All that a terminal acts on rather than shows, but for the line end: control
# characters, escape sequences, direction marks, line separators.
ACTIVE = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]"
)


@dataclass(frozen=True)
class Done:
    """What a command left: its exit status, and what it wrote."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


Oki = Callable[..., Done]


def command(*arguments: object) -> list[str]:
    """``oki-trace`` with these arguments, as a process of its own."""
    return [sys.executable, "-m", "oki_trace", *map(str, arguments)]


def start(*arguments: object, said: str = "") -> Done:
    """Run it as a process to its end, with ``said`` on its standard input."""
    done = subprocess.run(
        command(*arguments), input=said, capture_output=True, text=True, check=False, cwd=ROOT
    )
    return Done(done.returncode, done.stdout, done.stderr)
