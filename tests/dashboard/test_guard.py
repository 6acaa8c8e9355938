"""What the explorer's server answers to: raw requests, as pages of others would send them."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest

from dashboard import guard
from oki_trace.errors import UsageError
from oki_trace.launcher import checked_name, command
from tests.dashboard import server

PATHS = ("/", "/sql?sql=SELECT+1", "/_stcore/health", "/_stcore/host-config", "/media/x", "/no")
HOSTILE_HOSTS = ("evil.test", "127.0.0.1.evil.test", "localhost.evil.test", "evil.test:{port}")
HOSTILE_HOSTS += ("127.0.0.1@evil.test", "evil.test/127.0.0.1", "[::2]", "192.0.2.7", "", "a b")
OWN = ("127.0.0.1:{port}", "localhost:{port}", "LOCALHOST:{port}", "[::1]:{port}", "localhost")


def asked(port: int, path: str, host: str | None, **headers: str) -> http.client.HTTPResponse:
    """The answer to a request with this Host header and no other; None leaves it out."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with closing(connection):
        connection.putrequest("GET", path, skip_host=True)
        if host is not None:
            connection.putheader("Host", host)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        answer = connection.getresponse()
        answer.read()
        return answer


def upgraded(port: int, host: str, origin: str | None = None) -> int:
    """The status with which a WebSocket is answered: 101 opens it."""
    given = {} if origin is None else {"Origin": origin}
    answer = asked(
        port,
        "/_stcore/stream",
        host,
        Connection="Upgrade",
        Upgrade="websocket",
        Sec_WebSocket_Version="13",
        Sec_WebSocket_Key="b2tpLXRyYWNlLXRlc3Qtaw==",
        **given,
    )
    return answer.status


@pytest.fixture(scope="module", params=["oki-trace ui", "streamlit run"])
def served(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    run_explorer: Callable[..., server.Explorer],
) -> Iterator[server.Explorer]:
    """The explorer, started both ways."""
    if request.param == "oki-trace ui":
        yield run_explorer()
        return
    from tests.dashboard import server

    folder, port = tmp_path_factory.mktemp("streamlit-run"), server.free_port()
    run = ["streamlit", "run", str(server.HOME), "--server.port", str(port)]
    explorer = server.start(run, str(folder / "store.db"), port, folder / "output.txt", folder)
    yield explorer
    explorer.close()


def test_a_name_that_is_not_ours_is_refused_everywhere(served: server.Explorer) -> None:
    for path in PATHS:
        for host in HOSTILE_HOSTS:
            answer = asked(served.port, path, host.format(port=served.port))
            assert answer.status in (400, 403), (path, host)
    for host in HOSTILE_HOSTS[:4]:
        host = host.format(port=served.port)
        assert upgraded(served.port, host) == 403, host
        # The page that is shown under that name is of the same origin as its own requests.
        assert upgraded(served.port, host, f"http://{host}") == 403, host
    assert asked(served.port, "/", None).status in (400, 403)


def test_our_own_names_are_answered(served: server.Explorer) -> None:
    for host in OWN:
        host = host.format(port=served.port)
        assert asked(served.port, "/", host).status == 200, host
        assert upgraded(served.port, host, f"http://{host.lower()}") == 101, host


@pytest.mark.parametrize(
    "origin",
    ["http://127.0.0.1:9", "http://localhost:{port}", "https://evil.test", "null", "", "file://"],
)
def test_a_page_of_another_origin_is_refused(served: server.Explorer, origin: str) -> None:
    host, origin = f"127.0.0.1:{served.port}", origin.format(port=served.port)
    assert upgraded(served.port, host, origin) == 403
    for path in PATHS:
        assert asked(served.port, path, host, Origin=origin).status == 403, path


def test_the_same_origin_has_the_same_port(served: server.Explorer) -> None:
    """LensWorker a forwarded port the browser says that port in both."""
    assert upgraded(served.port, "localhost:9000", "http://localhost:9000") == 101
    assert upgraded(served.port, "localhost:9000", "http://localhost:9001") == 403
    assert upgraded(served.port, "localhost", "http://localhost:80") == 101


def test_every_answer_forbids_frames_and_guessing(served: server.Explorer) -> None:
    for path in PATHS:
        answer = asked(served.port, path, f"127.0.0.1:{served.port}")
        policy = answer.getheader("Content-Security-Policy") or ""
        assert "frame-ancestors 'none'" in policy, path
        assert answer.getheader("X-Frame-Options") == "DENY", path
        assert answer.getheader("X-Content-Type-Options") == "nosniff", path
        assert answer.getheader("Referrer-Policy") == "no-referrer", path
    refused = asked(served.port, "/", "evil.test")
    assert "frame-ancestors 'none'" in (refused.getheader("Content-Security-Policy") or "")


def test_who_opens_it_to_others_names_what_it_is_called(tmp_path: Path) -> None:
    """Any address leads to it, this machine's own name, and those that were given; no others."""
    db, port = str(tmp_path / "store.db"), server.free_port()
    ui = ["oki_trace", "ui", "--host", "0.0.0.0", "--public", "--port", str(port), "--db", db]
    explorer = server.start(
        [*ui, "--allow-host", "traces.example"], db, port, tmp_path / "output.txt"
    )
    try:
        own = socket.gethostname().lower()
        for host in ("192.0.2.7", "127.0.0.1", "localhost", "traces.example", own):
            assert asked(port, "/", f"{host}:{port}").status == 200, host
            assert upgraded(port, f"{host}:{port}", f"http://{host}:{port}") == 101, host
        for host in ("evil.test", "sub.traces.example"):
            assert asked(port, "/", f"{host}:{port}").status == 403, host
            assert upgraded(port, f"{host}:{port}", f"http://{host}:{port}") == 403, host
        # TLS ends at a proxy: what it passes on is the name.
        assert upgraded(port, "traces.example", "https://traces.example") == 101
    finally:
        explorer.close()


@pytest.mark.parametrize("name", ["*", "*.example", "a b", "host:80", "http://x", "", "a/b", "é"])
def test_a_name_to_be_allowed_is_a_name(name: str) -> None:
    with pytest.raises(UsageError, match="is not a host name"):
        checked_name(name)


def test_names_are_added_to_our_own() -> None:
    given = command(8501, names=(checked_name("traces.example"), checked_name("[::5]")))
    allowed = [after for flag, after in pairwise(given) if "allowedHosts" in flag]
    assert allowed == ["127.0.0.1", "localhost", "::1", "traces.example", "::5"]
    assert guard.is_ours("::5", allowed)


@pytest.mark.parametrize(
    "host", ["a@b", "a:b", "a:99999999", "a\tb", "é", "[::1", ":80", ".", "a;b"]
)
def test_what_is_no_host_is_none(host: str) -> None:
    assert guard.hostname(host) is None
    assert guard.refusal(host, (), ("*", "a")) == "host"
