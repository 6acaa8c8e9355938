"""Starts the explorer: Streamlit on the loopback address, from any folder.

Options that matter for privacy are set on the command line, so no configuration file
overrides them. Any other address has to be confirmed.
"""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import webbrowser
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlencode

from oki_trace.errors import OkiTraceError, UsageError

ADDRESS = "127.0.0.1"
FIRST_PORT = 8501


def home_page() -> Path:
    """``dashboard/Home.py``, in an installed package or in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "_bundled", package.parent):
        page = folder / "dashboard" / "Home.py"
        if page.is_file():
            return page
    raise OkiTraceError("The explorer's pages are not installed. Reinstall oki-trace.")


def is_loopback(host: str) -> bool:
    """Whether ``host`` is a loopback address or ``localhost``."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def checked_host(host: str, *, public: bool) -> str:
    """Return ``host``. Raises UsageError if other machines can reach it and ``public`` is not
    set, and if it is not an address of this machine.
    """
    if not is_loopback(host) and not public:
        raise UsageError(
            f"Other machines can reach {host}, and the explorer has no password: anyone who "
            "finds it can read and delete every conversation. Confirm with --public."
        )
    try:
        with socket.socket(_family(host)) as probe:
            probe.bind((host, 0))
    except OSError as error:
        raise UsageError(f"{host} is not an address of this machine: {error.strerror}.") from error
    return host


def checked_name(name: str) -> str:
    """``name`` without brackets and final dot. Raises UsageError unless it is a host name.

    A port is refused, and a pattern, which would admit names that others can register.
    """
    bare = name.strip("[]").rstrip(".")
    letters = bare.replace(":", "") if _is_address(bare) else bare
    if letters and all(c.isascii() and (c.isalnum() or c in "-._") for c in letters):
        return bare
    raise UsageError(f"{name!r} is not a host name. Give the name alone, without port or pattern.")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def free_port(wanted: int | None, host: str = ADDRESS) -> int:
    """``wanted`` if it is free, else the first free one from 8501 on."""
    candidates = [wanted] if wanted else range(FIRST_PORT, FIRST_PORT + 100)
    for port in candidates:
        with socket.socket(_family(host)) as probe:
            if os.name == "posix":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise UsageError(f"Port {wanted or FIRST_PORT} is in use. Choose another with --port.")


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def command(port: int, host: str = ADDRESS, names: Sequence[str] = ()) -> list[str]:
    """The command that serves the explorer on ``port`` of ``host``.

    Browsers may use ``names`` for it, besides this machine's own names.
    """
    # Other names are refused, against DNS rebinding. "*": any address, see dashboard/guard.py.
    own = ("127.0.0.1", "localhost", "::1", host) if is_loopback(host) else ("*", host)
    names = tuple(dict.fromkeys((*own, *names)))
    options = [
        ("server.address", host),
        ("server.port", str(port)),
        ("server.headless", "true"),
        ("server.fileWatcherType", "none"),
        *(("server.allowedHosts", name) for name in names),
        # Without it, Streamlit asks an outside server for this machine's address.
        ("browser.serverAddress", _name(host)),
        ("browser.gatherUsageStats", "false"),
        ("client.toolbarMode", "minimal"),
        # Its error box offers web searches that contain the message.
        ("client.showErrorDetails", "none"),
        ("client.showErrorLinks", "false"),
        # A table's own CSV may hold formulas.
        ("client.disableDataExport", "true"),
    ]
    flags = [part for name, value in options for part in (f"--{name}", value)]
    home = home_page()
    return [sys.executable, str(home.with_name("serve.py")), "run", str(home), *flags]


def url_of(port: int, query: Mapping[str, str], host: str = ADDRESS) -> str:
    """The explorer's address for a browser on this machine; ``query`` names the view."""
    return f"http://{_name(host)}:{port}/" + (f"?{urlencode(query)}" if query else "")


def _name(host: str) -> str:
    """``host`` as part of a URL; for a wildcard address, the loopback."""
    return {"0.0.0.0": ADDRESS, "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)


def serve(
    db: str,
    port: int,
    url: str,
    *,
    open_browser: bool,
    host: str = ADDRESS,
    names: Sequence[str] = (),
) -> int:
    """Serve until interrupted; return Streamlit's exit status."""
    environment = {**os.environ, "OKI_TRACE_DB": db}
    process = subprocess.Popen(command(port, host, names), env=environment)
    # A service manager ends this process alone, so this process ends Streamlit.
    signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    if open_browser:
        threading.Thread(target=_open_when_ready, args=(host, port, url), daemon=True).start()
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        return 0


def _open_when_ready(host: str, port: int, url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket(_family(host)) as probe:
            probe.settimeout(1)
            if probe.connect_ex((host, port)) == 0:
                webbrowser.open(url)
                return
        time.sleep(0.1)
