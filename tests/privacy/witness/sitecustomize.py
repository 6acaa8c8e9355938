"""First on a process's path, this refuses every try to reach beyond the machine, and notes it.

Python's own sockets only: libraries that bring their own are seen by the
kernel's count in ``cut_off.py``. It also notes whatever opens the store that
``OKI_TRACE_WITNESS_STORE`` names by other means than SQLite: to close such a
descriptor drops the locks that the process holds on the store.
"""

from __future__ import annotations

import ipaddress
import os
import sys
from pathlib import Path
from typing import Any

_NOTES = os.environ.get("OKI_TRACE_WITNESS")
_STORE = os.environ.get("OKI_TRACE_WITNESS_STORE")
_STORE_FILES = [f"{_STORE}{suffix}" for suffix in ("", "-wal", "-shm")] if _STORE else []
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


def _watch_store(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "open" or not isinstance(arguments[0], str | os.PathLike):
        return
    # A file that is made anew has no locks yet.
    if not arguments[2] & os.O_EXCL and str(Path(arguments[0]).absolute()) in _STORE_FILES:
        _note(f"open {os.fspath(arguments[0])!r}")


def _note(what: str) -> None:
    with Path(str(_NOTES)).open("a", encoding="utf-8") as notes:
        notes.write(f"{what} by {sys.orig_argv!r:.200}\n")


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in _WHERE or _NOTES is None:
        return
    host = _host(event, arguments)
    if host is None or _stays(host):
        return
    _note(f"{event} {host!r}")
    raise OSError(f"refused: {event} {host!r}")


sys.addaudithook(_watch)
if _STORE_FILES:
    sys.addaudithook(_watch_store)
