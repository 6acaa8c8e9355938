"""Nothing leaves the machine: with the network cut off, no process tries to reach it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.privacy import cut_off

ROOT = Path(__file__).resolve().parents[2]
WITNESS = Path(__file__).resolve().parent / "witness"


def environment(notes: Path, store: Path | None = None) -> dict[str, str]:
    """As a user has it: none of the switches with which the other tests keep libraries quiet."""
    switches = ("HF_", "TRANSFORMERS_", "STREAMLIT_", "DO_NOT_TRACK", "OKI_TRACE_", "PYTHON")
    own = {name: value for name, value in os.environ.items() if not name.startswith(switches)}
    watched = {"OKI_TRACE_WITNESS_STORE": str(store)} if store else {}
    return {**own, **watched, "PYTHONPATH": str(WITNESS), "OKI_TRACE_WITNESS": str(notes)}


def test_the_witness_sees_and_refuses(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    code = (
        "import socket\n"
        f"for ask in (lambda: socket.create_connection(({cut_off.ABROAD!r}, 80)),\n"
        "            lambda: socket.getaddrinfo('example.invalid', 443),\n"
        "            lambda: socket.socket().bind(('0.0.0.0', 0))):\n"
        "    try: ask()\n"
        "    except OSError as error: assert 'refused' in str(error), error\n"
        "    else: raise SystemExit('not refused')\n"
        "socket.socket().bind(('127.0.0.1', 0))\n"
        "socket.getaddrinfo('localhost', 80)\n"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(notes), check=True)
    assert len(notes.read_text(encoding="utf-8").splitlines()) >= 3


def test_the_witness_sees_a_store_that_is_opened_beside_sqlite(tmp_path: Path) -> None:
    notes, store = tmp_path / "notes.txt", tmp_path / "store.db"
    code = (
        "import os, pathlib, sqlite3, sys\n"
        "os.close(os.open(sys.argv[1], os.O_CREAT | os.O_EXCL | os.O_RDWR))\n"
        "sqlite3.connect(sys.argv[1]).execute('CREATE TABLE t (x)')\n"
        "pathlib.Path(sys.argv[1]).read_bytes()\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(store)], env=environment(notes, store), check=True
    )
    (line,) = notes.read_text(encoding="utf-8").splitlines()
    assert line.startswith(f"open {str(store)!r}")


@pytest.mark.slow
def test_a_whole_turn_and_every_page_with_the_network_cut_off(
    tmp_path: Path, smollm2_dir: Path
) -> None:
    """The command line, every page, the worker and the server; no try by any of them.

    Nor does any of them open the store by other means than SQLite.
    """
    notes, store = tmp_path / "notes.txt", tmp_path / "store.db"
    done = subprocess.run(
        [sys.executable, "-m", "tests.privacy.cut_off", str(store)],
        cwd=ROOT,
        env=environment(notes, store),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert not notes.exists(), notes.read_text(encoding="utf-8")
    assert not found["hub_telemetry"]
    assert {"run", "export", "import", "chat", "conversations", "ui"} <= set(found["done"])
    if found["namespace"]:
        # The kernel's count does see a try, and saw no other.
        assert found["control"]
        assert found["tries"] == 0
    elif os.environ.get("OKI_TRACE_REQUIRE_NAMESPACE"):
        pytest.fail("A network namespace could not be made here.")
