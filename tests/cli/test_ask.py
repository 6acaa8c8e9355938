"""Questions across steps on the command line."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from oki_trace.analysis.query_session import QuerySession
from oki_trace.analysis.tables import TABLES
from tests.cli.commands import ACTIVE, ROOT, Done, Oki, command
from tests.cli.conftest import Demo

QUESTIONS = ("settle", "uncertainty", "layers", "rivals", "attention", "heads", "reproducibility")


def csv_rows(done: Done) -> list[dict[str, str]]:
    """The rows of an answer; a command that failed says why."""
    assert (done.status, done.err) == (0, "")
    return list(csv.DictReader(io.StringIO(done.out)))


def test_all_questions_are_listed(oki: Oki) -> None:
    done = oki("ask")
    assert all(name in done.out for name in (*QUESTIONS, "compare", "prompt"))
    listed = json.loads(oki("ask", "--json").out)
    assert all(one["meaning"].endswith(".") and one["reading"] for one in listed)


@pytest.mark.parametrize("name", QUESTIONS)
def test_each_is_answered_with_a_picture(oki: Oki, demo: Demo, name: str) -> None:
    done = oki("ask", name, "--db", demo.db)
    assert (done.status, done.err) == (0, "")
    assert not ACTIVE.search(done.out)
    if name != "reproducibility":
        assert "█" in done.out


def test_an_answer_as_json_and_csv_says_the_same(oki: Oki, demo: Demo) -> None:
    answer = json.loads(oki("ask", "layers", "--json", "--db", demo.db).out)
    assert (answer["question"], answer["by"]) == ("layers", "layer")
    rows = csv_rows(oki("ask", "layers", "-f", "csv", "--db", demo.db))
    assert [float(row["kl"]) for row in rows] == [row["kl"] for row in answer["rows"]]
    assert [c["name"] for c in answer["columns"]] == list(rows[0])


def test_its_sql_is_the_users_own(oki: Oki, demo: Demo) -> None:
    options = ("settle", "--by", "class", "--text", "it's", "--model", "a'b", "--db", demo.db)
    sql = oki("ask", *options, "--sql").out
    assert "'a''b'" in sql
    assert json.loads(oki("sql", sql, "--json", "--db", demo.db).out) == []
    sql = oki("ask", "settle", "--db", demo.db, "--sql").out
    ours = json.loads(oki("ask", "settle", "--json", "--db", demo.db).out)["rows"]
    assert json.loads(oki("sql", sql, "--json", "--db", demo.db).out) == ours


def test_two_steps_and_two_replies(oki: Oki, demo: Demo) -> None:
    done = oki("ask", "compare", "2:5", "4:0", "--db", demo.db)
    assert "from full logits" in done.out and "␣Paris" in done.out
    assert "tokens are the same" in oki("ask", "compare", "2", "4", "--db", demo.db).out


@pytest.mark.parametrize("asked", [("heads",), ("compare", "2:5", "4:0"), ("compare", "2", "4")])
def test_what_reads_tensors_has_its_sql_too(oki: Oki, demo: Demo, asked: tuple[str, ...]) -> None:
    sql = oki("ask", *asked, "--sql", "--db", demo.db).out
    ours = json.loads(oki("ask", *asked, "--json", "--db", demo.db).out)["rows"]
    assert ours
    theirs = json.loads(oki("sql", sql, "--json", "--db", demo.db).out)
    assert [[*row] for row in theirs] == [[*row] for row in ours]
    for one, other in zip(theirs, ours, strict=True):
        for name, value in one.items():
            if isinstance(value, float):
                assert value == pytest.approx(other[name])
            else:
                assert value == other[name]


def test_filters(oki: Oki, demo: Demo) -> None:
    def steps(*options: object) -> int:
        rows = json.loads(oki("ask", "settle", "--json", "--db", demo.db, *options).out)["rows"]
        return sum(row["steps"] for row in rows)

    whole = steps()
    first = steps("--message", 2)
    assert 0 < first < whole
    assert steps("--conversation", 1) == steps("--model", "smollm2") == whole
    assert steps("--model", "other") == steps("--until", "2020-01-01") == 0
    assert steps("--since", "2020-01-01", "--until", "2999-12-31") == whole
    assert steps("--role", "user", "--text", "FAMOUS") == whole - first
    assert steps("--role", "system") == steps("--text", "no such words") == 0


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("ask", "nothing"), 2, "There is no question nothing"),
        (
            ("ask", "settle", "--by", "moon"),
            2,
            "no view moon: choose one of layer, model, position, class",
        ),
        (("ask", "settle", "2"), 2, "takes no 2"),
        (("ask", "compare", "2"), 2, "compare takes two steps"),
        (("ask", "compare", "2:5", "2"), 2, "compare takes two steps"),
        (("ask", "compare", "a", "b"), 1, "No prompt has replies of both"),
        (("ask", "compare", "2:5", "2:99"), 1, "no step 99"),
        (("ask", "compare", "1", "2"), 1, "Message 1 has no steps to compare"),
        (("sql", "SELECT * FROM steps"), 1, 'Did you mean "step"?'),
        (("ask", "settle", "--since", "yesterday"), 2, "write 2026-01-31"),
        (("sql", "DROP TABLE step"), 1, "one SELECT statement"),
        (("sql", "SELECT * FROM read_text('/etc/passwd')"), 1, "read_text() is not allowed"),
        (("sql", "SELECT wrong FROM step"), 1, "wrong"),
        (("sql",), 2, "The query is missing"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    oki: Oki, demo: Demo, arguments: tuple[str, ...], status: int, said: str
) -> None:
    done = oki(*arguments, "--db", demo.db)
    assert (done.status, done.out) == (status, "")
    assert said in done.err and len(done.err.splitlines()) == 1


def test_tables_are_listed(oki: Oki) -> None:
    done = oki("sql", "--tables")
    for table in TABLES:
        assert re.search(rf"^{table.name}: ", done.out, re.MULTILINE)
        assert all(f"  {column.name} " in done.out for column in table.columns)
    assert list(json.loads(oki("sql", "--tables", "--json").out)) == [t.name for t in TABLES]


def test_sql_in_every_format(oki: Oki, demo: Demo, tmp_path: Path) -> None:
    query = "SELECT token, prob, NULL AS nothing FROM step WHERE message_id = 2 ORDER BY step_index"
    rows = json.loads(oki("sql", query, "-f", "json", "--db", demo.db).out)
    assert rows[5]["token"] == " Paris" and rows[5]["nothing"] is None
    table = oki("sql", query, "--db", demo.db)
    assert "NULL" in table.out and f"{rows[5]['prob']:.6g}" in table.out
    found = csv_rows(oki("sql", query, "-f", "csv", "--db", demo.db))
    assert [float(row["prob"]) for row in found] == [row["prob"] for row in rows]
    for format in ("parquet", "csv", "json"):
        file = tmp_path / f"out.{format}"
        done = oki("sql", query, "-f", format, "-o", file, "--db", demo.db)
        assert (done.status, done.out) == (0, "") and file.exists()
    assert pq.read_table(tmp_path / "out.parquet")["prob"].to_pylist() == [r["prob"] for r in rows]
    assert json.loads((tmp_path / "out.json").read_text()) == rows


def test_a_csv_moves_no_terminal_and_computes_nothing(demo: Demo) -> None:
    query = "SELECT chr(27) || '[31m' AS x, '=1+1' AS y"
    asked = command("sql", query, "-f", "csv", "--db", demo.db)
    piped = subprocess.run(asked, capture_output=True, check=True, cwd=ROOT).stdout
    assert piped == b"x,y\n\x1b[31m,'=1+1\n"
    ours, theirs = os.openpty()
    try:
        subprocess.run(asked, stdout=theirs, stderr=subprocess.DEVNULL, check=True, cwd=ROOT)
        # The kernel passes on what was written piece by piece, also after the command has ended.
        expected = "x,y\r\n␛[31m,'=1+1\r\n".encode()
        shown = b""
        while len(shown) < len(expected):
            shown += os.read(ours, 1000)
    finally:
        os.close(ours)
        os.close(theirs)
    assert shown == expected


def test_a_pipe_that_breaks_within_a_command_is_no_empty_answer(
    oki: Oki, demo: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only when the reader of the output has gone does a command end as if all were well."""

    def broken(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(QuerySession, "ask", broken)
    done = oki("ask", "settle", "-f", "csv", "--db", demo.db)
    assert (done.status, done.out) == (1, "")
    assert "BrokenPipeError" in done.err


def test_too_many_rows_are_told(oki: Oki, demo: Demo) -> None:
    done = oki("sql", "SELECT layer FROM lens_layer", "--limit", 3, "--json", "--db", demo.db)
    assert len(json.loads(done.out)) == 3 and "more than 3 rows" in done.err


def test_columns_of_one_name_are_all_there(oki: Oki, demo: Demo, tmp_path: Path) -> None:
    query = "SELECT s.id, m.id, now() AS at FROM step s JOIN message m ON m.id = message_id LIMIT 1"
    (row,) = json.loads(oki("sql", query, "--json", "--db", demo.db).out)
    assert list(row) == ["id", "id_2", "at"] and row["at"].endswith("+00:00")
    assert list(csv_rows(oki("sql", query, "-f", "csv", "--db", demo.db))[0]) == list(row)
    assert oki("sql", query, "--db", demo.db).out.split()[:3] == ["id", "id_2", "at"]
    file = tmp_path / "answer.parquet"
    assert oki("sql", query, "-f", "parquet", "-o", file, "--db", demo.db).status == 0
    assert pq.read_table(file)["id_2"].to_pylist() == [row["id_2"]]


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (("SELECT range(200000) FROM range(1000)",), 1, "more than 512 MB of memory"),
        (("SELECT 1", "--memory", "1MB"), 2, "Give 200MB or more"),
        (("SELECT sleep_ms(60000)", "--timeout", "0.5"), 1, "took longer than 0.5 s"),
        (("SELECT '" + "x" * 100_000 + "' AS \ud800",), 2, "not UTF-8"),
    ],
)
def test_limits_are_told_in_one_line(
    oki: Oki, demo: Demo, options: tuple[str, ...], status: int, said: str
) -> None:
    done = oki("sql", *options, "--db", demo.db)
    assert (done.status, done.out) == (status, "")
    assert said in done.err and len(done.err.splitlines()) == 1


def test_rebuild(oki: Oki, demo: Demo) -> None:
    done = oki("sql", "--rebuild", "SELECT count(*) AS n FROM message", "--json", "--db", demo.db)
    assert json.loads(done.out) == [{"n": 4}]


def test_other_commands_start_without_duckdb() -> None:
    code = (
        "import sys\nfrom oki_trace.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'duckdb', 'pyarrow', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
