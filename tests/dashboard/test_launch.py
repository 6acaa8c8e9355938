"""However it is started, the explorer is this machine's alone, and fails in a sentence."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from tests.dashboard import sample_stores, server

CONFIGS = (
    server.ROOT / ".streamlit" / "config.toml",
    server.HOME.parent / ".streamlit" / "config.toml",
)

Serve = Callable[[str], server.Explorer]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.parent.name)
def test_configuration_keeps_to_this_machine(path: Path) -> None:
    config = tomllib.loads(path.read_text(encoding="utf-8"))
    assert config["server"]["address"] == "127.0.0.1"
    assert config["browser"]["gatherUsageStats"] is False


def test_both_configurations_serve_alike() -> None:
    first, second = (tomllib.loads(path.read_text(encoding="utf-8")) for path in CONFIGS)
    assert first["server"] == second["server"]
    assert first["browser"] == second["browser"]


def test_streamlit_run_from_another_folder_listens_here_alone(
    streamlit_run: Serve, tmp_path: Path
) -> None:
    explorer = streamlit_run(str(tmp_path / "store.db"))
    assert explorer.listens_on() == {"127.0.0.1"}
    for address in _other_addresses():
        with socket.socket() as probe:
            probe.settimeout(2)
            assert probe.connect_ex((address, explorer.port)) != 0


def test_ui_listens_here_alone_and_ends_with_what_it_started(tmp_path: Path) -> None:
    """Told to end as a service manager does it, too."""
    db, port = str(tmp_path / "store.db"), server.free_port()
    command = ["oki_trace", "ui", "--port", str(port), "--db", db]
    explorer = server.start(command, db, port, tmp_path / "output.txt")
    family = explorer.family()
    try:
        assert explorer.listens_on() == {"127.0.0.1"}
        # A page of others', whose name leads here, is not let in.
        assert _answer_to(port, f"127.0.0.1:{port}") == 101
        assert _answer_to(port, f"evil.test:{port}") == 403
        said = (tmp_path / "output.txt").read_text(encoding="utf-8")
        assert explorer.url in said and "WARNING" not in said
        explorer.process.terminate()
        explorer.process.wait(20)
        _, left = psutil.wait_procs(family, timeout=20)
        assert not left
    finally:
        for process in family:
            if process.is_running():
                process.kill()
        explorer.process.wait()


def test_ui_opens_to_others_only_when_that_is_meant(tmp_path: Path) -> None:
    db, port = str(tmp_path / "store.db"), server.free_port()
    refused = _ui(Path(db), "--host", "0.0.0.0")
    assert refused.returncode == 2
    assert "--public" in refused.stderr
    assert not Path(db).exists()
    nowhere = _ui(Path(db), "--host", "192.0.2.77", "--public")
    assert nowhere.returncode == 2
    assert "is not an address of this machine" in nowhere.stderr
    command = ["oki_trace", "ui", "--host", "0.0.0.0", "--public", "--port", str(port), "--db", db]
    explorer = server.start(command, db, port, tmp_path / "output.txt")
    try:
        assert explorer.listens_on() == {"0.0.0.0"}
        said = (tmp_path / "output.txt").read_text(encoding="utf-8")
        assert "Anyone who can reach 0.0.0.0" in said
        assert "external IP" not in said, "nobody else is asked for the address"
    finally:
        explorer.close()


def _answer_to(port: int, host: str) -> int:
    """What a browser is answered that asks for a connection under the name ``host``."""
    asked = {
        "Host": host,
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "b2tpLXRyYWNlLXRlc3Qtaw==",
    }
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request("GET", "/_stcore/stream", headers=asked)
        return connection.getresponse().status


def test_ui_takes_another_port_when_the_first_is_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = _ui(tmp_path / "store.db", "--port", str(port))
    assert done.returncode in (1, 2)
    assert str(port) in done.stderr
    assert "Traceback" not in done.stderr


def _other_addresses() -> list[str]:
    """This machine's addresses but for loopback."""
    families = psutil.net_if_addrs().values()
    found = [a.address for family in families for a in family if a.family is socket.AF_INET]
    return [address for address in found if not address.startswith("127.")]


# ------------------------------------------------------------ a store that cannot be


@pytest.mark.parametrize(
    "make", [sample_stores.strangers, sample_stores.newer, sample_stores.another_database]
)
def test_ui_refuses_a_store_in_a_sentence(tmp_path: Path, make: Callable[[Path], str]) -> None:
    path = tmp_path / "store.db"
    sentence = make(path)
    before = path.read_bytes()
    done = _ui(path)
    assert done.returncode == 1
    assert sentence in " ".join(done.stderr.split())
    assert len(done.stderr.strip().splitlines()) <= 3
    assert "Traceback" not in done.stderr + done.stdout
    assert path.read_bytes() == before


def _ui(db: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "oki_trace", "ui", "--db", str(db), *options],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "300"},
    )
