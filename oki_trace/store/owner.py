"""Which process a running reply belongs to, and whether that process still lives.

A process is named ``host:pid:start``. The start time (Linux: in clock ticks
since boot, from ``/proc``; elsewhere empty) tells it from a later process that
was given the same number. ``is_dead`` is True only when that is certain: about
a process on another host nothing is known here.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import NamedTuple


class Owner(NamedTuple):
    """A process, by host, number and start time."""

    host: str
    pid: int
    start: str

    def __str__(self) -> str:
        return ":".join((self.host, str(self.pid), self.start))

    @classmethod
    def parse(cls, name: str) -> Owner:
        """Read what ``str()`` wrote. A host name holds no colon."""
        host, pid, start = [*name.split(":"), "", ""][:3]
        # One that makes no sense names nobody: no process has the number 0.
        return cls(host, int(pid) if pid.isdecimal() and len(pid) < 10 else 0, start)


def this_process() -> Owner:
    """The running process. Asked anew each time, for a fork is another process."""
    pid = os.getpid()
    return Owner(socket.gethostname().replace(":", "-"), pid, _start_of(pid) or "")


def is_dead(name: str) -> bool:
    """Whether the process named ``name`` is known to have ended."""
    owner = Owner.parse(name)
    here = this_process()
    if owner.pid == 0:
        return True
    # On Windows os.kill would end the process instead of asking about it.
    if owner.host != here.host or sys.platform == "win32":
        return False
    start = _start_of(owner.pid)
    if owner.start and start is not None:
        return owner.start != start
    # No /proc, or no such process: the kernel tells the two apart.
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _start_of(pid: int) -> str | None:
    """When ``pid`` started; "" for one that has ended but is not yet reaped; None when unknown."""
    try:
        stat = Path("/proc", str(pid), "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The process's name, in brackets, may itself hold spaces and brackets.
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]
