"""The explorer as a process of its own, and what a test in the browser does with it."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import psutil

from oki_trace import worker
from tests.waiting import until

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / "dashboard" / "Home.py"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Explorer:
    """A running explorer; ``db`` is its store, ``output`` what it printed."""

    db: str
    port: int
    process: subprocess.Popen[bytes]
    output: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def family(self) -> list[psutil.Process]:
        """The server, its children and the worker."""
        try:
            own = psutil.Process(self.process.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def listens_on(self) -> set[str]:
        """The addresses at which the explorer can be reached."""
        found = set()
        for process in self.family():
            try:
                connections = process.net_connections(kind="inet")
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
            found |= {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
        return found

    def close(self) -> None:
        """End it as Ctrl-C does. Its worker has to follow by itself; nothing may be left."""
        family = self.family()
        if sys.platform == "win32":  # where Ctrl-C cannot be sent to one process
            for process in family[1:]:
                process.terminate()
        else:
            self.process.send_signal(signal.SIGINT)
        _, left = psutil.wait_procs(family, timeout=40)
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=10)
        self.process.wait()
        said = self.output.read_text(encoding="utf-8", errors="replace")
        log = worker.lock_path(self.db).with_suffix(".log")
        if log.exists():
            said += log.read_text(encoding="utf-8", errors="replace")
        assert not left, f"still running: {left}\n{said}"
        # Streamlit's own complaints, as of a window that goes while it sends, are not ours.
        ours = (str(ROOT / "dashboard"), str(ROOT / "oki_trace"))
        assert not [line for line in said.splitlines() if any(path in line for path in ours)], said


def start(command: Sequence[str], db: str, port: int, output: Path, cwd: Path = ROOT) -> Explorer:
    """Run ``command``, which serves the store ``db`` on ``port``, and wait until it answers."""
    # Without Streamlit's variables, which would stand in for our own settings.
    own = {name: v for name, v in os.environ.items() if not name.startswith("STREAMLIT_")}
    environment = {**own, "OKI_TRACE_DB": db, "HF_HUB_OFFLINE": "1"}
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    explorer = Explorer(db, port, process, output)
    try:
        until(lambda: _answers(explorer), "the explorer to answer")
    except BaseException:
        for one in reversed(explorer.family()):
            one.kill()
        process.wait()
        raise
    return explorer


def _answers(explorer: Explorer) -> bool:
    ended = explorer.process.poll()
    assert ended is None, f"it ended with {ended}: {explorer.output.read_text(encoding='utf-8')}"
    # Not urllib: it would ask a proxy that the environment names.
    with closing(http.client.HTTPConnection("127.0.0.1", explorer.port, timeout=5)) as connection:
        try:
            connection.request("GET", "/_stcore/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
