"""Starts the explorer: Streamlit on this machine alone, from any folder.

Everything that matters for privacy is given on the command line, so it holds
whatever configuration files are about: the loopback address, no usage
statistics.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import webbrowser
from collections.abc import Mapping
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


def free_port(wanted: int | None) -> int:
    """``wanted`` if it is free, else the first free one from 8501 on."""
    candidates = [wanted] if wanted else range(FIRST_PORT, FIRST_PORT + 100)
    for port in candidates:
        with socket.socket() as probe:
            if os.name == "posix":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((ADDRESS, port))
            except OSError:
                continue
            return port
    raise UsageError(f"Port {wanted or FIRST_PORT} is in use. Choose another with --port.")


def command(port: int) -> list[str]:
    """The command that serves the explorer on ``port``."""
    options = {
        "server.address": ADDRESS,
        "server.port": str(port),
        "server.headless": "true",
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false",
        "client.toolbarMode": "minimal",
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    return [sys.executable, "-m", "streamlit", "run", str(home_page()), *flags]


def url_of(port: int, query: Mapping[str, str]) -> str:
    """The explorer's address; ``query`` names the first view."""
    return f"http://{ADDRESS}:{port}/" + (f"?{urlencode(query)}" if query else "")


def serve(db: str, port: int, url: str, *, open_browser: bool) -> int:
    """Serve until interrupted; returns Streamlit's exit status."""
    environment = {**os.environ, "OKI_TRACE_DB": db}
    process = subprocess.Popen(command(port), env=environment)
    # What ends a service ends this process alone: Streamlit is told by us.
    signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    if open_browser:
        threading.Thread(target=_open_when_up, args=(port, url), daemon=True).start()
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        return 0


def _open_when_up(port: int, url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex((ADDRESS, port)) == 0:
                webbrowser.open(url)
                return
        time.sleep(0.1)
