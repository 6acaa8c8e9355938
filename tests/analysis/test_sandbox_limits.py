"""Limits of SQL from outside hold whatever the statement is, and the next one is answered."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from oki_trace.analysis.query_session import QuerySession
from oki_trace.analysis.sandbox import MEMORY_BYTES, Sandbox
from oki_trace.errors import QuestionError
from oki_trace.store.writing.writer import TraceWriter
from tests.analysis import made
from tests.waiting import until

GROWING = (
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT n.i + 1 FROM n, range(3)) "
    "SELECT count(*) FROM n"
)
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"
SECONDS = 5.0


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("limits") / "store.db")
    with TraceWriter(path) as writer:
        made.whole(writer)
    return path


@pytest.fixture(scope="module")
def session(path: str) -> Iterator[QuerySession]:
    with QuerySession(path) as session:
        yield session


def process_of(session: QuerySession) -> psutil.Process:
    """The process that answers, once it is there."""
    sandbox: Sandbox = session._sandbox
    return psutil.Process(sandbox._running[0]._popen.pid)


class Watch:
    """The most memory, in bytes, that all processes of this one held meanwhile; beyond before."""

    def __enter__(self) -> Watch:
        self.most = 0
        self._before = self._held()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.01):
            self.most = max(self.most, self._held() - self._before)

    def _held(self) -> int:
        held = 0
        for one in [psutil.Process(), *psutil.Process().children()]:
            try:
                held += one.memory_info().rss
            except psutil.Error:
                continue
        return held


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT range(200000) FROM range(1000)",
        "SELECT printf('%2000000000d', 1)",
        "SELECT repeat('x', 1000000000)",
        "SELECT list_resize([true], 1000000000, true)",
        "SELECT list(i || 'some longer text') FROM range(40000000) AS t(i)",
        "SELECT lpad('x', 1000000, 'y') FROM range(100000)",
        "SELECT repeat('x', 3000), i FROM range(100000) AS t(i)",
        "SELECT unnest(range(1000000000)) ORDER BY hash(1)",
        GROWING,
        ENDLESS,
        " UNION ALL ".join(["SELECT 1"] * 20_000),
        " UNION ".join(["(SELECT 1)"] * 20_000),
        "SELECT * FROM (" * 500 + "SELECT 1" + ")" * 500,
        "SELECT (SELECT " * 500 + "1" + ")" * 500,
        "SELECT " + "(" * 100_000 + "1" + ")" * 100_000,
        "SELECT " + "NOT " * 100_000 + "true",
        "SELECT " + "[" * 20_000 + "1" + "]" * 20_000,
        "SELECT " + "+".join(["1"] * 200_000),
        "SELECT '" + "x" * 50_000_000 + "'",
        "SELECT " + ",".join(["1 AS a"] * 140_000),
        "SELECT " + ",".join(["1 AS a"] * 3_000),
        "SELECT sleep_ms(60000)",
        "SELECT sum(a.i * b.i) FROM range(10000000) a(i), range(10000000) b(i)",
    ],
    ids=lambda sql: sql[:40],
)
def test_one_line_comes_in_time_and_in_little_memory(session: QuerySession, sql: str) -> None:
    session.sql("SELECT 1")
    began = time.monotonic()
    with Watch() as watch, pytest.raises(QuestionError) as refused:
        session.sql(sql, limit=100_000, seconds=1.5)
    took = time.monotonic() - began
    said = str(refused.value)
    assert len(said.splitlines()) == 1 and said.endswith(".") and len(said) < 400
    assert took < SECONDS
    assert watch.most < MEMORY_BYTES
    assert session.sql("SELECT count(*) FROM step").rows == ((3,),)


def test_what_a_statement_takes_is_what_was_given(session: QuerySession) -> None:
    sql = "SELECT max(length(x)) FROM (SELECT repeat('x', 300000000) AS x)"
    with pytest.raises(QuestionError, match="more than 250 MB"):
        session.sql(sql, memory_bytes=250_000_000)
    assert session.sql(sql, memory_bytes=2_000_000_000).rows == ((300_000_000,),)


def test_a_result_is_limited_before_it_is_sent(session: QuerySession) -> None:
    sql = "SELECT repeat('x', 1000) FROM range(100000)"
    with pytest.raises(QuestionError, match="The result is larger than 32 MB"):
        session.sql(sql, limit=100_000)
    assert len(session.sql(sql, limit=100_000, memory_bytes=4_000_000_000).rows) == 100_000


def test_a_process_that_behaves_is_kept_and_one_that_does_not_is_replaced(
    session: QuerySession,
) -> None:
    session.sql("SELECT 1")
    first = process_of(session)
    session.sql("SELECT count(*) FROM lens_entry")
    with pytest.raises(QuestionError):
        session.sql("SELECT nothing FROM step")
    assert process_of(session) == first
    first.kill()
    with pytest.raises(QuestionError, match="memory"):
        session.sql("SELECT 1")
    assert session.sql("SELECT 1").rows == ((1,),)
    assert process_of(session) != first


def test_whoever_goes_away_ends_the_question(session: QuerySession) -> None:
    class Gone(BaseException):
        pass

    began = time.monotonic()

    def tick() -> None:
        if time.monotonic() - began > 0.3:
            raise Gone

    session.sql("SELECT 1")
    process = process_of(session)
    with pytest.raises(Gone):
        session.sql_result(ENDLESS, seconds=60, tick=tick)
    assert not process.is_running() and time.monotonic() - began < SECONDS
    assert session.sql("SELECT 1").rows == ((1,),)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_stays_behind_a_command_that_is_ended(path: str, number: int) -> None:
    command = [sys.executable, "-m", "oki_trace", "sql", ENDLESS, "--timeout", "60", "--db", path]
    asked = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    watched = psutil.Process(asked.pid)
    try:
        # It answers when it computes: loading its libraries takes less.
        busy = until(
            lambda: next((one for one in watched.children() if one.cpu_times().user > 2.0), None),
            "the process to compute",
        )
        asked.send_signal(number)
        _, said = asked.communicate(timeout=10)
    finally:
        asked.kill()
    until(lambda: not busy.is_running() or busy.status() == psutil.STATUS_ZOMBIE, "its end")
    assert asked.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert b"Traceback" not in said


def test_a_built_in_question_does_not_wait_for_sql(session: QuerySession) -> None:
    session.sql("SELECT 1")

    def ask() -> None:
        with pytest.raises(QuestionError):
            session.sql(ENDLESS, seconds=2)

    asked = threading.Thread(target=ask)
    asked.start()
    try:
        assert session.ask("SELECT 1").rows == ((1,),)
        assert asked.is_alive()
    finally:
        asked.join()


def test_a_store_that_grows_is_seen_by_the_next_question(tmp_path: Path) -> None:
    path = str(tmp_path / "store.db")
    with TraceWriter(path) as writer, QuerySession(path) as session:
        made.whole(writer)
        count = "SELECT count(*) FROM message WHERE role = 'assistant'"
        assert session.sql(count).rows == ((1,),)
        process = process_of(session)
        made.whole(writer)
        assert session.sql(count).rows == ((2,),)
        assert process_of(session) == process


def test_the_statement_is_no_argument_of_a_process(session: QuerySession) -> None:
    session.sql("SELECT 'what was asked'")
    assert "what was asked" not in " ".join(process_of(session).cmdline())
    assert str(os.getpid()) not in process_of(session).cmdline()
