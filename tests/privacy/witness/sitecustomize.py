"""First on a process's path, this refuses every try to reach beyond the machine, and notes it.

Python's own sockets only: libraries that bring their own are seen by the
kernel's count in ``cut_off.py``.
"""

from __future__ import annotations

import ipaddress
import os
import sys
from pathlib import Path
from typing import Any

_NOTES = os.environ.get("OKI_TRACE_WITNESS")
_WHERE = {
    "socket.connect": 1,
    "socket.sendto": 1,
    "socket.sendmsg": 1,
    "socket.bind": 1,
    "socket.getaddrinfo": 0,
    "socket.gethostbyname": 0,
    "socket.gethostbyaddr": 0,
}


def _host(event: str, arguments: tuple[Any, ...]) -> str | None:
    """The host that is named; None where none is, as in a Unix socket's path."""
    address = arguments[_WHERE[event]]
    if isinstance(address, tuple):
        address = address[0] if address else None
    elif event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.bind"):
        return None
    if isinstance(address, bytes):
        address = address.decode("ascii", "replace")
    return address if isinstance(address, str) else None


def _stays(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in _WHERE or _NOTES is None:
        return
    host = _host(event, arguments)
    if host is None or _stays(host):
        return
    with Path(_NOTES).open("a", encoding="utf-8") as notes:
        notes.write(f"{event} {host!r} by {' '.join(sys.orig_argv)[:200]}\n")
    raise OSError(f"refused: {event} {host!r}")


sys.addaudithook(_watch)
