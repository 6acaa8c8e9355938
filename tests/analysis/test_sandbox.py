"""SQL from outside reads our tables and nothing else, within its limits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from oki_trace.analysis.folder import folder_of
from oki_trace.analysis.query_session import QuerySession
from oki_trace.errors import QuestionError
from oki_trace.store.writing.writer import TraceWriter
from tests.analysis import made

secret = "a variable of this program"


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[QuerySession, Path]]:
    """A small store under question, and the folder it lies in."""
    folder = tmp_path_factory.mktemp("held")
    path = folder / "store.db"
    (folder / "secret.csv").write_text("secret\n1\n")
    with TraceWriter(path) as writer:
        made.whole(writer)
    with QuerySession(path) as session:
        session.sql("SELECT 1")
        yield session, folder


# FILE is a file beside the store; OWN one of the cache's own, which the views must read.
REFUSED = [
    "SELECT * FROM read_csv('FILE')",
    "SELECT * FROM read_csv_auto('FILE')",
    "SELECT * FROM read_text('FILE')",
    "SELECT * FROM read_blob('FILE')",
    "SELECT * FROM read_json('FILE')",
    "SELECT * FROM sniff_csv('FILE')",
    "SELECT * FROM read_parquet('OWN')",
    "SELECT * FROM parquet_scan('FILE')",
    "SELECT * FROM parquet_metadata('OWN')",
    "SELECT * FROM 'FILE'",
    "SELECT * FROM 'OWN'",
    'FROM "STEM".parquet',
    'FROM "STEM"."parquet"',
    'FROM memory."STEM".parquet',
    'FROM "STEM".parquet.main',
    'FROM "secret".csv',
    'DESCRIBE "STEM".parquet',
    'SUMMARIZE "STEM".parquet',
    'SHOW "STEM".parquet',
    'WITH x AS (FROM "STEM".parquet) FROM x',
    'SELECT (SELECT count(*) FROM "STEM".parquet)',
    "SHOW ALL TABLES",
    "FROM information_schema.tables",
    "FROM pg_catalog.pg_settings",
    "SELECT current_setting('allowed_paths')",
    "SELECT pg_get_viewdef('step')",
    "SELECT json_serialize_plan('FROM \"STEM\".parquet')",
    "SELECT * FROM glob('/etc/*')",
    "SELECT * FROM read_csv('/dev/stdin')",
    "SELECT * FROM 'https://example.org/x.csv'",
    "SELECT * FROM read_csv('https://example.org/x.csv')",
    "SELECT (SELECT content FROM read_text('FILE'))",
    "SELECT * FROM step WHERE token IN (SELECT content FROM read_text('FILE'))",
    "WITH x AS (SELECT * FROM read_text('FILE')) SELECT * FROM x",
    "SELECT * FROM sqlite_scan('FILE', 'step')",
    "COPY (SELECT 1) TO 'NEW'",
    "COPY step FROM 'FILE'",
    "WITH x AS (COPY (SELECT 1) TO 'NEW') SELECT * FROM x",
    "WITH x AS MATERIALIZED (COPY (SELECT 1) TO 'OWN' (USE_TMP_FILE false)) SELECT * FROM x",
    "SELECT * FROM query('WITH x AS (COPY (SELECT 1) TO ''OWN'' (USE_TMP_FILE false)) FROM x')",
    "WITH x AS (INSERT INTO live_conversation VALUES (1)) SELECT * FROM x",
    "WITH x AS (DELETE FROM live_conversation RETURNING *) SELECT * FROM x",
    "EXPORT DATABASE 'NEW'",
    "ATTACH 'NEW'",
    "ATTACH 'FILE' (TYPE sqlite)",
    "DETACH memory",
    "INSTALL httpfs",
    "LOAD httpfs",
    "FORCE INSTALL sqlite",
    "SET memory_limit = '64GB'",
    "SET enable_external_access = true",
    "RESET lock_configuration",
    "PRAGMA database_list",
    "PRAGMA enable_profiling",
    "CALL pragma_version()",
    "SELECT * FROM pragma_database_list()",
    "SELECT * FROM duckdb_settings()",
    "SELECT * FROM duckdb_secrets()",
    "SELECT getenv('HOME')",
    "SELECT write_log('x')",
    "SELECT * FROM enable_logging()",
    "SELECT secret",
    "SELECT * FROM secret",
    "CREATE TABLE x AS SELECT 1",
    "CREATE OR REPLACE VIEW step AS SELECT 1",
    "CREATE SECRET s (TYPE s3)",
    "CREATE MACRO f() AS 1",
    "DROP VIEW step",
    "INSERT INTO step VALUES (1)",
    "UPDATE step SET prob = 1",
    "DELETE FROM step",
    "BEGIN",
    "CHECKPOINT",
    "VACUUM",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO 'NEW'",
    "PREPARE p AS SELECT 1",
    "SELECT 1; SELECT 2",
    "SELECT 1; DROP VIEW step",
    "",
    "   -- nothing",
    "SELEC 1",
    "SELECT * FROM no_such_table",
    "SELECT no_such_column FROM step",
    "SELECT $x",
    "SELECT json_execute_serialized_sql('{}')",
    "SELECT * FROM json_execute_serialized_sql(json_serialize_sql('SELECT 1'))",
]


@pytest.mark.parametrize("sql", REFUSED)
def test_it_is_refused_in_one_line(held: tuple[QuerySession, Path], sql: str) -> None:
    session, folder = held
    own = next(folder_of(str(folder / "store.db")).rglob("step.parquet"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    asked = sql.replace("FILE", str(folder / "secret.csv"))
    asked = asked.replace("STEM", str(own.with_suffix("")))
    asked = asked.replace("OWN", str(own)).replace("NEW", str(folder / "new"))
    with pytest.raises(QuestionError) as refused:
        session.sql(asked)
    said = str(refused.value)
    assert len(said.splitlines()) == 1 and said.endswith(".") and len(said) < 400
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert session.sql("SELECT count(*) FROM step").rows == ((3,),)


@pytest.mark.parametrize(
    "sql",
    [
        "FROM step",
        "FROM main.step",
        "FROM memory.main.step",
        "TABLE message",
        "VALUES (1), (2)",
        "DESCRIBE step",
        "SHOW TABLES",
        "SUMMARIZE step",
        "SELECT * EXCLUDE (token) FROM step QUALIFY row_number() OVER (ORDER BY prob) <= 2",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 5) FROM n",
        "SELECT * FROM range(3) AS t(i), generate_series(1, 2), unnest([1, 2])",
        "PIVOT lens_layer ON layer IN (0, 1) USING avg(entropy) GROUP BY step_id",
        "(SELECT 1 AS a) UNION BY NAME (SELECT 2 AS b)",
        "SELECT 'COPY x TO y', \"token\" FROM step -- insert",
        "SELECT a.token FROM step a ASOF JOIN step b ON a.id >= b.id",
    ],
)
def test_whatever_reads_our_tables_is_answered(held: tuple[QuerySession, Path], sql: str) -> None:
    assert held[0].sql(sql).rows


def test_rows_are_limited(held: tuple[QuerySession, Path]) -> None:
    session, _ = held
    found = session.sql("SELECT i FROM range(1000000) AS t(i)", limit=7)
    assert (len(found.rows), found.cut) == (7, True)
    assert not session.sql("SELECT i FROM range(7) AS t(i)", limit=7).cut
    result = session.sql_result("SELECT i FROM range(1000000) AS t(i)", limit=7)
    assert (result.table.num_rows, result.cut) == (7, True)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT sum(a.i * b.i) FROM range(10000000) a(i), range(10000000) b(i)",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n",
    ],
)
def test_time_is_limited(held: tuple[QuerySession, Path], sql: str) -> None:
    session, _ = held
    began = time.monotonic()
    with pytest.raises(QuestionError, match="took longer than 0"):
        session.sql(sql, seconds=0.2)
    # Far below what the question itself would take: it was interrupted, not waited for.
    assert time.monotonic() - began < 60
    assert session.sql("SELECT 1").rows == ((1,),)


def test_memory_is_limited(held: tuple[QuerySession, Path]) -> None:
    with pytest.raises(QuestionError, match="memory"):
        held[0].sql("SELECT list(i || 'some longer text to fill it') FROM range(40000000) AS t(i)")
