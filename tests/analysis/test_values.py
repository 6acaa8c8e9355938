"""Values that Arrow, Parquet or Python cannot hold, and columns of one name, in every format."""

from __future__ import annotations

import csv
import datetime as dt
import io
import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dashboard.viewdata import sql_table
from oki_trace.analysis import results, values
from oki_trace.analysis.query_session import QuerySession
from oki_trace.store.writing.writer import TraceWriter
from tests.analysis import made


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QuerySession]:
    path = str(tmp_path_factory.mktemp("values") / "store.db")
    with TraceWriter(path) as writer:
        made.whole(writer)
    with QuerySession(path) as session:
        yield session


VALUES: list[tuple[str, Any]] = [
    ("DATE 'infinity'", "infinity"),
    ("DATE '-infinity'", "-infinity"),
    ("DATE '290000-01-01'", "290000-01-01"),
    ("DATE '0044-03-15 (BC)'", "0044-03-15 (BC)"),
    ("DATE '2026-01-31'", "2026-01-31"),
    ("TIMESTAMP 'infinity'", "infinity"),
    ("TIMESTAMP '290000-01-01'", "290000-01-01 00:00:00"),
    ("TIMESTAMP '9999-12-31 23:59:59.999999'", "9999-12-31T23:59:59.999999"),
    ("TIMESTAMP_S '2026-01-31 18:00:00'", "2026-01-31T18:00:00"),
    ("TIMESTAMP_MS '290000-01-01'", "290000-01-01 00:00:00"),
    ("TIMESTAMP_NS '2026-01-31 18:00:00.123456789'", "2026-01-31 18:00:00.123456789"),
    ("TIMESTAMPTZ '2026-01-31 18:00:00+05'", "2026-01-31T13:00:00+00:00"),
    ("TIMESTAMPTZ 'infinity'", "infinity"),
    ("[TIMESTAMPTZ '2026-01-31 18:00:00+05']", "['2026-01-31 13:00:00+00']"),
    ("TIME '24:00:00'", "24:00:00"),
    ("TIME '18:00:00.5'", "18:00:00.500000"),
    ("TIMETZ '18:00:00+05'", "18:00:00+05"),
    ("[DATE 'infinity', DATE '2026-01-31']", "[infinity, 2026-01-31]"),
    ("[DATE '2026-01-31']", ["2026-01-31"]),
    ("{'when': DATE 'infinity'}", "{'when': infinity}"),
    ("MAP {'a': DATE 'infinity'}", "{a=infinity}"),
    ("INTERVAL '3 months 2 days'", "3 months 2 days"),
    ("12::HUGEINT", 12),
    ("170141183460469231731687303715884105727::HUGEINT", str(2**127 - 1)),
    ("340282366920938463463374607431768211455::UHUGEINT", str(2**128 - 1)),
    ("18446744073709551615::UBIGINT", 2**64 - 1),
    (f"{10**44}::BIGNUM", str(10**44)),
    ("1.50::DECIMAL(10, 2)", 1.5),
    ("'101'::BIT", "101"),
    (r"'\xAA'::BLOB", "aa"),
    ("MAP {'a': 1}", {"a": 1}),
    ("MAP {1: 2}", {"1": 2}),
    ("[{'a': MAP {'b': [MAP {'c': 1}]}}, NULL]", [{"a": {"b": [{"c": 1}]}}, None]),
    ("[[1, 2], NULL]::INT[2][]", [[1, 2], None]),
    ("MAP {[1]: 2}", "{[1]=2}"),
    ("union_value(a := 1)", "1"),
    ("row(1, 2)", "(1, 2)"),
    ("'a'::ENUM('a', 'b')", "a"),
    ("42::VARIANT", "42"),
    ("'nan'::DOUBLE", None),
    ("NULL", None),
    ("[]", []),
    ("'a' || chr(0)", "a\0"),
]  # fmt: skip


@pytest.mark.parametrize(("sql", "right"), VALUES, ids=[sql for sql, _ in VALUES])
def test_every_value_is_shown_in_every_format(session: QuerySession, sql: str, right: Any) -> None:
    found = session.sql_result(f"SELECT {sql} AS value, {sql} AS value")
    rows = values.rows_of(found.table)
    assert results.objects(found.table.schema.names, rows) == [{"value": right, "value_2": right}]
    assert json.loads(sql_table.as_json(found.table)) == [{"value": right, "value_2": right}]
    text = io.StringIO()
    results.write_csv(found.table.schema.names, rows, text)
    assert list(csv.DictReader(io.StringIO(text.getvalue(), newline="")))
    assert sql_table.as_csv(found.table) == text.getvalue()
    assert len(sql_table.frame(found.table)) == 1
    read = pq.read_table(io.BytesIO(results.parquet(found.table)))
    assert read.schema.names == ["value", "value_2"] and len(read) == 1


def test_a_value_beyond_makes_its_column_text_and_no_other(session: QuerySession) -> None:
    found = session.sql(
        "SELECT date_add(DATE '9999-12-30', i::INT) AS day, DATE '2026-01-31' AS other, i "
        "FROM range(3) AS t(i) ORDER BY i"
    )
    assert [row[0] for row in found.rows] == ["9999-12-30", "9999-12-31", "10000-01-01"]
    assert {row[1] for row in found.rows} == {dt.date(2026, 1, 31)}
    assert found.columns == ("day", "other", "i") and found.kinds == ("DATE", "DATE", "BIGINT")


def test_the_moment_is_told_in_utc_wherever_the_machine_is(
    session: QuerySession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    session._sandbox.close()
    (now,) = session.sql("SELECT now()").rows[0]
    assert now.tzinfo is dt.UTC and abs(now - dt.datetime.now(dt.UTC)) < dt.timedelta(seconds=10)


def test_the_order_stays_where_a_column_becomes_text(session: QuerySession) -> None:
    found = session.sql(
        "SELECT i, i::UHUGEINT AS big FROM range(9000) AS t(i) ORDER BY hash(i), i", limit=9000
    )
    again = session.sql("SELECT i FROM range(9000) AS t(i) ORDER BY hash(i), i", limit=9000)
    assert [row[0] for row in found.rows] == [row[0] for row in again.rows]
    assert all(row[1] == str(row[0]) for row in found.rows)


@pytest.mark.parametrize(
    ("names", "right"),
    [
        (["id", "id"], ["id", "id_2"]),
        (["id", "ID", "iD"], ["id", "ID_2", "iD_3"]),
        (["id", "id", "id_2"], ["id", "id_3", "id_2"]),
        (["", ""], ["", "_2"]),
        (["a", "b"], ["a", "b"]),
        (["a_2", "a", "a", "A_2", "a"], ["a_2", "a", "a_3", "A_2_2", "a_4"]),
        (["a"] * 100_000, ["a", *(f"a_{i}" for i in range(2, 100_001))]),
    ],
)
def test_each_column_has_a_name_of_its_own(names: list[str], right: list[str]) -> None:
    assert values.distinct(names) == right


def test_both_columns_of_one_name_are_in_a_parquet_file(
    session: QuerySession, tmp_path: Path
) -> None:
    found = session.sql_result("SELECT s.id, m.id FROM step AS s JOIN message AS m ON true LIMIT 2")
    file = tmp_path / "answer.parquet"
    file.write_bytes(results.parquet(found.table))
    assert pq.read_table(file, columns=["id_2"]).num_rows == 2


def test_whole_decimals_are_numbers_without_a_fraction() -> None:
    assert results.plain(Decimal("12")) == 12 and isinstance(results.plain(Decimal("12")), int)
    assert results.plain(Decimal("12.50")) == 12.5
